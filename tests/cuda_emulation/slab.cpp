// csrc/cuda/slab.cuh on the CPU.

#include "slab.cuh"

#include "entry.h"

namespace cuda = tca_fast::cuda;

#define SLAB(name, T)                                                                         \
  ENTRY const char* name(                                                                     \
      const int64_t* row_ptr, const int32_t* index, const T* coefficient,                     \
      const int64_t* order, const T* gain, const T* dense, const T* base, const T* bias,      \
      T* out, int64_t num_rows, int64_t N, int64_t D, int64_t capacity, int64_t shared_bytes, \
      int64_t poison) {                                                                       \
    return reported([=] {                                                                     \
      const cuda::SlabSum<T, T> sum{row_ptr, index, coefficient, order,    gain, dense, base, \
                                    bias,    out,   num_rows,    N,        D,    capacity};   \
      if (poison) {                                                                           \
        cuda::slab_sum<T, T, true>(sum, shared_bytes, nullptr);                               \
      } else {                                                                                \
        cuda::slab_sum<T, T, false>(sum, shared_bytes, nullptr);                              \
      }                                                                                       \
    });                                                                                       \
  }
SLAB(slab_bfloat16, c10::BFloat16)
#ifndef ONLY_BFLOAT16  // compiles in a third of the time
SLAB(slab_float16, c10::Half)
SLAB(slab_float32, float)
#endif

// Every row of N is in one slab, and two slabs fit.
ENTRY const char* check_slab_rows(int64_t cases) {
  return reported([=] {
    uint64_t state = 1;
    for (int64_t i = 0; i < cases; ++i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      const int64_t N = 1 + (state >> 33) % 70000, bytes = 128 + (state >> 20) % (227 << 10);
      const int64_t rows = cuda::rows_of_slab(N, bytes), slabs = (N + rows - 1) / rows;
      const int64_t fewest = (N + bytes / 128 - 1) / (bytes / 128);
      if (rows < 1 || 2 * 64 * rows > bytes || slabs > fewest) {
        throw std::runtime_error(
            "rows_of_slab: N " + std::to_string(N) + ", bytes " + std::to_string(bytes));
      }
    }
  });
}

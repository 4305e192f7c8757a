// csrc/cuda/screening.cuh on the CPU.

#include "screening.cuh"

#include "entry.h"

namespace cuda = tca_fast::cuda;

#define SCREENING(name, T)                                                                     \
  ENTRY const char* round_##name(const T* W, int8_t* q, float* rows, int64_t F, int64_t D) {   \
    return reported([=] {                                                                      \
      cuda::round_weights<T>(                                                                  \
          W, q, reinterpret_cast<cuda::Rounded*>(rows), static_cast<int>(F),                   \
          static_cast<int>(D), nullptr);                                                       \
    });                                                                                        \
  }                                                                                            \
  ENTRY const char* screened_##name(                                                           \
      const T* x, const T* W_enc, const T* b_enc, const T* W_dec, const T* base,               \
      const T* b_dec, const T* gain, const int8_t* q, const float* rows, T* out,               \
      T* activation, uint32_t* bits, int64_t num_tokens, int64_t F, int64_t D) {               \
    return reported([=] {                                                                      \
      cuda::screened_generation_step<T>(                                                       \
          {{x, W_enc, b_enc, W_dec, base, b_dec, gain, out, activation, bits,                  \
            static_cast<int>(num_tokens), static_cast<int>(F), static_cast<int>(D)},           \
           q,                                                                                  \
           reinterpret_cast<const cuda::Rounded*>(rows)},                                      \
          nullptr);                                                                            \
    });                                                                                        \
  }                                                                                            \
  ENTRY const char* plain_##name(                                                              \
      const T* x, const T* W_enc, const T* b_enc, const T* W_dec, const T* base,               \
      const T* b_dec, const T* gain, T* out, T* activation, uint32_t* bits,                    \
      int64_t num_tokens, int64_t F, int64_t D) {                                              \
    return reported([=] {                                                                      \
      cuda::generation_step<T>(                                                                \
          {x, W_enc, b_enc, W_dec, base, b_dec, gain, out, activation, bits,                   \
           static_cast<int>(num_tokens), static_cast<int>(F), static_cast<int>(D)},            \
          nullptr);                                                                            \
    });                                                                                        \
  }
SCREENING(bfloat16, c10::BFloat16)
#ifndef ONLY_BFLOAT16  // compiles in half of the time
SCREENING(float32, float)
#endif

// Halves of every level, and products of four by shifting.
ENTRY const char* check_halves() {
  return reported([] {
    for (int level = -32639; level <= 32639; ++level) {
      const int high = cuda::high_half(level), low = cuda::low_half(level);
      if (256 * high + low != level || high < -128 || high > 127 || low < -128 || low > 127) {
        throw std::runtime_error("level " + std::to_string(level));
      }
    }
  });
}

// Weighted sums of rows of a dense operand that passes through shared memory in slabs.
//
//   out[r] = base[r] + bias + sum over the entries e of r of gain[i] coefficient[e] dense[i]
//
// with i = index[e] ascending within r: what `gather_rows` computes, for 12 to 130 entries a row,
// where reading a row of `dense` from L2 for every entry takes longer than a dense product. It serves
// decode (rows are tokens, `dense` is W_dec), the encoder's gradient to its input (W_enc), and the
// sums of dW_dec and dW_enc by feature (rows are features, `dense` is dy or x, entries in the order
// by feature). Not the gradient of the activations: a dot product over all columns would need every
// slab of columns at once.
//
// Shapes: R rows, N rows of the dense operand, D columns, C capacity. A block keeps the sums of 1024
// rows and 64 bytes of columns in registers, eight rows for each group of four threads. N passes by
// in slabs of as many rows of 64 bytes as half of the shared memory holds, while the other half is
// being filled. A group goes on in its rows' entries until they leave the slab. Every sum is a chain
// of float additions in the order of the entries, rounded once: the same bits in every run, and for
// every size of the slab.
//
// At T = F = 8192, D = 3584, bfloat16: 112 slices of 32 columns, 8 blocks of rows, 5 slabs of 1639.
// Bytes from L2: 8 F D 2 = 470 MB of slabs and 112 * 6 a pair. From shared memory: D 2 a pair; each
// quarter of a warp reads two rows of 64 bytes, which meet in the same half of the banks every second
// time, so at 2/3 of 29.6 TB/s. Instructions: 23 for eight pairs and 32 columns; the eight groups of a
// warp wait for the longest, which is 1.4 times the mean at 13 entries.
// Predicted on an H100 (docs/kernels.md), not measured:
//   L0     slab       gather (L2 at 60 %)    dense product and ReLU
//   20     0.22 ms    0.36 ms                0.75 ms
//   64     0.35 ms    1.14 ms                0.75 ms
//   128    0.60 ms    2.28 ms                0.75 ms
// A row with many more entries than others holds up its block: one with all 8192 by about 0.2 ms.
#pragma once

#include "index_arithmetic.h"
#include "numbers.h"

#ifdef __CUDACC__
#include <cuda_pipeline_primitives.h>
#endif

namespace tca_fast::cuda {

constexpr int kSlabLanes = 4;  // of a group; a vector of 16 bytes each
constexpr int kSlabRowBytes = kSlabLanes * 16;
constexpr int kSlabThreads = 512, kSlabGroups = kSlabThreads / kSlabLanes;
constexpr int kRowsOfGroup = 8;
constexpr int kRowsOfBlock = kSlabGroups * kRowsOfGroup;
constexpr int kNoIndex = 0x7FFFFFFF;

// What is added up. `order`, `gain`, `base` and `bias` may be null.
template <typename T, typename C>
struct SlabSum {
  const int64_t* row_ptr;  // [R + 1]
  const int32_t* index;    // [C], or by `order`
  const C* coefficient;    // [C], or by `order`
  const int64_t* order;    // [C], where the entries of a row are
  const T* gain;           // [N]
  const T* dense;          // [N, D]
  const T* base;           // [R, D]
  const T* bias;           // [D]
  T* out;                  // [R, D]
  int64_t num_rows, N, D, capacity;
};

// Rows of a slab: equal shares of N, as few as two of them fit into.
__host__ __device__ __forceinline__ int64_t rows_of_slab(int64_t N, int64_t shared_bytes) {
  const int64_t most = shared_bytes / (2 * kSlabRowBytes);
  return ceil_div(N, ceil_div(N, most));
}

// Begins to copy rows first..last of 64 bytes of columns from `column` on.
template <typename T>
__device__ __forceinline__ void begin_slab(
    T* slab, const T* dense, int64_t first, int64_t last, int64_t column, int64_t D) {
  constexpr int V = kVector<T>;
  const int chunks = static_cast<int>(last - first) * kSlabLanes;
  for (int chunk = threadIdx.x; chunk < chunks; chunk += kSlabThreads) {
    const int64_t d = column + chunk % kSlabLanes * V;
    if (d < D) {
      __pipeline_memcpy_async(
          slab + int64_t{chunk} * V, dense + (first + chunk / kSlabLanes) * D + d, 16);
    }
  }
  __pipeline_commit();
}

// When more entries exist than fit, nothing is written, or NaN with POISON. An index outside of
// 0..N-1, and one that is smaller than the one before by a slab, gives NaN and is not read.
template <typename T, typename C, bool POISON>
__global__ void __launch_bounds__(kSlabThreads, 1) slab_kernel(SlabSum<T, C> sum, int64_t slab_rows) {
  constexpr int V = kVector<T>, kSlabWidth = kSlabLanes * V;
  T* slabs = dynamic_shared<T>();
  const int lane = threadIdx.x % kSlabLanes;
  const uint32_t group_mask = 0xFu << (threadIdx.x % kWarpSize - lane);
  const int64_t column = int64_t{blockIdx.x} * kSlabWidth, d = column + lane * V;
  const int64_t first_row = int64_t{blockIdx.y} * kRowsOfBlock + threadIdx.x / kSlabLanes;
  const bool overflowed = sum.row_ptr[sum.num_rows] > sum.capacity;
  if (overflowed && !POISON) {
    return;
  }
  float total[kRowsOfGroup][V];
  int next[kRowsOfGroup], last[kRowsOfGroup];
#pragma unroll
  for (int j = 0; j < kRowsOfGroup; ++j) {
    const int64_t row = first_row + j * kSlabGroups;
    Range range{0, 0};
    if (row < sum.num_rows && !overflowed) {
      range = entries_of_row(sum.row_ptr, row, sum.capacity);
    }
    next[j] = static_cast<int>(range.first), last[j] = static_cast<int>(range.last);
    for (int i = 0; i < V; ++i) {
      total[j][i] = overflowed ? NAN : 0.0f;
    }
  }

  begin_slab(slabs, sum.dense, 0, sum.N < slab_rows ? sum.N : slab_rows, column, sum.D);
  int half = 0;
  for (int64_t begin = 0; begin < sum.N; begin += slab_rows, half ^= 1) {
    const int64_t end = begin + slab_rows < sum.N ? begin + slab_rows : sum.N;
    const int64_t after = end + slab_rows < sum.N ? end + slab_rows : sum.N;
    begin_slab(
        slabs + (half ^ 1) * slab_rows * kSlabWidth, sum.dense, end, after, column, sum.D);
    __pipeline_wait_prior(1);
    __syncthreads();
    const T* slab = slabs + half * slab_rows * kSlabWidth + lane * V;
#pragma unroll
    for (int j = 0; j < kRowsOfGroup; ++j) {
      bool goes_on = true;
      while (goes_on) {
        // The group's next four entries, one in each lane.
        int own_index = kNoIndex;
        float own_scale = 0;
        if (next[j] + lane < last[j]) {
          const int64_t e = sum.order == nullptr ? next[j] + lane : sum.order[next[j] + lane];
          own_index = sum.index[e];
          own_scale = static_cast<float>(sum.coefficient[e]);
          if (own_index < begin) {
            own_scale = NAN;
            own_index = static_cast<int>(begin);
          } else if (sum.gain != nullptr && own_index < end) {
            own_scale *= static_cast<float>(sum.gain[own_index]);
          }
        }
#pragma unroll
        for (int entry = 0; entry < kSlabLanes; ++entry) {
          const int index = __shfl_sync(group_mask, own_index, entry, kSlabLanes);
          const float scale = __shfl_sync(group_mask, own_scale, entry, kSlabLanes);
          goes_on = goes_on && index < end;
          if (goes_on && d < sum.D) {
            const auto numbers = Numbers<T, V>::load(slab + (index - begin) * kSlabWidth);
            for (int i = 0; i < V; ++i) {
              total[j][i] = fmaf(scale, numbers[i], total[j][i]);
            }
          }
          next[j] += goes_on;
        }
      }
    }
    __syncthreads();
  }
  __pipeline_wait_prior(0);

#pragma unroll
  for (int j = 0; j < kRowsOfGroup; ++j) {
    const int64_t row = first_row + j * kSlabGroups;
    if (row >= sum.num_rows || d >= sum.D) {
      continue;
    }
    if (next[j] < last[j]) {  // an entry beyond the last row of `dense`
      for (int i = 0; i < V; ++i) {
        total[j][i] = NAN;
      }
    }
    const auto add = [&](const T* address) {
      const auto added = Numbers<T, V>::load(address);
      for (int i = 0; i < V; ++i) {
        total[j][i] += added[i];
      }
    };
    if (sum.bias != nullptr) {
      add(sum.bias + d);
    }
    if (sum.base != nullptr) {
      add(sum.base + row * sum.D + d);
    }
    Numbers<T, V>::store(sum.out + row * sum.D + d, total[j]);
  }
}

// `shared_bytes` is what a block may have: 163 KiB on sm_80, 227 KiB on sm_90. Throws where rows of
// D numbers do not fill vectors, or entries cannot be counted by 32 bits.
template <typename T, typename C, bool POISON>
void slab_sum(const SlabSum<T, C>& sum, int64_t shared_bytes, cudaStream_t stream) {
  if (sum.D % kVector<T> != 0) {
    throw std::runtime_error(
        "dense: a width of " + std::to_string(sum.D) + ", expected a multiple of " +
        std::to_string(kVector<T>));
  }
  if (sum.capacity > kNoIndex - kSlabLanes) {
    throw std::runtime_error(
        "index: a capacity of " + std::to_string(sum.capacity) + ", expected less than 2^31 - 4");
  }
  const int64_t rows = sum.N == 0 ? 1 : rows_of_slab(sum.N, shared_bytes);
  launch(
      slab_kernel<T, C, POISON>,
      dim3(
          static_cast<unsigned>(ceil_div(sum.D, kSlabLanes * kVector<T>)),
          static_cast<unsigned>(ceil_div(sum.num_rows, kRowsOfBlock))),
      kSlabThreads, 2 * rows * kSlabRowBytes, stream, sum, rows);
}

}  // namespace tca_fast::cuda

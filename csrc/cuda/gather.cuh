// Weighted sums of weight rows: decode, and the encoder's gradient to its input.
//
//   out[t] = base[t] + bias + sum over the entries e of t of gain[f] coefficient[e] W[f]
//
// Shapes: T tokens, D model width, F features, C capacity. A block takes a token and up to 512
// vectors of its columns; a warp holds the next 32 entries in its lanes and keeps the loads of 8
// rows in flight. Sums are floats in the order of the entries, rounded once.
//
// Bytes: a row of 2 D for each pair, through L2 (W_dec of 59 MB is larger than it), 2 T D for `base`
// and as many for `out`. Predicted at T = F = 8192, D = 3584, bfloat16, H100 (docs/kernels.md):
// 0.07 ms at L0 1.4 (memory), 0.18 ms at L0 10 (L2). Operations: 2 D a pair, nothing beside that.
#pragma once

#include <type_traits>

#include "index_arithmetic.h"
#include "numbers.h"

namespace tca_fast::cuda {

constexpr int kMostRowThreads = 512;
constexpr int kRowsInFlight = 8;

// What is gathered, by token.
template <typename C>
struct Rows {
  const int64_t* row_ptr;    // [T + 1]
  const int32_t* feature;    // [C]
  const C* coefficient;      // [C]
  int64_t num_tokens, capacity;
};

// `gain`, `base` and `bias` may be null. When more features fired than fit, nothing is written, or
// NaN with POISON. A feature outside 0..F-1 gives NaN and is not read.
template <typename T, typename C, int V, bool POISON>
__global__ void __launch_bounds__(kMostRowThreads)
gather_kernel(
    Rows<C> rows, const T* W, const T* gain, const T* base, const T* bias, T* out, int64_t F,
    int64_t D) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t t = blockIdx.x;
  const int64_t d = (int64_t{blockIdx.y} * blockDim.x + threadIdx.x) * V;
  const bool in_row = d < D;
  const T* column = W + (in_row ? d : 0);  // threads beyond the row read along, and write nothing
  const bool overflowed = rows.row_ptr[rows.num_tokens] > rows.capacity;
  if (overflowed && !POISON) {
    return;
  }
  float total[V];
  for (int i = 0; i < V; ++i) {
    total[i] = overflowed ? NAN : 0.0f;
  }
  Range range = entries_of_row(rows.row_ptr, t, rows.capacity);
  if (overflowed) {
    range.last = range.first;
  }
  for (int64_t first = range.first; first < range.last; first += kWarpSize) {
    int f = 0;
    float c = 0;
    if (first + lane < range.last) {
      f = rows.feature[first + lane];
      c = static_cast<float>(rows.coefficient[first + lane]);
      if (f < 0 || f >= F) {
        f = 0;
        c = NAN;
      } else if (gain != nullptr) {
        c *= static_cast<float>(gain[f]);
      }
    }
    const int here = range.last - first < kWarpSize ? static_cast<int>(range.last - first)
                                                    : kWarpSize;
    // Only a batch that is full has no conditions, and so all of its loads on their way at once.
    const auto add_batch = [&](auto is_full, int start) {
      Numbers<T, V> loaded[kRowsInFlight];
      float scale[kRowsInFlight];
#pragma unroll
      for (int row = 0; row < kRowsInFlight; ++row) {
        const int feature = __shfl_sync(kAllLanes, f, (start + row) % kWarpSize);
        scale[row] = __shfl_sync(kAllLanes, c, (start + row) % kWarpSize);
        if (decltype(is_full)::value || start + row < here) {
          loaded[row] = Numbers<T, V>::load(column + int64_t{feature} * D);
        }
      }
#pragma unroll
      for (int row = 0; row < kRowsInFlight; ++row) {
        if (decltype(is_full)::value || start + row < here) {
          for (int i = 0; i < V; ++i) {
            total[i] += scale[row] * loaded[row][i];
          }
        }
      }
    };
    int start = 0;
    for (; start + kRowsInFlight <= here; start += kRowsInFlight) {
      add_batch(std::true_type(), start);
    }
    if (start < here) {
      add_batch(std::false_type(), start);
    }
  }
  if (!in_row) {
    return;
  }
  if (bias != nullptr) {
    const auto added = Numbers<T, V>::load(bias + d);
    for (int i = 0; i < V; ++i) {
      total[i] += added[i];
    }
  }
  if (base != nullptr) {
    const auto added = Numbers<T, V>::load(base + t * D + d);
    for (int i = 0; i < V; ++i) {
      total[i] += added[i];
    }
  }
  Numbers<T, V>::store(out + t * D + d, total);
}

// Whole warps for `width` numbers, V a thread, at most `most` threads.
inline unsigned threads_of_row(int64_t width, int V, int most) {
  const int64_t threads = ceil_div(ceil_div(width, V), kWarpSize) * kWarpSize;
  return static_cast<unsigned>(threads < kWarpSize ? kWarpSize : threads < most ? threads : most);
}

template <typename T, typename C, int V, bool POISON>
void gather_rows(
    Rows<C> rows, const T* W, const T* gain, const T* base, const T* bias, T* out, int64_t F,
    int64_t D, cudaStream_t stream) {
  const unsigned threads = threads_of_row(D, V, kMostRowThreads);
  const dim3 grid(
      static_cast<unsigned>(rows.num_tokens), static_cast<unsigned>(ceil_div(D, threads * V)));
  launch(
      gather_kernel<T, C, V, POISON>, grid, threads, 0, stream, rows, W, gain, base, bias, out, F,
      D);
}

}  // namespace tca_fast::cuda

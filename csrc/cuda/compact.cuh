// From pre-activations to packed active features: which are active, how many, and where they go.
//
// Shapes: T tokens, F features, W = ceil(F / 32) words of 32 features, C capacity. Bit b of word w
// of a token says whether its feature 32 w + b is active: its pre-activation is positive or NaN.
//
//   norms          norm[f] = |W_dec[f]|
//   select         z -> bits, counts, L0, fired and the weighted L1 of every token
//   scan_counts    counts -> row_ptr
//   fill           bits, z -> feature and value in the order (token, feature)
//
// Nothing is sorted and no sum depends on an order: offsets are sums of counts and ranks in words.
//
// Bytes and predicted times at T = F = 8192, D = 3584, bfloat16, H100 (docs/kernels.md):
//   norms    F D 2 = 59 MB                              0.023 ms
//   select   T F 2 = 134 MB read, T F / 8 = 8 MB        0.056 ms; 0.11 ms where it also activates
//   scan     a block, T / 4096 rounds                   0.005 ms, latency alone
//   fill     T F / 8 + 32 bytes a pair                  0.004 ms at L0 10
// Operations: a comparison for each number and two for each active one; memory is what counts.
#pragma once

#include "index_arithmetic.h"
#include "numbers.h"
#include "reduce.h"

namespace tca_fast::cuda {

constexpr int kTokensPerBlock = 8;  // a warp each
constexpr int kLoadsInFlight = 4;
constexpr int kScanThreads = 1024, kScanItems = 4;

// What `select` counts; l1 and norm are null where no L1 is wanted.
struct Statistics {
  int32_t* count;   // [T], active features
  int32_t* l0;      // [T], the same, 0 for masked tokens
  uint8_t* fired;   // [F], starts at 0; 1 for features active in some real token
  float* l1;        // [T], sum of activation times norm, 0 for masked tokens
  const float* norm;  // [F]
};

// A condition that only the device knows: more features fired than fit, row_ptr[T] > C. With a null
// pointer the answer is always yes.
struct Overflow {
  const int64_t* row_ptr;
  int64_t num_tokens, capacity;

  __device__ __forceinline__ bool holds() const {
    return row_ptr == nullptr || row_ptr[num_tokens] > capacity;
  }
};

// What the gradient of the L1 needs; `grad` is null where there is none.
struct L1 {
  const float* grad;           // of the L1 summed over tokens
  const uint8_t* token_mask;   // [T] or null

  __device__ __forceinline__ bool counts(int64_t t) const {
    return token_mask == nullptr || token_mask[t] != 0;
  }
};

// norm[f] = |W[f]|, on overflow; a warp a row.
template <typename T, int V>
__global__ void __launch_bounds__(kTokensPerBlock * kWarpSize)
norm_kernel(const T* W, float* norm, int64_t F, int64_t D, Overflow overflow) {
  const int64_t f = int64_t{blockIdx.x} * kTokensPerBlock + threadIdx.x / kWarpSize;
  if (f >= F || !overflow.holds()) {
    return;
  }
  float squares = 0;
  for (int64_t d = threadIdx.x % kWarpSize * V; d < D; d += kWarpSize * V) {
    const auto w = Numbers<T, V>::load(W + f * D + d);
    for (int i = 0; i < V; ++i) {
      squares += w[i] * w[i];
    }
  }
  squares = warp_sum(squares);
  if (threadIdx.x % kWarpSize == 0) {
    norm[f] = sqrtf(squares);
  }
}

// The word that `32 / V` neighbouring lanes share, from each lane's V flags.
template <int V>
__device__ __forceinline__ uint32_t shared_word(const bool (&flags)[V]) {
  uint32_t word = bits_in_word<V>(flags, threadIdx.x % kWarpSize);
  for (int distance = 1; distance < kWordBits / V; distance *= 2) {
    word |= __shfl_xor_sync(kAllLanes, word, distance);
  }
  return word;
}

// One pass over the pre-activations, a warp a token. With ACTIVATES, z becomes ReLU(z) on the way.
template <typename T, int V, bool ACTIVATES>
__global__ void __launch_bounds__(kTokensPerBlock * kWarpSize)
select_kernel(
    T* z, const uint8_t* token_mask, uint32_t* bits, Statistics statistics, int64_t num_tokens,
    int64_t F) {
  constexpr int kLanesOfWord = kWordBits / V;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t t = int64_t{blockIdx.x} * kTokensPerBlock + threadIdx.x / kWarpSize;
  if (t >= num_tokens) {
    return;
  }
  const bool is_real = token_mask == nullptr || token_mask[t] != 0;
  T* row = z + t * F;
  uint32_t* words = bits + t * ceil_div(F, kWordBits);
  int count = 0;
  float weighted = 0;
  for (int64_t first = lane * V; first - lane * V < F; first += kLoadsInFlight * kWarpSize * V) {
    Numbers<T, V> loaded[kLoadsInFlight];
#pragma unroll
    for (int load = 0; load < kLoadsInFlight; ++load) {
      const int64_t f = first + load * kWarpSize * V;
      loaded[load] = f < F ? Numbers<T, V>::load(row + f) : Numbers<T, V>::zeros();
    }
#pragma unroll
    for (int load = 0; load < kLoadsInFlight; ++load) {
      const int64_t f = first + load * kWarpSize * V;
      bool active[V];
      float activation[V];
      for (int i = 0; i < V; ++i) {
        active[i] = is_active(loaded[load][i]);
        activation[i] = active[i] ? loaded[load][i] : 0.0f;
      }
      const uint32_t own = bits_in_word<V>(active, lane);
      count += popcount(own);
      if (own != 0 && is_real) {  // seldom, in the regime this is for
        for (int i = 0; i < V; ++i) {
          if (active[i]) {
            statistics.fired[f + i] = 1;  // several warps may write it, all the same
            if (statistics.l1 != nullptr) {
              weighted += activation[i] * statistics.norm[f + i];
            }
          }
        }
      }
      if constexpr (ACTIVATES) {
        if (f < F) {
          Numbers<T, V>::store(row + f, activation);
        }
      }
      const uint32_t word = shared_word<V>(active);
      if (lane % kLanesOfWord == 0 && f < F) {
        words[f / kWordBits] = word;
      }
    }
  }
  count = warp_sum(count);
  weighted = warp_sum(weighted);
  if (lane == 0) {
    statistics.count[t] = count;
    statistics.l0[t] = is_real ? count : 0;
    if (statistics.l1 != nullptr) {
      statistics.l1[t] = weighted;
    }
  }
}

// row_ptr[0] = 0, row_ptr[t + 1] = row_ptr[t] + count[t]; one block.
template <int THREADS>
__global__ void __launch_bounds__(THREADS)
scan_kernel(const int32_t* count, int64_t* row_ptr, int64_t num_tokens) {
  int64_t before = 0;
  for (int64_t start = 0; start < num_tokens; start += THREADS * kScanItems) {
    const int64_t first = start + int64_t{threadIdx.x} * kScanItems;
    int64_t own = 0, total;
    for (int64_t t = first; t < first + kScanItems && t < num_tokens; ++t) {
      own += count[t];
    }
    int64_t place = before + block_exclusive_scan(own, total);
    for (int64_t t = first; t < first + kScanItems && t < num_tokens; ++t) {
      row_ptr[t] = place;
      place += count[t];
    }
    before += total;
  }
  if (threadIdx.x == 0) {
    row_ptr[num_tokens] = before;
  }
}

// Feature and value of every set bit, a warp a token; those beyond C are left out.
template <typename T>
__global__ void __launch_bounds__(kTokensPerBlock * kWarpSize)
fill_kernel(
    const T* z, const uint32_t* bits, const int64_t* row_ptr, int32_t* feature, T* value,
    int64_t num_tokens, int64_t F, int64_t capacity) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t t = int64_t{blockIdx.x} * kTokensPerBlock + threadIdx.x / kWarpSize;
  if (t >= num_tokens) {
    return;
  }
  const int64_t num_words = ceil_div(F, kWordBits);
  int64_t start = row_ptr[t];
  for (int64_t first = 0; first < num_words; first += kWarpSize) {
    const int64_t w = first + lane;
    uint32_t word = w < num_words ? bits[t * num_words + w] : 0;
    const int in_word = popcount(word), up_to_here = warp_inclusive_scan(in_word);
    for (int64_t slot = start + up_to_here - in_word; word != 0 && slot < capacity; ++slot) {
      const int64_t f = w * kWordBits + lowest_bit(word);
      feature[slot] = static_cast<int32_t>(f);
      value[slot] = z[t * F + f];
      word = without_lowest_bit(word);
    }
    start += __shfl_sync(kAllLanes, up_to_here, kWarpSize - 1);
  }
}

inline dim3 blocks_of_rows(int64_t rows) {
  return dim3(static_cast<unsigned>(ceil_div(rows, kTokensPerBlock)));
}

template <typename T, int V>
void norms(
    const T* W, float* norm, int64_t F, int64_t D, Overflow overflow, cudaStream_t stream) {
  launch(
      norm_kernel<T, V>, blocks_of_rows(F), kTokensPerBlock * kWarpSize, 0, stream, W, norm, F, D,
      overflow);
}

template <typename T, int V, bool ACTIVATES>
void select(
    T* z, const uint8_t* token_mask, uint32_t* bits, Statistics statistics, int64_t num_tokens,
    int64_t F, cudaStream_t stream) {
  launch(
      select_kernel<T, V, ACTIVATES>, blocks_of_rows(num_tokens), kTokensPerBlock * kWarpSize, 0,
      stream, z, token_mask, bits, statistics, num_tokens, F);
}

inline void scan_counts(
    const int32_t* count, int64_t* row_ptr, int64_t num_tokens, cudaStream_t stream) {
  launch(scan_kernel<kScanThreads>, 1, kScanThreads, 0, stream, count, row_ptr, num_tokens);
}

template <typename T>
void fill(
    const T* z, const uint32_t* bits, const int64_t* row_ptr, int32_t* feature, T* value,
    int64_t num_tokens, int64_t F, int64_t capacity, cudaStream_t stream) {
  launch(
      fill_kernel<T>, blocks_of_rows(num_tokens), kTokensPerBlock * kWarpSize, 0, stream, z, bits,
      row_ptr, feature, value, num_tokens, F, capacity);
}

}  // namespace tca_fast::cuda

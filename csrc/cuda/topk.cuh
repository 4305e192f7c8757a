// TopK: the bit mask and the statistics of the k largest pre-activations of every token.
//
// Shapes: T tokens, F features (at most 65,536), W = ceil(F / 32) words. Active are the k largest of
// the positive ones, NaN the largest of all, ties to the lowest index: `select` of compact.cuh with
// a limit, and its outputs. Packed, in the order (token, feature), they are made by `fill`.
//
// A block takes a row. It holds the row in registers, counts its keys by digit in shared memory
// (radix.h), and knows the k-th largest key after two digits of a 16-bit number, three of a float.
// Keys above it are active; among the keys equal to it, in words of 32 features, a scan over the
// words finds the lowest indices. Sums of integers alone decide, so the order of the threads
// changes nothing. Rows of more than 32,768 features (16,384 of float) do not fit into registers and
// are read again, from L2, for each digit and for the mask; so are rows that do not start on 16 bytes.
//
// Bytes at T = F = 8192, bfloat16: T F 2 = 134 MB read once, T F / 8 = 8 MB written.
// Operations: about 20 a number (two keys, a count for positive ones, a comparison, a flag).
// Predicted (H100, docs/kernels.md): 0.056 ms from the bytes; counting takes about as long as
// reading where half of the numbers are positive, and overlaps with it. Shared memory: 8 KB of counts
// and W / 4 bytes; 2 to 8 blocks of a multiprocessor. Slow, and still right: rows of a few distinct
// positive values, where the threads of a warp count one after another.
#pragma once

#include "compact.cuh"
#include "radix.h"

namespace tca_fast::cuda {

constexpr int kMostTopkFeatures = 1 << 16;
constexpr int kMostTopkWords = kMostTopkFeatures / kWordBits;
// Vectors of a row that a thread keeps. The compiler gives every number a register of its own.
constexpr int kTopkRounds = 4;

// A row of F numbers that the block walks over in rounds of THREADS * V. With ROUNDS, they are kept
// in registers.
template <typename T, int V, int ROUNDS, int THREADS>
struct Row {
  using Items = Numbers<T, V>;
  T* z;
  int F;
  Items kept[ROUNDS ? ROUNDS : 1];

  static __device__ __forceinline__ int first_of(int round) {
    return (round * THREADS + threadIdx.x) * V;
  }

  __device__ __forceinline__ Items read(int round) const {
    return first_of(round) < F ? Items::load(z + first_of(round)) : Items::zeros();
  }

  __device__ __forceinline__ void load() {
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
      kept[round] = read(round);
    }
  }

  // Calls body(round, numbers) in every thread, whether or not the row reaches as far.
  template <typename Body>
  __device__ __forceinline__ void for_each(const Body& body) const {
    if constexpr (ROUNDS > 0) {
#pragma unroll
      for (int round = 0; round < ROUNDS; ++round) {
        if (round * THREADS * V < F) {
          body(round, kept[round]);
        }
      }
    } else {
      for (int round = 0; round * THREADS * V < F; ++round) {
        body(round, read(round));
      }
    }
  }
};

// What the k-th largest key is, and how many keys equal to it are active.
struct Limit {
  uint32_t key;
  int places;
};

// The block's search for the k-th largest key; where fewer are positive, the limit is 0.
template <typename T, int THREADS, typename Row>
__device__ __forceinline__ Limit find_limit(const Row& row, int k, int* counts) {
  SHARED_ARRAY(int, found, 2);
  constexpr int kValues = kDigitValues / THREADS;  // of each thread
  uint32_t prefix = 0;
#pragma unroll
  for (int digit = 0; digit < kDigits<T>; ++digit) {
    for (int value = threadIdx.x; value < kDigitValues; value += THREADS) {
      counts[value] = 0;
    }
    __syncthreads();
    row.for_each([&](int, const auto& z) {
      for (const T& one : z.item) {
        const int value = digit_of<T>(key_of(one), digit, prefix);
        if (value >= 0) {
          atomicAdd(&counts[value], 1);
        }
      }
    });
    __syncthreads();
    // Thread 0 has the largest values.
    const int last = kDigitValues - static_cast<int>(threadIdx.x) * kValues, first = last - kValues;
    int own = 0, total;
    for (int value = first; value < last; ++value) {
      own += counts[value];
    }
    const int before = block_exclusive_scan(own, total);
    if (total <= k && digit == 0) {
      return {0, 0};  // all that are positive
    }
    const Place place = place_of(counts, first, last, before, k);
    if (place.value >= 0) {
      found[0] = place.value;
      found[1] = place.left;
    }
    __syncthreads();
    prefix = prefix << digit_bits<T>(digit) | static_cast<uint32_t>(found[0]);
    k = found[1];
  }
  return {prefix, k};
}

// The bits of the words `above`, and of the lowest bits of `tied` as many as there are places, in
// `above`. Each thread has consecutive words.
template <int THREADS>
__device__ __forceinline__ void take_lowest(uint32_t* above, const uint32_t* tied, int W, int places) {
  const int words = ceil_div(W, THREADS), first = threadIdx.x * words;
  const int last = first + words < W ? first + words : W;
  int own = 0, total;
  for (int w = first; w < last; ++w) {
    own += popcount(tied[w]);
  }
  int left = places - block_exclusive_scan(own, total);
  for (int w = first; w < last && left > 0; ++w) {
    above[w] |= lowest_bits(tied[w], left);
    left -= popcount(tied[w]);
  }
}

// With `activates`, z becomes its activations on the way.
template <typename T, int V, int ROUNDS, int THREADS>
__global__ void __launch_bounds__(THREADS)
topk_kernel(
    T* z, const uint8_t* token_mask, uint32_t* bits, Statistics statistics, int k, int F,
    bool activates) {
  constexpr int kWords = ROUNDS ? THREADS * V * ROUNDS / kWordBits : kMostTopkWords;
  SHARED_ARRAY(int, counts, kDigitValues);
  SHARED_ARRAY(uint32_t, active, kWords);
  SHARED_ARRAY(uint32_t, tied, kWords);
  const int64_t t = blockIdx.x;
  const int lane = threadIdx.x % kWarpSize, W = static_cast<int>(ceil_div(F, kWordBits));
  Row<T, V, ROUNDS, THREADS> row{z + t * F, F, {}};
  row.load();
  const Limit limit = find_limit<T, THREADS>(row, k, counts);

  row.for_each([&](int round, const auto& numbers) {
    bool is_above[V], is_tied[V];
    for (int i = 0; i < V; ++i) {
      const uint32_t key = key_of(numbers.item[i]);
      is_above[i] = key > limit.key;
      is_tied[i] = key == limit.key && key != 0;
    }
    const uint32_t word = shared_word<V>(is_above), tied_word = shared_word<V>(is_tied);
    const int w = row.first_of(round) / kWordBits;
    if (lane % (kWordBits / V) == 0 && w < W) {
      active[w] = word;
      tied[w] = tied_word;
    }
  });
  __syncthreads();
  take_lowest<THREADS>(active, tied, W, limit.places);
  __syncthreads();

  const bool is_real = token_mask == nullptr || token_mask[t] != 0;
  float weighted = 0;
  row.for_each([&](int round, const auto& numbers) {
    const int first = row.first_of(round);
    if (first >= F) {
      return;
    }
    const uint32_t word = active[first / kWordBits] >> first % kWordBits;
    float activation[V];
    for (int i = 0; i < V; ++i) {
      const bool is_active = word >> i & 1;
      activation[i] = is_active ? numbers[i] : 0.0f;
      if (is_active && is_real) {
        statistics.fired[first + i] = 1;  // several blocks may write it, all the same
        if (statistics.l1 != nullptr) {
          weighted += activation[i] * statistics.norm[first + i];
        }
      }
    }
    if (activates) {
      Numbers<T, V>::store(row.z + first, activation);
    }
  });
  int count = 0;
  for (int w = threadIdx.x; w < W; w += THREADS) {
    bits[t * W + w] = active[w];
    count += popcount(active[w]);
  }
  count = block_sum(count);
  weighted = block_sum(weighted);
  if (threadIdx.x == 0) {
    statistics.count[t] = count;
    statistics.l0[t] = is_real ? count : 0;
    if (statistics.l1 != nullptr) {
      statistics.l1[t] = weighted;
    }
  }
}

// As many threads as hold the row in registers; F is at most 65,536.
template <typename T, int V>
void topk(
    T* z, const uint8_t* token_mask, uint32_t* bits, Statistics statistics, int64_t num_tokens,
    int64_t F, int64_t k, bool activates, cudaStream_t stream) {
  const auto run = [&](auto* kernel, int threads) {
    launch(
        kernel, dim3(static_cast<unsigned>(num_tokens)), threads, 0, stream, z, token_mask, bits,
        statistics, k, F, activates);
  };
  if constexpr (V > 1) {
    constexpr int kOfThread = V * kTopkRounds;
    if (F <= 256 * kOfThread) {
      return run(topk_kernel<T, V, kTopkRounds, 256>, 256);
    }
    if (F <= 512 * kOfThread) {
      return run(topk_kernel<T, V, kTopkRounds, 512>, 512);
    }
    if (F <= 1024 * kOfThread) {
      return run(topk_kernel<T, V, kTopkRounds, 1024>, 1024);
    }
  }
  run(topk_kernel<T, V, 0, 1024>, 1024);
}

}  // namespace tca_fast::cuda

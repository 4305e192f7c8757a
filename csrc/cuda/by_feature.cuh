// The packed pairs in the order of their feature, tokens ascending, by popcount prefixes.
//
// Shapes: T tokens, F features, C capacity, G = ceil(T / 256) tiles of tokens. A block takes a tile
// of 256 tokens and 1024 features, and sets one bit in shared memory for every pair between them:
// 8 words a feature. A feature's count in the tile is the sum of their popcounts, and the place of
// a pair within it is the number of bits below its own. So the order needs no sort; the bits are
// set by atomic operations, whose order changes nothing.
//
//   count    pairs -> tile_start[G, F], counts of every tile
//   sum      tile_start becomes the pairs of earlier tiles; column_count[F]
//   scan     column_count -> col_ptr[F + 1] and extra_ptr[F + 1]
//   place    pairs -> entry[C] and token[C] at col_ptr[f] + tile_start[g, f] + rank
//
// Nothing is done where more features fired than fit.
//
// Bytes: the pairs' features, 4 C, once for each of F / 1024 ranges and of two passes; 8 a pair
// written; 16 G F for the tiles. Predicted at T = F = 8192, L0 10, H100 (docs/kernels.md):
// 5 MB + 1 MB + 4 MB, 0.004 ms of memory, 0.02 ms in all by the latency of four launches.
#pragma once

#include "compact.cuh"

namespace tca_fast::cuda {

constexpr int kTileTokens = 256, kTileFeatures = 1024, kTileWords = kTileTokens / kWordBits;
constexpr int kTileThreads = 256;

// The order of the active pairs by feature.
struct ByFeature {
  int64_t* col_ptr;     // [F + 1], where each feature begins
  int64_t* extra_ptr;   // [F + 1], segments beyond the first of the features before
  int32_t* entry;       // [C], the pair
  int32_t* token;       // [C], its token

  // Whether the order is there: not on overflow, nor where rows that a caller made overlap.
  __device__ __forceinline__ bool exists(
      const int64_t* row_ptr, int64_t num_tokens, int64_t F, int64_t capacity) const {
    return row_ptr[num_tokens] <= capacity && col_ptr[F] <= capacity;
  }
};

// Calls body(entry, token, feature) for the tile's pairs whose feature lies in its range.
template <typename Body>
__device__ __forceinline__ void for_pairs_of_tile(
    const int64_t* row_ptr, const int32_t* feature, int64_t num_tokens, int64_t F, int64_t capacity,
    const Body& body) {
  const int64_t first_token = int64_t{blockIdx.x} * kTileTokens;
  const int64_t first_feature = int64_t{blockIdx.y} * kTileFeatures;
  const int64_t end_feature =
      F < first_feature + kTileFeatures ? F : first_feature + kTileFeatures;
  for (int i = threadIdx.x / kWarpSize; i < kTileTokens; i += kTileThreads / kWarpSize) {
    if (first_token + i >= num_tokens) {
      return;
    }
    const Range range = entries_of_row(row_ptr, first_token + i, capacity);
    for (int64_t e = range.first + threadIdx.x % kWarpSize; e < range.last; e += kWarpSize) {
      const int64_t f = feature[e];
      if (f >= first_feature && f < end_feature) {
        body(e, i, static_cast<int>(f - first_feature));
      }
    }
  }
}

// Sets the bits of the tile's pairs: bit t of words[0..7][f], 1024 features apart.
__device__ __forceinline__ void set_bits_of_tile(
    uint32_t* words, const int64_t* row_ptr, const int32_t* feature, int64_t num_tokens, int64_t F,
    int64_t capacity) {
  for (int i = threadIdx.x; i < kTileWords * kTileFeatures; i += kTileThreads) {
    words[i] = 0;
  }
  __syncthreads();
  for_pairs_of_tile(row_ptr, feature, num_tokens, F, capacity, [=](int64_t, int t, int f) {
    atomicOr(words + t / kWordBits * kTileFeatures + f, 1u << t % kWordBits);
  });
  __syncthreads();
}

template <int THREADS>
__global__ void __launch_bounds__(THREADS)
count_kernel(
    const int64_t* row_ptr, const int32_t* feature, int32_t* tile_start, int64_t num_tokens,
    int64_t F, int64_t capacity) {
  SHARED_ARRAY(uint32_t, words, kTileWords * kTileFeatures);
  if (row_ptr[num_tokens] > capacity) {
    return;
  }
  set_bits_of_tile(words, row_ptr, feature, num_tokens, F, capacity);
  const int64_t first = int64_t{blockIdx.y} * kTileFeatures;
  for (int i = threadIdx.x; i < kTileFeatures && first + i < F; i += THREADS) {
    int count = 0;
    for (int word = 0; word < kTileWords; ++word) {
      count += popcount(words[word * kTileFeatures + i]);
    }
    tile_start[int64_t{blockIdx.x} * F + first + i] = count;
  }
}

// Counts of the tiles become the counts before each tile; a thread a feature.
template <int THREADS>
__global__ void __launch_bounds__(THREADS)
sum_tiles_kernel(
    const int64_t* row_ptr, int32_t* tile_start, int32_t* column_count, int64_t num_tokens,
    int64_t num_tiles, int64_t F, int64_t capacity) {
  const int64_t f = int64_t{blockIdx.x} * THREADS + threadIdx.x;
  if (f >= F || row_ptr[num_tokens] > capacity) {
    return;
  }
  int32_t before = 0;
#pragma unroll 8
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    const int32_t count = tile_start[tile * F + f];
    tile_start[tile * F + f] = before;
    before += count;
  }
  column_count[f] = before;
}

// col_ptr and extra_ptr from the counts of the features; one block.
template <int THREADS>
__global__ void __launch_bounds__(THREADS)
scan_features_kernel(
    const int64_t* row_ptr, const int32_t* column_count, int64_t* col_ptr, int64_t* extra_ptr,
    int64_t num_tokens, int64_t F, int64_t capacity, int64_t per_segment) {
  if (row_ptr[num_tokens] > capacity) {
    return;
  }
  int64_t pairs_before = 0, extras_before = 0;
  for (int64_t start = 0; start < F; start += THREADS) {
    const int64_t f = start + threadIdx.x;
    const int64_t count = f < F ? column_count[f] : 0;
    int64_t pairs, extras;
    const int64_t pair = block_exclusive_scan(count, pairs);
    const int64_t extra = block_exclusive_scan(extra_segments(count, per_segment), extras);
    if (f < F) {
      col_ptr[f] = pairs_before + pair;
      extra_ptr[f] = extras_before + extra;
    }
    pairs_before += pairs;
    extras_before += extras;
  }
  if (threadIdx.x == 0) {
    col_ptr[F] = pairs_before;
    extra_ptr[F] = extras_before;
  }
}

template <int THREADS>
__global__ void __launch_bounds__(THREADS)
place_kernel(
    const int64_t* row_ptr, const int32_t* feature, const int32_t* tile_start, ByFeature out,
    int64_t num_tokens, int64_t F, int64_t capacity) {
  SHARED_ARRAY(uint32_t, words, kTileWords * kTileFeatures);
  if (row_ptr[num_tokens] > capacity) {
    return;
  }
  set_bits_of_tile(words, row_ptr, feature, num_tokens, F, capacity);
  const int64_t tile = blockIdx.x, first_feature = int64_t{blockIdx.y} * kTileFeatures;
  const uint32_t* bits = words;
  for_pairs_of_tile(row_ptr, feature, num_tokens, F, capacity, [=](int64_t e, int t, int f) {
    const int64_t column = first_feature + f;
    const int64_t place = out.col_ptr[column] + tile_start[tile * F + column] +
                          rank_in_words(bits + f, kTileFeatures, t);
    if (place < capacity) {  // always, unless the rows that a caller made overlap
      out.entry[place] = static_cast<int32_t>(e);
      out.token[place] = static_cast<int32_t>(tile * kTileTokens + t);
    }
  });
}

inline int64_t num_tiles(int64_t num_tokens) { return ceil_div(num_tokens, kTileTokens); }

// Fills `out`; `tile_start` [G, F] and `column_count` [F] are room to work in.
inline void order_by_feature(
    const int64_t* row_ptr, const int32_t* feature, ByFeature out, int32_t* tile_start,
    int32_t* column_count, int64_t num_tokens, int64_t F, int64_t capacity, int64_t per_segment,
    cudaStream_t stream) {
  const dim3 tiles(
      static_cast<unsigned>(num_tiles(num_tokens)),
      static_cast<unsigned>(ceil_div(F, kTileFeatures)));
  launch(
      count_kernel<kTileThreads>, tiles, kTileThreads, 0, stream, row_ptr, feature, tile_start, num_tokens, F,
      capacity);
  launch(
      sum_tiles_kernel<kTileThreads>, static_cast<unsigned>(ceil_div(F, kTileThreads)), kTileThreads, 0, stream,
      row_ptr, tile_start, column_count, num_tokens, num_tiles(num_tokens), F, capacity);
  launch(
      scan_features_kernel<kScanThreads>, 1, kScanThreads, 0, stream, row_ptr, column_count, out.col_ptr,
      out.extra_ptr, num_tokens, F, capacity, per_segment);
  launch(
      place_kernel<kTileThreads>, tiles, kTileThreads, 0, stream, row_ptr, feature, tile_start, out, num_tokens,
      F, capacity);
}

}  // namespace tca_fast::cuda

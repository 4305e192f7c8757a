// Where things are: ranks in bit masks, offsets, and how features are split into segments.
//
// Plain functions of integers, for kernels and for the host, where tests hold each one to brute
// force. What a GPU still has to show of them is memory access and synchronisation.
#pragma once

#include "launch.h"

namespace tca_fast::cuda {

constexpr int kWordBits = 32;

__host__ __device__ __forceinline__ constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

__host__ __device__ __forceinline__ int popcount(uint32_t word) {
#ifdef __CUDA_ARCH__
  return __popc(word);
#else
  word -= word >> 1 & 0x55555555u;
  word = (word & 0x33333333u) + (word >> 2 & 0x33333333u);
  word = (word + (word >> 4)) & 0x0F0F0F0Fu;
  return static_cast<int>(word * 0x01010101u >> 24);
#endif
}

// The bits below `bit`, which is 0..31.
__host__ __device__ __forceinline__ uint32_t bits_below(int bit) { return (1u << bit) - 1; }

// How many set bits of a word are below `bit`.
__host__ __device__ __forceinline__ int rank_in_word(uint32_t word, int bit) {
  return popcount(word & bits_below(bit));
}

// The index of the lowest set bit of a word that has one.
__host__ __device__ __forceinline__ int lowest_bit(uint32_t word) {
  return popcount((word & (0u - word)) - 1);
}

__host__ __device__ __forceinline__ uint32_t without_lowest_bit(uint32_t word) {
  return word & (word - 1);
}

// How many set bits are below bit `position` of consecutive words that lie `stride` apart.
__host__ __device__ __forceinline__ int rank_in_words(
    const uint32_t* words, int64_t stride, int position) {
  const int word = position / kWordBits;
  int rank = rank_in_word(words[word * stride], position % kWordBits);
  for (int before = 0; before < word; ++before) {
    rank += popcount(words[before * stride]);
  }
  return rank;
}

// Half of a range of consecutive numbers.
struct Range {
  int64_t first, last;  // `last` is not in it
};

// The entries of row `row` that exist: within 0..capacity whatever `row_ptr` says.
__host__ __device__ __forceinline__ Range entries_of_row(
    const int64_t* row_ptr, int64_t row, int64_t capacity) {
  const int64_t first = row_ptr[row] < 0 ? 0 : row_ptr[row];
  const int64_t last = row_ptr[row + 1] < capacity ? row_ptr[row + 1] : capacity;
  return {first, last < first ? first : last};
}

// The number i for which ptr[i] <= place < ptr[i + 1]; `ptr` [n + 1] starts at 0 and does not fall,
// and `place` is below ptr[n].
__host__ __device__ __forceinline__ int64_t owner(const int64_t* ptr, int64_t n, int64_t place) {
  int64_t low = 0, high = n;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (ptr[middle + 1] <= place) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Segments beyond the first of a feature that is active for `count` tokens.
__host__ __device__ __forceinline__ int64_t extra_segments(int64_t count, int64_t per_segment) {
  return count > per_segment ? (count - 1) / per_segment : 0;
}

// The most segments beyond the first that `capacity` pairs can make, over all features.
__host__ __device__ __forceinline__ int64_t most_extra_segments(
    int64_t capacity, int64_t per_segment) {
  return capacity / per_segment;
}

// How many pairs a segment takes: `least`, or as many as keep the segments beyond the first, which
// need memory for their sums, to `most`.
__host__ __device__ __forceinline__ int64_t segment_length(
    int64_t capacity, int64_t least, int64_t most) {
  const int64_t needed = ceil_div(capacity, most);
  return needed < least ? least : needed;
}

// One piece of work on a feature: the pairs first..last of the order by feature.
struct Segment {
  int64_t feature, first, last;
  int64_t part;  // row of its partial sums; -1 where the feature has one segment alone
};

// The segment that program `program` works on. Programs 0..F-1 take the first segment of every
// feature, program F + i the i-th of the others; a program beyond those has feature F.
// Partial sums are numbered so that those of the segments beyond the first come one behind the
// other, in order, and those of first segments, at most as many, behind `most_extra` of them.
__host__ __device__ __forceinline__ Segment segment_of(
    int64_t program, const int64_t* col_ptr, const int64_t* extra_ptr, int64_t num_features,
    int64_t per_segment, int64_t most_extra) {
  const int64_t extra = program - num_features;
  if (extra >= extra_ptr[num_features]) {
    return {num_features, 0, 0, -1};
  }
  const int64_t feature = extra < 0 ? program : owner(extra_ptr, num_features, extra);
  const int64_t number = extra < 0 ? 0 : extra - extra_ptr[feature] + 1;
  const int64_t first = col_ptr[feature] + number * per_segment, end = col_ptr[feature + 1];
  const int64_t last = end < first + per_segment ? end : first + per_segment;
  const bool is_alone = extra_ptr[feature] == extra_ptr[feature + 1];
  const int64_t part = is_alone ? -1 : number > 0 ? extra : most_extra + extra_ptr[feature];
  return {feature, first, last, part};
}

// The partial sums of a feature with several segments, in order: this one, then the others.
__host__ __device__ __forceinline__ int64_t part_of(
    int64_t feature, int64_t number, const int64_t* extra_ptr, int64_t most_extra) {
  return number == 0 ? most_extra + extra_ptr[feature] : extra_ptr[feature] + number - 1;
}

// The bits of a thread's V flags at their place in the word of 32 features that `32 / V`
// neighbouring lanes share.
template <int V>
__host__ __device__ __forceinline__ uint32_t bits_in_word(const bool (&flags)[V], int lane) {
  uint32_t bits = 0;
  for (int i = 0; i < V; ++i) {
    bits |= static_cast<uint32_t>(flags[i]) << i;
  }
  return bits << lane % (kWordBits / V) * V;
}

}  // namespace tca_fast::cuda

// Exact selection of the k largest by radix: the arithmetic, for kernels and for the host.
//
// A pre-activation becomes a key that orders as the selection does: the bits of a positive number
// order as the number, NaN is above infinity, and what cannot survive the ReLU is 0. A key is cut
// into digits from the top. Counting the keys by one digit says which of its values the k-th largest
// key has; only keys that begin so are counted by the next one. The first digit of 11 bits spreads
// numbers over the mantissa too, so that few threads meet on one counter.
#pragma once

#include <cstring>

#include "index_arithmetic.h"
#include "numbers.h"

namespace tca_fast::cuda {

template <typename T>
using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;

template <typename T>
constexpr uint32_t kInfinity = 0x7F800000;
template <>
inline constexpr uint32_t kInfinity<c10::BFloat16> = 0x7F80;
template <>
inline constexpr uint32_t kInfinity<c10::Half> = 0x7C00;

template <typename T>
constexpr int kKeyBits = 8 * sizeof(T) - 1;

// 0 for what is not active; otherwise larger for the larger number, and the largest for every NaN.
template <typename T>
__host__ __device__ __forceinline__ uint32_t key_of(T z) {
  constexpr uint32_t kLargest = (1u << kKeyBits<T>) - 1;
  Bits<T> bits;
  std::memcpy(&bits, &z, sizeof bits);
  const uint32_t magnitude = bits & kLargest;
  if (magnitude > kInfinity<T>) {
    return kLargest;
  }
  return bits > kLargest ? 0 : magnitude;
}

constexpr int kMostDigitBits = 11, kDigitValues = 1 << kMostDigitBits;

// Digits of 11 bits, then 10 at most: 11 + 4, or 11 + 10 + 10.
template <typename T>
constexpr int kDigits = sizeof(T) == 2 ? 2 : 3;

// Where digit number `digit` begins, from the lowest bit.
template <typename T>
__host__ __device__ constexpr int digit_shift(int digit) {
  const int shift = kKeyBits<T> - kMostDigitBits - 10 * digit;
  return shift < 0 ? 0 : shift;
}

template <typename T>
__host__ __device__ constexpr int digit_bits(int digit) {
  return digit == 0 ? kMostDigitBits : digit_shift<T>(digit - 1) - digit_shift<T>(digit);
}

// The digit of a key that begins with `prefix`, or -1. Keys of 0 have none: they are not active.
template <typename T>
__host__ __device__ __forceinline__ int digit_of(uint32_t key, int digit, uint32_t prefix) {
  const int shift = digit_shift<T>(digit), bits = digit_bits<T>(digit);
  if (key == 0 || key >> (shift + bits) != prefix) {
    return -1;
  }
  return static_cast<int>(key >> shift & ((1u << bits) - 1));
}

// A value of a digit, and how many of the k largest are left for the keys that have it.
struct Place {
  int value, left;
};

// Looks for the k-th largest among the keys counted by digit value last - 1, last - 2, .., first,
// when `before` keys have larger values; value -1 where it is not among them.
__host__ __device__ __forceinline__ Place place_of(
    const int* counts, int first, int last, int before, int k) {
  for (int value = last - 1; value >= first; --value) {
    if (before < k && k <= before + counts[value]) {
      return {value, k - before};
    }
    before += counts[value];
  }
  return {-1, 0};
}

// The lowest `count` set bits of a word, or all of them.
__host__ __device__ __forceinline__ uint32_t lowest_bits(uint32_t word, int count) {
  if (count >= popcount(word)) {
    return word;
  }
  uint32_t rest = word;
  for (int i = 0; i < count; ++i) {
    rest = without_lowest_bit(rest);
  }
  return word ^ rest;
}

}  // namespace tca_fast::cuda

// csrc/cuda/topk.cuh on the CPU, and the arithmetic of radix.h against sorting.

#include "topk.cuh"

#include <algorithm>
#include <numeric>
#include <random>

#include "entry.h"

namespace cuda = tca_fast::cuda;

namespace {

using Random = std::mt19937_64;

template <typename T>
T from_bits(uint32_t bits) {
  T z;
  std::memcpy(&z, &bits, sizeof z);
  return z;
}

// Any bits at all, a few distinct numbers, numbers around zero, or what is not finite.
template <typename T>
T random_number(Random& random, int kind) {
  const uint32_t bits = static_cast<uint32_t>(random());
  const uint32_t special[] = {0, 1u << cuda::kKeyBits<T>, cuda::kInfinity<T>,
                              cuda::kInfinity<T> | 1u << cuda::kKeyBits<T>, cuda::kInfinity<T> + 1,
                              (1u << cuda::kKeyBits<T>) - 1, ~0u, 1, 2};
  switch (kind) {
    case 0:
      return from_bits<T>(bits);
    case 1:
      return T(static_cast<float>(static_cast<int>(bits % 7) - 3));
    case 2:
      return T(static_cast<float>(static_cast<int>(bits % 2001) - 1000) / 512);
    default:
      return from_bits<T>(special[bits % 9]);
  }
}

// The k largest as the reference takes them: a stable sort by value, NaN first, then the ReLU.
template <typename T>
std::vector<bool> by_sorting(const std::vector<T>& z, int k) {
  std::vector<int> order(z.size());
  for (size_t i = 0; i < z.size(); ++i) {
    order[i] = static_cast<int>(i);
  }
  const auto value = [&](int i) { return static_cast<float>(z[i]); };
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    const bool a_nan = std::isnan(value(a)), b_nan = std::isnan(value(b));
    return a_nan != b_nan ? a_nan : value(a) > value(b);
  });
  std::vector<bool> kept(z.size(), false);
  for (int i = 0; i < k; ++i) {
    kept[order[i]] = std::isnan(value(order[i])) || value(order[i]) > 0;
  }
  return kept;
}

template <typename T>
void check_row(Random& random) {
  const int F = 1 + random() % 70, k = random() % 8 ? 1 + random() % F : F;
  const int kind = random() % 5;
  std::vector<T> z(F);
  for (T& one : z) {
    one = random_number<T>(random, kind < 4 ? kind : random() % 4);
  }
  // The search as the threads of find_limit share it.
  const int threads = random() % 2 ? 256 : 1024, values = cuda::kDigitValues / threads;
  uint32_t prefix = 0;
  int left = k;
  for (int digit = 0; digit < cuda::kDigits<T> && left > 0; ++digit) {
    std::vector<int> counts(cuda::kDigitValues, 0);
    int total = 0;
    for (const T& one : z) {
      const int value = cuda::digit_of<T>(cuda::key_of(one), digit, prefix);
      if (value >= 0) {
        ++counts[value], ++total;
      }
    }
    if (digit == 0 && total <= k) {
      left = 0;
      break;
    }
    cuda::Place found{-1, 0};
    int before = 0;
    for (int thread = 0; thread < threads; ++thread) {
      const int last = cuda::kDigitValues - thread * values;
      const cuda::Place place =
          cuda::place_of(counts.data(), last - values, last, before, left);
      if (place.value >= 0) {
        if (found.value >= 0) {
          throw std::runtime_error("two threads find the k-th largest");
        }
        found = place;
      }
      before += std::accumulate(counts.begin() + last - values, counts.begin() + last, 0);
    }
    if (found.value < 0) {
      throw std::runtime_error("no thread finds the k-th largest");
    }
    prefix = prefix << cuda::digit_bits<T>(digit) | static_cast<uint32_t>(found.value);
    left = found.left;
  }
  std::vector<bool> active(F, false);
  for (int start = 0; start < F; start += 32) {
    uint32_t tied = 0;
    for (int f = start; f < F && f < start + 32; ++f) {
      const uint32_t key = cuda::key_of(z[f]);
      active[f] = key > prefix;
      tied |= static_cast<uint32_t>(key == prefix && key != 0) << (f - start);
    }
    const uint32_t kept = left > 0 ? cuda::lowest_bits(tied, left) : 0;
    left -= cuda::popcount(tied);
    for (int f = start; f < F && f < start + 32; ++f) {
      active[f] = active[f] || (kept >> (f - start) & 1);
    }
  }
  if (active != by_sorting(z, k)) {
    throw std::runtime_error("F " + std::to_string(F) + ", k " + std::to_string(k));
  }
}

template <typename T>
const char* run_any(
    T* z, const uint8_t* token_mask, uint32_t* bits, cuda::Statistics statistics,
    int64_t num_tokens, int64_t F, int64_t k, bool activates) {
  return reported([=] {
    if (F % cuda::kVector<T> == 0) {
      cuda::topk<T, cuda::kVector<T>>(
          z, token_mask, bits, statistics, num_tokens, F, k, activates, nullptr);
    } else {
      cuda::topk<T, 1>(z, token_mask, bits, statistics, num_tokens, F, k, activates, nullptr);
    }
  });
}

}  // namespace

ENTRY const char* check_radix(int64_t seed, int64_t cases) {
  return reported([=] {
    Random random(seed);
    for (int64_t i = 0; i < cases; ++i) {
      check_row<c10::BFloat16>(random);
      check_row<c10::Half>(random);
      check_row<float>(random);
    }
  });
}

#define TOPK(name, T)                                                                            \
  ENTRY const char* name(                                                                        \
      T* z, const uint8_t* token_mask, uint32_t* bits, int32_t* count, int32_t* l0,              \
      uint8_t* fired, float* l1, const float* norm, int64_t num_tokens, int64_t F, int64_t k,    \
      int64_t activates) {                                                                       \
    return run_any<T>(                                                                           \
        z, token_mask, bits, {count, l0, fired, l1, norm}, num_tokens, F, k, activates);         \
  }
TOPK(topk_bfloat16, c10::BFloat16)
#ifndef ONLY_BFLOAT16  // compiles in a third of the time
TOPK(topk_float16, c10::Half)
TOPK(topk_float32, float)
#endif

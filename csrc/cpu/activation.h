// From pre-activations to active features, row by row: z + b_enc, then ReLU or ReLU of the K largest.
//
// A feature is active where its activation is not zero, so NaN is active. Ties among the K largest
// go to the lowest index, and NaN counts as the largest value. Only positive values (and NaN) can
// survive the ReLU, so the K largest are sought among those alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "rows.h"

namespace tca_fast {

template <typename T>
struct Active {
  int32_t feature;
  T value;
};

namespace detail {

// Larger activation first, then lower index; NaN before everything.
template <typename T>
inline bool precedes(const Active<T>& a, const Active<T>& b) {
  const Sum<T> left = a.value, right = b.value;
  const bool left_nan = left != left, right_nan = right != right;
  if (left_nan != right_nan) {
    return left_nan;
  }
  if (!left_nan && left != right) {
    return left > right;
  }
  return a.feature < b.feature;
}

}  // namespace detail

// Appends the active features of one row to `active`, in ascending order.
template <typename T>
inline void collect_active(
    const T* z, const T* b_enc, int64_t num_features, std::optional<int64_t> k,
    std::vector<Active<T>>& active) {
  const size_t begin = active.size();
  auto take = [&](int64_t f) {
    const Sum<T> value = static_cast<Sum<T>>(z[f]) + static_cast<Sum<T>>(b_enc[f]);
    if (!(value <= 0)) {
      active.push_back({static_cast<int32_t>(f), static_cast<T>(value)});
    }
  };
  int64_t f = 0;
  for (; f + kLanes <= num_features; f += kLanes) {
    int any = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      any |= !(static_cast<Sum<T>>(z[f + lane]) + static_cast<Sum<T>>(b_enc[f + lane]) <= 0);
    }
    if (any) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        take(f + lane);
      }
    }
  }
  for (; f < num_features; ++f) {
    take(f);
  }
  if (k.has_value() && static_cast<int64_t>(active.size() - begin) > *k) {
    const auto first = active.begin() + begin;
    std::nth_element(first, first + (*k - 1), active.end(), detail::precedes<T>);
    active.resize(begin + *k);
    std::sort(active.begin() + begin, active.end(), [](const Active<T>& a, const Active<T>& b) {
      return a.feature < b.feature;
    });
  }
}

// Replaces one row of pre-activations by its activations.
template <typename T>
inline void activate_row(T* z, const T* b_enc, int64_t num_features, std::optional<int64_t> k) {
  if (k.has_value()) {
    std::vector<Active<T>> active;
    collect_active(z, b_enc, num_features, k, active);
    std::fill(z, z + num_features, static_cast<T>(0));
    for (const Active<T>& one : active) {
      z[one.feature] = one.value;
    }
    return;
  }
  for (int64_t f = 0; f < num_features; ++f) {
    const Sum<T> value = static_cast<Sum<T>>(z[f]) + static_cast<Sum<T>>(b_enc[f]);
    z[f] = value <= 0 ? static_cast<T>(0) : static_cast<T>(value);
  }
}

}  // namespace tca_fast

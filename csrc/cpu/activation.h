// From pre-activations to active features, row by row: z + b_enc, then ReLU or ReLU of the K largest.
//
// A feature is active where its activation is not zero, so NaN is active. Ties among the K largest
// go to the lowest index, and NaN counts as the largest value. Only positive values (and NaN) can
// survive the ReLU, so the K largest are sought among those alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
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

// The next smaller number than a positive one. A small one may round to 0 in T, and stays that.
template <typename T>
inline T before(T positive) {
  std::conditional_t<
      sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>> bits;
  std::memcpy(&bits, &positive, sizeof(T));
  bits -= bits > 0;
  std::memcpy(&positive, &bits, sizeof(T));
  return positive;
}

}  // namespace detail

// The active features of one row, found in ascending order; with a K, the K largest of them.
//
// Features are looked at that exceed `least_`. It starts from what K features are known to reach, and
// more than twice K are never held: then all but the K largest are dropped, and it becomes the smallest
// of those. An equal one further on would lose the tie.
template <typename T>
class RowSearch {
 public:
  RowSearch(std::optional<int64_t> k, std::vector<Active<T>>& active)
      : active_(active), begin_(active.size()), k_(k) {}

  void run(const T* z, const T* b_enc, int64_t num_features) {
    if (k_ && num_features >= 2 * kLanes * *k_) {
      least_ = below_largest(z, b_enc, num_features);
    }
    int64_t f = 0;
    for (; f + kLanes <= num_features; f += kLanes) {
      int any = 0;
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        any |= !(static_cast<Sum<T>>(z[f + lane]) + static_cast<Sum<T>>(b_enc[f + lane]) <= least_);
      }
      if (any) {
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          take(f + lane, z, b_enc);
        }
      }
    }
    for (; f < num_features; ++f) {
      take(f, z, b_enc);
    }
    if (k_ && held() > *k_) {
      drop();
    }
    if (is_shuffled_) {
      std::sort(
          active_.begin() + begin_, active_.end(),
          [](const Active<T>& a, const Active<T>& b) { return a.feature < b.feature; });
    }
  }

 private:
  // A number, 0 or more, that is less than the K largest activations. Of groups of features, each in
  // another lane or another stretch of the row and K of them or more, the largest one each is known
  // after one pass; the K-th largest of those is reached by K features. Its predecessor in T is
  // taken, because what rounds to it may still win a tie.
  Sum<T> below_largest(const T* z, const T* b_enc, int64_t num_features) const {
    constexpr int64_t kStretch = kLanes * kLanes;
    std::vector<Sum<T>> largest((num_features / kStretch + 1) * kLanes, Sum<T>(0));
    for (int64_t f = 0; f + kLanes <= num_features; f += kLanes) {
      Sum<T>* lanes = largest.data() + f / kStretch * kLanes;
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const Sum<T> value =
            static_cast<Sum<T>>(z[f + lane]) + static_cast<Sum<T>>(b_enc[f + lane]);
        lanes[lane] = value > lanes[lane] ? value : lanes[lane];
      }
    }
    const auto bound = largest.begin() + (*k_ - 1);
    std::nth_element(largest.begin(), bound, largest.end(), std::greater<Sum<T>>());
    return *bound > 0 ? static_cast<Sum<T>>(detail::before(static_cast<T>(*bound))) : Sum<T>(0);
  }

  int64_t held() const { return static_cast<int64_t>(active_.size()) - begin_; }

  void take(int64_t f, const T* z, const T* b_enc) {
    const Sum<T> value = static_cast<Sum<T>>(z[f]) + static_cast<Sum<T>>(b_enc[f]);
    if (!(value <= least_)) {
      active_.push_back({static_cast<int32_t>(f), static_cast<T>(value)});
      if (k_ && held() >= 2 * *k_ + kLanes) {
        drop();
      }
    }
  }

  void drop() {
    const auto first = active_.begin() + begin_, last_kept = first + (*k_ - 1);
    std::nth_element(first, last_kept, active_.end(), detail::precedes<T>);
    least_ = last_kept->value;
    active_.resize(begin_ + *k_);
    is_shuffled_ = true;
  }

  std::vector<Active<T>>& active_;
  const int64_t begin_;
  const std::optional<int64_t> k_;
  Sum<T> least_ = 0;
  bool is_shuffled_ = false;
};

// Appends the active features of one row to `active`, in ascending order.
template <typename T>
inline void collect_active(
    const T* z, const T* b_enc, int64_t num_features, std::optional<int64_t> k,
    std::vector<Active<T>>& active) {
  RowSearch<T>(k, active).run(z, b_enc, num_features);
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

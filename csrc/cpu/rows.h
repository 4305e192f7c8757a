// Arithmetic on rows of D numbers: stored as T, accumulated in Sum<T> (float, or double for double).
// Every loop keeps a fixed number of partial sums, so results do not depend on the thread count.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

namespace tca_fast {

template <typename T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

constexpr int64_t kLanes = 16;

// Σ_i a[i]·b[i]
template <typename T>
inline Sum<T> dot(const T* a, const T* b, int64_t size) {
  Sum<T> lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] += static_cast<Sum<T>>(a[i + lane]) * static_cast<Sum<T>>(b[i + lane]);
    }
  }
  for (int64_t lane = 0; i < size; ++i, ++lane) {
    lanes[lane] += static_cast<Sum<T>>(a[i]) * static_cast<Sum<T>>(b[i]);
  }
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t lane = 0; lane < width; ++lane) {
      lanes[lane] += lanes[lane + width];
    }
  }
  return lanes[0];
}

// Asks memory for a row that is read next: rows lie far apart, and each begins with a wait.
template <typename T>
inline void prefetch(const T* row, int64_t size) {
#ifdef __GNUC__
  const char* bytes = reinterpret_cast<const char*>(row);
  for (int64_t i = 0; i < size * static_cast<int64_t>(sizeof(T)); i += 64) {
    __builtin_prefetch(bytes + i);
  }
#endif
}

// out[i] += scale·row[i]
template <typename T>
inline void add_scaled(Sum<T>* out, Sum<T> scale, const T* row, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    out[i] += scale * static_cast<Sum<T>>(row[i]);
  }
}

// to[i] = from[i], rounded to the type of `to`
template <typename To, typename From>
inline void convert(To* to, const From* from, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    to[i] = static_cast<To>(static_cast<Sum<To>>(from[i]));
  }
}

}  // namespace tca_fast

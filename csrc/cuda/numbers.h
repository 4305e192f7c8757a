// Numbers as they are stored and as they are added, and vectors of 16 bytes.
//
// Activations and weights are float, BFloat16 or Half; every sum is a float, rounded once where the
// result is stored.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "launch.h"

namespace tca_fast::cuda {

// Numbers of type T in 16 bytes, the widest load of a thread: eight, or four of float.
template <typename T>
constexpr int kVector = 16 / sizeof(T);

template <typename T>
struct alignas(16) Vector {
  T item[kVector<T>];
};

// A vector from an address that is a multiple of 16 bytes.
template <typename T>
__device__ __forceinline__ Vector<T> load16(const T* address) {
  Vector<T> vector;
#ifdef __CUDACC__
  const uint4 bits = *reinterpret_cast<const uint4*>(address);
  *reinterpret_cast<uint4*>(&vector) = bits;
#else
  emulation::check_aligned(address, 16);
  std::memcpy(&vector, address, 16);
#endif
  return vector;
}

template <typename T>
__device__ __forceinline__ void store16(T* address, const Vector<T>& vector) {
#ifdef __CUDACC__
  *reinterpret_cast<uint4*>(address) = *reinterpret_cast<const uint4*>(&vector);
#else
  emulation::check_aligned(address, 16);
  std::memcpy(address, &vector, 16);
#endif
}

// V consecutive numbers: a vector, or one number where rows do not all start on 16 bytes.
template <typename T, int V>
struct Numbers {
  static_assert(V == 1 || V == kVector<T>);
  T item[V];

  static __device__ __forceinline__ Numbers load(const T* address) {
    Numbers numbers;
    if constexpr (V == 1) {
      numbers.item[0] = *address;
    } else {
      const Vector<T> vector = load16(address);
      for (int i = 0; i < V; ++i) {
        numbers.item[i] = vector.item[i];
      }
    }
    return numbers;
  }

  static __device__ __forceinline__ Numbers zeros() {
    Numbers numbers;
    for (int i = 0; i < V; ++i) {
      numbers.item[i] = T(0.0f);
    }
    return numbers;
  }

  // Rounds each float once.
  static __device__ __forceinline__ void store(T* address, const float (&values)[V]) {
    if constexpr (V == 1) {
      *address = T(values[0]);
    } else {
      Vector<T> vector;
      for (int i = 0; i < V; ++i) {
        vector.item[i] = T(values[i]);
      }
      store16(address, vector);
    }
  }

  __device__ __forceinline__ float operator[](int i) const { return static_cast<float>(item[i]); }
};

// Whether a pre-activation leaves something behind: a NaN does, so that it stays visible.
__host__ __device__ __forceinline__ bool is_active(float z) { return !(z <= 0); }

}  // namespace tca_fast::cuda

// Numbers as they are stored and as they are added, and vectors of 16 bytes.
//
// Activations and weights are float, BFloat16 or Half; every sum is a float, rounded once where the
// result is stored.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "launch.h"

namespace tca_fast::cuda {

// Numbers of type T in 16 bytes, the widest load of a thread.
template <typename T>
constexpr int kVector = 16 / sizeof(T);

template <typename T>
struct alignas(16) Vector {
  T item[kVector<T>];
};

// Eight numbers from an address that is a multiple of 16 bytes (four of float).
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

// Whether rows of `width` numbers of type T, one behind the other, all start on 16 bytes.
template <typename T>
__host__ __device__ constexpr bool fills_vectors(int64_t width) {
  return width % kVector<T> == 0;
}

// Whether a pre-activation leaves something behind: a NaN does, so that it stays visible.
__host__ __device__ __forceinline__ bool is_active(float z) { return !(z <= 0); }

}  // namespace tca_fast::cuda

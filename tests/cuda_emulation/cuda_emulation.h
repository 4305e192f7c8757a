// CUDA's device language for an ordinary C++ compiler, as far as csrc/cuda uses it.
//
// csrc/cuda/launch.h includes this file instead of CUDA's own headers where nvcc is not the
// compiler, so that the same kernels run on a CPU under the scheduler of fibers.h. Warp functions
// take the place of their call as hidden arguments, which errors then name.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>

#include "hooks.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define threadIdx (::emulation::device().current->thread)
#define blockIdx (::emulation::device().block_index)
#define blockDim (::emulation::device().block)
#define gridDim (::emulation::device().grid)

// The place of the call, for functions that wait.
#define EMULATED_CALL const char *file = __builtin_FILE(), int line = __builtin_LINE()

// A shared array of the block: `SHARED_ARRAY(float, sums, 32);`.
#define SHARED_ARRAY(type, name, count)                                               \
  static const char name##_tag = 0;                                                   \
  auto& name = *reinterpret_cast<type(*)[count]>(                                     \
      ::emulation::device().shared(&name##_tag, sizeof(type) * (count)))

using cudaStream_t = void*;

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace emulation {

inline void check_aligned(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    device().fail("an access of " + std::to_string(bytes) + " bytes to an address that is no multiple");
  }
}

template <typename T>
uint64_t as_bits(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <typename T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline unsigned lane() { return device().current->number % kWarp; }

// The value of another lane; `source` is the own lane where the hardware would stay there.
template <typename T>
T take(unsigned mask, T value, unsigned source, Place place) {
  const auto& given = device().exchange(mask, as_bits(value), place);
  if (!(mask >> source & 1)) {
    device().fail("lane " + std::to_string(source) + ", outside the mask, is read by " + place.text());
  }
  return from_bits<T>(given[source]);
}

template <typename T, typename Combine>
T reduce(unsigned mask, T value, Combine combine, Place place) {
  const auto given = device().exchange(mask, as_bits(value), place);
  const unsigned first = std::countr_zero(mask);
  T total = from_bits<T>(given[first]);
  for (unsigned lane = first + 1; lane < kWarp; ++lane) {
    if (mask >> lane & 1) {
      total = combine(total, from_bits<T>(given[lane]));
    }
  }
  return total;
}

}  // namespace emulation

inline void __syncthreads(EMULATED_CALL) {
  emulation::device().block_barrier(false, {"__syncthreads", file, line});
}
inline int __syncthreads_count(int predicate, EMULATED_CALL) {
  return emulation::device().block_barrier(predicate, {"__syncthreads_count", file, line});
}
inline int __syncthreads_or(int predicate, EMULATED_CALL) {
  return emulation::device().block_barrier(predicate, {"__syncthreads_or", file, line}) != 0;
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFF, EMULATED_CALL) {
  emulation::device().exchange(mask, 0, {"__syncwarp", file, line}, true);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATED_CALL) {
  const unsigned base = emulation::lane() / width * width;
  return emulation::take(
      mask, value, base + static_cast<unsigned>(source) % width, {"__shfl_sync", file, line});
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, EMULATED_CALL) {
  const unsigned source = emulation::lane() ^ static_cast<unsigned>(lanes);
  const bool stays = source / width > emulation::lane() / width;
  return emulation::take(
      mask, value, stays ? emulation::lane() : source, {"__shfl_xor_sync", file, line});
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = 32, EMULATED_CALL) {
  const unsigned lane = emulation::lane();
  return emulation::take(
      mask, value, lane % width < lanes ? lane : lane - lanes, {"__shfl_up_sync", file, line});
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32, EMULATED_CALL) {
  const unsigned lane = emulation::lane();
  return emulation::take(
      mask, value, lane % width + lanes >= static_cast<unsigned>(width) ? lane : lane + lanes,
      {"__shfl_down_sync", file, line});
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATED_CALL) {
  const unsigned bit = predicate ? 1u << emulation::lane() : 0;
  return emulation::reduce(
      mask, bit, [](unsigned a, unsigned b) { return a | b; }, {"__ballot_sync", file, line});
}
inline int __any_sync(unsigned mask, int predicate, EMULATED_CALL) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, EMULATED_CALL) {
  return __ballot_sync(mask, predicate, file, line) == mask;
}
template <typename T>
T __reduce_add_sync(unsigned mask, T value, EMULATED_CALL) {
  return emulation::reduce(
      mask, value, [](T a, T b) { return static_cast<T>(unsigned(a) + unsigned(b)); },
      {"__reduce_add_sync", file, line});
}
template <typename T>
T __reduce_max_sync(unsigned mask, T value, EMULATED_CALL) {
  return emulation::reduce(
      mask, value, [](T a, T b) { return std::max(a, b); }, {"__reduce_max_sync", file, line});
}
template <typename T>
T __reduce_min_sync(unsigned mask, T value, EMULATED_CALL) {
  return emulation::reduce(
      mask, value, [](T a, T b) { return std::min(a, b); }, {"__reduce_min_sync", file, line});
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value, EMULATED_CALL) {
  return emulation::reduce(
      mask, value, [](unsigned a, unsigned b) { return a | b; }, {"__reduce_or_sync", file, line});
}

// Blocks run one after another and a fiber is not interrupted, so these are plain operations.
#define EMULATED_ATOMIC template <typename T> UNWATCHED T
EMULATED_ATOMIC atomicAdd(T* address, T value) {
  static_assert(std::is_integral_v<T>, "sums of floating-point numbers depend on the order");
  emulated_access(address, sizeof(T), emulation::Kind::atomic);
  const T before = *address;
  *address = static_cast<T>(std::make_unsigned_t<T>(before) + value);
  return before;
}
EMULATED_ATOMIC atomicOr(T* address, T value) {
  emulated_access(address, sizeof(T), emulation::Kind::atomic);
  const T before = *address;
  *address = before | value;
  return before;
}
EMULATED_ATOMIC atomicMax(T* address, T value) {
  emulated_access(address, sizeof(T), emulation::Kind::atomic);
  const T before = *address;
  *address = before < value ? value : before;
  return before;
}
inline void __threadfence() {}

// Copies to shared memory: one half of them arrives at once, the other one as late as it may, when
// the thread waits for it.
namespace emulation {
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};
// Of each thread: the copies it has begun, in groups; the last one is still open.
inline std::map<const Fiber*, std::vector<std::vector<Copy>>>& copies() {
  static std::map<const Fiber*, std::vector<std::vector<Copy>>> copies;
  return copies;
}
inline void copied(void* to, const void* from, size_t bytes) {
  emulated_access(from, bytes, Kind::read);
  emulated_access(to, bytes, Kind::write);
}
}  // namespace emulation

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  emulation::check_aligned(to, bytes);
  emulation::check_aligned(from, bytes);
  emulation::copied(to, from, bytes);
  static std::minstd_rand random;
  if (random() % 2) {
    std::memcpy(to, from, bytes);
    return;
  }
  auto& groups = emulation::copies()[emulation::device().current];
  groups.resize(std::max<size_t>(1, groups.size()));
  groups.back().push_back({to, from, bytes});
}
inline void __pipeline_commit() {
  auto& groups = emulation::copies()[emulation::device().current];
  groups.resize(std::max<size_t>(1, groups.size()) + 1);
}
// Until at most `pending` of the committed groups have not arrived.
inline void __pipeline_wait_prior(size_t pending) {
  auto& groups = emulation::copies()[emulation::device().current];
  while (groups.size() > pending + 1) {
    for (const emulation::Copy& copy : groups.front()) {
      emulation::copied(copy.to, copy.from, copy.bytes);
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
    groups.erase(groups.begin());
  }
}

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return x ? std::countr_zero(static_cast<unsigned>(x)) + 1 : 0; }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
template <typename T>
T __ldg(const T* address) {
  return *address;
}

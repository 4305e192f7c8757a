// Sums over a warp and over a block, always in the same order: results are the same in every run.
#pragma once

#include "launch.h"

namespace tca_fast::cuda {

// The sum over the warp's lanes, in every lane.
template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

// The sums over the warp's lanes of N values, N a power of 2: that of values[i] in the lanes that are
// i modulo N. Half of the values change hands in each step, so N - 1 + log2(32 / N) exchanges do.
template <int N>
__device__ __forceinline__ float warp_sums(float (&values)[N]) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int half = N / 2; half > 0; half /= 2) {
    const bool keeps_upper = lane & half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float given = keeps_upper ? values[i] : values[i + half];
      const float kept = keeps_upper ? values[i + half] : values[i];
      values[i] = kept + __shfl_xor_sync(kAllLanes, given, half);
    }
  }
  for (int distance = N; distance < kWarpSize; distance *= 2) {
    values[0] += __shfl_xor_sync(kAllLanes, values[0], distance);
  }
  return values[0];
}

// The sum over the warp's lanes up to and including this one.
template <typename T>
__device__ __forceinline__ T warp_inclusive_scan(T value) {
  const int lane = threadIdx.x % kWarpSize;
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const T before = __shfl_up_sync(kAllLanes, value, distance);
    value += lane >= distance ? before : T(0);
  }
  return value;
}

// The sum over a block of whole warps, in every thread; it may be called again at once.
template <typename T>
__device__ __forceinline__ T block_sum(T value) {
  SHARED_ARRAY(T, sums, kMostWarps);
  const int num_warps = blockDim.x / kWarpSize;
  value = warp_sum(value);
  if (threadIdx.x % kWarpSize == 0) {
    sums[threadIdx.x / kWarpSize] = value;
  }
  __syncthreads();
  value = T(0);
  for (int warp = 0; warp < num_warps; ++warp) {
    value += sums[warp];
  }
  __syncthreads();
  return value;
}

// The sum over the threads of a block before this one; `total` becomes the sum over all.
template <typename T>
__device__ __forceinline__ T block_exclusive_scan(T value, T& total) {
  SHARED_ARRAY(T, sums, kMostWarps);
  const int num_warps = blockDim.x / kWarpSize;
  const T inclusive = warp_inclusive_scan(value);
  const int warp = threadIdx.x / kWarpSize;
  if (threadIdx.x % kWarpSize == kWarpSize - 1) {
    sums[warp] = inclusive;
  }
  __syncthreads();
  T before = T(0);
  total = T(0);
  for (int other = 0; other < num_warps; ++other) {
    before += other < warp ? sums[other] : T(0);
    total += sums[other];
  }
  __syncthreads();
  return before + inclusive - value;
}

}  // namespace tca_fast::cuda

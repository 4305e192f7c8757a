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

// The sum over a block of WARPS whole warps, in every thread. Ends with a barrier's guarantee that
// it may be called again at once.
template <int WARPS, typename T>
__device__ __forceinline__ T block_sum(T value) {
  SHARED_ARRAY(T, sums, WARPS);
  value = warp_sum(value);
  if (threadIdx.x % kWarpSize == 0) {
    sums[threadIdx.x / kWarpSize] = value;
  }
  __syncthreads();
  value = T(0);
  for (int warp = 0; warp < WARPS; ++warp) {
    value += sums[warp];
  }
  __syncthreads();
  return value;
}

// The sum over the threads of a block before this one; `total` becomes the sum over all.
template <int WARPS, typename T>
__device__ __forceinline__ T block_exclusive_scan(T value, T& total) {
  SHARED_ARRAY(T, sums, WARPS);
  const T inclusive = warp_inclusive_scan(value);
  const int warp = threadIdx.x / kWarpSize;
  if (threadIdx.x % kWarpSize == kWarpSize - 1) {
    sums[warp] = inclusive;
  }
  __syncthreads();
  T before = T(0);
  total = T(0);
  for (int other = 0; other < WARPS; ++other) {
    before += other < warp ? sums[other] : T(0);
    total += sums[other];
  }
  __syncthreads();
  return before + inclusive - value;
}

}  // namespace tca_fast::cuda

// The one way in which kernels are launched, and shared memory.
//
// Where nvcc is not the compiler, tests/cuda_emulation runs the same kernels on a CPU; kernels
// therefore use `launch`, SHARED_ARRAY and dynamic_shared instead of CUDA's syntax for them.
#pragma once

#ifdef __CUDACC__

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

// A shared array of the block: `SHARED_ARRAY(float, sums, 32);`.
#define SHARED_ARRAY(type, name, count) __shared__ type name[count]

#else

#include "cuda_emulation.h"

#endif

#include <cstddef>
#include <cstdint>

namespace tca_fast::cuda {

constexpr int kWarpSize = 32, kMostWarps = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFF;

// The shared memory whose size the launch gives, aligned to 16 bytes.
template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
#ifdef __CUDACC__
  extern __shared__ uint4 memory[];
  return reinterpret_cast<T*>(memory);
#else
  return static_cast<T*>(emulation::device().dynamic_shared());
#endif
}

#ifdef __CUDACC__
// A launch that gives more shared memory than 48 KiB, less what the kernel's own arrays take, has to
// ask for it.
template <typename Kernel>
cudaError_t ask_for_shared(Kernel* kernel, size_t bytes) {
  if (bytes == 0) {
    return cudaSuccess;
  }
  return cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

// The runtime keeps an error until it is asked for it, and the next launch would report this one.
inline void check_start(cudaError_t error) {
  if (error != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    throw std::runtime_error(std::string("CUDA: a kernel did not start: ") + cudaGetErrorString(error));
  }
}
#endif

// Runs `kernel(arguments...)` on the stream; an empty grid is no launch.
template <typename... Parameters, typename... Arguments>
void launch(
    void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
    Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) {
    return;
  }
#ifdef __CUDACC__
  check_start(ask_for_shared(kernel, shared_bytes));
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
  check_start(cudaGetLastError());
#else
  static_cast<void>(stream);
  emulation::device().run(
      reinterpret_cast<void*>(kernel), grid, block, shared_bytes,
      [=] { kernel(static_cast<Parameters>(arguments)...); });
#endif
}

}  // namespace tca_fast::cuda

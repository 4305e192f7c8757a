// Kernels that are wrong in one way each, and one that is right: what the emulator has to tell apart.

#include "entry.h"
#include "launch.h"
#include "numbers.h"

namespace faults {

using tca_fast::cuda::dynamic_shared;
using tca_fast::cuda::kAllLanes;
using tca_fast::cuda::launch;
using tca_fast::cuda::load16;

// out[i] = in[n - 1 - i] within each block, through shared memory.
__global__ void reverse(const int* in, int* out, bool with_barrier, bool early_end) {
  SHARED_ARRAY(int, values, 64);
  values[threadIdx.x] = in[blockIdx.x * blockDim.x + threadIdx.x];
  if (early_end && threadIdx.x == 3) {
    return;
  }
  if (with_barrier) {
    __syncthreads();
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
}

// The sum of each warp's values, in dynamic shared memory, by lanes of a mask.
__global__ void sums(const int* in, int* out, unsigned mask) {
  int* total = dynamic_shared<int>();
  int value = in[threadIdx.x];
  for (int step = 16; step > 0; step /= 2) {
    value += __shfl_xor_sync(mask, value, step);
  }
  if (threadIdx.x % 32 == 0) {
    total[threadIdx.x / 32] = value;
  }
  __syncthreads();
  out[threadIdx.x] = total[threadIdx.x / 32];
}

// out = the sums over the warps of each round's number, through one buffer or through two.
__global__ void rounds(int* out, int buffers) {
  SHARED_ARRAY(int, sums, 2 * 2);
  for (int round = 0; round < 20; ++round) {
    int* buffer = sums + round % buffers * 2;
    int value = round;
    for (int step = 16; step > 0; step /= 2) {
      value += __shfl_xor_sync(kAllLanes, value, step);
    }
    if (threadIdx.x % 32 == 0) {
      buffer[threadIdx.x / 32] = value;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      out[round] = buffer[0] + buffer[1];
    }
  }
}

__global__ void divergent(int* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 0;
}

__global__ void beyond(int* out, int64_t at) { out[at] = 1; }

__global__ void shifted(int* out, int by) { out[0] = 1 << by; }

__global__ void misaligned(const int* in, int* out) { out[0] = load16(in).item[0]; }

__global__ void not_written(float* out) {
  SHARED_ARRAY(float, values, 1);
  out[0] = values[0];
}

// out[i] = the number of the next lane, through shared memory: only __syncwarp orders that.
__global__ void neighbours(int* out, bool with_barrier) {
  SHARED_ARRAY(int, values, 64);
  values[threadIdx.x] = threadIdx.x;
  if (with_barrier) {
    __syncwarp();
  } else {
    __shfl_sync(kAllLanes, 0, 0);
  }
  out[threadIdx.x] = values[threadIdx.x ^ 1];
}

// Every block writes to the same place: its number, or the same; or adds to it, or reads what its
// neighbour writes.
__global__ void blocks(int* out, int what) {
  const int block = blockIdx.x;
  if (what == 0) {
    out[0] = block;
  } else if (what == 1) {
    out[0] = 7;
  } else if (what == 2) {
    atomicAdd(out, 1);
  } else {
    out[block] = out[block ^ 1];
  }
}

// Which thread of which block runs first.
__global__ void sequence(int* next, int* out) {
  out[atomicAdd(next, 1)] = blockIdx.x * blockDim.x + threadIdx.x;
}

__global__ void read_beyond(const int* in, int* out, int64_t at) { out[0] = in[at]; }

}  // namespace faults

using namespace faults;

ENTRY const char* run_reverse(const int* in, int* out, int64_t barrier, int64_t early_end) {
  return reported([=] { launch(reverse, 3, 64, 0, nullptr, in, out, barrier, early_end); });
}
ENTRY const char* run_sums(const int* in, int* out, int64_t mask) {
  return reported([=] { launch(sums, 1, 64, 2 * sizeof(int), nullptr, in, out, mask); });
}
ENTRY const char* run_sums_without_room(const int* in, int* out) {
  return reported([=] { launch(sums, 1, 64, 0, nullptr, in, out, kAllLanes); });
}
ENTRY const char* run_rounds(int* out, int64_t buffers) {
  return reported([=] { launch(rounds, 1, 64, 0, nullptr, out, buffers); });
}
ENTRY const char* run_divergent(int* out) {
  return reported([=] { launch(divergent, 1, 64, 0, nullptr, out); });
}
ENTRY const char* run_beyond(int* out, int64_t at) {
  return reported([=] { launch(beyond, 1, 1, 0, nullptr, out, at); });
}
ENTRY const char* run_shifted(int* out, int64_t by) {
  return reported([=] { launch(shifted, 1, 1, 0, nullptr, out, by); });
}
ENTRY const char* run_misaligned(const int* in, int* out) {
  return reported([=] { launch(misaligned, 1, 1, 0, nullptr, in, out); });
}
ENTRY const char* run_not_written(float* out) {
  return reported([=] { launch(not_written, 1, 1, 0, nullptr, out); });
}
ENTRY const char* run_too_large() {
  return reported([] { launch(not_written, 1, 1025, 0, nullptr, nullptr); });
}
ENTRY const char* run_empty(int* out) {
  return reported([=] { launch(beyond, 0, 1, 0, nullptr, out, 0); });
}
ENTRY const char* run_neighbours(int* out, int64_t barrier) {
  return reported([=] { launch(neighbours, 1, 64, 0, nullptr, out, barrier); });
}
ENTRY const char* run_blocks(int* out, int64_t what) {
  return reported([=] { launch(blocks, 4, 1, 0, nullptr, out, what); });
}
ENTRY const char* run_read_beyond(const int* in, int* out, int64_t at) {
  return reported([=] { launch(read_beyond, 1, 1, 0, nullptr, in, out, at); });
}
ENTRY const char* run_sequence(int* next, int* out) {
  return reported([=] { launch(sequence, 3, 64, 0, nullptr, next, out); });
}

// The adapter for the 1 to 32 tokens of a generation step, in one launch.
//
//   a[t, f] = ReLU(<W_enc[f], x[t]> + b_enc[f])
//   out[t] = base[t] + b_dec + sum over active f, in ascending order, of gain[f] a[t, f] W_dec[f]
//
// Shapes: T tokens, D model width, F features, W = ceil(F / 32) words.
//
// Encode: a block takes 32 features, a warp four of them, and reads their rows of W_enc once for all
// tokens; x comes out of L1. Every block has to know of every activation before any can decode, so
// all blocks wait for each other once (a cooperative launch). Decode: a block takes a token and 32
// vectors of columns, lists the set bits of the token, and its warps add up every eighth row each;
// the eight sums are added in order. Results depend neither on the number of blocks nor on time.
//
// Bytes at D = 3584, F = 8192, bfloat16: F D 2 = 59 MB of W_enc, once, and 2 D for each active pair.
// Operations: 2 T F D, and the conversion of every number to float: 12 instructions of a warp for
// 512 bytes and each token. Predicted (H100, docs/kernels.md; 4 us for the launch and the wait):
// 0.027 ms from 1 to 8 tokens, where memory decides; 0.06 ms at 32, where instructions do: from about
// 12 tokens on a product on tensor cores, `select` and `gather_rows` should be faster. Two dense
// products read 117 MB, 0.046 ms.
#pragma once

#include "index_arithmetic.h"
#include "numbers.h"
#include "reduce.h"

#ifdef __CUDACC__
#include <cooperative_groups.h>
#endif

namespace tca_fast::cuda {

constexpr int kStepWarps = 8, kStepThreads = kStepWarps * kWarpSize;
constexpr int kFeaturesOfWarp = kWordBits / kStepWarps;
constexpr int kMostStepTokens = kWarpSize;  // a lane keeps what belongs to a token
constexpr int kDecodeRowsInFlight = 8;

template <typename T>
struct GenerationStep {
  const T* x;            // [T, D]
  const T* W_enc;        // [F, D]
  const T* b_enc;        // [F]
  const T* W_dec;        // [F, D]
  const T* base;         // [T, D] or null
  const T* b_dec;        // [D] or null
  const T* gain;         // [F] or null
  T* out;                // [T, D]
  T* activation;         // [T, F], written where a bit is set
  uint32_t* bits;        // [T, W]
  int num_tokens, F, D;
};

// A vector that is read once: it leaves L1 to what is read again.
template <typename T>
__device__ __forceinline__ Numbers<T, kVector<T>> load_once(const T* address) {
#ifdef __CUDACC__
  Numbers<T, kVector<T>> numbers;
  const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(address));
  std::memcpy(&numbers, &bits, sizeof bits);
  return numbers;
#else
  return Numbers<T, kVector<T>>::load(address);
#endif
}

// One more vector of a dot product. Each of its additions is rounded once, in this order, so that
// the same product comes out to the same bits wherever it is computed.
template <typename Vector, int V>
__device__ __forceinline__ void add_products(float& sum, const Vector& w, const float (&x)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) {
    sum = fmaf(w[i], x[i], sum);
  }
}

// In lane t: <W[row], x[t]> for the ROWS rows from `first`; rows that do not exist are not read.
// `tokens` says which are wanted, and TOKENS is above the highest one.
template <int ROWS, int TOKENS, typename T>
__device__ __forceinline__ void dot_products(
    const GenerationStep<T>& step, int first, uint32_t tokens, float (&products)[ROWS]) {
  constexpr int V = kVector<T>;
  const int lane = threadIdx.x % kWarpSize;
  float sums[ROWS][TOKENS] = {};
  for (int d = lane * V; d < step.D; d += kWarpSize * V) {
    Numbers<T, V> w[ROWS];
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      w[row] = first + row < step.F ? load_once(step.W_enc + int64_t{first + row} * step.D + d)
                                    : Numbers<T, V>::zeros();
    }
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
      if (tokens >> t & 1) {
        const auto loaded = Numbers<T, V>::load(step.x + int64_t{t} * step.D + d);
        float x[V];
        for (int i = 0; i < V; ++i) {
          x[i] = loaded[i];
        }
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
          add_products(sums[row][t], w[row], x);
        }
      }
    }
  }
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
    products[row] = 0;
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
      if (tokens >> t & 1) {
        const float sum = warp_sum(sums[row][t]);
        products[row] = lane == t ? sum : products[row];
      }
    }
  }
}

// Stores the activation of feature f and token `lane`, and says whether there is one.
template <typename T>
__device__ __forceinline__ bool activate(const GenerationStep<T>& step, int f, float product) {
  const int t = threadIdx.x % kWarpSize;
  if (t >= step.num_tokens || f >= step.F) {
    return false;
  }
  const T activation = T(product + static_cast<float>(step.b_enc[f]));
  if (!is_active(static_cast<float>(activation))) {
    return false;
  }
  step.activation[int64_t{t} * step.F + f] = activation;
  return true;
}

// Writes the words of 32 features from the bits that each warp's lanes have for their token.
template <typename T>
__device__ __forceinline__ void store_words(
    const GenerationStep<T>& step, int word, uint32_t bits_of_warp) {
  SHARED_ARRAY(uint32_t, bits, kStepThreads);
  __syncthreads();
  bits[threadIdx.x] = bits_of_warp;
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < step.num_tokens) {
    uint32_t together = 0;
    for (int warp = 0; warp < kStepWarps; ++warp) {
      together |= bits[warp * kWarpSize + threadIdx.x];
    }
    step.bits[threadIdx.x * ceil_div(step.F, kWordBits) + word] = together;
  }
}

__device__ __forceinline__ uint32_t all_tokens(int num_tokens) {
  return num_tokens == kWordBits ? ~0u : bits_below(num_tokens);
}

template <typename T, int TOKENS>
__device__ void encode_step(const GenerationStep<T>& step) {
  // As many sums as registers hold.
  constexpr int kRows = TOKENS > 8 ? 2 : 4;
  const int warp = threadIdx.x / kWarpSize, num_words = ceil_div(step.F, kWordBits);
  for (int word = blockIdx.x; word < num_words; word += gridDim.x) {
    uint32_t bits = 0;
    for (int start = 0; start < kFeaturesOfWarp; start += kRows) {
      const int bit = warp * kFeaturesOfWarp + start, first = word * kWordBits + bit;
      float products[kRows];
      dot_products<kRows, TOKENS>(step, first, all_tokens(step.num_tokens), products);
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        bits |= static_cast<uint32_t>(activate(step, first + row, products[row])) << (bit + row);
      }
    }
    store_words(step, word, bits);
  }
}

template <typename T>
__device__ void decode_step(const GenerationStep<T>& step) {
  constexpr int V = kVector<T>;
  constexpr int kColumns = kWarpSize * V;
  SHARED_ARRAY(uint16_t, listed, kStepThreads * kWordBits);
  SHARED_ARRAY(float, sums, kStepWarps * kColumns);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int num_words = ceil_div(step.F, kWordBits), num_slices = ceil_div(step.D, kColumns);
  for (int item = blockIdx.x; item < step.num_tokens * num_slices; item += gridDim.x) {
    const int64_t t = item / num_slices;
    const int d = item % num_slices * kColumns + lane * V;
    float total[V] = {};
    for (int first = 0; first < num_words; first += kStepThreads) {
      const int w = first + threadIdx.x;
      uint32_t word = w < num_words ? step.bits[t * num_words + w] : 0;
      int count;
      for (int slot = block_exclusive_scan(popcount(word), count); word != 0; ++slot) {
        listed[slot] = static_cast<uint16_t>(threadIdx.x * kWordBits + lowest_bit(word));
        word = without_lowest_bit(word);
      }
      __syncthreads();
      for (int start = warp; start < count; start += kStepWarps * kDecodeRowsInFlight) {
        Numbers<T, V> loaded[kDecodeRowsInFlight];
        float scale[kDecodeRowsInFlight];
#pragma unroll
        for (int row = 0; row < kDecodeRowsInFlight; ++row) {
          const int entry = start + row * kStepWarps;
          loaded[row] = Numbers<T, V>::zeros();
          scale[row] = 0;
          if (entry < count) {
            const int64_t f = int64_t{first} * kWordBits + listed[entry];
            scale[row] = static_cast<float>(step.activation[t * step.F + f]);
            if (step.gain != nullptr) {
              scale[row] *= static_cast<float>(step.gain[f]);
            }
            if (d < step.D) {
              loaded[row] = load_once(step.W_dec + f * step.D + d);
            }
          }
        }
#pragma unroll
        for (int row = 0; row < kDecodeRowsInFlight; ++row) {
          if (start + row * kStepWarps < count) {
            for (int i = 0; i < V; ++i) {
              total[i] = fmaf(scale[row], loaded[row][i], total[i]);
            }
          }
        }
      }
      __syncthreads();
    }
    for (int i = 0; i < V; ++i) {
      sums[warp * kColumns + i * kWarpSize + lane] = total[i];
    }
    __syncthreads();
    if (warp == 0 && d < step.D) {
      const auto added = [&](const T* row) {
        const auto numbers = Numbers<T, V>::load(row + d);
        for (int i = 0; i < V; ++i) {
          total[i] += numbers[i];
        }
      };
      for (int i = 0; i < V; ++i) {
        for (int other = 1; other < kStepWarps; ++other) {
          total[i] += sums[other * kColumns + i * kWarpSize + lane];
        }
      }
      if (step.b_dec != nullptr) {
        added(step.b_dec);
      }
      if (step.base != nullptr) {
        added(step.base + t * step.D);
      }
      Numbers<T, V>::store(step.out + t * step.D + d, total);
    }
    __syncthreads();
  }
}

// The two halves, with a wait of all blocks between them. The emulator runs its blocks one after
// another, so there each half is a launch of its own.
template <typename Step, void (*encode)(const Step&), void (*decode)(const Step&)>
__global__ void __launch_bounds__(kStepThreads, 2) generation_kernel(Step step, bool encodes, bool decodes) {
  if (encodes) {
    encode(step);
  }
#ifdef __CUDACC__
  cooperative_groups::this_grid().sync();
#endif
  if (decodes) {
    decode(step);
  }
}

// At most as many blocks as run at the same time; more would wait for blocks that cannot start.
template <typename Step>
void launch_step(
    void (*kernel)(Step, bool, bool), Step step, int most_blocks, size_t shared_bytes,
    cudaStream_t stream) {
#ifdef __CUDACC__
  int device = 0, multiprocessors = 0, blocks = 0;
  check_start(cudaGetDevice(&device));
  check_start(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  check_start(ask_for_shared(kernel, shared_bytes));
  check_start(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
      &blocks, kernel, kStepThreads, shared_bytes));
  const int together = blocks * multiprocessors;
  bool both = true;
  void* arguments[] = {&step, &both, &both};
  check_start(cudaLaunchCooperativeKernel(
      reinterpret_cast<void*>(kernel), dim3(together < most_blocks ? together : most_blocks),
      dim3(kStepThreads), arguments, shared_bytes, stream));
#else
  const int blocks = most_blocks < 3 ? most_blocks : 3;  // each takes several items
  launch(kernel, blocks, kStepThreads, shared_bytes, stream, step, true, false);
  launch(kernel, blocks, kStepThreads, shared_bytes, stream, step, false, true);
#endif
}

// Refuses what the kernels do not serve, so that the caller can take the others.
template <typename T>
void check_step(const GenerationStep<T>& step) {
  if (step.num_tokens < 1 || step.num_tokens > kMostStepTokens) {
    throw std::runtime_error(
        "x: " + std::to_string(step.num_tokens) + " tokens, expected 1.." +
        std::to_string(kMostStepTokens));
  }
  if (step.D % kVector<T> != 0) {
    throw std::runtime_error(
        "x: a width of " + std::to_string(step.D) + ", expected a multiple of " +
        std::to_string(kVector<T>));
  }
}

template <typename T>
void generation_step(const GenerationStep<T>& step, cudaStream_t stream) {
  using Step = GenerationStep<T>;
  check_step(step);
  const int words = ceil_div(step.F, kWordBits);
  if (step.num_tokens == 1) {
    launch_step(generation_kernel<Step, encode_step<T, 1>, decode_step<T>>, step, words, 0, stream);
  } else if (step.num_tokens <= 8) {
    launch_step(generation_kernel<Step, encode_step<T, 8>, decode_step<T>>, step, words, 0, stream);
  } else {
    launch_step(generation_kernel<Step, encode_step<T, 32>, decode_step<T>>, step, words, 0, stream);
  }
}

}  // namespace tca_fast::cuda

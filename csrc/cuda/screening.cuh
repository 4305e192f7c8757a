// The generation step with an encoder that reads int8 weights and rescores what they leave open.
//
// The products with rounded weights and inputs are sums of integers, and exact. They differ from the
// encoder's own products by no more than a bound that Cauchy and Schwarz give (docs/screening.md has
// the proof). Features that the bound keeps below zero are inactive; the others are candidates, and
// for them the product is computed as `encode_step` computes it, in the same order. Activations and
// outputs are therefore those of `generation_step`, bit for bit, for every input.
//
// Shapes: T tokens (1 to 8), D model width, F features.
//
// Weights are rounded to 8 bits, once, with a scale for each row; inputs to 16 bits, in two halves of
// 8, by each block, so that outliers of the input cost nothing. What is not finite, or so large or so
// small that floats could overflow or vanish, has an error of infinity: a candidate everywhere.
//
// Bytes at D = 3584, F = 8192, bfloat16: F D = 29 MB of int8 weights, 7 kB for each candidate, beside
// 2 D for each active pair. Operations: two instructions for four products and each token.
// Predicted for a token (H100, docs/kernels.md; 5 us for the launch, the wait and the rounding of x):
// 0.017 ms, where `generation_step` takes 0.027 ms. Shared memory: 2 T D bytes.
#pragma once

#include "generation.cuh"

namespace tca_fast::cuda {

constexpr int kMostScreenedTokens = 8;
constexpr int kMostScreenedWidth = 1 << 16;
constexpr float kWeightLevels = 127, kInputLevels = 32639;  // 127 * 256 + 127
// Outside of these, float arithmetic on products could overflow or lose a whole term.
constexpr float kSmallestScreened = 0x1p-100f, kLargestScreened = 0x1p50f;
// What rounding does to sums of squares and to the bound itself, and to a remainder of a rounding.
constexpr float kRoundedUp = 1.001f, kRemainderError = 0x1p-20f;
constexpr float kVanishing = 0x1p-120f;
constexpr float kUnitRoundoff = 0x1p-24f;

// How a vector w was rounded to scale * q: error >= |w - scale q| and norm >= |w|.
struct Rounded {
  float scale, error, norm;
};

// Adds what component `value`, rounded to `level`, contributes, in units of the scale.
__host__ __device__ __forceinline__ void add_rounded(
    float value, float level, float scale, float& error_squares, float& squares) {
  const float remainder = fmaf(-scale, level, value) / scale, relative = value / scale;
  error_squares += remainder * remainder;
  squares += relative * relative;
}

// From the largest magnitude and the sums of add_rounded.
__host__ __device__ __forceinline__ Rounded rounded(
    float scale, float error_squares, float squares) {
  return {scale, scale * (sqrtf(error_squares) * kRoundedUp + kRemainderError),
          scale * sqrtf(squares) * kRoundedUp};
}

__host__ __device__ __forceinline__ bool can_be_screened(float largest) {
  return largest == 0 || (largest >= kSmallestScreened && largest <= kLargestScreened);
}

// What a vector is where nothing is known of its products.
__host__ __device__ __forceinline__ Rounded unknown() { return {0, INFINITY, INFINITY}; }

// Whether the float product of w and x, plus `bias`, may be positive or NaN. `levels` is the product
// of the levels, and D the number of terms.
__host__ __device__ __forceinline__ bool is_candidate(
    int64_t levels, const Rounded& w, const Rounded& x, float bias, int D) {
  const float estimate = static_cast<float>(levels) * w.scale * x.scale;
  const float both = (w.norm + w.error) * (x.norm + x.error);
  const float rounding = static_cast<float>(D / kWarpSize + 32) * kUnitRoundoff;
  const float bound =
      (x.norm * w.error + x.error * (w.norm + w.error) + rounding * both) * kRoundedUp + kVanishing;
  // Nothing is ruled out by an infinite bound, not even by a bias of -inf: the sum may be NaN.
  return !(bound < INFINITY && estimate + bound <= -bias);
}

// The high and low half of a level of the input: 256 high + low, each within -128..127.
__host__ __device__ __forceinline__ int high_half(int level) { return (level + 128) >> 8; }
__host__ __device__ __forceinline__ int low_half(int level) { return level - 256 * high_half(level); }

// sum + the product of four int8 numbers each.
__device__ __forceinline__ int add_four(int a, int b, int sum) {
#ifdef __CUDACC__
  return __dp4a(a, b, sum);
#else
  for (int shift = 0; shift < 32; shift += 8) {
    sum += static_cast<int8_t>(a >> shift) * static_cast<int8_t>(b >> shift);
  }
  return sum;
#endif
}

// Rounds a vector of D numbers by a warp; store(d, level) takes the levels.
template <typename T, typename Store>
__device__ __forceinline__ Rounded round_vector(
    const T* vector, int D, float levels, const Store& store) {
  const int lane = threadIdx.x % kWarpSize;
  unsigned bits = 0;  // of the largest magnitude: they order as it does, NaN last
  for (int d = lane; d < D; d += kWarpSize) {
    const unsigned magnitude = __float_as_uint(fabsf(static_cast<float>(vector[d])));
    bits = magnitude > bits ? magnitude : bits;
  }
  const float largest = __uint_as_float(__reduce_max_sync(kAllLanes, bits));
  const bool is_known = can_be_screened(largest);
  const float scale = is_known ? largest / levels : 0;
  float error_squares = 0, squares = 0;
  for (int d = lane; d < D; d += kWarpSize) {
    const float value = static_cast<float>(vector[d]);
    const float level = scale > 0 ? rintf(value / scale) : 0;
    store(d, static_cast<int>(level));
    if (scale > 0) {
      add_rounded(value, level, scale, error_squares, squares);
    }
  }
  error_squares = warp_sum(error_squares);
  squares = warp_sum(squares);
  return is_known ? rounded(scale, error_squares, squares) : unknown();
}

// Rounded weights q [F, D] and what is known of each row [F]; a warp a row.
template <typename T>
__global__ void __launch_bounds__(kStepThreads)
round_weights_kernel(const T* W, int8_t* q, Rounded* rows, int F, int D) {
  const int f = blockIdx.x * kStepWarps + threadIdx.x / kWarpSize;
  if (f >= F) {
    return;
  }
  const Rounded row = round_vector(W + int64_t{f} * D, D, kWeightLevels, [&](int d, int level) {
    q[int64_t{f} * D + d] = static_cast<int8_t>(level);
  });
  if (threadIdx.x % kWarpSize == 0) {
    rows[f] = row;
  }
}

template <typename T>
struct ScreenedStep : GenerationStep<T> {
  const int8_t* q;      // [F, D]
  const Rounded* rows;  // [F]
};

template <typename T>
__device__ void encode_screened(const ScreenedStep<T>& step) {
  constexpr int kTokens = kMostScreenedTokens, kRows = kFeaturesOfWarp;
  SHARED_ARRAY(Rounded, tokens, kTokens);
  int8_t* high = dynamic_shared<int8_t>();
  int8_t* low = high + step.num_tokens * step.D;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  if (warp < step.num_tokens) {
    int8_t* own_high = high + warp * step.D;
    int8_t* own_low = low + warp * step.D;
    const Rounded token =
        round_vector(step.x + int64_t{warp} * step.D, step.D, kInputLevels, [&](int d, int level) {
          own_high[d] = static_cast<int8_t>(high_half(level));
          own_low[d] = static_cast<int8_t>(low_half(level));
        });
    if (lane == 0) {
      tokens[warp] = token;
    }
  }
  __syncthreads();

  const int num_words = ceil_div(step.F, kWordBits);
  for (int word = blockIdx.x; word < num_words; word += gridDim.x) {
    const int first = word * kWordBits + warp * kRows;
    int high_sums[kRows][kTokens] = {}, low_sums[kRows][kTokens] = {};
    for (int d = lane * 16; d < step.D; d += kWarpSize * 16) {
      Vector<int> q[kRows];
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        if (first + row < step.F) {
          q[row] = load16(reinterpret_cast<const int*>(step.q + int64_t{first + row} * step.D + d));
        } else {
          q[row] = {};
        }
      }
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        if (t < step.num_tokens) {
          const auto x_high = load16(reinterpret_cast<const int*>(high + t * step.D + d));
          const auto x_low = load16(reinterpret_cast<const int*>(low + t * step.D + d));
#pragma unroll
          for (int row = 0; row < kRows; ++row) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              high_sums[row][t] = add_four(q[row].item[i], x_high.item[i], high_sums[row][t]);
              low_sums[row][t] = add_four(q[row].item[i], x_low.item[i], low_sums[row][t]);
            }
          }
        }
      }
    }
    uint32_t bits = 0;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      int64_t levels = 0;
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        if (t < step.num_tokens) {
          const int high_sum = __reduce_add_sync(kAllLanes, high_sums[row][t]);
          const int low_sum = __reduce_add_sync(kAllLanes, low_sums[row][t]);
          levels = lane == t ? int64_t{high_sum} * 256 + low_sum : levels;
        }
      }
      const int f = first + row;
      bool is_open = false;
      if (lane < step.num_tokens && f < step.F) {
        is_open = is_candidate(
            levels, step.rows[f], tokens[lane], static_cast<float>(step.b_enc[f]), step.D);
      }
      const uint32_t candidates = __ballot_sync(kAllLanes, is_open);
      if (candidates != 0) {
        float products[1];
        dot_products<1, kTokens>(step, f, candidates, products);
        const bool is_active = is_open && activate(step, f, products[0]);
        bits |= static_cast<uint32_t>(is_active) << (warp * kRows + row);
      }
    }
    store_words(step, word, bits);
  }
}

template <typename T>
__device__ void decode_screened(const ScreenedStep<T>& step) {
  decode_step<T>(step);
}

// Rounds W [F, D] for `screened_generation_step`; once for weights that stay.
template <typename T>
void round_weights(const T* W, int8_t* q, Rounded* rows, int F, int D, cudaStream_t stream) {
  launch(
      round_weights_kernel<T>, dim3(static_cast<unsigned>(ceil_div(F, kStepWarps))), kStepThreads,
      0, stream, W, q, rows, F, D);
}

// The bits of `generation_step`, for 1 to 8 tokens of a width that is a multiple of 16.
template <typename T>
void screened_generation_step(const ScreenedStep<T>& step, cudaStream_t stream) {
  check_step<T>(step);
  if (step.num_tokens > kMostScreenedTokens) {
    throw std::runtime_error(
        "x: " + std::to_string(step.num_tokens) + " tokens, expected at most " +
        std::to_string(kMostScreenedTokens));
  }
  if (step.D % 16 != 0 || step.D > kMostScreenedWidth) {
    throw std::runtime_error(
        "x: a width of " + std::to_string(step.D) + ", expected a multiple of 16 up to " +
        std::to_string(kMostScreenedWidth));
  }
  launch_step(
      generation_kernel<ScreenedStep<T>, encode_screened<T>, decode_screened<T>>, step,
      static_cast<int>(ceil_div(step.F, kWordBits)), size_t{2} * step.num_tokens * step.D, stream);
}

}  // namespace tca_fast::cuda

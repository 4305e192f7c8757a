// The regime in which so much is active that dense products win, fused around the products.
//
// Shapes: T tokens, F features, D model width, W = ceil(F / 32) words of 32 features. Every kernel
// takes a condition, row_ptr[T] > C, and does nothing without it: a pass that overflows its packed
// arena goes this way without the host having to know. The products are the vendor's library's;
// that library cannot be told on the device not to run, so on the condition `product_kernel` runs
// instead. It multiplies floats without tensor cores: exact, and slow by design, since it is the way
// out of a rare case and must only cost a launch in the others.
//
// Bytes and predicted times at T = F = 8192, D = 3584, bfloat16, H100 (docs/kernels.md):
//   affine                4 bytes a number, 6 with a base
//   activate              T F 4 + T F / 8 = 277 MB               0.11 ms
//   activation_backward   T F 6 = 403 MB and 8 F a chunk         0.16 ms
//   finish                F D 6 where the L1 counts, else F      0.07 ms
//   product               2 T D F = 481 GFLOP at 30 TFLOP/s      16 ms; 0.004 ms where it does nothing
#pragma once

#include "compact.cuh"
#include "gather.cuh"

namespace tca_fast::cuda {

constexpr int kDenseThreads = 128;
// Tokens whose sums over the columns one block adds up.
constexpr int kChunkTokens = 64;

// Turns pre-activations into activations, in place: 0 where the bit is not set, or, without bits,
// where nothing is active.
template <typename T, int V>
__global__ void __launch_bounds__(kDenseThreads)
activate_kernel(T* z, const uint32_t* bits, int64_t num_tokens, int64_t F, Overflow overflow) {
  const int64_t f = (int64_t{blockIdx.y} * kDenseThreads + threadIdx.x) * V, t = blockIdx.x;
  if (f >= F || !overflow.holds()) {
    return;
  }
  const uint32_t word =
      bits == nullptr ? 0 : bits[t * ceil_div(F, kWordBits) + f / kWordBits] >> f % kWordBits;
  const auto loaded = Numbers<T, V>::load(z + t * F + f);
  float activation[V];
  for (int i = 0; i < V; ++i) {
    const bool active = bits == nullptr ? is_active(loaded[i]) : word >> i & 1;
    activation[i] = active ? loaded[i] : 0.0f;
  }
  Numbers<T, V>::store(z + t * F + f, activation);
}

// out[r, c] = scale[c] in[r, c] + base[r, c] + bias[c], where `out` may be `in`; `scale`, `base` and
// `bias` may be null.
template <typename T, int V>
__global__ void __launch_bounds__(kDenseThreads)
affine_kernel(
    const T* in, const T* scale, const T* base, const T* bias, T* out, int64_t columns) {
  const int64_t c = (int64_t{blockIdx.y} * kDenseThreads + threadIdx.x) * V;
  if (c >= columns) {
    return;
  }
  const int64_t at = int64_t{blockIdx.x} * columns + c;
  const auto loaded = Numbers<T, V>::load(in + at);
  const auto added =
      base == nullptr ? Numbers<T, V>::zeros() : Numbers<T, V>::load(base + at);
  float result[V];
  for (int i = 0; i < V; ++i) {
    result[i] = loaded[i];
    result[i] *= scale == nullptr ? 1.0f : static_cast<float>(scale[c + i]);
    result[i] += added[i];
    result[i] += bias == nullptr ? 0.0f : static_cast<float>(bias[c + i]);
  }
  Numbers<T, V>::store(out + at, result);
}

// What the activation's backward reads; `gain` and `grad_l1` may be null.
template <typename T>
struct ActivationBackward {
  const T* features;    // [T, F]
  const float* norm;    // [F]
  const T* gain;        // [F]
  L1 l1;
  float* bias_sum;      // [chunks, F], of da
  float* active_sum;    // [chunks, F], of the real tokens' activations
};

// da = g da + dl1 m_t |W_dec[f]| where active, 0 elsewhere, in place, with the sums of the chunk.
template <typename T, int V, typename A>
__global__ void __launch_bounds__(kDenseThreads)
activation_backward_kernel(
    ActivationBackward<T> in, A* da, int64_t num_tokens, int64_t F, Overflow overflow) {
  const int64_t f = (int64_t{blockIdx.y} * kDenseThreads + threadIdx.x) * V;
  if (f >= F || !overflow.holds()) {
    return;
  }
  const float dl1 = in.l1.grad == nullptr ? 0.0f : *in.l1.grad;
  float of_norm[V], g[V], bias[V], active[V];
  for (int i = 0; i < V; ++i) {
    of_norm[i] = dl1 == 0 ? 0.0f : dl1 * in.norm[f + i];
    g[i] = in.gain == nullptr ? 1.0f : static_cast<float>(in.gain[f + i]);
    bias[i] = active[i] = 0;
  }
  const int64_t first = int64_t{blockIdx.x} * kChunkTokens;
  const int64_t last = num_tokens < first + kChunkTokens ? num_tokens : first + kChunkTokens;
#pragma unroll 4
  for (int64_t t = first; t < last; ++t) {
    const bool is_real = in.l1.token_mask == nullptr || in.l1.token_mask[t];
    const auto a = Numbers<T, V>::load(in.features + t * F + f);
    const auto upstream = Numbers<A, V>::load(da + t * F + f);
    float result[V];
    for (int i = 0; i < V; ++i) {
      const float value = g[i] * upstream[i] + (is_real ? of_norm[i] : 0.0f);
      result[i] = a[i] != 0 ? value : 0.0f;
      bias[i] += result[i];
      active[i] += is_real ? a[i] : 0.0f;
    }
    Numbers<A, V>::store(da + t * F + f, result);
  }
  for (int i = 0; i < V; ++i) {
    in.bias_sum[int64_t{blockIdx.x} * F + f + i] = bias[i];
    in.active_sum[int64_t{blockIdx.x} * F + f + i] = active[i];
  }
}

// db_enc[f] is the sum of da, and dW_dec[f] += dl1 (sum_t m_t a) W_dec[f] / |W_dec[f]|; a warp a
// feature.
template <typename T, int V>
__global__ void __launch_bounds__(kTokensPerBlock * kWarpSize)
finish_kernel(
    ActivationBackward<T> in, const T* W_dec, T* db, T* dW, int64_t num_chunks, int64_t F,
    int64_t D, Overflow overflow) {
  const int64_t f = int64_t{blockIdx.x} * kTokensPerBlock + threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  if (f >= F || !overflow.holds()) {
    return;
  }
  float bias = 0, active = 0;
  for (int64_t chunk = lane; chunk < num_chunks; chunk += kWarpSize) {
    bias += in.bias_sum[chunk * F + f];
    active += in.active_sum[chunk * F + f];
  }
  bias = warp_sum(bias);
  active = warp_sum(active);
  if (lane == 0) {
    db[f] = T(bias);
  }
  const float dl1 = in.l1.grad == nullptr ? 0.0f : *in.l1.grad, norm = in.norm[f];
  if (dl1 == 0 || norm == 0) {
    return;
  }
  const float along = dl1 * active / norm;
  for (int64_t d = lane * V; d < D; d += kWarpSize * V) {
    const auto w = Numbers<T, V>::load(W_dec + f * D + d);
    const auto sum = Numbers<T, V>::load(dW + f * D + d);
    float result[V];
    for (int i = 0; i < V; ++i) {
      result[i] = sum[i] + along * w[i];
    }
    Numbers<T, V>::store(dW + f * D + d, result);
  }
}

constexpr int kProductTile = 64, kProductDepth = 16, kProductThreads = 256;

// A matrix and how far its rows and its columns lie apart.
template <typename T>
struct Matrix {
  const T* data;
  int64_t row, column;
};

// What a product is made of; all but `a` and `b` may be null. A float `a` is not rounded to T.
template <typename A, typename T>
struct Factors {
  Matrix<A> a;
  Matrix<T> b;
  const T* scale_of_k = nullptr;   // [K]
  const T* scale_of_row = nullptr; // [M]
  const T* base = nullptr;         // [M, N]
  const T* bias = nullptr;         // [N]
};

// out[m, n] = base + bias + scale_of_row[m] sum_k scale_of_k[k] a[m, k] b[k, n], on overflow. A block
// computes a tile of 64 by 64, a thread 4 by 4 of it.
template <typename A, typename T, typename Out>
__global__ void __launch_bounds__(kProductThreads)
product_kernel(
    Factors<A, T> in, Out* out, int64_t M, int64_t N, int64_t K, Overflow overflow) {
  constexpr int kOwn = 4, kSide = kProductTile / kOwn;
  SHARED_ARRAY(float, left, kProductDepth * (kProductTile + 1));
  SHARED_ARRAY(float, right, kProductDepth * (kProductTile + 1));
  if (!overflow.holds()) {
    return;
  }
  const int64_t first_m = int64_t{blockIdx.x} * kProductTile;
  const int64_t first_n = int64_t{blockIdx.y} * kProductTile;
  const int own_m = threadIdx.x / kSide, own_n = threadIdx.x % kSide;
  float total[kOwn][kOwn] = {};
  for (int64_t first_k = 0; first_k < K; first_k += kProductDepth) {
    for (int i = threadIdx.x; i < kProductDepth * kProductTile; i += kProductThreads) {
      // Neighbouring threads read neighbouring numbers, whichever way the matrix is stored.
      const bool a_by_k = in.a.column == 1, b_by_k = in.b.row == 1;
      const int m = a_by_k ? i / kProductDepth : i % kProductTile;
      const int k_a = a_by_k ? i % kProductDepth : i / kProductTile;
      const int n = b_by_k ? i / kProductDepth : i % kProductTile;
      const int k_b = b_by_k ? i % kProductDepth : i / kProductTile;
      const int64_t at_a = first_k + k_a, at_b = first_k + k_b;
      float of_a = 0, of_b = 0;
      if (first_m + m < M && at_a < K) {
        of_a = static_cast<float>(in.a.data[(first_m + m) * in.a.row + at_a * in.a.column]);
        of_a *= in.scale_of_k == nullptr ? 1.0f : static_cast<float>(in.scale_of_k[at_a]);
      }
      if (first_n + n < N && at_b < K) {
        of_b = static_cast<float>(in.b.data[at_b * in.b.row + (first_n + n) * in.b.column]);
      }
      left[k_a * (kProductTile + 1) + m] = of_a;
      right[k_b * (kProductTile + 1) + n] = of_b;
    }
    __syncthreads();
    for (int k = 0; k < kProductDepth; ++k) {
      for (int i = 0; i < kOwn; ++i) {
        const float of_a = left[k * (kProductTile + 1) + own_m + i * kSide];
        for (int j = 0; j < kOwn; ++j) {
          total[i][j] += of_a * right[k * (kProductTile + 1) + own_n + j * kSide];
        }
      }
    }
    __syncthreads();
  }
  for (int i = 0; i < kOwn; ++i) {
    for (int j = 0; j < kOwn; ++j) {
      const int64_t m = first_m + own_m + i * kSide, n = first_n + own_n + j * kSide;
      if (m < M && n < N) {
        float result = total[i][j];
        result *= in.scale_of_row == nullptr ? 1.0f : static_cast<float>(in.scale_of_row[m]);
        result += in.bias == nullptr ? 0.0f : static_cast<float>(in.bias[n]);
        result += in.base == nullptr ? 0.0f : static_cast<float>(in.base[m * N + n]);
        out[m * N + n] = Out(result);
      }
    }
  }
}

inline dim3 grid_of(int64_t rows, int64_t columns, int V) {
  return dim3(
      static_cast<unsigned>(rows), static_cast<unsigned>(ceil_div(columns, kDenseThreads * V)));
}

template <typename T, int V>
void affine(
    const T* in, const T* scale, const T* base, const T* bias, T* out, int64_t rows,
    int64_t columns, cudaStream_t stream) {
  launch(
      affine_kernel<T, V>, grid_of(rows, columns, V), kDenseThreads, 0, stream, in, scale, base,
      bias, out, columns);
}

template <typename T, int V>
void activate(
    T* z, const uint32_t* bits, int64_t num_tokens, int64_t F, Overflow overflow,
    cudaStream_t stream) {
  launch(
      activate_kernel<T, V>, grid_of(num_tokens, F, V), kDenseThreads, 0, stream, z, bits,
      num_tokens, F, overflow);
}

inline int64_t num_chunks(int64_t num_tokens) { return ceil_div(num_tokens, kChunkTokens); }

template <typename T, int V, typename A>
void activation_backward(
    const ActivationBackward<T>& in, A* da, int64_t num_tokens, int64_t F, Overflow overflow,
    cudaStream_t stream) {
  launch(
      activation_backward_kernel<T, V, A>, grid_of(num_chunks(num_tokens), F, V), kDenseThreads, 0,
      stream, in, da, num_tokens, F, overflow);
}

template <typename T, int V>
void finish(
    const ActivationBackward<T>& in, const T* W_dec, T* db, T* dW, int64_t num_tokens, int64_t F,
    int64_t D, Overflow overflow, cudaStream_t stream) {
  launch(
      finish_kernel<T, V>, blocks_of_rows(F), kTokensPerBlock * kWarpSize, 0, stream, in, W_dec, db,
      dW, num_chunks(num_tokens), F, D, overflow);
}

template <typename A, typename T, typename Out>
void overflow_product(
    const Factors<A, T>& in, Out* out, int64_t M, int64_t N, int64_t K, Overflow overflow,
    cudaStream_t stream) {
  const dim3 grid(
      static_cast<unsigned>(ceil_div(M, kProductTile)),
      static_cast<unsigned>(ceil_div(N, kProductTile)));
  launch(product_kernel<A, T, Out>, grid, kProductThreads, 0, stream, in, out, M, N, K, overflow);
}

}  // namespace tca_fast::cuda

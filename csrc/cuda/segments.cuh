// Gradients of the weights, one feature at a time: every row is read once, every gradient written once.
//
// Shapes: T tokens, D model width, F features, C capacity. The pairs are visited by feature
// (by_feature.cuh). Program p < F takes the first pairs of feature p, 256 or more; others take what follows in
// features that fire more often, so that a feature that always fires does not hold up the device.
//
//   decoder   da = g <dy_t, W_dec[f]> + dl1 m_t |W_dec[f]|,
//             dW_dec[f] = sum_t g a dy_t + dl1 (sum_t m_t a) W_dec[f] / |W_dec[f]|
//   encoder   dW_enc[f] = sum_t da x_t,  db_enc[f] = sum_t da
//   add       the segments of a feature that has several, in order
//
// The norm's gradient is 0 where the norm is 0. All sums run in one fixed order, in float.
//
// Bytes: a row of 2 D for each pair and kernel, through L2 (dy and x, 59 MB each, are larger), W_dec
// read once, each gradient written once: 4 x 59 MB beside 4 nnz D. Predicted at T = F = 8192,
// D = 3584, bfloat16, H100 (docs/kernels.md): decoder 0.07 ms and encoder 0.05 ms at L0 1.4
// (memory); 0.18 ms each at L0 10 (L2). Operations: 4 D and 2 D a pair.
#pragma once

#include "by_feature.cuh"
#include "gather.cuh"

namespace tca_fast::cuda {

// Tests split at fewer pairs.
#ifndef TCA_FAST_PAIRS_PER_SEGMENT
#define TCA_FAST_PAIRS_PER_SEGMENT 256
#endif
constexpr int64_t kPairsPerSegment = TCA_FAST_PAIRS_PER_SEGMENT, kMostExtraSegments = 4096;

// Sums of the segments of features that have several.
struct Partial {
  float* row;    // [2 most_extra, D]
  float* sum;    // [2 most_extra], of da, or of the real tokens' activations
  int64_t most_extra;
};

// The pairs and how they are split.
struct Pairs {
  ByFeature order;
  const int64_t* row_ptr;
  int64_t num_tokens, F, capacity, per_segment;
  Partial partial;

  __device__ __forceinline__ bool exist() const {
    return order.exists(row_ptr, num_tokens, F, capacity);
  }
  __device__ __forceinline__ Segment segment() const {
    return segment_of(
        blockIdx.x, order.col_ptr, order.extra_ptr, F, per_segment, partial.most_extra);
  }
  int64_t programs() const { return F + partial.most_extra; }
};

// The decoder's gradients of one segment. A block holds W_dec[f] and the sum of its gradient in
// registers, CHUNKS vectors a thread, and takes `kRows` rows of dy at a time.
template <typename T, int V, int CHUNKS>
__global__ void __launch_bounds__(kMostRowThreads)
decoder_segment_kernel(
    Pairs pairs, const T* value, const T* dy, const T* W_dec, const T* gain, L1 l1, float* da,
    T* dW, int64_t D) {
  constexpr int kRows = V == 1 ? 1 : CHUNKS * V <= 8 ? 4 : CHUNKS * V <= 16 ? 2 : 1;
  constexpr int kLanesOfRow = kWarpSize / kRows;
  // Two buffers: while the first warp adds up one batch, the others may be a batch ahead.
  SHARED_ARRAY(float, dots, 2 * kRows * (kMostRowThreads / kWarpSize));
  if (!pairs.exist()) {
    return;
  }
  const Segment segment = pairs.segment();
  const int64_t f = segment.feature;
  if (f >= pairs.F) {
    return;
  }
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int num_warps = blockDim.x / kWarpSize;
  Numbers<T, V> w[CHUNKS];
  float total[CHUNKS][V], squares = 0;
  int column[CHUNKS];
  bool in_row[CHUNKS];  // threads beyond the row read along, and add nothing
  for (int c = 0; c < CHUNKS; ++c) {
    const int d = (c * blockDim.x + threadIdx.x) * V;
    in_row[c] = d < D;
    column[c] = in_row[c] ? d : 0;
    w[c] = in_row[c] ? Numbers<T, V>::load(W_dec + f * D + d) : Numbers<T, V>::zeros();
    for (int i = 0; i < V; ++i) {
      squares += w[c][i] * w[c][i];
      total[c][i] = 0;
    }
  }
  const float dl1 = l1.grad == nullptr ? 0.0f : *l1.grad;
  const float norm = dl1 == 0 ? 0.0f : sqrtf(block_sum(squares));
  const float of_norm = dl1 == 0 ? 0.0f : dl1 * norm;
  const float g = gain == nullptr ? 1.0f : static_cast<float>(gain[f]);

  float active_sum = 0;
  int buffer = 0;
  for (int64_t start = segment.first; start < segment.last; start += kRows, buffer ^= 1) {
    float dot[kRows];
    // Only a batch that is full has no conditions, and so all of its loads on their way at once.
    const auto add_batch = [&](auto is_full) {
      Numbers<T, V> row[kRows][CHUNKS];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        dot[r] = 0;
        if (decltype(is_full)::value || start + r < segment.last) {
          const T* row_of_dy = dy + pairs.order.token[start + r] * D;
#pragma unroll
          for (int c = 0; c < CHUNKS; ++c) {
            row[r][c] = Numbers<T, V>::load(row_of_dy + column[c]);
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (decltype(is_full)::value || start + r < segment.last) {
          const float a = static_cast<float>(value[pairs.order.entry[start + r]]);
          active_sum += l1.counts(pairs.order.token[start + r]) ? a : 0.0f;
          const float scaled = g * a;
#pragma unroll
          for (int c = 0; c < CHUNKS; ++c) {
            for (int i = 0; i < V; ++i) {
              dot[r] += in_row[c] ? w[c][i] * row[r][c][i] : 0.0f;
              total[c][i] += scaled * row[r][c][i];
            }
          }
        }
      }
    };
    if (start + kRows <= segment.last) {
      add_batch(std::true_type());
    } else {
      add_batch(std::false_type());
    }
    const float of_warp = warp_sums<kRows>(dot);
    float* batch = dots + buffer * kRows * (kMostRowThreads / kWarpSize);
    if (lane < kRows) {
      batch[lane * num_warps + warp] = of_warp;
    }
    __syncthreads();
    if (warp == 0) {
      const int r = lane / kLanesOfRow;
      float sum = 0;
      for (int other = lane % kLanesOfRow; other < num_warps; other += kLanesOfRow) {
        sum += batch[r * num_warps + other];
      }
      for (int distance = 1; distance < kLanesOfRow; distance *= 2) {
        sum += __shfl_xor_sync(kAllLanes, sum, distance);
      }
      if (lane % kLanesOfRow == 0 && start + r < segment.last) {
        const bool counts = l1.counts(pairs.order.token[start + r]);
        da[pairs.order.entry[start + r]] = g * sum + (counts ? of_norm : 0.0f);
      }
    }
  }

  const bool is_alone = segment.part < 0;
  const float along = is_alone && dl1 != 0 && norm != 0 ? dl1 * active_sum / norm : 0.0f;
  for (int c = 0; c < CHUNKS; ++c) {
    const int d = column[c];
    if (!in_row[c]) {
      continue;
    }
    if (is_alone) {
      for (int i = 0; i < V; ++i) {
        total[c][i] += along * w[c][i];
      }
      Numbers<T, V>::store(dW + f * D + d, total[c]);
    } else {
      for (int i = 0; i < V; ++i) {
        pairs.partial.row[segment.part * D + d + i] = total[c][i];
      }
    }
  }
  if (!is_alone && threadIdx.x == 0) {
    pairs.partial.sum[segment.part] = active_sum;
  }
}

// The encoder's gradients of one segment and of the columns of one block.
template <typename T, typename C, int V>
__global__ void __launch_bounds__(kMostRowThreads)
encoder_segment_kernel(
    Pairs pairs, const C* da, const T* x, T* dW, T* db, int64_t D) {
  if (!pairs.exist()) {
    return;
  }
  const Segment segment = pairs.segment();
  const int64_t f = segment.feature;
  if (f >= pairs.F) {
    return;
  }
  const int64_t d = (int64_t{blockIdx.y} * blockDim.x + threadIdx.x) * V;
  const bool in_row = d < D;
  float total[V], sum = 0;
  for (int i = 0; i < V; ++i) {
    total[i] = 0;
  }
  const T* column = x + (in_row ? d : 0);  // threads beyond the row read along, and write nothing
  const auto add_batch = [&](auto is_full, int64_t start) {
    Numbers<T, V> row[kRowsInFlight];
#pragma unroll
    for (int r = 0; r < kRowsInFlight; ++r) {
      if (decltype(is_full)::value || start + r < segment.last) {
        row[r] = Numbers<T, V>::load(column + pairs.order.token[start + r] * D);
      }
    }
#pragma unroll
    for (int r = 0; r < kRowsInFlight; ++r) {
      if (decltype(is_full)::value || start + r < segment.last) {
        const float of_pair = static_cast<float>(da[pairs.order.entry[start + r]]);
        sum += of_pair;
        for (int i = 0; i < V; ++i) {
          total[i] += of_pair * row[r][i];
        }
      }
    }
  };
  int64_t start = segment.first;
  for (; start + kRowsInFlight <= segment.last; start += kRowsInFlight) {
    add_batch(std::true_type(), start);
  }
  if (start < segment.last) {
    add_batch(std::false_type(), start);
  }
  const bool writes_sum = blockIdx.y == 0 && threadIdx.x == 0;
  if (segment.part < 0) {
    if (in_row) {
      Numbers<T, V>::store(dW + f * D + d, total);
    }
    if (writes_sum) {
      db[f] = T(sum);
    }
    return;
  }
  for (int i = 0; in_row && i < V; ++i) {
    pairs.partial.row[segment.part * D + d + i] = total[i];
  }
  if (writes_sum) {
    pairs.partial.sum[segment.part] = sum;
  }
}

// Adds up, in order, the segments of a feature that has several; a block a feature. For the decoder
// with W_dec, whose norm's gradient comes last; for the encoder with db.
template <typename T>
__global__ void __launch_bounds__(kMostRowThreads)
add_segments_kernel(Pairs pairs, const T* W_dec, L1 l1, T* dW, T* db, int64_t D) {
  if (!pairs.exist()) {
    return;
  }
  const int64_t f = blockIdx.x;
  const int64_t* extra_ptr = pairs.order.extra_ptr;
  const int64_t num_segments = extra_ptr[f + 1] - extra_ptr[f] + 1;
  if (num_segments == 1) {
    return;
  }
  float sum = 0;
  for (int64_t number = 0; number < num_segments; ++number) {
    sum += pairs.partial.sum[part_of(f, number, extra_ptr, pairs.partial.most_extra)];
  }
  float along = 0;
  if (W_dec != nullptr && l1.grad != nullptr && *l1.grad != 0) {
    float squares = 0;
    for (int64_t d = threadIdx.x; d < D; d += blockDim.x) {
      const float w = static_cast<float>(W_dec[f * D + d]);
      squares += w * w;
    }
    const float norm = sqrtf(block_sum(squares));
    along = norm != 0 ? *l1.grad * sum / norm : 0.0f;
  }
  for (int64_t d = threadIdx.x; d < D; d += blockDim.x) {
    float total = 0;
    for (int64_t number = 0; number < num_segments; ++number) {
      total += pairs.partial.row[part_of(f, number, extra_ptr, pairs.partial.most_extra) * D + d];
    }
    if (along != 0) {
      total += along * static_cast<float>(W_dec[f * D + d]);
    }
    dW[f * D + d] = T(total);
  }
  if (db != nullptr && threadIdx.x == 0) {
    db[f] = T(sum);
  }
}

template <typename T>
void add_segments(
    const Pairs& pairs, const T* W_dec, L1 l1, T* dW, T* db, int64_t D, cudaStream_t stream) {
  if (pairs.partial.most_extra > 0) {
    launch(
        add_segments_kernel<T>, static_cast<unsigned>(pairs.F),
        threads_of_row(D, 1, kMostRowThreads), 0, stream, pairs, W_dec, l1, dW, db, D);
  }
}

// Vectors (V > 1) or single numbers of a row that the decoder's block holds at most.
template <int V>
constexpr int kMostChunks = V == 1 ? 8 : 4;

template <typename T, int V>
constexpr int64_t most_width() {
  return int64_t{kMostRowThreads} * V * kMostChunks<V>;
}

template <typename T, int V, int CHUNKS>
void decoder_segments(
    const Pairs& pairs, const T* value, const T* dy, const T* W_dec, const T* gain, L1 l1,
    float* da, T* dW, int64_t D, cudaStream_t stream) {
  if (CHUNKS < kMostChunks<V> && D > int64_t{kMostRowThreads} * V * CHUNKS) {
    if constexpr (CHUNKS < kMostChunks<V>) {
      decoder_segments<T, V, V == 1 ? 8 : 2 * CHUNKS>(
          pairs, value, dy, W_dec, gain, l1, da, dW, D, stream);
    }
    return;
  }
  launch(
      decoder_segment_kernel<T, V, CHUNKS>, static_cast<unsigned>(pairs.programs()),
      threads_of_row(ceil_div(D, CHUNKS), V, kMostRowThreads), 0, stream, pairs, value, dy, W_dec,
      gain, l1, da, dW, D);
  add_segments<T>(pairs, W_dec, l1, dW, nullptr, D, stream);
}

// The decoder's gradients: da [C] and dW_dec [F, D], for D up to `most_width`.
template <typename T, int V>
void decoder_gradients(
    const Pairs& pairs, const T* value, const T* dy, const T* W_dec, const T* gain, L1 l1,
    float* da, T* dW, int64_t D, cudaStream_t stream) {
  decoder_segments<T, V, 1>(pairs, value, dy, W_dec, gain, l1, da, dW, D, stream);
}

// The encoder's gradients: dW_enc [F, D] and db_enc [F].
template <typename T, typename C, int V>
void encoder_gradients(
    const Pairs& pairs, const C* da, const T* x, T* dW, T* db, int64_t D, cudaStream_t stream) {
  const unsigned threads = threads_of_row(D, V, kMostRowThreads);
  const dim3 grid(
      static_cast<unsigned>(pairs.programs()), static_cast<unsigned>(ceil_div(D, threads * V)));
  launch(encoder_segment_kernel<T, C, V>, grid, threads, 0, stream, pairs, da, x, dW, db, D);
  add_segments<T>(pairs, nullptr, L1{nullptr, nullptr}, dW, db, D, stream);
}

}  // namespace tca_fast::cuda

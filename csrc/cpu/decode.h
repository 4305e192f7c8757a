// The sparse forward pass from packed active features: the output, and the statistics beside it.
#pragma once

#include <vector>

#include "kernels.h"

namespace tca_fast {

// What the adapter reports beside its output. Masked tokens count in none of it.
template <typename T>
struct Statistics {
  Sum<T>* l1;     // [T], Σ_f a·‖W_dec[f]‖
  int32_t* l0;    // [T], active features
  bool* fired;    // [F]
};

template <typename T>
void statistics_of_packed(
    const int64_t* row_ptr, const int32_t* feature, const T* value, const T* W_dec,
    const bool* token_mask, Statistics<T> out, int64_t num_tokens, int64_t F, int64_t D) {
  std::fill(out.fired, out.fired + F, false);
  for (int64_t t = 0; t < num_tokens; ++t) {
    if (token_mask == nullptr || token_mask[t]) {
      for (int64_t e = row_ptr[t]; e < row_ptr[t + 1]; ++e) {
        out.fired[feature[e]] = true;
      }
    }
  }
  std::vector<Sum<T>> norm(F);
  row_norms(W_dec, out.fired, norm.data(), F, D);
  parallel_for(0, num_tokens, kTokensPerBlock, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const bool counts = token_mask == nullptr || token_mask[t];
      out.l1[t] = 0;
      out.l0[t] = counts ? static_cast<int32_t>(row_ptr[t + 1] - row_ptr[t]) : 0;
      for (int64_t e = row_ptr[t]; counts && e < row_ptr[t + 1]; ++e) {
        out.l1[t] += static_cast<Sum<T>>(value[e]) * norm[feature[e]];
      }
    }
  });
}

// What decodes: y[t] = base[t] + b_dec + Σ_f g_f·a_tf·W_dec[f], rounded once. `b_dec`, `gain` and
// `base` may be null.
template <typename T>
struct Decoder {
  const int64_t* row_ptr;
  const int32_t* feature;
  const T* value;
  const T* W_dec;
  const T* b_dec;
  const T* gain;
  const T* base;
  T* y;
  int64_t D;

  // Columns [first, last) of y[t], which begin at a block. `sum` has room for them. Unless null,
  // squares[e·blocks + block] becomes the squared length of that block of the row of entry e.
  void run(int64_t t, int64_t first, int64_t last, Sum<T>* sum, Sum<T>* squares) const {
    std::fill(sum, sum + (last - first), Sum<T>(0));
    for (int64_t e = row_ptr[t]; e < row_ptr[t + 1]; ++e) {
      const int64_t f = feature[e];
      const Sum<T> g = gain == nullptr ? Sum<T>(1) : static_cast<Sum<T>>(gain[f]);
      const Sum<T> scale = g * static_cast<Sum<T>>(value[e]);
      const T* row = W_dec + f * D;
      if (squares == nullptr) {
        add_scaled(sum, scale, row + first, last - first);
        continue;
      }
      if (e + 1 < row_ptr[t + 1]) {
        prefetch(W_dec + feature[e + 1] * D + first, last - first);
      }
      for (int64_t begin = first; begin < last; begin += kColumnsPerBlock) {
        const int64_t size = std::min(kColumnsPerBlock, last - begin);
        squares[e * column_blocks(D) + begin / kColumnsPerBlock] =
            dot(row + begin, row + begin, size);
        add_scaled(sum + (begin - first), scale, row + begin, size);
      }
    }
    if (b_dec != nullptr) {
      add_scaled(sum, Sum<T>(1), b_dec + first, last - first);
    }
    if (base != nullptr) {
      add_scaled(sum, Sum<T>(1), base + t * D + first, last - first);
    }
    convert(y + t * D + first, sum, last - first);
  }
};

template <typename T>
void decode_rows(const Decoder<T>& decoder, int64_t num_tokens) {
  parallel_for(0, num_tokens, kTokensPerBlock, [&](int64_t begin, int64_t end) {
    std::vector<Sum<T>> sum(decoder.D);
    for (int64_t t = begin; t < end; ++t) {
      decoder.run(t, 0, decoder.D, sum.data(), nullptr);
    }
  });
}

// Output and statistics of a few tokens, as in generation: they are split by column, and each row of
// W_dec is read once for both.
template <typename T>
void decode_few_rows(
    const Decoder<T>& decoder, const bool* token_mask, Statistics<T> out, int64_t num_tokens,
    int64_t F) {
  const int64_t* row_ptr = decoder.row_ptr;
  const int64_t D = decoder.D, blocks = column_blocks(D);
  std::vector<Sum<T>> squares(row_ptr[num_tokens] * blocks);
  parallel_for(0, num_tokens * blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<Sum<T>> sum(D);
    for (int64_t t = begin / blocks; t * blocks < end; ++t) {
      const int64_t first = std::max<int64_t>(begin - t * blocks, 0) * kColumnsPerBlock;
      const int64_t last = std::min(D, (end - t * blocks) * kColumnsPerBlock);
      decoder.run(t, first, last, sum.data(), squares.data());
    }
  });
  std::fill(out.fired, out.fired + F, false);
  for (int64_t t = 0; t < num_tokens; ++t) {
    const bool counts = token_mask == nullptr || token_mask[t];
    out.l1[t] = 0;
    out.l0[t] = counts ? static_cast<int32_t>(row_ptr[t + 1] - row_ptr[t]) : 0;
    for (int64_t e = row_ptr[t]; counts && e < row_ptr[t + 1]; ++e) {
      out.fired[decoder.feature[e]] = true;
      const Sum<T> norm = length_of(squares.data() + e * blocks, blocks);
      out.l1[t] += static_cast<Sum<T>>(decoder.value[e]) * norm;
    }
  }
}

}  // namespace tca_fast

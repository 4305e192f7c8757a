// The CPU kernels behind the operators: raw pointers in, raw pointers out, no checks.
//
// Shapes: T tokens, D model width, F features. Weights are [F, D], row-major. Work is split by
// token or by feature, and every sum has one fixed order, so results are bitwise equal at any number
// of threads. Optional pointers may be null.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "activation.h"
#include "packed.h"
#include "rows.h"

namespace tca_fast {

using torch::stable::parallel_for;

constexpr int64_t kTokensPerBlock = 16;
constexpr int64_t kFeaturesPerBlock = 32;
constexpr int64_t kColumnsPerBlock = 256;
// A feature that fires for more tokens than this is split, so that one that always fires does not
// keep a single thread busy; the pieces are added in order.
constexpr int64_t kTokensPerSegment = 512;

inline int64_t column_blocks(int64_t D) { return (D + kColumnsPerBlock - 1) / kColumnsPerBlock; }

// The length of a row, from the squared lengths of its blocks.
template <typename S>
S length_of(const S* squares, int64_t num_blocks) {
  S sum = 0;
  for (int64_t block = 0; block < num_blocks; ++block) {
    sum += squares[block];
  }
  return std::sqrt(sum);
}

// ‖row‖, with the same bits as by `length_of`.
template <typename T>
Sum<T> row_norm(const T* row, int64_t D) {
  Sum<T> sum = 0;
  for (int64_t begin = 0; begin < D; begin += kColumnsPerBlock) {
    sum += dot(row + begin, row + begin, std::min(kColumnsPerBlock, D - begin));
  }
  return std::sqrt(sum);
}

// norm[f] = ‖W_dec[f]‖ where wanted[f]; the others are not read. Null wants all.
template <typename T>
void row_norms(const T* W_dec, const bool* wanted, Sum<T>* norm, int64_t F, int64_t D) {
  parallel_for(0, F, kFeaturesPerBlock, [=](int64_t begin, int64_t end) {
    for (int64_t f = begin; f < end; ++f) {
      if (wanted == nullptr || wanted[f]) {
        norm[f] = row_norm(W_dec + f * D, D);
      }
    }
  });
}

// The active features found by one streaming pass over the pre-activations.
template <typename T>
struct Scan {
  std::vector<std::vector<Active<T>>> blocks;  // of kTokensPerBlock tokens each
  std::vector<int64_t> row_ptr;                // [T + 1]
};

template <typename T>
Scan<T> scan(
    const T* z, const T* b_enc, std::optional<int64_t> k, int64_t num_tokens, int64_t F) {
  const int64_t num_blocks = (num_tokens + kTokensPerBlock - 1) / kTokensPerBlock;
  Scan<T> found;
  found.blocks.resize(num_blocks);
  found.row_ptr.assign(num_tokens + 1, 0);
  parallel_for(0, num_blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      std::vector<Active<T>>& active = found.blocks[block];
      const int64_t last = std::min(num_tokens, (block + 1) * kTokensPerBlock);
      for (int64_t t = block * kTokensPerBlock; t < last; ++t) {
        const size_t first = active.size();
        collect_active(z + t * F, b_enc, F, k, active);
        found.row_ptr[t + 1] = static_cast<int64_t>(active.size() - first);
      }
    }
  });
  for (int64_t t = 0; t < num_tokens; ++t) {
    found.row_ptr[t + 1] += found.row_ptr[t];
  }
  return found;
}

// Moves what a scan found into the packed arrays; the caller knows that it fits.
template <typename T>
void fill_packed(const Scan<T>& found, int32_t* feature, T* value) {
  parallel_for(0, found.blocks.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      int64_t e = found.row_ptr[block * kTokensPerBlock];
      for (const Active<T>& one : found.blocks[block]) {
        feature[e] = one.feature;
        value[e++] = one.value;
      }
    }
  });
}

// Upstream gradients of the adapter's two differentiable results.
template <typename T>
struct Upstream {
  const T* y;              // [T, D]
  Sum<T> l1;               // of the L1 summed over tokens; 0 leaves it out
  const bool* token_mask;  // [T] or null
};

// Where a feature's gradients go. The encoder's may be null together.
template <typename T>
struct FeatureGradients {
  T* W_enc;    // [F, D]
  T* b_enc;    // [F]
  T* W_dec;    // [F, D]
  Sum<T>* da;  // [entries], of every active activation
};

// Sums over the active tokens of one feature.
template <typename T>
struct FeatureSums {
  std::vector<Sum<T>> W_enc, W_dec;
  Sum<T> b_enc = 0, active = 0;

  void clear(int64_t D, bool encoder) {
    W_dec.assign(D, 0);
    W_enc.assign(encoder ? D : 0, 0);
    b_enc = active = 0;
  }

  void add(const FeatureSums& other) {
    for (size_t i = 0; i < W_dec.size(); ++i) {
      W_dec[i] += other.W_dec[i];
    }
    for (size_t i = 0; i < W_enc.size(); ++i) {
      W_enc[i] += other.W_enc[i];
    }
    b_enc += other.b_enc;
    active += other.active;
  }
};

// Gradients of every feature in one pass over active pairs:
//   da = g·⟨dy_t, W_dec[f]⟩ + dl1·m_t·‖W_dec[f]‖
//   dW_dec[f] = Σ_t g·a·dy_t + dl1·(Σ_t m_t·a)·W_dec[f]/‖W_dec[f]‖
//   dW_enc[f] = Σ_t da·x_t,  db_enc[f] = Σ_t da
// Reads two rows of D numbers for each pair and writes each gradient row once. The norm's gradient
// is taken as 0 where the norm is 0.
template <typename T>
class BackwardByFeature {
 public:
  const ByFeature& pairs;
  const T* value;
  const T* x;
  const T* W_dec;
  const T* gain;
  Upstream<T> upstream;
  FeatureGradients<T> gradients;
  int64_t D;

  void run(int64_t F) const {
    parallel_for(0, F, kFeaturesPerBlock, [&](int64_t begin, int64_t end) {
      FeatureSums<T> sums;
      for (int64_t f = begin; f < end; ++f) {
        if (count(f) <= kTokensPerSegment) {
          sums.clear(D, encoder());
          accumulate(f, pairs.start[f], pairs.start[f + 1], sums);
          write(f, sums);
        }
      }
    });
    for (int64_t f = 0; f < F; ++f) {
      if (count(f) > kTokensPerSegment) {
        run_in_segments(f);
      }
    }
  }

 private:
  int64_t count(int64_t f) const { return pairs.start[f + 1] - pairs.start[f]; }
  bool encoder() const { return gradients.W_enc != nullptr; }
  Sum<T> norm(int64_t f) const {
    return upstream.l1 == 0 ? 0 : row_norm(W_dec + f * D, D);
  }

  void accumulate(int64_t f, int64_t first, int64_t last, FeatureSums<T>& sums) const {
    if (first == last) {
      return;
    }
    const Sum<T> g = gain == nullptr ? Sum<T>(1) : static_cast<Sum<T>>(gain[f]);
    const Sum<T> l1 = upstream.l1 * norm(f);
    for (int64_t slot = first; slot < last; ++slot) {
      const int64_t t = pairs.token[slot], e = pairs.entry[slot];
      const T* dy = upstream.y + t * D;
      const Sum<T> a = static_cast<Sum<T>>(value[e]);
      Sum<T> da = g * dot(dy, W_dec + f * D, D);
      if (upstream.l1 != 0 && (upstream.token_mask == nullptr || upstream.token_mask[t])) {
        da += l1;
        sums.active += a;
      }
      gradients.da[e] = da;
      add_scaled(sums.W_dec.data(), g * a, dy, D);
      if (encoder()) {
        add_scaled(sums.W_enc.data(), da, x + t * D, D);
        sums.b_enc += da;
      }
    }
  }

  void write(int64_t f, FeatureSums<T>& sums) const {
    if (sums.active != 0) {
      if (const Sum<T> length = norm(f); length != 0) {
        add_scaled(sums.W_dec.data(), upstream.l1 * sums.active / length, W_dec + f * D, D);
      }
    }
    convert(gradients.W_dec + f * D, sums.W_dec.data(), D);
    if (encoder()) {
      convert(gradients.W_enc + f * D, sums.W_enc.data(), D);
      gradients.b_enc[f] = static_cast<T>(sums.b_enc);
    }
  }

  void run_in_segments(int64_t f) const {
    const int64_t first = pairs.start[f], last = pairs.start[f + 1];
    const int64_t num_segments = (last - first + kTokensPerSegment - 1) / kTokensPerSegment;
    std::vector<FeatureSums<T>> sums(num_segments);
    parallel_for(0, num_segments, 1, [&](int64_t begin, int64_t end) {
      for (int64_t segment = begin; segment < end; ++segment) {
        const int64_t start = first + segment * kTokensPerSegment;
        sums[segment].clear(D, encoder());
        accumulate(f, start, std::min(last, start + kTokensPerSegment), sums[segment]);
      }
    });
    for (int64_t segment = 1; segment < num_segments; ++segment) {
      sums[0].add(sums[segment]);
    }
    write(f, sums[0]);
  }
};

// dW_enc[f] = Σ_t da·x_t and db_enc[f] = Σ_t da over the active tokens of every feature.
template <typename T>
void encoder_gradients(
    const ByFeature& pairs, const Sum<T>* da, const T* x, T* dW_enc, T* db_enc, int64_t F,
    int64_t D) {
  parallel_for(0, F, kFeaturesPerBlock, [&](int64_t begin, int64_t end) {
    std::vector<Sum<T>> row(D);
    for (int64_t f = begin; f < end; ++f) {
      std::fill(row.begin(), row.end(), Sum<T>(0));
      Sum<T> bias = 0;
      for (int64_t slot = pairs.start[f]; slot < pairs.start[f + 1]; ++slot) {
        add_scaled(row.data(), da[pairs.entry[slot]], x + pairs.token[slot] * D, D);
        bias += da[pairs.entry[slot]];
      }
      convert(dW_enc + f * D, row.data(), D);
      db_enc[f] = static_cast<T>(bias);
    }
  });
}

// out[t] = Σ_f d_tf·W[f] over the packed pairs of t.
template <typename T>
void scatter_rows(
    const int64_t* row_ptr, const int32_t* feature, const Sum<T>* d, const T* W, T* out,
    int64_t num_tokens, int64_t D) {
  parallel_for(0, num_tokens, kTokensPerBlock, [=](int64_t begin, int64_t end) {
    std::vector<Sum<T>> row(D);
    for (int64_t t = begin; t < end; ++t) {
      std::fill(row.begin(), row.end(), Sum<T>(0));
      for (int64_t e = row_ptr[t]; e < row_ptr[t + 1]; ++e) {
        add_scaled(row.data(), d[e], W + static_cast<int64_t>(feature[e]) * D, D);
      }
      convert(out + t * D, row.data(), D);
    }
  });
}

// out[i] = Σ_t rows[t, i], token by token.
template <typename T>
void column_sums(const T* rows, T* out, int64_t num_tokens, int64_t D) {
  constexpr int64_t kColumns = 128;
  parallel_for(0, (D + kColumns - 1) / kColumns, 1, [=](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kColumns, size = std::min(kColumns, D - first);
      Sum<T> sums[kColumns] = {};
      for (int64_t t = 0; t < num_tokens; ++t) {
        add_scaled(sums, Sum<T>(1), rows + t * D + first, size);
      }
      convert(out + first, sums, size);
    }
  });
}

}  // namespace tca_fast

// The dense regime, for layers where a large share of all features fires (as at initialisation):
// products by the vendor library, everything else in one pass each.
#pragma once

#include <mutex>

#include "decode.h"

namespace tca_fast {

// z [T, F] becomes its activations; row_ptr [T + 1] and the statistics come from the same pass.
// `out` may hold null pointers when no statistics are wanted.
template <typename T>
void activate_dense(
    T* z, const T* b_enc, const Sum<T>* norm, std::optional<int64_t> k, const bool* token_mask,
    int64_t* row_ptr, Statistics<T> out, int64_t num_tokens, int64_t F) {
  std::mutex merging;
  if (out.fired != nullptr) {
    std::fill(out.fired, out.fired + F, false);
  }
  row_ptr[0] = 0;
  parallel_for(0, num_tokens, kTokensPerBlock, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> seen(F, 0);
    for (int64_t t = begin; t < end; ++t) {
      T* row = z + t * F;
      activate_row(row, b_enc, F, k);
      int32_t active = 0;
      for (int64_t f = 0; f < F; ++f) {
        active += !(static_cast<Sum<T>>(row[f]) == 0);
      }
      row_ptr[t + 1] = active;
      if (out.fired == nullptr) {
        continue;
      }
      const bool counts = token_mask == nullptr || token_mask[t];
      out.l0[t] = counts ? active : 0;
      out.l1[t] = 0;
      if (counts) {
        Sum<T> lanes[kLanes] = {};
        for (int64_t f = 0; f < F; ++f) {
          seen[f] |= !(static_cast<Sum<T>>(row[f]) == 0);
        }
        int64_t f = 0;
        for (; f + kLanes <= F; f += kLanes) {
          for (int64_t lane = 0; lane < kLanes; ++lane) {
            lanes[lane] += static_cast<Sum<T>>(row[f + lane]) * norm[f + lane];
          }
        }
        for (; f < F; ++f) {
          lanes[0] += static_cast<Sum<T>>(row[f]) * norm[f];
        }
        for (Sum<T> lane : lanes) {
          out.l1[t] += lane;
        }
      }
    }
    if (out.fired != nullptr) {
      const std::lock_guard<std::mutex> lock(merging);
      for (int64_t f = 0; f < F; ++f) {
        out.fired[f] = out.fired[f] || seen[f];
      }
    }
  });
  for (int64_t t = 0; t < num_tokens; ++t) {
    row_ptr[t + 1] += row_ptr[t];
  }
}

// y[t] += base[t] + b_dec; both may be null.
template <typename T>
void add_rows(T* y, const T* base, const T* b_dec, int64_t num_tokens, int64_t D) {
  parallel_for(0, num_tokens, kTokensPerBlock, [=](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t i = 0; i < D; ++i) {
        Sum<T> sum = static_cast<Sum<T>>(y[t * D + i]);
        sum += base == nullptr ? Sum<T>(0) : static_cast<Sum<T>>(base[t * D + i]);
        sum += b_dec == nullptr ? Sum<T>(0) : static_cast<Sum<T>>(b_dec[i]);
        y[t * D + i] = static_cast<T>(sum);
      }
    }
  });
}

// out[t, f] = gain[f]·features[t, f]
template <typename T>
void scale_columns(const T* features, const T* gain, T* out, int64_t num_tokens, int64_t F) {
  parallel_for(0, num_tokens, kTokensPerBlock, [=](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t f = 0; f < F; ++f) {
        out[t * F + f] = static_cast<T>(
            static_cast<Sum<T>>(gain[f]) * static_cast<Sum<T>>(features[t * F + f]));
      }
    }
  });
}

// da [T, F] holds dy·W_decᵀ and becomes the gradient of the pre-activations; its column sums and
// those of the unmasked activations come from the same pass, token by token.
template <typename T>
void backward_dense(
    const T* features, const T* gain, const Sum<T>* norm, Sum<T> grad_l1, const bool* token_mask,
    T* da, T* db_enc, Sum<T>* active_sum, int64_t num_tokens, int64_t F) {
  constexpr int64_t kColumns = 256;
  parallel_for(0, (F + kColumns - 1) / kColumns, 1, [=](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kColumns, size = std::min(kColumns, F - first);
      Sum<T> bias[kColumns] = {}, active[kColumns] = {};
      for (int64_t t = 0; t < num_tokens; ++t) {
        const T* row = features + t * F + first;
        T* gradient = da + t * F + first;
        const bool counts = token_mask == nullptr || token_mask[t];
        const Sum<T> l1 = counts ? grad_l1 : Sum<T>(0);
        for (int64_t i = 0; i < size; ++i) {
          const Sum<T> a = static_cast<Sum<T>>(row[i]);
          const Sum<T> g = gain == nullptr ? Sum<T>(1) : static_cast<Sum<T>>(gain[first + i]);
          const Sum<T> all = g * static_cast<Sum<T>>(gradient[i]) + l1 * norm[first + i];
          const Sum<T> dz = a == 0 ? Sum<T>(0) : all;
          gradient[i] = static_cast<T>(dz);
          bias[i] += dz;
          active[i] += counts ? a : Sum<T>(0);
        }
      }
      convert(db_enc + first, bias, size);
      std::copy(active, active + size, active_sum + first);
    }
  });
}

// dW_dec[f] += dl1·active_sum[f]·W_dec[f]/‖W_dec[f]‖, nothing where the norm is 0.
template <typename T>
void add_norm_gradient(
    const T* W_dec, const Sum<T>* norm, const Sum<T>* active_sum, Sum<T> grad_l1, T* dW_dec,
    int64_t F, int64_t D) {
  parallel_for(0, F, kFeaturesPerBlock, [=](int64_t begin, int64_t end) {
    std::vector<Sum<T>> row(D);
    for (int64_t f = begin; f < end; ++f) {
      if (norm[f] != 0 && active_sum[f] != 0) {
        convert(row.data(), dW_dec + f * D, D);
        add_scaled(row.data(), grad_l1 * active_sum[f] / norm[f], W_dec + f * D, D);
        convert(dW_dec + f * D, row.data(), D);
      }
    }
  });
}

}  // namespace tca_fast

// What the operators are called with: checked once, made contiguous, the sizes under their names.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <limits>

#include "checks.h"

namespace tca_fast {

using torch::headeronly::ScalarType;

constexpr ScalarType kIndex = ScalarType::Long, kFeature = ScalarType::Int,
                     kMask = ScalarType::Bool;

template <typename T>
const T* pointer(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
const T* pointer(const std::optional<Tensor>& tensor) {
  return tensor ? pointer<T>(*tensor) : nullptr;
}

template <typename T>
T* output(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline Tensor transposed(const Tensor& matrix) {
  Tensor view = matrix;
  return torch::stable::transpose(view, 0, 1);
}

// What sums of `dtype` are added in, as `Sum<T>`.
inline ScalarType sum_type(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Features and tokens are numbered by 32-bit integers inside the kernels; pairs of them are not.
inline void check_count(const char* name, int64_t count) {
  STD_TORCH_CHECK(
      count <= std::numeric_limits<int32_t>::max(), name, ": ", count, " rows, expected at most ",
      std::numeric_limits<int32_t>::max());
}

inline void check_k(std::optional<int64_t> k, int64_t F) {
  STD_TORCH_CHECK(!k || (*k >= 1 && *k <= F), "k: ", k.value_or(0), ", expected 1..", F);
}

inline void check_capacity(int64_t capacity) {
  STD_TORCH_CHECK(capacity >= 0, "capacity: ", capacity, ", expected 0 or more");
}

// x [T, D] and W_enc [F, D] name the sizes that everything else has to fit.
struct EncoderArguments {
  ScalarType dtype;
  int64_t num_tokens, D, F;
  Tensor x, W_enc;

  EncoderArguments(const Tensor& x_, const Tensor& W_enc_) {
    check_dimensions("x", x_, 2, "[T, D]");
    check_dimensions("W_enc", W_enc_, 2, "[F, D]");
    dtype = x_.scalar_type();
    num_tokens = x_.sizes()[0], D = x_.sizes()[1], F = W_enc_.sizes()[0];
    check_count("x", num_tokens);
    check_count("W_enc", F);
    x = checked("x", x_, {num_tokens, D}, dtype);
    W_enc = checked("W_enc", W_enc_, {F, D}, dtype);
  }
};

// W_dec [F, D] and gain [F], which fit the packed values.
struct DecoderArguments {
  ScalarType dtype;
  int64_t D, F;
  Tensor W_dec;
  std::optional<Tensor> gain;

  DecoderArguments(
      const Tensor& W_dec_, const std::optional<Tensor>& gain_, ScalarType dtype_)
      : dtype(dtype_) {
    check_dimensions("W_dec", W_dec_, 2, "[F, D]");
    F = W_dec_.sizes()[0], D = W_dec_.sizes()[1];
    check_count("W_dec", F);
    W_dec = checked("W_dec", W_dec_, {F, D}, dtype);
    gain = checked("gain", gain_, {F}, dtype);
  }
};

// The output of the MLP, [..., D] with as many rows as there are tokens, made contiguous.
inline Tensor checked_mlp_out(
    const Tensor& mlp_out, int64_t num_tokens, int64_t D, ScalarType dtype) {
  const auto sizes = mlp_out.sizes();
  STD_TORCH_CHECK(
      !sizes.empty() && sizes.back() == D && mlp_out.numel() == num_tokens * D, "mlp_out: shape ",
      shape_of(mlp_out), ", expected [..., ", D, "] with ", num_tokens, " rows");
  return checked_kind("mlp_out", mlp_out, dtype);
}

// What the adapter's pass and its backward have in common.
struct AdapterArguments : EncoderArguments {
  Tensor b_enc, W_dec;
  std::optional<Tensor> gain, token_mask;
  std::optional<int64_t> k;

  AdapterArguments(
      const Tensor& x_, const Tensor& W_enc_, const Tensor& b_enc_, const Tensor& W_dec_,
      const std::optional<Tensor>& gain_, const std::optional<Tensor>& token_mask_,
      std::optional<int64_t> k_)
      : EncoderArguments(x_, W_enc_),
        b_enc(checked("b_enc", b_enc_, {F}, dtype)),
        W_dec(checked("W_dec", W_dec_, {F, D}, dtype)),
        gain(checked("gain", gain_, {F}, dtype)),
        token_mask(checked("token_mask", token_mask_, {num_tokens}, kMask)),
        k(k_) {
    check_k(k, F);
  }
};

}  // namespace tca_fast

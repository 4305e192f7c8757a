// The dense regime, called with tensors: activations and gradients around products with whole weights,
// the vendor's library's or, with an overflow to heed, our own.
#pragma once

#include "../arguments.h"
#include "dense.cuh"
#include "packed_tensors.h"

namespace tca_fast::cuda {

// g·features, or the features themselves where there is no gain.
template <typename T>
Tensor gained(
    const Tensor& features, const std::optional<Tensor>& gain, cudaStream_t stream) {
  if (!gain) {
    return features;
  }
  const int64_t rows = features.sizes()[0], columns = features.sizes()[1];
  const Tensor result = make(features, {rows, columns}, features.scalar_type());
  with_vectors<T>(columns, [&](auto v) {
    affine<T, v()>(
        pointer<T>(features), pointer<T>(gain), nullptr, nullptr, output<T>(result), rows, columns,
        stream);
  });
  return result;
}

// y = base + bias + g·features W_dec, rounded once after the product; with both a base and a bias,
// which the vendor's library cannot add together, once more.
template <typename T>
Tensor decoded_dense(
    const Tensor& features, const AdapterArguments& in, const Tensor& base,
    const std::optional<Tensor>& bias, cudaStream_t stream) {
  const Tensor y = make(base, {in.num_tokens, in.D}, in.dtype);
  const Tensor scaled = gained<T>(features, in.gain, stream);
  linear(scaled, transposed(in.W_dec), bias ? std::nullopt : std::optional(base), y);
  if (bias) {
    with_vectors<T>(in.D, [&](auto v) {
      affine<T, v()>(
          pointer<T>(y), nullptr, pointer<T>(base), pointer<T>(bias), output<T>(y), in.num_tokens,
          in.D, stream);
    });
  }
  return y;
}

template <typename T>
void activate_on(
    const Tensor& z, const Tensor* bits, Overflow overflow, cudaStream_t stream) {
  with_vectors<T>(z.sizes()[1], [&](auto v) {
    activate<T, v()>(
        output<T>(z), bits ? pointer<uint32_t>(*bits) : nullptr, z.sizes()[0], z.sizes()[1],
        overflow, stream);
  });
}

template <typename T>
Matrix<T> as_matrix(const Tensor& tensor) {
  return {pointer<T>(tensor), tensor.sizes()[1], 1};
}

template <typename T>
Matrix<T> as_transposed(const Tensor& tensor) {
  return {pointer<T>(tensor), 1, tensor.sizes()[1]};
}

struct Gradients {
  Tensor x, W_enc, b_enc, W_dec;

  explicit Gradients(const AdapterArguments& in)
      : x(make(in.x, {in.num_tokens, in.D}, in.dtype)),
        W_enc(make(in.x, {in.F, in.D}, in.dtype)),
        b_enc(make(in.x, {in.F}, in.dtype)),
        W_dec(make(in.x, {in.F, in.D}, in.dtype)) {}
};

// All gradients by dense products: the vendor's, or with an overflow to heed, our own.
template <typename T>
void differentiate_dense(
    const AdapterArguments& in, const Tensor& features, const Tensor& grad_y, L1 l1,
    const Gradients& out, Overflow overflow, cudaStream_t stream) {
  const int64_t num_tokens = in.num_tokens, F = in.F, D = in.D;
  const bool always = overflow.row_ptr == nullptr;
  const Tensor norm = row_norms<T>(in.W_dec, overflow, stream);
  const Tensor da = make(in.x, {num_tokens, F}, in.dtype);
  const Tensor bias_sum = make(in.x, {num_chunks(num_tokens), F}, ScalarType::Float);
  const Tensor active_sum = make(in.x, {num_chunks(num_tokens), F}, ScalarType::Float);
  const ActivationBackward<T> activation{
      pointer<T>(features), pointer<float>(norm), pointer<T>(in.gain), l1, output<float>(bias_sum),
      output<float>(active_sum)};

  const auto product = [&](const Factors<T>& factors, const Tensor& result, int64_t K) {
    overflow_product(
        factors, output<T>(result), result.sizes()[0], result.sizes()[1], K, overflow, stream);
  };
  if (always) {
    linear(grad_y, in.W_dec, std::nullopt, da);
  } else {
    product({as_matrix<T>(grad_y), as_transposed<T>(in.W_dec)}, da, D);
  }
  with_vectors<T>(F, [&](auto v) {
    activation_backward<T, v()>(activation, output<T>(da), num_tokens, F, overflow, stream);
  });
  if (always) {
    const Tensor scaled = gained<T>(features, in.gain, stream);
    linear(transposed(scaled), transposed(grad_y), std::nullopt, out.W_dec);
    linear(transposed(da), transposed(in.x), std::nullopt, out.W_enc);
    linear(da, transposed(in.W_enc), std::nullopt, out.x);
  } else {
    product(
        {as_transposed<T>(features), as_matrix<T>(grad_y), nullptr, pointer<T>(in.gain)},
        out.W_dec, num_tokens);
    product({as_transposed<T>(da), as_matrix<T>(in.x)}, out.W_enc, num_tokens);
    product({as_matrix<T>(da), as_matrix<T>(in.W_enc)}, out.x, F);
  }
  with_vectors<T>(D, [&](auto v) {
    finish<T, v()>(
        activation, pointer<T>(in.W_dec), output<T>(out.b_enc), output<T>(out.W_dec), num_tokens,
        F, D, overflow, stream);
  });
}

}  // namespace tca_fast::cuda

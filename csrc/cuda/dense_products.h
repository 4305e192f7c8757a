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

// Whether activations and their gradients may leave T when they are multiplied by gains: Half ends at
// 65504, and what is made of them need not. They are floats then.
template <typename T>
bool gains_may_overflow(const AdapterArguments& in) {
  return std::is_same_v<T, c10::Half> && in.gain;
}

// y = base + bias + g·features W_dec, rounded once after the product; with both a base and a bias,
// which the vendor's library cannot add together, once more.
template <typename T>
Tensor decoded_dense(
    const Tensor& features, const AdapterArguments& in, const Tensor& base,
    const std::optional<Tensor>& bias, cudaStream_t stream) {
  if (gains_may_overflow<T>(in)) {
    AdapterArguments wide = in;
    wide.dtype = ScalarType::Float;
    wide.gain = as_type(in.gain, wide.dtype), wide.W_dec = as_type(in.W_dec, wide.dtype);
    const Tensor y = decoded_dense<float>(
        as_type(features, wide.dtype), wide, as_type(base, wide.dtype),
        as_type(bias, wide.dtype), stream);
    return as_type(y, in.dtype);
  }
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

// All gradients by dense products: the vendor's, or with an overflow to heed, our own. A is what the
// gradients of the activations are kept in.
template <typename T, typename A>
void differentiate_dense(
    const AdapterArguments& in, const Tensor& features, const Tensor& grad_y, L1 l1,
    const Gradients& out, Overflow overflow, cudaStream_t stream) {
  const int64_t num_tokens = in.num_tokens, F = in.F, D = in.D;
  const bool always = overflow.row_ptr == nullptr;
  const Tensor norm = row_norms<T>(in.W_dec, overflow, stream);
  constexpr bool kIsWide = !std::is_same_v<A, T>;
  const Tensor da =
      make(in.x, {num_tokens, F}, kIsWide ? ScalarType::Float : in.dtype);
  const Tensor bias_sum = make(in.x, {num_chunks(num_tokens), F}, ScalarType::Float);
  const Tensor active_sum = make(in.x, {num_chunks(num_tokens), F}, ScalarType::Float);
  const ActivationBackward<T> activation{
      pointer<T>(features), pointer<float>(norm), pointer<T>(in.gain), l1, output<float>(bias_sum),
      output<float>(active_sum)};

  const auto multiply = [&](const Tensor& a, const Tensor& b, const Tensor& result) {
    kIsWide ? linear_as_float(a, b, result) : linear(a, b, std::nullopt, result);
  };
  if (always) {
    multiply(grad_y, in.W_dec, da);
  } else {
    overflow_product<T, T, A>(
        {as_matrix<T>(grad_y), as_transposed<T>(in.W_dec)}, output<A>(da), num_tokens, F, D,
        overflow, stream);
  }
  const auto backward = [&](auto v) {
    activation_backward<T, v(), A>(activation, output<A>(da), num_tokens, F, overflow, stream);
  };
  if constexpr (kIsWide) {
    backward(std::integral_constant<int, 1>());
  } else {
    with_vectors<T>(F, backward);
  }
  if (always) {
    const Tensor scaled = gained<A>(
        as_type(features, da.scalar_type()), as_type(in.gain, da.scalar_type()), stream);
    multiply(transposed(scaled), transposed(grad_y), out.W_dec);
    multiply(transposed(da), transposed(in.x), out.W_enc);
    multiply(da, transposed(in.W_enc), out.x);
  } else {
    overflow_product<T, T, T>(
        {as_transposed<T>(features), as_matrix<T>(grad_y), nullptr, pointer<T>(in.gain)},
        output<T>(out.W_dec), F, D, num_tokens, overflow, stream);
    overflow_product<A, T, T>(
        {as_transposed<A>(da), as_matrix<T>(in.x)}, output<T>(out.W_enc), F, D, num_tokens,
        overflow, stream);
    overflow_product<A, T, T>(
        {as_matrix<A>(da), as_matrix<T>(in.W_enc)}, output<T>(out.x), num_tokens, D, F, overflow,
        stream);
  }
  with_vectors<T>(D, [&](auto v) {
    finish<T, v()>(
        activation, pointer<T>(in.W_dec), output<T>(out.b_enc), output<T>(out.W_dec), num_tokens,
        F, D, overflow, stream);
  });
}

template <typename T>
void differentiate_dense(
    const AdapterArguments& in, const Tensor& features, const Tensor& grad_y, L1 l1,
    const Gradients& out, Overflow overflow, cudaStream_t stream) {
  if constexpr (std::is_same_v<T, c10::Half>) {
    if (gains_may_overflow<T>(in)) {
      differentiate_dense<T, float>(in, features, grad_y, l1, out, overflow, stream);
      return;
    }
  }
  differentiate_dense<T, T>(in, features, grad_y, l1, out, overflow, stream);
}

}  // namespace tca_fast::cuda

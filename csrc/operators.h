// The operators of tca_fast/registry.py, for the device that a library is compiled for; see there for
// what they mean.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace tca_fast {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor> encode(
    const Tensor& x, const Tensor& W_enc, const Tensor& b_enc, std::optional<int64_t> k,
    int64_t capacity);

std::tuple<Tensor, Tensor, Tensor> encode_backward(
    const Tensor& grad_value, const Tensor& row_ptr, const Tensor& feature, const Tensor& x,
    const Tensor& W_enc);

Tensor decode(
    const Tensor& row_ptr, const Tensor& feature, const Tensor& value, const Tensor& W_dec,
    const std::optional<Tensor>& b_dec, const std::optional<Tensor>& gain);

std::tuple<Tensor, Tensor> decode_backward(
    const Tensor& grad_y, const Tensor& row_ptr, const Tensor& feature, const Tensor& value,
    const Tensor& W_dec, const std::optional<Tensor>& gain);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> adapter(
    const Tensor& x, const Tensor& mlp_out, const Tensor& W_enc, const Tensor& b_enc,
    const Tensor& W_dec, const std::optional<Tensor>& b_dec, const std::optional<Tensor>& gain,
    const std::optional<Tensor>& token_mask, std::optional<int64_t> k, int64_t capacity);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> adapter_backward(
    const Tensor& grad_y, const Tensor& grad_l1, const Tensor& x, const Tensor& W_enc,
    const Tensor& b_enc, const Tensor& W_dec, const std::optional<Tensor>& gain,
    const std::optional<Tensor>& token_mask, std::optional<int64_t> k, const Tensor& row_ptr,
    const Tensor& feature, const Tensor& value);

}  // namespace tca_fast

// The operators of tca_fast/registry.py for CUDA tensors, put together from the kernels.
//
// Nothing here waits for the device, and every size is known from the arguments, so a call can be
// captured in a CUDA graph. Products with whole weights go to the vendor's library. How a pass is
// computed depends on the room that the caller reserves: densely where there is room for all T·F
// activations, else over the active ones, with a way out on the device for what does not fit.

#include "../operators.h"

#include "dense_products.h"
#include "packed_tensors.h"

namespace tca_fast {
namespace {

using namespace cuda;

bool always_fits(const AdapterArguments& in, int64_t capacity) {
  return capacity >= in.num_tokens * in.k.value_or(in.F);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> encode(
    const Tensor& x, const Tensor& W_enc, const Tensor& b_enc_, std::optional<int64_t> k,
    int64_t capacity) {
  EncoderArguments in(x, W_enc);
  Tensor b_enc = checked("b_enc", b_enc_, {in.F}, in.dtype);
  check_k(k, in.F);
  check_room(capacity);
  align_all(in.x, in.W_enc, b_enc);
  const Device device(in.x);
  const Tensor z = make(in.x, {in.num_tokens, in.F}, in.dtype);
  linear(in.x, in.W_enc, b_enc, z);
  Packed packed;
  dispatch(in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Selected found =
        select_active<T>(z, std::nullopt, std::nullopt, k, false, device.stream());
    packed = pack<T>(z, found, capacity, device.stream());
  });
  return {packed.value, packed.row_ptr, packed.feature};
}

std::tuple<Tensor, Tensor, Tensor> encode_backward(
    const Tensor& grad_value, const Tensor& row_ptr, const Tensor& feature, const Tensor& x,
    const Tensor& W_enc) {
  EncoderArguments in(x, W_enc);
  const Packed packed = packed_arguments(row_ptr, feature, grad_value, "grad_value", in.dtype);
  checked("row_ptr", row_ptr, {in.num_tokens + 1}, kIndex);
  align_all(in.x, in.W_enc);
  const Device device(in.x);
  const Tensor dW_enc = not_a_number(in.x, {in.F, in.D}, in.dtype);
  const Tensor db_enc = not_a_number(in.x, {in.F}, in.dtype);
  Tensor dx;
  dispatch(in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const OrderedPairs ordered(packed, in.F, in.D, device.stream());
    differentiate_encoder<T, T>(
        ordered.pairs, packed.value, in.x, dW_enc, db_enc, device.stream());
    dx = gathered<T, T, true>(
        packed, packed.value, in.W_enc, std::nullopt, std::nullopt, std::nullopt,
        device.stream());
  });
  return {dx, dW_enc, db_enc};
}

Tensor decode(
    const Tensor& row_ptr, const Tensor& feature, const Tensor& value, const Tensor& W_dec,
    const std::optional<Tensor>& b_dec_, const std::optional<Tensor>& gain) {
  DecoderArguments in(W_dec, gain, value.scalar_type());
  const Packed packed = packed_arguments(row_ptr, feature, value, "value", in.dtype);
  std::optional<Tensor> b_dec = checked("b_dec", b_dec_, {in.D}, in.dtype);
  align_all(in.W_dec, in.gain, b_dec);
  const Device device(in.W_dec);
  Tensor y;
  dispatch(in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    y = gathered<T, T, true>(
        packed, packed.value, in.W_dec, in.gain, std::nullopt, b_dec, device.stream());
  });
  return y;
}

std::tuple<Tensor, Tensor> decode_backward(
    const Tensor& grad_y_, const Tensor& row_ptr, const Tensor& feature, const Tensor& value,
    const Tensor& W_dec, const std::optional<Tensor>& gain) {
  DecoderArguments in(W_dec, gain, value.scalar_type());
  const Packed packed = packed_arguments(row_ptr, feature, value, "value", in.dtype);
  Tensor grad_y = checked("grad_y", grad_y_, {packed.num_tokens(), in.D}, in.dtype);
  align_all(in.W_dec, in.gain, grad_y);
  const Device device(in.W_dec);
  const Tensor da = zeros(in.W_dec, {packed.capacity()}, ScalarType::Float);
  const Tensor dW_dec = not_a_number(in.W_dec, {in.F, in.D}, in.dtype);
  dispatch(in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const OrderedPairs ordered(packed, in.F, in.D, device.stream());
    differentiate_decoder<T>(
        ordered.pairs, packed.value, grad_y, in.W_dec, in.gain, {nullptr, nullptr}, da, dW_dec,
        device.stream());
  });
  // The same tensor twice would be an alias among the results.
  return {torch::stable::to(da, in.dtype), dW_dec};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> adapter(
    const Tensor& x, const Tensor& mlp_out_, const Tensor& W_enc, const Tensor& b_enc,
    const Tensor& W_dec, const std::optional<Tensor>& b_dec_, const std::optional<Tensor>& gain,
    const std::optional<Tensor>& token_mask, std::optional<int64_t> k, int64_t capacity) {
  AdapterArguments in(x, W_enc, b_enc, W_dec, gain, token_mask, k);
  const int64_t num_tokens = in.num_tokens, D = in.D, F = in.F;
  Tensor mlp_out = torch::stable::view(
      checked_mlp_out(mlp_out_, num_tokens, D, in.dtype), {num_tokens, D});
  std::optional<Tensor> b_dec = checked("b_dec", b_dec_, {D}, in.dtype);
  const bool keeps_dense = capacity >= num_tokens * F;
  keeps_dense ? check_capacity(capacity) : check_room(capacity);
  align_all(in.x, in.W_enc, in.b_enc, in.W_dec, in.gain, in.token_mask, mlp_out, b_dec);
  const Device device(in.x);
  const cudaStream_t stream = device.stream();

  const Tensor z = make(in.x, {num_tokens, F}, in.dtype);
  linear(in.x, in.W_enc, in.b_enc, z);
  Tensor y;
  Packed packed;
  Selected found;
  dispatch(in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Tensor norm = row_norms<T>(in.W_dec, {}, stream);
    found = select_active<T>(z, in.token_mask, norm, k, keeps_dense, stream);
    if (keeps_dense) {
      packed = {
          found.row_ptr, make(z, {0}, kFeature), torch::stable::view(z, {num_tokens * F})};
      y = decoded_dense<T>(z, in, mlp_out, b_dec, stream);
      return;
    }
    packed = pack<T>(z, found, capacity, stream);
    y = gathered<T, T, false>(packed, packed.value, in.W_dec, in.gain, mlp_out, b_dec, stream);
    if (!always_fits(in, capacity)) {
      activate_on<T>(z, &found.bits, packed.overflow(), stream);
      overflow_product<T, T, T>(
          {as_matrix<T>(z), as_matrix<T>(in.W_dec), pointer<T>(in.gain), nullptr,
           pointer<T>(mlp_out), pointer<T>(b_dec)},
          output<T>(y), num_tokens, D, F, packed.overflow(), stream);
    }
  });
  const Tensor l1 = torch::stable::sum(*found.l1);
  y = torch::stable::view(y, mlp_out_.sizes());
  return {y, l1, found.l0, found.fired, packed.row_ptr, packed.feature, packed.value};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> adapter_backward(
    const Tensor& grad_y_, const Tensor& grad_l1_, const Tensor& x, const Tensor& W_enc,
    const Tensor& b_enc, const Tensor& W_dec, const std::optional<Tensor>& gain,
    const std::optional<Tensor>& token_mask, std::optional<int64_t> k, const Tensor& row_ptr,
    const Tensor& feature, const Tensor& value) {
  AdapterArguments in(x, W_enc, b_enc, W_dec, gain, token_mask, k);
  const int64_t num_tokens = in.num_tokens, F = in.F, D = in.D;
  Tensor grad_y = checked("grad_y", grad_y_, {num_tokens, D}, in.dtype);
  Tensor grad_l1 = checked("grad_l1", grad_l1_, {}, ScalarType::Float);
  check_dimensions("feature", feature, 1, "[C]");
  check_dimensions("value", value, 1, "[C] or [T·F]");
  const int64_t capacity = feature.sizes()[0];
  align_all(in.x, in.W_enc, in.b_enc, in.W_dec, in.gain, in.token_mask, grad_y, grad_l1);
  const Device device(in.x);
  const cudaStream_t stream = device.stream();
  const L1 l1{pointer<float>(grad_l1), pointer<uint8_t>(in.token_mask)};

  const Gradients out(in);
  dispatch(in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (capacity == 0 && value.sizes()[0] == num_tokens * F) {
      Tensor features = checked("value", value, {num_tokens * F}, in.dtype);
      align(features);
      features = torch::stable::view(features, {num_tokens, F});
      differentiate_dense<T>(in, features, grad_y, l1, out, {}, stream);
      return;
    }
    const Packed packed = packed_arguments(row_ptr, feature, value, "value", in.dtype);
    checked("row_ptr", row_ptr, {num_tokens + 1}, kIndex);
    const OrderedPairs ordered(packed, F, D, stream);
    const Tensor da = make(in.x, {capacity}, ScalarType::Float);
    differentiate_decoder<T>(
        ordered.pairs, packed.value, grad_y, in.W_dec, in.gain, l1, da, out.W_dec, stream);
    differentiate_encoder<T, float>(ordered.pairs, da, in.x, out.W_enc, out.b_enc, stream);
    with_vectors<T>(D, [&](auto v) {
      gather_rows<T, float, v(), false>(
          packed.rows<float>(da), pointer<T>(in.W_enc), nullptr, nullptr, nullptr,
          output<T>(out.x), F, D, stream);
    });
    if (!always_fits(in, capacity)) {
      const Tensor z = make(in.x, {num_tokens, F}, in.dtype);
      overflow_product<T, T, T>(
          {as_matrix<T>(in.x), as_transposed<T>(in.W_enc), nullptr, nullptr, nullptr,
           pointer<T>(in.b_enc)},
          output<T>(z), num_tokens, F, D, packed.overflow(), stream);
      if (in.k) {
        const Selected again =
            select_active<T>(z, std::nullopt, std::nullopt, in.k, false, stream);
        activate_on<T>(z, &again.bits, packed.overflow(), stream);
      } else {
        activate_on<T>(z, nullptr, packed.overflow(), stream);
      }
      differentiate_dense<T>(in, z, grad_y, l1, out, packed.overflow(), stream);
    }
  });
  return {out.x, out.W_enc, out.b_enc, out.W_dec, column_sums(grad_y)};
}

}  // namespace tca_fast

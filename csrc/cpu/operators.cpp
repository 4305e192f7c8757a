// The operators of tca_fast/registry.py for CPU tensors: allocation, and the choice of regime.
//
// The encoder product is the vendor library's. How a pass is computed, sparse or dense, depends on
// the number of active features alone. How they are kept for the backward depends on the room that
// the caller reserves: packed; densely, when there is room for all T·F; or not at all when more
// fire than fit, and then the backward computes them again from x. So results do not depend on the
// room, and nothing is ever dropped.

#include "../operators.h"

#include "arguments.h"
#include "dense.h"
#include "packed_tensors.h"

namespace tca_fast {
namespace {

// Above this share of active features, four gathered rows for each of them cost more than five
// dense products (benchmarks/README.md has the readings). A product takes activations times gains in
// their dtype, which in half precision a large gain leaves.
bool prefers_dense(int64_t entries, const AdapterArguments& in) {
  const bool may_overflow = in.gain && in.dtype == ScalarType::Half;
  return entries > in.num_tokens * in.F / 16 && !may_overflow;
}

// g_f·features, or the features themselves where there is no gain.
template <typename T>
Tensor gained(const Tensor& features, const AdapterArguments& in) {
  if (!in.gain) {
    return features;
  }
  Tensor result = make({in.num_tokens, in.F}, in.dtype);
  scale_columns(
      pointer<T>(features), pointer<T>(in.gain), output<T>(result), in.num_tokens, in.F);
  return result;
}

// Replaces the encoder product [T, F] by its activations; their statistics come with it.
template <typename T>
void activate_with_statistics(
    const AdapterArguments& in, const Tensor& z, int64_t* row_ptr, Statistics<T> statistics) {
  std::vector<Sum<T>> norm(in.F);
  row_norms<T>(pointer<T>(in.W_dec), nullptr, norm.data(), in.F, in.D);
  activate_dense(
      output<T>(z), pointer<T>(in.b_enc), norm.data(), in.k, pointer<bool>(in.token_mask), row_ptr,
      statistics, in.num_tokens, in.F);
}

struct AdapterGradients {
  Tensor x, W_enc, b_enc, W_dec, b_dec;

  explicit AdapterGradients(const AdapterArguments& in)
      : b_enc(make({in.F}, in.dtype)), b_dec(make({in.D}, in.dtype)) {}
};

// By five dense products.
template <typename T>
void differentiate(
    const AdapterArguments& in, const Tensor& features, const Tensor& grad_y, Sum<T> grad_l1,
    AdapterGradients& out) {
  std::vector<Sum<T>> norm(in.F), active_sum(in.F);
  row_norms<T>(pointer<T>(in.W_dec), nullptr, norm.data(), in.F, in.D);
  const Tensor da = product(grad_y, transposed(in.W_dec));
  backward_dense(
      pointer<T>(features), pointer<T>(in.gain), norm.data(), grad_l1,
      pointer<bool>(in.token_mask), output<T>(da), output<T>(out.b_enc), active_sum.data(),
      in.num_tokens, in.F);
  out.W_dec = product(transposed(gained<T>(features, in)), grad_y);
  add_norm_gradient(
      pointer<T>(in.W_dec), norm.data(), active_sum.data(), grad_l1, output<T>(out.W_dec), in.F,
      in.D);
  out.W_enc = product(transposed(da), in.x);
  out.x = product(da, in.W_enc);
}

// Over active pairs only.
template <typename T>
void differentiate(
    const AdapterArguments& in, const PackedView<T>& packed, const Tensor& grad_y, Sum<T> grad_l1,
    AdapterGradients& out) {
  const ByFeature pairs = packed.by_feature(in.F);
  out.x = make({in.num_tokens, in.D}, in.dtype);
  out.W_enc = make({in.F, in.D}, in.dtype);
  out.W_dec = make({in.F, in.D}, in.dtype);
  std::vector<Sum<T>> da(packed.entries());
  BackwardByFeature<T>{
      pairs, packed.value, pointer<T>(in.x), pointer<T>(in.W_dec), pointer<T>(in.gain),
      {pointer<T>(grad_y), grad_l1, pointer<bool>(in.token_mask)},
      {output<T>(out.W_enc), output<T>(out.b_enc), output<T>(out.W_dec), da.data()}, in.D}
      .run(in.F);
  scatter_rows(
      packed.row_ptr, packed.feature, da.data(), pointer<T>(in.W_enc), output<T>(out.x),
      in.num_tokens, in.D);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> encode(
    const Tensor& x, const Tensor& W_enc, const Tensor& b_enc_, std::optional<int64_t> k,
    int64_t capacity) {
  const EncoderArguments in(x, W_enc);
  const Tensor b_enc = checked("b_enc", b_enc_, {in.F}, in.dtype);
  check_k(k, in.F);
  check_capacity(capacity);
  const Tensor z = product(in.x, transposed(in.W_enc));
  return dispatch(in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Packed<T> packed(scan(pointer<T>(z), pointer<T>(b_enc), k, in.num_tokens, in.F));
    auto [row_ptr, feature, value] = packed.tensors(capacity, in.dtype);
    return std::make_tuple(value, row_ptr, feature);
  });
}

std::tuple<Tensor, Tensor, Tensor> encode_backward(
    const Tensor& grad_value, const Tensor& row_ptr, const Tensor& feature, const Tensor& x,
    const Tensor& W_enc) {
  const EncoderArguments in(x, W_enc);
  const PackedArguments arguments(row_ptr, feature, grad_value, "grad_value", in.F, in.dtype);
  checked("row_ptr", row_ptr, {in.num_tokens + 1}, kIndex);
  Tensor dx = make({in.num_tokens, in.D}, in.dtype), dW_enc = make({in.F, in.D}, in.dtype);
  Tensor db_enc = make({in.F}, in.dtype);
  dispatch(in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const PackedView<T> packed = arguments.view<T>();
    std::vector<Sum<T>> da(packed.entries());
    convert(da.data(), packed.value, packed.entries());
    encoder_gradients(
        packed.by_feature(in.F), da.data(), pointer<T>(in.x), output<T>(dW_enc),
        output<T>(db_enc), in.F, in.D);
    scatter_rows(
        packed.row_ptr, packed.feature, da.data(), pointer<T>(in.W_enc), output<T>(dx),
        in.num_tokens, in.D);
    return 0;
  });
  return {dx, dW_enc, db_enc};
}

Tensor decode(
    const Tensor& row_ptr, const Tensor& feature, const Tensor& value, const Tensor& W_dec,
    const std::optional<Tensor>& b_dec_, const std::optional<Tensor>& gain) {
  const DecoderArguments in(W_dec, gain, value.scalar_type());
  const PackedArguments arguments(row_ptr, feature, value, "value", in.F, in.dtype);
  const std::optional<Tensor> b_dec = checked("b_dec", b_dec_, {in.D}, in.dtype);
  Tensor y = make({arguments.num_tokens, in.D}, in.dtype);
  dispatch(in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const PackedView<T> packed = arguments.view<T>();
    decode_rows<T>(
        {packed.row_ptr, packed.feature, packed.value, pointer<T>(in.W_dec), pointer<T>(b_dec),
         pointer<T>(in.gain), nullptr, output<T>(y), in.D},
        packed.num_tokens);
    return 0;
  });
  return y;
}

std::tuple<Tensor, Tensor> decode_backward(
    const Tensor& grad_y_, const Tensor& row_ptr, const Tensor& feature, const Tensor& value,
    const Tensor& W_dec, const std::optional<Tensor>& gain) {
  const DecoderArguments in(W_dec, gain, value.scalar_type());
  const PackedArguments arguments(row_ptr, feature, value, "value", in.F, in.dtype);
  const Tensor grad_y = checked("grad_y", grad_y_, {arguments.num_tokens, in.D}, in.dtype);
  Tensor dvalue = make({arguments.capacity}, in.dtype), dW_dec = make({in.F, in.D}, in.dtype);
  dispatch(in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const PackedView<T> packed = arguments.view<T>();
    const ByFeature pairs = packed.by_feature(in.F);
    std::vector<Sum<T>> da(packed.entries());
    BackwardByFeature<T>{
        pairs, packed.value, nullptr, pointer<T>(in.W_dec), pointer<T>(in.gain),
        {pointer<T>(grad_y), 0, nullptr}, {nullptr, nullptr, output<T>(dW_dec), da.data()}, in.D}
        .run(in.F);
    std::fill(output<T>(dvalue), output<T>(dvalue) + arguments.capacity, T(0));
    convert(output<T>(dvalue), da.data(), packed.entries());
    return 0;
  });
  return {dvalue, dW_dec};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> adapter(
    const Tensor& x, const Tensor& mlp_out_, const Tensor& W_enc, const Tensor& b_enc,
    const Tensor& W_dec, const std::optional<Tensor>& b_dec_, const std::optional<Tensor>& gain,
    const std::optional<Tensor>& token_mask_, std::optional<int64_t> k, int64_t capacity) {
  const AdapterArguments in(x, W_enc, b_enc, W_dec, gain, token_mask_, k);
  const int64_t num_tokens = in.num_tokens, D = in.D, F = in.F;
  const Tensor mlp_out = checked_mlp_out(mlp_out_, num_tokens, D, in.dtype);
  const std::optional<Tensor> b_dec = checked("b_dec", b_dec_, {D}, in.dtype);
  check_capacity(capacity);

  const Tensor z = product(in.x, transposed(in.W_enc));
  Tensor l1 = make({}, sum_type(in.dtype)), l0 = make({num_tokens}, kFeature);
  Tensor fired = make({F}, kMask), y, row_ptr, feature, value;
  dispatch(in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    std::vector<Sum<T>> l1_by_token(num_tokens);
    const Statistics<T> statistics{l1_by_token.data(), output<int32_t>(l0), output<bool>(fired)};
    const bool keeps_dense = capacity >= num_tokens * F;
    Packed<T> found;
    if (keeps_dense) {
      row_ptr = make({num_tokens + 1}, kIndex);
      feature = make({0}, kFeature);
      activate_with_statistics<T>(in, z, output<int64_t>(row_ptr), statistics);
      value = torch::stable::reshape(z, {num_tokens * F});
    } else {
      found = Packed<T>(scan(pointer<T>(z), pointer<T>(in.b_enc), k, num_tokens, F));
      std::tie(row_ptr, feature, value) = found.tensors(capacity, in.dtype);
    }
    if (prefers_dense(pointer<int64_t>(row_ptr)[num_tokens], in)) {
      if (!keeps_dense) {
        activate_with_statistics<T>(in, z, output<int64_t>(row_ptr), statistics);
      }
      y = product(gained<T>(z, in), in.W_dec);
      add_rows(output<T>(y), pointer<T>(mlp_out), pointer<T>(b_dec), num_tokens, D);
      y = torch::stable::reshape(y, mlp_out.sizes());
    } else {
      if (keeps_dense) {
        found = Packed<T>::of_activations(z, num_tokens, F);
      }
      const PackedView<T> packed = found.view();
      y = make(mlp_out.sizes(), in.dtype);
      const Decoder<T> decoder{
          packed.row_ptr, packed.feature, packed.value, pointer<T>(in.W_dec), pointer<T>(b_dec),
          pointer<T>(in.gain), pointer<T>(mlp_out), output<T>(y), D};
      const bool* token_mask = pointer<bool>(in.token_mask);
      if (num_tokens <= kTokensPerBlock) {
        decode_few_rows(decoder, token_mask, statistics, num_tokens, F);
      } else {
        statistics_of_packed(
            packed.row_ptr, packed.feature, packed.value, decoder.W_dec, token_mask, statistics,
            num_tokens, F, D);
        decode_rows(decoder, num_tokens);
      }
    }
    double total = 0;
    for (Sum<T> one : l1_by_token) {
      total += one;
    }
    *output<Sum<T>>(l1) = static_cast<Sum<T>>(total);
    return 0;
  });
  return {y, l1, l0, fired, row_ptr, feature, value};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> adapter_backward(
    const Tensor& grad_y_, const Tensor& grad_l1_, const Tensor& x, const Tensor& W_enc,
    const Tensor& b_enc, const Tensor& W_dec, const std::optional<Tensor>& gain,
    const std::optional<Tensor>& token_mask, std::optional<int64_t> k, const Tensor& row_ptr_,
    const Tensor& feature, const Tensor& value) {
  const AdapterArguments in(x, W_enc, b_enc, W_dec, gain, token_mask, k);
  const int64_t num_tokens = in.num_tokens, F = in.F;
  const Tensor grad_y = checked("grad_y", grad_y_, {num_tokens, in.D}, in.dtype);
  const Tensor grad_l1 = checked("grad_l1", grad_l1_, {}, sum_type(in.dtype));
  const Tensor row_ptr = checked("row_ptr", row_ptr_, {num_tokens + 1}, kIndex);
  check_dimensions("feature", feature, 1, "[C]");
  check_dimensions("value", value, 1, "[C] or [T·F]");
  const int64_t entries = pointer<int64_t>(row_ptr)[num_tokens], capacity = feature.sizes()[0];
  const bool kept_dense = capacity == 0 && value.sizes()[0] == num_tokens * F;
  const bool overflowed = !kept_dense && entries > capacity;
  const bool dense = prefers_dense(entries, in);

  AdapterGradients gradients(in);
  dispatch(in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Sum<T> l1 = *pointer<Sum<T>>(grad_l1);
    if (kept_dense || overflowed) {
      Tensor features;
      if (kept_dense) {
        features = torch::stable::reshape(
            checked("value", value, {num_tokens * F}, in.dtype), {num_tokens, F});
      } else {
        features = product(in.x, transposed(in.W_enc));
        std::vector<int64_t> starts(num_tokens + 1);
        activate_dense<T>(
            output<T>(features), pointer<T>(in.b_enc), nullptr, k, nullptr, starts.data(), {},
            num_tokens, F);
      }
      if (dense) {
        differentiate<T>(in, features, grad_y, l1, gradients);
      } else {
        const Packed<T> again = Packed<T>::of_activations(features, num_tokens, F);
        differentiate<T>(in, again.view(), grad_y, l1, gradients);
      }
    } else {
      const PackedArguments kept(row_ptr, feature, value, "value", F, in.dtype);
      if (dense) {
        differentiate<T>(in, kept.dense<T>(F), grad_y, l1, gradients);
      } else {
        differentiate<T>(in, kept.view<T>(), grad_y, l1, gradients);
      }
    }
    column_sums(pointer<T>(grad_y), output<T>(gradients.b_dec), num_tokens, in.D);
    return 0;
  });
  return {gradients.x, gradients.W_enc, gradients.b_enc, gradients.W_dec, gradients.b_dec};
}

}  // namespace tca_fast

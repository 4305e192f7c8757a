// The operators of tca_fast/registry.py for CUDA tensors, put together from the kernels.
//
// Nothing here waits for the device, and every size is known from the arguments, so a call can be
// captured in a CUDA graph. Products with whole weights go to the vendor's library. How a pass is
// computed depends on the room that the caller reserves: densely where there is room for all T·F
// activations, else over the active ones, with a way out on the device for what does not fit.

#include "../operators.h"

#include "dense.cuh"
#include "segments.cuh"
#include "tensors.h"
#include "topk.cuh"

namespace tca_fast {
namespace {

using namespace cuda;

// What a pass over the pre-activations finds; l1 is by token.
struct Selected {
  Tensor bits, row_ptr, l0, fired;
  std::optional<Tensor> l1;
};

template <typename T>
Tensor row_norms(const Tensor& W, Overflow overflow, cudaStream_t stream) {
  const int64_t F = W.sizes()[0], D = W.sizes()[1];
  const Tensor norm = make(W, {F}, ScalarType::Float);
  with_vectors<T>(D, [&](auto v) {
    norms<T, v()>(pointer<T>(W), output<float>(norm), F, D, overflow, stream);
  });
  return norm;
}

// Which features are active; with `activates`, z becomes their activations.
template <typename T>
Selected select_active(
    const Tensor& z, const std::optional<Tensor>& token_mask, const std::optional<Tensor>& norm,
    std::optional<int64_t> k, bool activates, cudaStream_t stream) {
  const int64_t num_tokens = z.sizes()[0], F = z.sizes()[1];
  const bool is_limited = k && *k < F;
  STD_TORCH_CHECK(
      !is_limited || F <= kMostTopkFeatures, "k: the largest of ", F, " features, expected at most ",
      kMostTopkFeatures, " features; use another backend");
  Selected found{
      make(z, {num_tokens, ceil_div(F, kWordBits)}, ScalarType::Int),
      make(z, {num_tokens + 1}, kIndex), make(z, {num_tokens}, kFeature), zeros(z, {F}, kMask),
      std::nullopt};
  if (norm) {
    found.l1 = make(z, {num_tokens}, ScalarType::Float);
  }
  const Tensor count = make(z, {num_tokens}, ScalarType::Int);
  const Statistics statistics{
      output<int32_t>(count), output<int32_t>(found.l0), output<uint8_t>(found.fired),
      found.l1 ? output<float>(*found.l1) : nullptr, pointer<float>(norm)};
  with_vectors<T>(F, [&](auto v) {
    if (is_limited) {
      topk<T, v()>(
          output<T>(z), pointer<uint8_t>(token_mask), output<uint32_t>(found.bits), statistics,
          num_tokens, F, *k, activates, stream);
      return;
    }
    const auto run = [&](auto also_activates) {
      select<T, v(), also_activates()>(
          output<T>(z), pointer<uint8_t>(token_mask), output<uint32_t>(found.bits), statistics,
          num_tokens, F, stream);
    };
    activates ? run(std::true_type()) : run(std::false_type());
  });
  scan_counts(pointer<int32_t>(count), output<int64_t>(found.row_ptr), num_tokens, stream);
  return found;
}

struct Packed {
  Tensor row_ptr, feature, value;

  int64_t num_tokens() const { return row_ptr.sizes()[0] - 1; }
  int64_t capacity() const { return feature.sizes()[0]; }

  template <typename C>
  Rows<C> rows(const Tensor& coefficient) const {
    return {
        pointer<int64_t>(row_ptr), pointer<int32_t>(feature), pointer<C>(coefficient),
        num_tokens(), capacity()};
  }
  Overflow overflow() const { return {pointer<int64_t>(row_ptr), num_tokens(), capacity()}; }
};

// Entries are numbered by 32-bit integers inside the kernels.
void check_room(int64_t capacity) {
  check_capacity(capacity);
  check_count("capacity", capacity);
}

// The active features as packed ones; entries beyond the last are 0.
template <typename T>
Packed pack(
    const Tensor& z, const Selected& found, int64_t capacity, cudaStream_t stream) {
  Packed packed{
      found.row_ptr, zeros(z, {capacity}, kFeature), zeros(z, {capacity}, z.scalar_type())};
  fill(
      pointer<T>(z), pointer<uint32_t>(found.bits), pointer<int64_t>(packed.row_ptr),
      output<int32_t>(packed.feature), output<T>(packed.value), z.sizes()[0], z.sizes()[1],
      capacity, stream);
  return packed;
}

// Packed arguments, which a caller may have made by hand: what is wrong with their numbers, the
// device finds out.
Packed packed_arguments(
    const Tensor& row_ptr, const Tensor& feature, const Tensor& value, const char* value_name,
    ScalarType dtype) {
  check_dimensions("row_ptr", row_ptr, 1, "[T + 1]");
  check_dimensions("feature", feature, 1, "[C]");
  STD_TORCH_CHECK(row_ptr.sizes()[0] > 0, "row_ptr: shape [0], expected [T + 1]");
  const int64_t capacity = feature.sizes()[0];
  check_count("row_ptr", row_ptr.sizes()[0] - 1);
  check_room(capacity);
  Packed packed{
      checked("row_ptr", row_ptr, {row_ptr.sizes()[0]}, kIndex),
      checked("feature", feature, {capacity}, kFeature),
      checked(value_name, value, {capacity}, dtype)};
  align_all(packed.row_ptr, packed.feature, packed.value);
  return packed;
}

// out[t] = base[t] + bias + the gathered rows of W; C is the type of the coefficients.
template <typename T, typename C, bool POISON>
Tensor gathered(
    const Packed& packed, const Tensor& coefficient, const Tensor& W,
    const std::optional<Tensor>& gain, const std::optional<Tensor>& base,
    const std::optional<Tensor>& bias, cudaStream_t stream) {
  const int64_t F = W.sizes()[0], D = W.sizes()[1];
  const Tensor out = make(W, {packed.num_tokens(), D}, W.scalar_type());
  with_vectors<T>(D, [&](auto v) {
    gather_rows<T, C, v(), POISON>(
        packed.rows<C>(coefficient), pointer<T>(W), pointer<T>(gain), pointer<T>(base),
        pointer<T>(bias), output<T>(out), F, D, stream);
  });
  return out;
}

// The packed pairs by feature, and the memory that this takes.
struct OrderedPairs {
  Tensor col_ptr, extra_ptr, entry, token, partial_row, partial_sum;
  Pairs pairs;

  OrderedPairs(const Packed& packed, int64_t F, int64_t D, cudaStream_t stream) {
    const Tensor& like = packed.row_ptr;
    const int64_t num_tokens = packed.num_tokens(), capacity = packed.capacity();
    const int64_t most_extra = most_extra_segments(capacity, kPairsPerSegment);
    col_ptr = make(like, {F + 1}, kIndex), extra_ptr = make(like, {F + 1}, kIndex);
    entry = make(like, {capacity}, kFeature), token = make(like, {capacity}, kFeature);
    partial_row = make(like, {2 * most_extra, D}, ScalarType::Float);
    partial_sum = make(like, {2 * most_extra}, ScalarType::Float);
    pairs = Pairs{
        {output<int64_t>(col_ptr), output<int64_t>(extra_ptr), output<int32_t>(entry),
         output<int32_t>(token)},
        pointer<int64_t>(packed.row_ptr), num_tokens, F, capacity,
        {output<float>(partial_row), output<float>(partial_sum), most_extra}};
    const Tensor tile_start = make(like, {num_tiles(num_tokens), F}, kFeature);
    const Tensor column_count = make(like, {F}, kFeature);
    order_by_feature(
        pointer<int64_t>(packed.row_ptr), pointer<int32_t>(packed.feature), pairs.order,
        output<int32_t>(tile_start), output<int32_t>(column_count), num_tokens, F, capacity,
        kPairsPerSegment, stream);
  }
};

void check_width(int64_t D, int64_t most) {
  STD_TORCH_CHECK(
      D <= most, "W_dec: rows of ", D, ", expected at most ", most, " for this dtype and ",
      "divisibility; use another backend");
}

// Gradients of the decoder over packed pairs, into da [C] and dW [F, D].
template <typename T>
void differentiate_decoder(
    const Pairs& pairs, const Tensor& value, const Tensor& grad_y, const Tensor& W_dec,
    const std::optional<Tensor>& gain, L1 l1, const Tensor& da, const Tensor& dW,
    cudaStream_t stream) {
  const int64_t D = W_dec.sizes()[1];
  with_vectors<T>(D, [&](auto v) {
    check_width(D, most_width<T, v()>());
    decoder_gradients<T, v()>(
        pairs, pointer<T>(value), pointer<T>(grad_y), pointer<T>(W_dec), pointer<T>(gain), l1,
        output<float>(da), output<T>(dW), D, stream);
  });
}

// Gradients of the encoder over packed pairs, into dW [F, D] and db [F].
template <typename T, typename C>
void differentiate_encoder(
    const Pairs& pairs, const Tensor& da, const Tensor& x, const Tensor& dW, const Tensor& db,
    cudaStream_t stream) {
  const int64_t D = x.sizes()[1];
  with_vectors<T>(D, [&](auto v) {
    encoder_gradients<T, C, v()>(
        pairs, pointer<C>(da), pointer<T>(x), output<T>(dW), output<T>(db), D, stream);
  });
}

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
  Tensor mlp_out = checked("mlp_out", mlp_out_, {num_tokens, D}, in.dtype);
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
      overflow_product<T>(
          {as_matrix<T>(z), as_matrix<T>(in.W_dec), pointer<T>(in.gain), nullptr,
           pointer<T>(mlp_out), pointer<T>(b_dec)},
          output<T>(y), num_tokens, D, F, packed.overflow(), stream);
    }
  });
  const Tensor l1 = torch::stable::sum(*found.l1);
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
      overflow_product<T>(
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

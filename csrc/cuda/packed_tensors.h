// Kernels over the active pairs, called with tensors: selection, packing, gathered rows and the
// gradients of the weights. Memory that only a kernel needs goes back to PyTorch's allocator at once:
// what takes it over runs later on the same stream.
#pragma once

#include "segments.cuh"
#include "tensors.h"
#include "topk.cuh"

namespace tca_fast::cuda {

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
inline void check_room(int64_t capacity) {
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
inline Packed packed_arguments(
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
    const int64_t per_segment = segment_length(capacity, kPairsPerSegment, kMostExtraSegments);
    const int64_t most_extra = most_extra_segments(capacity, per_segment);
    col_ptr = make(like, {F + 1}, kIndex), extra_ptr = make(like, {F + 1}, kIndex);
    entry = make(like, {capacity}, kFeature), token = make(like, {capacity}, kFeature);
    partial_row = make(like, {2 * most_extra, D}, ScalarType::Float);
    partial_sum = make(like, {2 * most_extra}, ScalarType::Float);
    pairs = Pairs{
        {output<int64_t>(col_ptr), output<int64_t>(extra_ptr), output<int32_t>(entry),
         output<int32_t>(token)},
        pointer<int64_t>(packed.row_ptr), num_tokens, F, capacity, per_segment,
        {output<float>(partial_row), output<float>(partial_sum), most_extra}};
    const Tensor tile_start = make(like, {num_tiles(num_tokens), F}, kFeature);
    const Tensor column_count = make(like, {F}, kFeature);
    order_by_feature(
        pointer<int64_t>(packed.row_ptr), pointer<int32_t>(packed.feature), pairs.order,
        output<int32_t>(tile_start), output<int32_t>(column_count), num_tokens, F, capacity,
        per_segment, stream);
  }
};

inline void check_width(int64_t D, int64_t most) {
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

}  // namespace tca_fast::cuda

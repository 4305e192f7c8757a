// The operators of tca_fast/ops.py for CPU tensors: checks, allocation, and the choice of regime.
//
// The encoder product is the vendor library's. How a pass is computed, sparse or dense, depends on
// the number of active features alone. How they are kept for the backward depends on the room that
// the caller reserves: packed; densely, when there is room for all T·F; or not at all when more
// fire than fit, and then the backward computes them again from x. So results do not depend on the
// room, and nothing is ever dropped.

#include "operators.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include "../checks.h"
#include "dense.h"

namespace tca_fast {
namespace {

using torch::headeronly::ScalarType;

constexpr ScalarType kIndex = ScalarType::Long, kFeature = ScalarType::Int,
                     kMask = ScalarType::Bool;

// Calls `body` with a null pointer of the C++ type that `dtype` names.
template <typename Body>
auto dispatch(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(static_cast<float*>(nullptr));
    case ScalarType::Double:
      return body(static_cast<double*>(nullptr));
    case ScalarType::BFloat16:
      return body(static_cast<c10::BFloat16*>(nullptr));
    case ScalarType::Half:
      return body(static_cast<c10::Half*>(nullptr));
    default:
      STD_TORCH_CHECK(false, "x: dtype is not float32, float64, bfloat16 or float16");
  }
}

template <typename T>
const T* pointer(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

template <typename T>
const T* pointer(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* output(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

Tensor make(std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::empty(
      torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), dtype);
}

// Above this share of active features, four gathered rows for each of them cost more than five
// dense products (benchmarks/README.md has the readings).
bool prefers_dense(int64_t entries, int64_t num_tokens, int64_t F) {
  return entries > num_tokens * F / 16;
}

ScalarType sum_type(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor transposed(const Tensor& matrix) {
  Tensor view = matrix;
  return torch::stable::transpose(view, 0, 1);
}

// Packed arguments as a caller may have made them by hand.
struct CheckedPacked {
  Tensor row_ptr, feature, value;
  int64_t entries;
};

CheckedPacked checked_packed(
    const Tensor& row_ptr, const Tensor& feature, const Tensor& value, int64_t num_features) {
  const int64_t num_tokens = row_ptr.dim() == 1 ? row_ptr.sizes()[0] - 1 : -1;
  STD_TORCH_CHECK(num_tokens >= 0, "row_ptr: shape ", shape_of(row_ptr), ", expected [tokens + 1]");
  STD_TORCH_CHECK(feature.dim() == 1, "feature: shape ", shape_of(feature), ", expected [C]");
  const int64_t capacity = feature.sizes()[0];
  CheckedPacked packed{
      checked("row_ptr", row_ptr, {num_tokens + 1}, kIndex),
      checked("feature", feature, {capacity}, kFeature),
      checked("value", value, {capacity}, value.scalar_type()), 0};
  const int64_t* starts = pointer<int64_t>(packed.row_ptr);
  STD_TORCH_CHECK(starts[0] == 0, "row_ptr: starts at ", starts[0], ", expected 0");
  for (int64_t t = 0; t < num_tokens; ++t) {
    STD_TORCH_CHECK(
        starts[t] <= starts[t + 1], "row_ptr: falls from ", starts[t], " to ", starts[t + 1],
        " at token ", t, "; it must not fall");
  }
  packed.entries = starts[num_tokens];
  STD_TORCH_CHECK(
      packed.entries <= capacity, "row_ptr: ", packed.entries,
      " active features do not fit the capacity of ", capacity,
      "; encode again with a larger capacity");
  const int32_t* features = pointer<int32_t>(packed.feature);
  for (int64_t e = 0; e < packed.entries; ++e) {
    STD_TORCH_CHECK(
        features[e] >= 0 && features[e] < num_features, "feature: entry ", e, " is ", features[e],
        ", expected 0..", num_features - 1);
  }
  return packed;
}

template <typename T>
Tensor dense_of(const CheckedPacked& packed, int64_t num_tokens, int64_t F) {
  Tensor features = make({num_tokens, F}, packed.value.scalar_type());
  const int64_t* starts = pointer<int64_t>(packed.row_ptr);
  const int32_t* feature = pointer<int32_t>(packed.feature);
  const T* value = pointer<T>(packed.value);
  parallel_for(0, num_tokens, kTokensPerBlock, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      T* row = output<T>(features) + t * F;
      std::fill(row, row + F, T(0));
      for (int64_t e = starts[t]; e < starts[t + 1]; ++e) {
        row[feature[e]] = value[e];
      }
    }
  });
  return features;
}

// Packed active features that this file made itself.
template <typename T>
struct Packed {
  std::vector<int64_t> row_ptr;
  std::vector<int32_t> feature;
  std::vector<T> value;

  Packed() = default;

  explicit Packed(const Scan<T>& found) : row_ptr(found.row_ptr) {
    feature.resize(row_ptr.back());
    value.resize(row_ptr.back());
    fill_packed(found, feature.data(), value.data());
  }

  // As tensors with room for `capacity` entries; when more are active, none of them is copied.
  std::tuple<Tensor, Tensor, Tensor> tensors(int64_t capacity, ScalarType dtype) const {
    const int64_t num_rows = row_ptr.size(), entries = feature.size();
    Tensor starts = make({num_rows}, kIndex), features = make({capacity}, kFeature);
    Tensor values = make({capacity}, dtype);
    const int64_t used = entries <= capacity ? entries : 0;
    std::copy(row_ptr.begin(), row_ptr.end(), output<int64_t>(starts));
    std::copy(feature.begin(), feature.begin() + used, output<int32_t>(features));
    std::copy(value.begin(), value.begin() + used, output<T>(values));
    std::fill(output<int32_t>(features) + used, output<int32_t>(features) + capacity, 0);
    std::fill(output<T>(values) + used, output<T>(values) + capacity, T(0));
    return {starts, features, values};
  }
};

template <typename T>
Packed<T> packed_of_activations(const T* features, int64_t num_tokens, int64_t F) {
  const std::vector<T> no_bias(F, T(0));
  return Packed<T>(scan<T>(features, no_bias.data(), std::nullopt, num_tokens, F));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> encode(
    const Tensor& x_, const Tensor& W_enc_, const Tensor& b_enc_, std::optional<int64_t> k,
    int64_t capacity) {
  const ScalarType dtype = x_.scalar_type();
  STD_TORCH_CHECK(x_.dim() == 2, "x: shape ", shape_of(x_), ", expected [T, D]");
  STD_TORCH_CHECK(W_enc_.dim() == 2, "W_enc: shape ", shape_of(W_enc_), ", expected [F, D]");
  const int64_t num_tokens = x_.sizes()[0], D = x_.sizes()[1], F = W_enc_.sizes()[0];
  const Tensor x = checked("x", x_, {num_tokens, D}, dtype);
  const Tensor W_enc = checked("W_enc", W_enc_, {F, D}, dtype);
  const Tensor b_enc = checked("b_enc", b_enc_, {F}, dtype);
  const Tensor z = torch::stable::matmul(x, transposed(W_enc));
  return dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Packed<T> packed(scan(pointer<T>(z), pointer<T>(b_enc), k, num_tokens, F));
    auto [row_ptr, feature, value] = packed.tensors(capacity, dtype);
    return std::make_tuple(value, row_ptr, feature);
  });
}

std::tuple<Tensor, Tensor, Tensor> encode_backward(
    const Tensor& grad_value_, const Tensor& row_ptr_, const Tensor& feature_, const Tensor& x_,
    const Tensor& W_enc_) {
  const ScalarType dtype = x_.scalar_type();
  const int64_t num_tokens = x_.sizes()[0], D = x_.sizes()[1], F = W_enc_.sizes()[0];
  const CheckedPacked packed = checked_packed(row_ptr_, feature_, grad_value_, F);
  const Tensor x = checked("x", x_, {num_tokens, D}, dtype);
  const Tensor W_enc = checked("W_enc", W_enc_, {F, D}, dtype);
  Tensor dx = make({num_tokens, D}, dtype), dW_enc = make({F, D}, dtype), db_enc = make({F}, dtype);
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const ByFeature pairs =
        by_feature(pointer<int64_t>(packed.row_ptr), pointer<int32_t>(packed.feature), num_tokens, F);
    std::vector<Sum<T>> da(packed.entries);
    convert(da.data(), pointer<T>(packed.value), packed.entries);
    encoder_gradients(
        pairs, da.data(), pointer<T>(x), output<T>(dW_enc), output<T>(db_enc), F, D);
    scatter_rows(
        pointer<int64_t>(packed.row_ptr), pointer<int32_t>(packed.feature), da.data(),
        pointer<T>(W_enc), output<T>(dx), num_tokens, D);
    return 0;
  });
  return {dx, dW_enc, db_enc};
}

Tensor decode(
    const Tensor& row_ptr_, const Tensor& feature_, const Tensor& value_, const Tensor& W_dec_,
    const std::optional<Tensor>& b_dec_, const std::optional<Tensor>& gain_) {
  const ScalarType dtype = value_.scalar_type();
  STD_TORCH_CHECK(W_dec_.dim() == 2, "W_dec: shape ", shape_of(W_dec_), ", expected [F, D]");
  const int64_t F = W_dec_.sizes()[0], D = W_dec_.sizes()[1];
  const CheckedPacked packed = checked_packed(row_ptr_, feature_, value_, F);
  const Tensor W_dec = checked("W_dec", W_dec_, {F, D}, dtype);
  const std::optional<Tensor> b_dec = checked("b_dec", b_dec_, {D}, dtype);
  const std::optional<Tensor> gain = checked("gain", gain_, {F}, dtype);
  const int64_t num_tokens = packed.row_ptr.sizes()[0] - 1;
  Tensor y = make({num_tokens, D}, dtype);
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    decode_rows<T>(
        pointer<int64_t>(packed.row_ptr), pointer<int32_t>(packed.feature),
        pointer<T>(packed.value), pointer<T>(W_dec), pointer<T>(b_dec), pointer<T>(gain), nullptr,
        output<T>(y), num_tokens, D);
    return 0;
  });
  return y;
}

std::tuple<Tensor, Tensor> decode_backward(
    const Tensor& grad_y_, const Tensor& row_ptr_, const Tensor& feature_, const Tensor& value_,
    const Tensor& W_dec_, const std::optional<Tensor>& gain_) {
  const ScalarType dtype = value_.scalar_type();
  const int64_t F = W_dec_.sizes()[0], D = W_dec_.sizes()[1];
  const CheckedPacked packed = checked_packed(row_ptr_, feature_, value_, F);
  const int64_t num_tokens = packed.row_ptr.sizes()[0] - 1;
  const Tensor grad_y = checked("grad_y", grad_y_, {num_tokens, D}, dtype);
  const Tensor W_dec = checked("W_dec", W_dec_, {F, D}, dtype);
  const std::optional<Tensor> gain = checked("gain", gain_, {F}, dtype);
  Tensor dvalue = make({packed.value.sizes()[0]}, dtype), dW_dec = make({F, D}, dtype);
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const ByFeature pairs =
        by_feature(pointer<int64_t>(packed.row_ptr), pointer<int32_t>(packed.feature), num_tokens, F);
    std::vector<Sum<T>> da(packed.entries);
    BackwardByFeature<T>{
        pairs, pointer<T>(packed.value), nullptr, pointer<T>(W_dec), pointer<T>(gain),
        {pointer<T>(grad_y), 0, nullptr}, {nullptr, nullptr, output<T>(dW_dec), da.data()}, D}
        .run(F);
    std::fill(output<T>(dvalue), output<T>(dvalue) + packed.value.sizes()[0], T(0));
    convert(output<T>(dvalue), da.data(), packed.entries);
    return 0;
  });
  return {dvalue, dW_dec};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> adapter(
    const Tensor& x_, const Tensor& mlp_out_, const Tensor& W_enc_, const Tensor& b_enc_,
    const Tensor& W_dec_, const std::optional<Tensor>& b_dec_, const std::optional<Tensor>& gain_,
    const std::optional<Tensor>& token_mask_, std::optional<int64_t> k, int64_t capacity) {
  const ScalarType dtype = x_.scalar_type();
  STD_TORCH_CHECK(x_.dim() == 2, "x: shape ", shape_of(x_), ", expected [T, D]");
  STD_TORCH_CHECK(W_enc_.dim() == 2, "W_enc: shape ", shape_of(W_enc_), ", expected [F, D]");
  const int64_t num_tokens = x_.sizes()[0], D = x_.sizes()[1], F = W_enc_.sizes()[0];
  const Tensor x = checked("x", x_, {num_tokens, D}, dtype);
  const Tensor mlp_out = checked("mlp_out", mlp_out_, {num_tokens, D}, dtype);
  const Tensor W_enc = checked("W_enc", W_enc_, {F, D}, dtype);
  const Tensor b_enc = checked("b_enc", b_enc_, {F}, dtype);
  const Tensor W_dec = checked("W_dec", W_dec_, {F, D}, dtype);
  const std::optional<Tensor> b_dec = checked("b_dec", b_dec_, {D}, dtype);
  const std::optional<Tensor> gain = checked("gain", gain_, {F}, dtype);
  const std::optional<Tensor> mask = checked("token_mask", token_mask_, {num_tokens}, kMask);

  Tensor z = torch::stable::matmul(x, transposed(W_enc));
  Tensor l1 = make({}, sum_type(dtype)), l0 = make({num_tokens}, kFeature), fired = make({F}, kMask);
  Tensor y, row_ptr, feature, value;
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    std::vector<Sum<T>> l1_by_token(num_tokens);
    const Statistics<T> statistics{l1_by_token.data(), output<int32_t>(l0), output<bool>(fired)};
    const bool keeps_dense = capacity >= num_tokens * F;
    const auto activate = [&] {
      std::vector<Sum<T>> norm(F);
      row_norms<T>(pointer<T>(W_dec), nullptr, norm.data(), F, D);
      activate_dense(
          output<T>(z), pointer<T>(b_enc), norm.data(), k, pointer<bool>(mask),
          output<int64_t>(row_ptr), statistics, num_tokens, F);
    };
    Packed<T> packed;
    if (keeps_dense) {
      row_ptr = make({num_tokens + 1}, kIndex);
      feature = make({0}, kFeature);
      activate();
      value = torch::stable::reshape(z, {num_tokens * F});
    } else {
      packed = Packed<T>(scan(pointer<T>(z), pointer<T>(b_enc), k, num_tokens, F));
      std::tie(row_ptr, feature, value) = packed.tensors(capacity, dtype);
    }
    if (prefers_dense(pointer<int64_t>(row_ptr)[num_tokens], num_tokens, F)) {
      if (!keeps_dense) {
        activate();
      }
      Tensor gained = z;
      if (gain) {
        gained = make({num_tokens, F}, dtype);
        scale_columns(pointer<T>(z), pointer<T>(gain), output<T>(gained), num_tokens, F);
      }
      y = torch::stable::matmul(gained, W_dec);
      add_rows(output<T>(y), pointer<T>(mlp_out), pointer<T>(b_dec), num_tokens, D);
    } else {
      if (keeps_dense) {
        packed = packed_of_activations(pointer<T>(z), num_tokens, F);
      }
      y = make({num_tokens, D}, dtype);
      statistics_of_packed(
          packed.row_ptr.data(), packed.feature.data(), packed.value.data(), pointer<T>(W_dec),
          pointer<bool>(mask), statistics, num_tokens, F, D);
      decode_rows(
          packed.row_ptr.data(), packed.feature.data(), packed.value.data(), pointer<T>(W_dec),
          pointer<T>(b_dec), pointer<T>(gain), pointer<T>(mlp_out), output<T>(y), num_tokens, D);
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
    const Tensor& grad_y_, const Tensor& grad_l1_, const Tensor& x_, const Tensor& W_enc_,
    const Tensor& b_enc_, const Tensor& W_dec_, const std::optional<Tensor>& gain_,
    const std::optional<Tensor>& token_mask_, std::optional<int64_t> k, const Tensor& row_ptr_,
    const Tensor& feature_, const Tensor& value_) {
  const ScalarType dtype = x_.scalar_type();
  const int64_t num_tokens = x_.sizes()[0], D = x_.sizes()[1], F = W_enc_.sizes()[0];
  const Tensor grad_y = checked("grad_y", grad_y_, {num_tokens, D}, dtype);
  const Tensor grad_l1 = checked("grad_l1", grad_l1_, {}, sum_type(dtype));
  const Tensor x = checked("x", x_, {num_tokens, D}, dtype);
  const Tensor W_enc = checked("W_enc", W_enc_, {F, D}, dtype);
  const Tensor b_enc = checked("b_enc", b_enc_, {F}, dtype);
  const Tensor W_dec = checked("W_dec", W_dec_, {F, D}, dtype);
  const std::optional<Tensor> gain = checked("gain", gain_, {F}, dtype);
  const std::optional<Tensor> mask = checked("token_mask", token_mask_, {num_tokens}, kMask);
  const Tensor row_ptr = checked("row_ptr", row_ptr_, {num_tokens + 1}, kIndex);
  const int64_t entries = pointer<int64_t>(row_ptr)[num_tokens];
  const bool kept_dense = feature_.sizes()[0] == 0 && value_.sizes()[0] == num_tokens * F;
  const bool overflowed = !kept_dense && entries > feature_.sizes()[0];
  const bool dense = prefers_dense(entries, num_tokens, F);

  Tensor dx, dW_enc, dW_dec;
  Tensor db_enc = make({F}, dtype), db_dec = make({D}, dtype);
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Sum<T> l1 = *pointer<Sum<T>>(grad_l1);
    Tensor features;
    if (kept_dense) {
      features = torch::stable::reshape(torch::stable::contiguous(value_), {num_tokens, F});
    } else if (overflowed) {
      features = torch::stable::matmul(x, transposed(W_enc));
      std::vector<int64_t> counts(num_tokens + 1);
      activate_dense<T>(
          output<T>(features), pointer<T>(b_enc), nullptr, k, nullptr, counts.data(), {},
          num_tokens, F);
    }
    if (dense) {
      if (!kept_dense && !overflowed) {
        features = dense_of<T>(checked_packed(row_ptr, feature_, value_, F), num_tokens, F);
      }
      std::vector<Sum<T>> norm(F), active_sum(F);
      row_norms<T>(pointer<T>(W_dec), nullptr, norm.data(), F, D);
      Tensor da = torch::stable::matmul(grad_y, transposed(W_dec));
      backward_dense(
          pointer<T>(features), pointer<T>(gain), norm.data(), l1, pointer<bool>(mask),
          output<T>(da), output<T>(db_enc), active_sum.data(), num_tokens, F);
      if (gain) {
        Tensor gained = make({num_tokens, F}, dtype);
        scale_columns(pointer<T>(features), pointer<T>(gain), output<T>(gained), num_tokens, F);
        features = gained;
      }
      dW_dec = torch::stable::matmul(transposed(features), grad_y);
      add_norm_gradient(
          pointer<T>(W_dec), norm.data(), active_sum.data(), l1, output<T>(dW_dec), F, D);
      dW_enc = torch::stable::matmul(transposed(da), x);
      dx = torch::stable::matmul(da, W_enc);
    } else {
      Packed<T> again;
      CheckedPacked kept;
      const int64_t* starts;
      const int32_t* feature;
      const T* value;
      if (kept_dense || overflowed) {
        again = packed_of_activations(pointer<T>(features), num_tokens, F);
        starts = again.row_ptr.data(), feature = again.feature.data(), value = again.value.data();
      } else {
        kept = checked_packed(row_ptr, feature_, value_, F);
        starts = pointer<int64_t>(kept.row_ptr), feature = pointer<int32_t>(kept.feature);
        value = pointer<T>(kept.value);
      }
      const ByFeature pairs = by_feature(starts, feature, num_tokens, F);
      dx = make({num_tokens, D}, dtype);
      dW_enc = make({F, D}, dtype);
      dW_dec = make({F, D}, dtype);
      std::vector<Sum<T>> da(entries);
      BackwardByFeature<T>{
          pairs, value, pointer<T>(x), pointer<T>(W_dec), pointer<T>(gain),
          {pointer<T>(grad_y), l1, pointer<bool>(mask)},
          {output<T>(dW_enc), output<T>(db_enc), output<T>(dW_dec), da.data()}, D}
          .run(F);
      scatter_rows(
          starts, feature, da.data(), pointer<T>(W_enc), output<T>(dx), num_tokens, D);
    }
    column_sums(pointer<T>(grad_y), output<T>(db_dec), num_tokens, D);
    return 0;
  });
  return {dx, dW_enc, db_enc, dW_dec, db_dec};
}

}  // namespace tca_fast

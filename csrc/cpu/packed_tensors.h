// Packed active features as tensors: those that a caller hands over, and those that are made here.
#pragma once

#include <tuple>
#include <vector>

#include "arguments.h"
#include "kernels.h"

namespace tca_fast {

// Packed features as the kernels read them; the memory belongs to one of the structures below.
template <typename T>
struct PackedView {
  const int64_t* row_ptr;
  const int32_t* feature;
  const T* value;
  int64_t num_tokens;

  int64_t entries() const { return row_ptr[num_tokens]; }
  ByFeature by_feature(int64_t F) const {
    return tca_fast::by_feature(row_ptr, feature, num_tokens, F);
  }
};

// Packed arguments, which a caller may have made by hand.
struct PackedArguments {
  Tensor row_ptr, feature, value;
  int64_t num_tokens, capacity, entries;

  PackedArguments(
      const Tensor& row_ptr_, const Tensor& feature_, const Tensor& value_, const char* value_name,
      int64_t F, ScalarType dtype) {
    check_dimensions("row_ptr", row_ptr_, 1, "[T + 1]");
    check_dimensions("feature", feature_, 1, "[C]");
    num_tokens = row_ptr_.sizes()[0] - 1, capacity = feature_.sizes()[0];
    STD_TORCH_CHECK(num_tokens >= 0, "row_ptr: shape [0], expected [T + 1]");
    check_count("row_ptr", num_tokens);
    row_ptr = checked("row_ptr", row_ptr_, {num_tokens + 1}, kIndex);
    feature = checked("feature", feature_, {capacity}, kFeature);
    value = checked(value_name, value_, {capacity}, dtype);
    check_rows();
    check_features(F);
  }

  template <typename T>
  PackedView<T> view() const {
    return {
        pointer<int64_t>(row_ptr), pointer<int32_t>(feature), pointer<T>(value), num_tokens};
  }

  // The same activations as [T, F], zero where inactive.
  template <typename T>
  Tensor dense(int64_t F) const {
    Tensor features = make({num_tokens, F}, value.scalar_type());
    T* rows = output<T>(features);
    const PackedView<T> packed = view<T>();
    parallel_for(0, num_tokens, kTokensPerBlock, [=](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        T* row = rows + t * F;
        std::fill(row, row + F, T(0));
        for (int64_t e = packed.row_ptr[t]; e < packed.row_ptr[t + 1]; ++e) {
          row[packed.feature[e]] = packed.value[e];
        }
      }
    });
    return features;
  }

 private:
  void check_rows() {
    const int64_t* starts = pointer<int64_t>(row_ptr);
    STD_TORCH_CHECK(starts[0] == 0, "row_ptr: starts at ", starts[0], ", expected 0");
    for (int64_t t = 0; t < num_tokens; ++t) {
      STD_TORCH_CHECK(
          starts[t] <= starts[t + 1], "row_ptr: falls from ", starts[t], " to ", starts[t + 1],
          " at token ", t, "; it must not fall");
    }
    entries = starts[num_tokens];
    STD_TORCH_CHECK(
        entries <= capacity, "row_ptr: ", entries, " active features do not fit the capacity of ",
        capacity, "; encode again with a larger capacity");
  }

  void check_features(int64_t F) const {
    const int32_t* features = pointer<int32_t>(feature);
    for (int64_t e = 0; e < entries; ++e) {
      STD_TORCH_CHECK(
          features[e] >= 0 && features[e] < F, "feature: entry ", e, " is ", features[e],
          ", expected 0..", F - 1);
    }
  }
};

// Packed features found here.
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

  static Packed of_activations(const Tensor& features, int64_t num_tokens, int64_t F) {
    const std::vector<T> no_bias(F, T(0));
    return Packed(scan<T>(pointer<T>(features), no_bias.data(), std::nullopt, num_tokens, F));
  }

  PackedView<T> view() const {
    return {
        row_ptr.data(), feature.data(), value.data(), static_cast<int64_t>(row_ptr.size()) - 1};
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

}  // namespace tca_fast

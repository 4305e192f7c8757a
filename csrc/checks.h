// Arguments that do not fit are reported by name; kernels behind these checks never look again.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/DeviceType.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

// The device whose operators a library holds: CPU or CUDA.
#ifndef TCA_FAST_DEVICE
#define TCA_FAST_DEVICE CPU
#endif

namespace tca_fast {

using torch::stable::Tensor;

constexpr const char* kDevice =
    torch::headeronly::DeviceType::TCA_FAST_DEVICE == torch::headeronly::DeviceType::CPU
        ? "CPU"
        : "CUDA device";

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    text += (i ? ", " : "") + std::to_string(tensor.sizes()[i]);
  }
  return text + "]";
}

// Refuses a tensor of another number of dimensions; `expected` names them, as in "[T, D]".
inline void check_dimensions(
    const char* name, const Tensor& tensor, int64_t dimensions, const char* expected) {
  STD_TORCH_CHECK(
      tensor.dim() == dimensions, name, ": shape ", shape_of(tensor), ", expected ", expected);
}

// "[2, 3]", for messages alone.
inline std::string shape_of(std::initializer_list<int64_t> shape) {
  std::string text = "[";
  for (int64_t size : shape) {
    text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  }
  return text + "]";
}

// The tensor as one of the library's device and of the given dtype, made contiguous.
inline Tensor checked_kind(
    const char* name, const Tensor& tensor, torch::headeronly::ScalarType dtype) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == dtype, name, ": dtype ",
      torch::headeronly::toString(tensor.scalar_type()), ", expected ",
      torch::headeronly::toString(dtype));
  STD_TORCH_CHECK(
      tensor.device().type() == torch::headeronly::DeviceType::TCA_FAST_DEVICE, name,
      ": is not on the ", kDevice);
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// As `checked_kind`, of the given shape. Whatever costs more than a comparison waits until it is
// needed: in generation these checks are a visible share.
inline Tensor checked(
    const char* name,
    const Tensor& tensor,
    std::initializer_list<int64_t> shape,
    torch::headeronly::ScalarType dtype) {
  const auto sizes = tensor.sizes();
  STD_TORCH_CHECK(
      std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end()), name, ": shape ",
      shape_of(tensor), ", expected ", shape_of(shape));
  return checked_kind(name, tensor, dtype);
}

inline std::optional<Tensor> checked(
    const char* name,
    const std::optional<Tensor>& tensor,
    std::initializer_list<int64_t> shape,
    torch::headeronly::ScalarType dtype) {
  if (!tensor.has_value()) {
    return std::nullopt;
  }
  return checked(name, *tensor, shape, dtype);
}

}  // namespace tca_fast

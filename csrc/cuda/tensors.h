// Tensors as the CUDA operators handle them: memory, streams, types, and the vendor's products.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <type_traits>

#include "../arguments.h"
#include "numbers.h"

#ifdef __CUDACC__
// Absent where torch was built without CUDA: the library loads there all the same.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(
    int32_t device_index, void** stream);
#endif

namespace tca_fast::cuda {

// Makes the tensor's device the current one while it lives, and knows the stream in use there.
class Device {
 public:
#ifdef __CUDACC__
  explicit Device(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    STD_TORCH_CHECK(
        aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA");
    void* stream = nullptr;
    // Not its STABLE_ namesake, which torch 2.11 lacks.
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
#else
  explicit Device(const Tensor&) {}
#endif
  cudaStream_t stream() const { return stream_; }

 private:
#ifdef __CUDACC__
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  cudaStream_t stream_ = nullptr;
};

using Shape = std::initializer_list<int64_t>;

// Uninitialised memory where `like` is.
inline Tensor make(const Tensor& like, Shape shape, ScalarType dtype) {
  const torch::headeronly::IntHeaderOnlyArrayRef sizes(shape.begin(), shape.size());
#ifdef __CUDACC__
  return torch::stable::new_empty(like, sizes, dtype);
#else
  const Tensor meant = torch::stable::new_empty(like, sizes, dtype);
  void* memory = emulation::guarded_memory().allocate(meant.numel() * meant.element_size());
  return torch::stable::from_blob(
      memory, sizes, meant.strides(), like.device(), dtype,
      [](void* begin) { emulation::guarded_memory().free(begin); });
#endif
}

inline Tensor zeros(const Tensor& like, Shape shape, ScalarType dtype) {
  Tensor tensor = make(like, shape, dtype);
  return torch::stable::zero_(tensor);
}

inline Tensor not_a_number(const Tensor& like, Shape shape, ScalarType dtype) {
  Tensor tensor = make(like, shape, dtype);
  return torch::stable::fill_(tensor, NAN);
}

// Contiguous tensors become such whose memory starts on a multiple of 16 bytes: parts of a larger
// buffer need not.
inline void align(Tensor& tensor) {
#ifdef __CUDACC__
  const bool is_aligned = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
#else
  const bool is_aligned = false;  // always into guarded memory
#endif
  if (!is_aligned) {
    const auto sizes = tensor.sizes();
    Tensor flat = make(tensor, {tensor.numel()}, tensor.scalar_type());
    Tensor copy = torch::stable::view(flat, sizes);
    tensor = torch::stable::copy_(copy, tensor);
  }
}

inline void align(std::optional<Tensor>& tensor) {
  if (tensor) {
    align(*tensor);
  }
}

template <typename... Tensors>
void align_all(Tensors&... tensors) {
  (align(tensors), ...);
}

// Calls `body` with a null pointer of the C++ type that `dtype` names.
template <typename Body>
void dispatch(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(static_cast<float*>(nullptr));
    case ScalarType::BFloat16:
      return body(static_cast<c10::BFloat16*>(nullptr));
    case ScalarType::Half:
      return body(static_cast<c10::Half*>(nullptr));
    default:
      STD_TORCH_CHECK(
          false, "x: dtype ", torch::headeronly::toString(dtype),
          ", expected Float, BFloat16 or Half; the backends triton and reference compute others");
  }
}

// Calls `body` with how many numbers of a row of `width` a thread may load at a time.
template <typename T, typename Body>
void with_vectors(int64_t width, const Body& body) {
  if (width % kVector<T> == 0) {
    body(std::integral_constant<int, kVector<T>>());
  } else {
    body(std::integral_constant<int, 1>());
  }
}

// out = a b^T + bias, by the vendor's library. Written into memory that exists, because autocast,
// which is still in force in here, changes the dtype of a product that allocates its own.
inline void linear(
    const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias, const Tensor& out) {
  std::array<StableIValue, 4> stack{
      torch::stable::detail::from(a), torch::stable::detail::from(b),
      torch::stable::detail::from(bias), torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
  static_cast<void>(torch::stable::detail::to<Tensor>(stack[0]));
}

inline Tensor as_type(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

inline std::optional<Tensor> as_type(const std::optional<Tensor>& tensor, ScalarType dtype) {
  return tensor ? std::optional(as_type(*tensor, dtype)) : std::nullopt;
}

// out = a b^T where one of them may be float and the others are not: multiplied as floats.
inline void linear_as_float(const Tensor& a, const Tensor& b, const Tensor& out) {
  const auto sizes = out.sizes();
  const Tensor result = out.scalar_type() == ScalarType::Float
                            ? out
                            : make(out, {sizes[0], sizes[1]}, ScalarType::Float);
  linear(as_type(a, ScalarType::Float), as_type(b, ScalarType::Float), std::nullopt, result);
  if (out.scalar_type() != ScalarType::Float) {
    Tensor rounded = out;
    torch::stable::copy_(rounded, result);
  }
}

// Sums over the rows, in float, rounded once.
inline Tensor column_sums(const Tensor& matrix) {
  const int64_t rows = 0;
  const Tensor sums = torch::stable::sum(
      matrix, torch::headeronly::IntHeaderOnlyArrayRef(&rows, 1), false, ScalarType::Float);
  return torch::stable::to(sums, matrix.scalar_type());
}

}  // namespace tca_fast::cuda

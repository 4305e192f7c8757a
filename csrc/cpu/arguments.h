// Tensors as the CPU's operators handle them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>

#include "../arguments.h"
#include "rows.h"

namespace tca_fast {

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
      STD_TORCH_CHECK(
          false, "x: dtype ", torch::headeronly::toString(dtype),
          ", expected Float, Double, BFloat16 or Half");
  }
}

inline Tensor make(torch::headeronly::IntHeaderOnlyArrayRef shape, ScalarType dtype) {
  return torch::stable::empty(shape, dtype);
}

inline Tensor make(std::initializer_list<int64_t> shape, ScalarType dtype) {
  return make(torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), dtype);
}

// a·b in the dtype of `a`. Written into memory of that dtype because autocast, which is still in
// force in here, changes the dtype of a product that allocates its own.
inline Tensor product(const Tensor& a, const Tensor& b) {
  const Tensor out = make({a.sizes()[0], b.sizes()[1]}, a.scalar_type());
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(a), torch::stable::detail::from(b),
      torch::stable::detail::from(out)};
  // Not its STABLE_ namesake, which torch 2.11 lacks.
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace tca_fast

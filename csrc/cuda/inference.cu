// Operators that no backend chooses yet, because a GPU has to time them first: `tca_fast_cuda::…`
// beside the operators of tca_fast/registry.py. They have no gradients.
//
//   slab_decode               `decode`, by slab.cuh
//   generation_step           `adapter` without statistics for 1 to 32 tokens, by generation.cuh
//   round_weights             W_enc to int8, for the next one
//   screened_generation_step  the bits of `generation_step` from fewer bytes, by screening.cuh

#include <torch/csrc/stable/library.h>

#include "screening.cuh"
#include "slab.cuh"
#include "tensors.h"

#ifndef TCA_FAST_NAMESPACE
#define TCA_FAST_NAMESPACE tca_fast_cuda
#endif

namespace tca_fast {
namespace {

using namespace cuda;

// What a block may have on the current device.
int64_t most_shared_bytes() {
#ifdef __CUDACC__
  int device = 0, bytes = 0;
  STD_TORCH_CHECK(
      cudaGetDevice(&device) == cudaSuccess &&
          cudaDeviceGetAttribute(
              &bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess,
      "CUDA: the device does not say how much shared memory it has");
  return bytes;
#else
  return 64 << 10;
#endif
}

Tensor slab_decode(
    const Tensor& row_ptr_, const Tensor& feature_, const Tensor& value_, const Tensor& W_dec,
    const std::optional<Tensor>& b_dec_, const std::optional<Tensor>& gain) {
  DecoderArguments in(W_dec, gain, value_.scalar_type());
  check_dimensions("row_ptr", row_ptr_, 1, "[T + 1]");
  check_dimensions("feature", feature_, 1, "[C]");
  STD_TORCH_CHECK(row_ptr_.sizes()[0] > 0, "row_ptr: shape [0], expected [T + 1]");
  const int64_t num_tokens = row_ptr_.sizes()[0] - 1, capacity = feature_.sizes()[0];
  Tensor row_ptr = checked("row_ptr", row_ptr_, {num_tokens + 1}, kIndex);
  Tensor feature = checked("feature", feature_, {capacity}, kFeature);
  Tensor value = checked("value", value_, {capacity}, in.dtype);
  std::optional<Tensor> b_dec = checked("b_dec", b_dec_, {in.D}, in.dtype);
  align_all(row_ptr, feature, value, in.W_dec, in.gain, b_dec);
  const Device device(in.W_dec);
  const Tensor y = make(in.W_dec, {num_tokens, in.D}, in.dtype);
  dispatch(in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    slab_sum<T, T, true>(
        {pointer<int64_t>(row_ptr), pointer<int32_t>(feature), pointer<T>(value), nullptr,
         pointer<T>(in.gain), pointer<T>(in.W_dec), nullptr, pointer<T>(b_dec), output<T>(y),
         num_tokens, in.F, in.D, capacity},
        most_shared_bytes(), device.stream());
  });
  return y;
}

// The arguments of a step, aligned, and its memory.
struct StepArguments : AdapterArguments {
  Tensor mlp_out, y, activation, bits;
  std::optional<Tensor> b_dec;

  StepArguments(
      const Tensor& x_, const Tensor& mlp_out_, const Tensor& W_enc_, const Tensor& b_enc_,
      const Tensor& W_dec_, const std::optional<Tensor>& b_dec_,
      const std::optional<Tensor>& gain_)
      : AdapterArguments(x_, W_enc_, b_enc_, W_dec_, gain_, std::nullopt, std::nullopt),
        mlp_out(checked("mlp_out", mlp_out_, {num_tokens, D}, dtype)),
        b_dec(checked("b_dec", b_dec_, {D}, dtype)) {
    align_all(x, mlp_out, W_enc, b_enc, W_dec, b_dec, gain);
    y = make(x, {num_tokens, D}, dtype);
    activation = make(x, {num_tokens, F}, dtype);
    bits = make(x, {num_tokens, ceil_div(F, kWordBits)}, ScalarType::Int);
  }

  template <typename T>
  GenerationStep<T> step() const {
    return {pointer<T>(x), pointer<T>(W_enc), pointer<T>(b_enc), pointer<T>(W_dec),
            pointer<T>(mlp_out), pointer<T>(b_dec), pointer<T>(gain), output<T>(y),
            output<T>(activation), output<uint32_t>(bits), static_cast<int>(num_tokens),
            static_cast<int>(F), static_cast<int>(D)};
  }
};

Tensor generation(
    const Tensor& x, const Tensor& mlp_out, const Tensor& W_enc, const Tensor& b_enc,
    const Tensor& W_dec, const std::optional<Tensor>& b_dec, const std::optional<Tensor>& gain) {
  const StepArguments in(x, mlp_out, W_enc, b_enc, W_dec, b_dec, gain);
  const Device device(in.x);
  dispatch(in.dtype, [&](auto* type) {
    generation_step(in.step<std::remove_pointer_t<decltype(type)>>(), device.stream());
  });
  return in.y;
}

// Scale, error and norm of each row, as `Rounded`.
constexpr int64_t kRoundedNumbers = sizeof(Rounded) / sizeof(float);

std::tuple<Tensor, Tensor> rounded_weights(const Tensor& W_) {
  check_dimensions("W", W_, 2, "[F, D]");
  const int64_t F = W_.sizes()[0], D = W_.sizes()[1];
  check_count("W", F);
  Tensor W = checked("W", W_, {F, D}, W_.scalar_type());
  align(W);
  const Device device(W);
  const Tensor q = make(W, {F, D}, ScalarType::Char);
  const Tensor rows = make(W, {F, kRoundedNumbers}, ScalarType::Float);
  dispatch(W.scalar_type(), [&](auto* type) {
    round_weights(
        pointer<std::remove_pointer_t<decltype(type)>>(W), output<int8_t>(q),
        output<Rounded>(rows), static_cast<int>(F), static_cast<int>(D), device.stream());
  });
  return {q, rows};
}

Tensor screened_generation(
    const Tensor& x, const Tensor& mlp_out, const Tensor& W_enc, const Tensor& b_enc,
    const Tensor& W_dec, const std::optional<Tensor>& b_dec, const std::optional<Tensor>& gain,
    const Tensor& q_, const Tensor& rows_) {
  const StepArguments in(x, mlp_out, W_enc, b_enc, W_dec, b_dec, gain);
  Tensor q = checked("q", q_, {in.F, in.D}, ScalarType::Char);
  Tensor rows = checked("rows", rows_, {in.F, kRoundedNumbers}, ScalarType::Float);
  align_all(q, rows);
  const Device device(in.x);
  dispatch(in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    screened_generation_step<T>(
        {in.step<T>(), pointer<int8_t>(q), pointer<Rounded>(rows)}, device.stream());
  });
  return in.y;
}

}  // namespace
}  // namespace tca_fast

// The names are macros, which have to be expanded before they are pasted.
#define TCA_FAST_DEFINE(space, library) STABLE_TORCH_LIBRARY_FRAGMENT(space, library)
#define TCA_FAST_SERVE(space, device, library) STABLE_TORCH_LIBRARY_IMPL(space, device, library)

TCA_FAST_DEFINE(TCA_FAST_NAMESPACE, library) {
  library.def(
      "slab_decode(Tensor row_ptr, Tensor feature, Tensor value, Tensor W_dec, Tensor? b_dec,"
      " Tensor? gain) -> Tensor");
  library.def(
      "generation_step(Tensor x, Tensor mlp_out, Tensor W_enc, Tensor b_enc, Tensor W_dec,"
      " Tensor? b_dec, Tensor? gain) -> Tensor");
  library.def("round_weights(Tensor W) -> (Tensor q, Tensor rows)");
  library.def(
      "screened_generation_step(Tensor x, Tensor mlp_out, Tensor W_enc, Tensor b_enc,"
      " Tensor W_dec, Tensor? b_dec, Tensor? gain, Tensor q, Tensor rows) -> Tensor");
}

TCA_FAST_SERVE(TCA_FAST_NAMESPACE, TCA_FAST_DEVICE, library) {
  library.impl("slab_decode", TORCH_BOX(&tca_fast::slab_decode));
  library.impl("generation_step", TORCH_BOX(&tca_fast::generation));
  library.impl("round_weights", TORCH_BOX(&tca_fast::rounded_weights));
  library.impl("screened_generation_step", TORCH_BOX(&tca_fast::screened_generation));
}

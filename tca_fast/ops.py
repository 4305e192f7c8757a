"""The operators: name, schema, shape rule, gradient and backend, once per operator.

The PyTorch dispatcher is the backend table (design §4.1): `reference` serves every device, and a
faster backend takes a device over by registering for its dispatch key, as the compiled extension
does for the CPU. Callers use the functions of this module, which check their arguments;
`torch.ops.tca_fast.*` underneath takes a capacity for the packed active features as well, and
`torch.ops.tca_fast_reference.*` and `torch.ops.tca_fast_triton.*` are the same operators without
the dispatcher's choice.

Shapes: T tokens, D model width, F features, C capacity.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tca_fast import reference
from tca_fast.errors import UserError
from tca_fast.kernels import DENSE_SHARE

# Share of all features expected to be active when nothing is known of it, by kind of device. More
# may fire: on a CPU they are then computed again in the backward, which costs one encoder product;
# a CUDA device, which cannot be asked, starts with dense products.
_DEFAULT_DENSITY = {"cpu": 1 / 32, "cuda": 1.0}
# From this share on, activations are kept densely. On a CPU, packing twice as many would take as
# much memory; on CUDA, dense products are faster from about here on (performance §3b).
_DENSE_DENSITY = {"cpu": 1 / 4, "cuda": DENSE_SHARE}

# Implementations beside the reference: the device they serve, the module that holds them, and what
# installs it.
_BACKENDS = {
    "cpp": ("CPU", "tca_fast._C", "pip install --no-build-isolation tca_fast compiles it"),
    "triton": ("CUDA", "triton", "pip install triton"),
}
# `cpp` is what the dispatcher takes for the CPU; it has no namespace of its own.
_NAMESPACES = {"cpp": "tca_fast", "reference": "tca_fast_reference", "triton": "tca_fast_triton"}
_DISPATCHED = "tca_fast"

_SCHEMAS = {
    "encode": (
        "(Tensor x, Tensor W_enc, Tensor b_enc, int? k, SymInt capacity)"
        " -> (Tensor value, Tensor row_ptr, Tensor feature)"
    ),
    "encode_backward": (
        "(Tensor grad_value, Tensor row_ptr, Tensor feature, Tensor x, Tensor W_enc)"
        " -> (Tensor, Tensor, Tensor)"
    ),
    "decode": (
        "(Tensor row_ptr, Tensor feature, Tensor value, Tensor W_dec, Tensor? b_dec, Tensor? gain)"
        " -> Tensor"
    ),
    "decode_backward": (
        "(Tensor grad_y, Tensor row_ptr, Tensor feature, Tensor value, Tensor W_dec, Tensor? gain)"
        " -> (Tensor, Tensor)"
    ),
    "adapter": (
        "(Tensor x, Tensor mlp_out, Tensor W_enc, Tensor b_enc, Tensor W_dec, Tensor? b_dec,"
        " Tensor? gain, Tensor? token_mask, int? k, SymInt capacity)"
        " -> (Tensor y, Tensor l1, Tensor l0, Tensor fired,"
        " Tensor row_ptr, Tensor feature, Tensor value)"
    ),
    "adapter_backward": (
        "(Tensor grad_y, Tensor grad_l1, Tensor x, Tensor W_enc, Tensor b_enc, Tensor W_dec,"
        " Tensor? gain, Tensor? token_mask, int? k,"
        " Tensor row_ptr, Tensor feature, Tensor value)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
}


@dataclass(frozen=True)
class ActiveFeatures:
    """The active features of T tokens in compressed sparse rows.

    Attributes:
        row_ptr: int64 [T+1]; token t owns the entries row_ptr[t]..row_ptr[t+1].
        feature: int32 [C], feature of each entry, ascending within a token.
        value: [C], its activation (differentiable).
        num_features: F.

    `C` may exceed the number of entries; what lies beyond row_ptr[T] has no meaning.
    """

    row_ptr: Tensor
    feature: Tensor
    value: Tensor
    num_features: int

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.row_ptr.shape[0] - 1

    def counts(self) -> Tensor:
        """Active features of every token, int64 [T] (the L0 of each)."""
        return self.row_ptr.diff()

    def tokens(self) -> Tensor:
        """The token of every entry, int64 [row_ptr[T]]; waits for the device."""
        index = torch.arange(self.num_tokens, device=self.row_ptr.device)
        return index.repeat_interleave(self.counts())

    def trim(self) -> ActiveFeatures:
        """The same features without the room beyond the last entry; waits for the device."""
        entries = int(self.row_ptr[-1])
        return ActiveFeatures(
            self.row_ptr, self.feature[:entries], self.value[:entries], self.num_features
        )

    def to_dense(self) -> Tensor:
        """Activations as [T, F], zero where inactive; waits for the device."""
        return reference.unpack(self.row_ptr, self.feature, self.value, self.num_features)

    @staticmethod
    def from_dense(features_TF: Tensor) -> ActiveFeatures:
        """Pack dense activations [T, F]; waits for the device."""
        entries = int(torch.count_nonzero(features_TF))
        return ActiveFeatures(*reference.pack(features_TF, entries), features_TF.shape[1])


class AdapterOutput(NamedTuple):
    """Result of `adapter`.

    Attributes:
        y: mlp_out + adapter, the shape and dtype of `mlp_out`.
        l1: 0-d, Σ over real tokens of Σ_f a_tf·‖W_dec[f]‖ (contract §1.4, before the mean).
        l0: int32 [T], active features of each real token; 0 for masked tokens.
        fired: bool [F], features that were active in some real token.
        num_active: int64 0-d, active pairs of all tokens, masked ones included.
    """

    y: Tensor
    l1: Tensor
    l0: Tensor
    fired: Tensor
    num_active: Tensor


def encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, *, k: int | None = None) -> ActiveFeatures:
    """Active features of every token: ReLU(W_enc·x + b_enc), or the k largest of it (paper §3).

    Args:
        x: [..., D]; leading dimensions are flattened to T tokens.
        W_enc: [F, D], the dtype of `x`.
        b_enc: [F].
        k: keep the k largest pre-activations, ties to the lowest index, then apply ReLU; None
            keeps every positive one.

    Returns:
        Packed features with a differentiable `value`.

    Raises:
        UserError: an argument of the wrong shape, dtype or device, or k outside 1..F.
    """
    x_TD = _tokens("x", x, W_enc.shape[-1])
    _check_encoder(x_TD, W_enc, b_enc, k)
    capacity = x_TD.shape[0] * (W_enc.shape[0] if k is None else k)
    value, row_ptr, feature = _operator("encode")(x_TD, W_enc, b_enc, k, capacity)
    return ActiveFeatures(row_ptr, feature, value, W_enc.shape[0])


def decode(
    active: ActiveFeatures,
    W_dec: Tensor,
    b_dec: Tensor | None = None,
    *,
    gain: Tensor | None = None,
) -> Tensor:
    """Σ_f g_f·a_tf·W_dec[f] + b_dec for every token (design §1).

    Args:
        active: packed features; gradients flow into its `value`.
        W_dec: [F, D], the dtype of `active.value`.
        b_dec: [D] or None.
        gain: [F], 1 leaves a feature as it is, 0 ablates it; not differentiable. None is all 1.

    Returns:
        [T, D].

    Raises:
        UserError: an argument of the wrong shape, dtype or device.
    """
    num_features, width = active.num_features, W_dec.shape[-1]
    _check("W_dec", W_dec, (num_features, width), active.value)
    _check("b_dec", b_dec, (width,), active.value)
    _check_gain(gain, num_features, active.value)
    return _operator("decode")(active.row_ptr, active.feature, active.value, W_dec, b_dec, gain)


def adapter(
    x: Tensor,
    mlp_out: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None = None,
    *,
    k: int | None = None,
    gain: Tensor | None = None,
    token_mask: Tensor | None = None,
    expected_density: float | None = None,
) -> AdapterOutput:
    """mlp_out + decode(encode(x)) with the sparsity statistics, in one pass (contract §1).

    Args:
        x: [..., D], the input of the MLP.
        mlp_out: the frozen MLP's output, the shape and dtype of `x`.
        W_enc, W_dec: [F, D], the dtype of `x`.
        b_enc: [F].
        b_dec: [D] or None.
        k: as in `encode`.
        gain: as in `decode`; the statistics are those before the gain.
        token_mask: bool, the leading dimensions of `x`; False leaves a token out of the
            statistics (its output is computed all the same). None counts every token.
        expected_density: share of all features expected to be active, for example that of the
            last batch. It decides how much memory is kept for the backward and never the result.

    Returns:
        The output and its statistics; gradients flow through `y` and `l1`.

    Raises:
        UserError: an argument of the wrong shape, dtype or device, or k outside 1..F.
    """
    num_features, width = W_enc.shape[0], W_enc.shape[-1]
    x_TD = _tokens("x", x, width)
    mlp_out_TD = _tokens("mlp_out", mlp_out, width)
    _check("mlp_out", mlp_out_TD, x_TD.shape, x_TD)
    _check_encoder(x_TD, W_enc, b_enc, k)
    _check("W_dec", W_dec, (num_features, width), x_TD)
    _check("b_dec", b_dec, (width,), x_TD)
    _check_gain(gain, num_features, x_TD)
    if token_mask is not None:
        if token_mask.dtype != torch.bool or token_mask.shape != x.shape[:-1]:
            raise UserError(
                f"token_mask: {token_mask.dtype} of shape {tuple(token_mask.shape)}; it must be "
                f"torch.bool of shape {tuple(x.shape[:-1])}, one entry for each token of x"
            )
        token_mask = token_mask.flatten()
    y_TD, l1, l0_T, fired_F, row_ptr, *_ = _operator("adapter")(
        x_TD,
        mlp_out_TD,
        W_enc,
        b_enc,
        W_dec,
        b_dec,
        gain,
        token_mask,
        k,
        _capacity(x_TD.shape[0], num_features, k, expected_density, x_TD.device.type),
    )
    return AdapterOutput(y_TD.view(mlp_out.shape), l1, l0_T, fired_F, row_ptr[-1])


def backends() -> dict[str, dict[str, str]]:
    """Which implementation serves each operator on each kind of device.

    Returns:
        {operator: {"CPU" or "CUDA": backend name}}; "reference" is the plain PyTorch one.
    """
    names = {key: name for name, (key, _, _) in _BACKENDS.items()}
    return {
        operator: {
            key: names[key] if _is_registered(operator, key) else "reference"
            for key in ("CPU", "CUDA")
        }
        for operator in _SCHEMAS
    }


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the block's operators with one backend, for tests and benchmarks.

    Args:
        name: "reference"; "cpp", the compiled CPU extension; or "triton", which needs a CUDA
            device or Triton's interpreter (TRITON_INTERPRET=1 before the first import).

    Raises:
        UserError: no such backend, or it is not installed, or nothing here can run it.
    """
    global _namespace
    if name not in _NAMESPACES:
        known = ", ".join(sorted(_NAMESPACES))
        raise UserError(f"backend: {name!r} is not known; choose one of {known}")
    if name in _BACKENDS:
        key, module, remedy = _BACKENDS[name]
        if not all(_is_registered(operator, key) for operator in _SCHEMAS):
            raise UserError(f"backend: {name!r} needs {module}, which is not installed; {remedy}")
    if name == "triton" and not torch.cuda.is_available() and not _triton_is_interpreted():
        raise UserError(
            "backend: 'triton' needs a CUDA device and there is none; set TRITON_INTERPRET=1 to "
            "run its kernels in Triton's interpreter"
        )
    before, _namespace = _namespace, _NAMESPACES[name]
    try:
        yield
    finally:
        _namespace = before


def _operator(name: str) -> Callable[..., Any]:
    return getattr(getattr(torch.ops, _namespace), name)


def _is_registered(operator: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{_DISPATCHED}::{operator}", key)


def _triton_is_interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


def _capacity(
    num_tokens: int, num_features: int, k: int | None, expected_density: float | None, device: str
) -> int:
    """Active features to reserve room for: twice what is expected, or all when that is less."""
    if k is not None:
        return num_tokens * k
    regime = device if device in _DENSE_DENSITY else "cuda"
    density = _DEFAULT_DENSITY[regime] if expected_density is None else expected_density
    if density > _DENSE_DENSITY[regime]:
        return num_tokens * num_features
    return num_tokens * min(num_features, max(4, math.ceil(2 * density * num_features)))


def _tokens(name: str, tensor: Tensor, width: int) -> Tensor:
    if tensor.dim() < 1 or tensor.shape[-1] != width:
        raise UserError(
            f"{name}: shape {tuple(tensor.shape)} does not end in the model width {width} of "
            f"the weights; pass [..., {width}]"
        )
    if not tensor.is_floating_point():
        raise UserError(f"{name}: {tensor.dtype}, expected a floating-point dtype")
    return tensor.reshape(-1, width)


def _check(name: str, tensor: Tensor | None, shape: Sequence[int], like: Tensor) -> None:
    if tensor is None:
        return
    if tensor.shape != torch.Size(shape):
        raise UserError(f"{name}: shape {tuple(tensor.shape)}, expected {tuple(shape)}")
    if tensor.dtype != like.dtype or tensor.device != like.device:
        raise UserError(
            f"{name}: {tensor.dtype} on {tensor.device}, expected {like.dtype} on {like.device} "
            "like the activations; cast or move it"
        )


def _check_encoder(x_TD: Tensor, W_enc: Tensor, b_enc: Tensor, k: int | None) -> None:
    if W_enc.dim() != 2:
        raise UserError(f"W_enc: shape {tuple(W_enc.shape)}, expected [features, model width]")
    _check("W_enc", W_enc, (W_enc.shape[0], x_TD.shape[1]), x_TD)
    _check("b_enc", b_enc, (W_enc.shape[0],), x_TD)
    if k is not None and not 1 <= k <= W_enc.shape[0]:
        raise UserError(f"k: {k} is outside 1..{W_enc.shape[0]}, the number of features")


def _check_gain(gain: Tensor | None, num_features: int, like: Tensor) -> None:
    _check("gain", gain, (num_features,), like)
    if gain is not None and gain.requires_grad:
        raise UserError("gain: requires_grad is set, but no gradient reaches gains; detach it")


def _fake_packed(x: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape[0] + 1, dtype=torch.int64),
        x.new_empty(capacity, dtype=torch.int32),
        x.new_empty(capacity),
    )


def _fake_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int | None, capacity: int) -> Any:
    row_ptr, feature, value = _fake_packed(x, capacity)
    return value, row_ptr, feature


def _fake_encode_backward(
    grad_value: Tensor, row_ptr: Tensor, feature: Tensor, x: Tensor, W_enc: Tensor
) -> Any:
    return x.new_empty(x.shape), W_enc.new_empty(W_enc.shape), W_enc.new_empty(W_enc.shape[0])


def _fake_decode(
    row_ptr: Tensor,
    feature: Tensor,
    value: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    gain: Tensor | None,
) -> Any:
    return value.new_empty(row_ptr.shape[0] - 1, W_dec.shape[1])


def _fake_decode_backward(
    grad_y: Tensor,
    row_ptr: Tensor,
    feature: Tensor,
    value: Tensor,
    W_dec: Tensor,
    gain: Tensor | None,
) -> Any:
    return value.new_empty(value.shape), W_dec.new_empty(W_dec.shape)


def _fake_adapter(
    x: Tensor,
    mlp_out: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    gain: Tensor | None,
    token_mask: Tensor | None,
    k: int | None,
    capacity: int,
) -> Any:
    row_ptr, feature, value = _fake_packed(x, capacity)
    num_activations = x.shape[0] * W_enc.shape[0]
    if reference.keeps_dense(num_activations, capacity):
        feature, value = feature.new_empty(0), value.new_empty(num_activations)
    return (
        x.new_empty(x.shape),
        x.new_empty((), dtype=_sum_dtype(x)),
        x.new_empty(x.shape[0], dtype=torch.int32),
        x.new_empty(W_enc.shape[0], dtype=torch.bool),
        row_ptr,
        feature,
        value,
    )


def _fake_adapter_backward(
    grad_y: Tensor,
    grad_l1: Tensor,
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    gain: Tensor | None,
    token_mask: Tensor | None,
    k: int | None,
    row_ptr: Tensor,
    feature: Tensor,
    value: Tensor,
) -> Any:
    return (
        x.new_empty(x.shape),
        W_enc.new_empty(W_enc.shape),
        W_enc.new_empty(W_enc.shape[0]),
        W_dec.new_empty(W_dec.shape),
        W_dec.new_empty(W_dec.shape[1]),
    )


def _save_encode(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, W_enc, _, _, _ = inputs
    _, row_ptr, feature = output
    ctx.mark_non_differentiable(row_ptr, feature)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(row_ptr, feature, x, W_enc)


def _grad_encode(
    ops: Any, ctx: Any, grad_value: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    if grad_value is None:
        return None, None, None, None, None
    dx, dW_enc, db_enc = ops.encode_backward(grad_value, *ctx.saved_tensors)
    return dx, dW_enc, db_enc, None, None


def _save_decode(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    row_ptr, feature, value, W_dec, b_dec, gain = inputs
    ctx.has_bias = b_dec is not None
    ctx.save_for_backward(row_ptr, feature, value, W_dec, gain)


def _grad_decode(ops: Any, ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    dvalue, dW_dec = ops.decode_backward(grad_y, *ctx.saved_tensors)
    db_dec = grad_y.sum(0, dtype=_sum_dtype(grad_y)).to(dW_dec.dtype) if ctx.has_bias else None
    return None, None, dvalue, dW_dec, db_dec, None


def _save_adapter(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, W_enc, b_enc, W_dec, b_dec, gain, token_mask, k, _ = inputs
    ctx.mark_non_differentiable(*output[2:])
    # Not zeros for outputs without a gradient: the packed ones may be as large as [T, F].
    ctx.set_materialize_grads(False)
    ctx.has_bias, ctx.k = b_dec is not None, k
    ctx.save_for_backward(x, W_enc, b_enc, W_dec, gain, token_mask, *output[4:])


def _grad_adapter(
    ops: Any, ctx: Any, grad_y: Tensor | None, grad_l1: Tensor | None, *_: None
) -> tuple[Any, ...]:
    *arguments, row_ptr, feature, value = ctx.saved_tensors
    x = arguments[0]
    if grad_y is None:
        grad_y = torch.zeros_like(x)
    if grad_l1 is None:
        grad_l1 = x.new_zeros((), dtype=_sum_dtype(x))
    dx, dW_enc, db_enc, dW_dec, db_dec = ops.adapter_backward(
        grad_y, grad_l1, *arguments, ctx.k, row_ptr, feature, value
    )
    if not ctx.has_bias:
        db_dec = None
    return dx, grad_y, dW_enc, db_enc, dW_dec, db_dec, None, None, None, None


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


_FAKES: dict[str, Callable[..., Any]] = {
    "encode": _fake_encode,
    "encode_backward": _fake_encode_backward,
    "decode": _fake_decode,
    "decode_backward": _fake_decode_backward,
    "adapter": _fake_adapter,
    "adapter_backward": _fake_adapter_backward,
}
_GRADIENTS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "encode": (_grad_encode, _save_encode),
    "decode": (_grad_decode, _save_decode),
    "adapter": (_grad_adapter, _save_adapter),
}


def _register(namespace: str, implementation: Callable[[str], Callable[..., Any]]) -> None:
    for name, schema in _SCHEMAS.items():
        operator = f"{namespace}::{name}"
        torch.library.define(operator, schema)
        torch.library.impl(operator, "CompositeExplicitAutograd", implementation(name))
        torch.library.register_fake(operator, _FAKES[name])
        if name in _GRADIENTS:
            backward, save = _GRADIENTS[name]
            gradient = partial(backward, getattr(torch.ops, namespace))
            torch.library.register_autograd(operator, gradient, setup_context=save)


def _without_autocast(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Keep the dtype of products inside an operator, which autocast would lower."""

    def run(*arguments: Any) -> Any:
        device = next(a.device.type for a in arguments if isinstance(a, Tensor))
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return operator(*arguments)
        with torch.autocast(device, enabled=False):
            return operator(*arguments)

    return run


def _reference(name: str) -> Callable[..., Any]:
    return _without_autocast(getattr(reference, name))


def _triton(name: str) -> Callable[..., Any]:
    """An operator in Triton, whose import waits for the first call; kernels know no strides."""

    def run(*arguments: Any) -> Any:
        from tca_fast.kernels import operators

        dense = [a.contiguous() if isinstance(a, Tensor) else a for a in arguments]
        # Triton launches on the current device, which need not be the one of the tensors.
        with torch.cuda.device_of(dense[0]):
            return getattr(operators, name)(*dense)

    return _without_autocast(run)


_namespace = _DISPATCHED
_register(_DISPATCHED, _reference)
_register(_NAMESPACES["reference"], _reference)
# Absent, the reference serves; present but broken, the ImportError comes out.
if importlib.util.find_spec("tca_fast._C"):
    importlib.import_module("tca_fast._C")
if importlib.util.find_spec("triton"):
    _register(_NAMESPACES["triton"], _triton)
    for _name in _SCHEMAS:
        torch.library.impl(f"{_DISPATCHED}::{_name}", "CUDA", _triton(_name))

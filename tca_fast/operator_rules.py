"""Shape rules and gradients of the operators, as `registry` registers them with PyTorch.

A shape rule says what an operator gives without computing it, for compilation. A gradient is an
operator of its own, `…_backward`, which any backend may serve.

Shapes: T tokens, D model width, F features, C capacity. Everything is by token but the adapter's
`mlp_out` and `y`, which are [..., D].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tca_fast import reference
from tca_fast.errors import UserError


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
        mlp_out.new_empty(mlp_out.shape),
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


class _OnceDifferentiable(torch.autograd.Function):
    """A backward operator in a graph, as `create_graph=True` records it."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Any], *arguments: Any) -> Any:
        return run(*arguments)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise UserError(
            "create_graph: the operators have first derivatives only; write the layer in plain "
            "PyTorch where second ones are needed"
        )


def _differentiate(run: Callable[..., Any], *arguments: Any) -> Any:
    """The gradients, whose own gradient is refused rather than taken for zero."""
    if torch.is_grad_enabled():
        return _OnceDifferentiable.apply(run, *arguments)
    return run(*arguments)


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
    dx, dW_enc, db_enc = _differentiate(ops.encode_backward, grad_value, *ctx.saved_tensors)
    return dx, dW_enc, db_enc, None, None


def _save_decode(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    row_ptr, feature, value, W_dec, b_dec, gain = inputs
    ctx.has_bias = b_dec is not None
    ctx.save_for_backward(row_ptr, feature, value, W_dec, gain)


def _grad_decode(ops: Any, ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    dvalue, dW_dec = _differentiate(ops.decode_backward, grad_y, *ctx.saved_tensors)
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
    grad_y_TD = torch.zeros_like(x) if grad_y is None else grad_y.reshape(x.shape)
    if grad_l1 is None:
        grad_l1 = x.new_zeros((), dtype=_sum_dtype(x))
    packed = row_ptr, feature, value
    dx, dW_enc, db_enc, dW_dec, db_dec = _differentiate(
        ops.adapter_backward, grad_y_TD, grad_l1, *arguments, ctx.k, *packed
    )
    if not ctx.has_bias:
        db_dec = None
    return dx, grad_y, dW_enc, db_enc, dW_dec, db_dec, None, None, None, None


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


# By operator.
FAKES: dict[str, Callable[..., Any]] = {
    "encode": _fake_encode,
    "encode_backward": _fake_encode_backward,
    "decode": _fake_decode,
    "decode_backward": _fake_decode_backward,
    "adapter": _fake_adapter,
    "adapter_backward": _fake_adapter_backward,
}
# By operator: the backward, and what it is given to keep.
GRADIENTS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "encode": (_grad_encode, _save_encode),
    "decode": (_grad_decode, _save_decode),
    "adapter": (_grad_adapter, _save_adapter),
}

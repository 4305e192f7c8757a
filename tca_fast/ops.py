"""The operators as callers use them: checked arguments in, active features and outputs out.

What each computes is in `reference`, and which backend computes it in `registry`.

Shapes: T tokens, D model width, F features, C capacity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tca_fast import reference
from tca_fast.errors import UserError
from tca_fast.registry import backend, backends, call, dense_share, serving

__all__ = [
    "ActiveFeatures",
    "AdapterOutput",
    "adapter",
    "backend",
    "backends",
    "decode",
    "encode",
    "serving",
]

# Share of all features expected to be active when nothing is known of it. More may fire: on a CPU
# they are then computed again in the backward, which costs one encoder product. A CUDA device,
# which cannot be asked, starts a training with dense products.
_DEFAULT_DENSITY = 1 / 32
# On a CPU, activations are kept densely from this share on: packing twice as many would take as
# much memory. On CUDA, from where dense products are faster (`registry.dense_share`).
_CPU_DENSE_SHARE = 1 / 4
# T for which compiled code asks, since there the number of tokens may be a symbol.
_COMPILED_TOKENS = 8192


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
        row_ptr: int64 [T+1], where the active pairs of each token begin; masked ones included.
    """

    y: Tensor
    l1: Tensor
    l0: Tensor
    fired: Tensor
    row_ptr: Tensor

    @property
    def num_active(self) -> Tensor:
        """Active pairs of all tokens, int64 0-d."""
        return self.row_ptr[-1]


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
    value, row_ptr, feature = call("encode", x_TD, W_enc, b_enc, k, capacity)
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
    return call("decode", active.row_ptr, active.feature, active.value, W_dec, b_dec, gain)


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
    if mlp_out.shape[-1:] != (width,) or mlp_out.numel() != x_TD.numel():
        raise UserError(f"mlp_out: shape {tuple(mlp_out.shape)}, expected {tuple(x.shape)}")
    _check("mlp_out", mlp_out, mlp_out.shape, x_TD)
    _check_encoder(x_TD, W_enc, b_enc, k)
    _check("W_dec", W_dec, (num_features, width), x_TD)
    _check("b_dec", b_dec, (width,), x_TD)
    _check_gain(gain, num_features, x_TD)
    if token_mask is not None:
        shape, device = x.shape[:-1], x.device
        fits = token_mask.shape == shape and token_mask.device == device
        if token_mask.dtype != torch.bool or not fits:
            raise UserError(
                f"token_mask: {token_mask.dtype} of shape {tuple(token_mask.shape)} on "
                f"{token_mask.device}; it must be torch.bool of shape {tuple(shape)} on {device}, "
                "one entry for each token of x"
            )
        token_mask = token_mask.flatten()
    y, l1, l0_T, fired_F, row_ptr, *_ = call(
        "adapter",
        x_TD,
        mlp_out,
        W_enc,
        b_enc,
        W_dec,
        b_dec,
        gain,
        token_mask,
        k,
        _capacity(x_TD, num_features, k, expected_density),
    )
    return AdapterOutput(y, l1, l0_T, fired_F, row_ptr)


def _capacity(
    x_TD: Tensor, num_features: int, k: int | None, expected_density: float | None
) -> int:
    """Active features to reserve room for: twice what is expected, or all when that is less.

    On a CPU, which counts them first, none where there will be no backward to keep them for.
    """
    is_cpu = x_TD.device.type == "cpu"
    if is_cpu and not torch.is_grad_enabled() and (expected_density or 0) <= _CPU_DENSE_SHARE:
        return 0
    num_tokens, width = x_TD.shape
    if k is not None:
        return num_tokens * k
    if is_cpu:
        density, most = _DEFAULT_DENSITY, _CPU_DENSE_SHARE
    else:
        asked = _COMPILED_TOKENS if torch.compiler.is_compiling() else num_tokens
        most = dense_share(x_TD.device, asked, width, num_features)
        # Adapters that only run are trained ones as a rule, and those are sparse.
        is_sparse = most > 0 and not torch.is_grad_enabled()
        density = min(_DEFAULT_DENSITY, most) if is_sparse else 1.0
    if expected_density is not None:
        density = expected_density
    if density > most:
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


def _check(name: str, tensor: Tensor | None, shape: tuple[int, ...], like: Tensor) -> None:
    if tensor is None:
        return
    if tensor.shape != shape:
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

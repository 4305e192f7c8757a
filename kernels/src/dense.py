"""The regime in which so much is active that dense products win, fused around the products.

Shapes: T tokens, F features, W words of 32 features. With `row_ptr` a kernel does nothing
unless more features fired than fit, row_ptr[T] > C: a step that overflows its packed arena takes
this way without the host having to know (performance §5, K1).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tca_fast.kernels import launch
from tca_fast.kernels.gather import norms
from tca_fast.kernels.select import Counts, is_active

_CHUNK, _TOKENS, _FEATURES = 1024, 16, 64

# out = scale[:, None]·(a @ b), written into the third argument; the scale may be None.
Product = Callable[[Tensor, Tensor, Tensor, Tensor | None], object]


def activate(
    z_TF: Tensor,
    bits: Tensor | None,
    norm_F: Tensor | None,
    token_mask_T: Tensor | None,
    counts: Counts | None,
    l1_T: Tensor | None,
    overflow: launch.Overflow | None = None,
) -> None:
    """Turn pre-activations into activations, in place; see `activate_kernel`."""
    num_tokens, num_features = z_TF.shape
    block, warps = launch.features_of_row(num_features)
    active, l0, fired = counts or (None, None, None)
    row_ptr, _, capacity = launch.condition(overflow)
    activate_kernel[(num_tokens,)](
        z_TF, bits, norm_F, token_mask_T, active, l0, fired, l1_T, row_ptr,
        num_tokens, num_features, triton.cdiv(num_features, 32), capacity,
        SUM=launch.triton_dtype(launch.sum_dtype(z_TF.dtype)), FEATURES=block, num_warps=warps,
    )  # fmt: skip


class Upstream(NamedTuple):
    """Gradients that arrive, and what they pass through.

    Attributes:
        y: [T, D], of the output.
        l1: 0-d, of the L1 summed over tokens, or None.
        gain: [F] or None.
        token_mask: uint8 [T] or None.
    """

    y: Tensor
    l1: Tensor | None
    gain: Tensor | None
    token_mask: Tensor | None


class Gradients(NamedTuple):
    """Where the gradients go."""

    x: Tensor
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor

    @staticmethod
    def empty(x_TD: Tensor, W_FD: Tensor) -> "Gradients":
        """Uninitialised, in the dtype of the weights."""
        return Gradients(
            torch.empty_like(x_TD), torch.empty_like(W_FD), W_FD[:, 0].new_empty(len(W_FD)),
            torch.empty_like(W_FD),
        )  # fmt: skip


def backward(
    features_TF: Tensor,
    x_TD: Tensor,
    W_enc_FD: Tensor,
    W_dec_FD: Tensor,
    upstream: Upstream,
    out: Gradients,
    product: Product,
    overflow: launch.Overflow | None = None,
) -> None:
    """All gradients by four dense products; with `overflow`, `product` must heed it as well."""
    (num_tokens, num_features), width = features_TF.shape, x_TD.shape[1]
    sums = launch.sum_dtype(x_TD.dtype)
    row_ptr, _, capacity = launch.condition(overflow)
    norm = norms(W_dec_FD, overflow=overflow)
    da = torch.empty_like(features_TF, dtype=gained_dtype(features_TF, upstream.gain))
    product(upstream.y, W_dec_FD.T, da, None)
    num_chunks = triton.cdiv(num_tokens, _CHUNK)
    partial = torch.empty(2, num_chunks, num_features, dtype=sums, device=x_TD.device)
    activation_backward_kernel[(triton.cdiv(num_features, _FEATURES), num_chunks)](
        features_TF, da, norm, upstream.gain, upstream.l1, upstream.token_mask, *partial, row_ptr,
        num_tokens, num_features, capacity,
        SUM=launch.triton_dtype(sums), TOKENS=_TOKENS, CHUNK=_CHUNK, FEATURES=_FEATURES,
        num_warps=4,
    )  # fmt: skip
    product(features_TF.T, upstream.y, out.W_dec, upstream.gain)
    block, warps = launch.row(width)
    finish_kernel[(num_features,)](
        W_dec_FD, norm, upstream.l1, *partial, out.b_enc, out.W_dec, row_ptr,
        num_tokens, num_features, width, capacity, num_chunks,
        SUM=launch.triton_dtype(sums), WIDTH=block, num_warps=warps,
    )  # fmt: skip
    product(da.T, x_TD, out.W_enc, None)
    product(da, W_enc_FD, out.x, None)


def gained_dtype(tensor: Tensor, gain_F: Tensor | None) -> torch.dtype:
    """What holds a tensor times gains: float16 ends at 65504, which a large gain leaves."""
    if gain_F is not None and tensor.dtype == torch.float16:
        return torch.float32
    return tensor.dtype


@launch.kernel
def activate_kernel(
    z, bits, norm, token_mask, counts, l0, fired, l1, row_ptr,
    num_tokens, num_features, num_words, capacity,
    SUM: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Turn one token's pre-activations into activations, in place, and take its statistics.

    With `bits` the mask says what is active; otherwise every positive or NaN entry is. `counts`,
    `l0` and `fired` may be None together, `l1` (with `norm`) on its own.
    """
    if row_ptr is not None:
        if tl.load(row_ptr + num_tokens) <= capacity:
            return
    t = tl.program_id(0).to(tl.int64)
    is_real = tl.full((), 1, dtype=tl.int1)
    if token_mask is not None:
        is_real = tl.load(token_mask + t) != 0
    # Sums over the row end in one exchange between threads after the loop, not one in every round.
    count = tl.zeros((FEATURES,), dtype=tl.int32)
    weighted = tl.zeros((FEATURES,), dtype=SUM)
    for first in range(0, num_features, FEATURES):
        f = first + tl.arange(0, FEATURES)
        inside = f < num_features
        z_F = tl.load(z + t * num_features + f, mask=inside, other=0.0)
        if bits is not None:
            words = tl.load(bits + t * num_words + f // 32, mask=inside, other=0)
            active = ((words >> (f % 32)) & 1) > 0
        else:
            active = is_active(z_F)
        a = tl.where(active, z_F, 0.0)
        tl.store(z + t * num_features + f, a, mask=inside)
        if l1 is not None:
            weight = tl.load(norm + f, mask=inside, other=0.0)
            weighted += tl.where(active, a.to(SUM) * weight, 0.0)
        if counts is not None:
            count += active.to(tl.int32)
            tl.store(fired + f, 1, mask=active & inside & is_real)
    if counts is not None:
        num_active = tl.sum(count, axis=0)
        tl.store(counts + t, num_active.to(tl.int64))
        tl.store(l0 + t, tl.where(is_real, num_active, 0))
    if l1 is not None:
        tl.store(l1 + t, tl.where(is_real, tl.sum(weighted, axis=0), 0.0))


@launch.kernel
def activation_backward_kernel(
    features, da, norm, gain, grad_l1, token_mask, partial_bias, partial_active, row_ptr,
    num_tokens, num_features, capacity,
    SUM: tl.constexpr, TOKENS: tl.constexpr, CHUNK: tl.constexpr,
    FEATURES: tl.constexpr,
):  # fmt: skip
    """da = g·da + dl1·m_t·‖W_dec[f]‖ where active, 0 elsewhere, in place, for a chunk of tokens.

    Also the chunk's column sums of da (for db_enc) and of the real tokens' activations (for the
    norm's gradient), [chunks, F] each.
    """
    if row_ptr is not None:
        if tl.load(row_ptr + num_tokens) <= capacity:
            return
    f = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    chunk = tl.program_id(1).to(tl.int64)
    is_feature = f < num_features
    weight = tl.load(norm + f, mask=is_feature, other=0.0)
    dl1 = tl.load(grad_l1).to(SUM)
    of_norm = tl.where(dl1 != 0, dl1 * weight, 0.0)
    g = tl.full((FEATURES,), 1, dtype=SUM)
    if gain is not None:
        g = tl.load(gain + f, mask=is_feature, other=0.0).to(SUM)
    bias = tl.zeros((TOKENS, FEATURES), dtype=SUM)
    active_sum = tl.zeros((TOKENS, FEATURES), dtype=SUM)
    for first in range(0, CHUNK, TOKENS):
        t = chunk * CHUNK + first + tl.arange(0, TOKENS)
        is_token = t < num_tokens
        inside = is_token[:, None] & is_feature[None, :]
        at = t[:, None] * num_features + f[None, :]
        a = tl.load(features + at, mask=inside, other=0.0).to(SUM)
        is_real = is_token
        if token_mask is not None:
            is_real = tl.load(token_mask + t, mask=is_token, other=0) != 0
        upstream = g[None, :] * tl.load(da + at, mask=inside, other=0.0).to(SUM)
        upstream += tl.where(is_real[:, None], of_norm[None, :], 0.0)
        upstream = tl.where(a != 0, upstream, 0.0)
        tl.store(da + at, upstream, mask=inside)
        bias += upstream
        active_sum += tl.where(is_real[:, None], a, 0.0)
    at = chunk * num_features + f
    tl.store(partial_bias + at, tl.sum(bias, axis=0), mask=is_feature)
    tl.store(partial_active + at, tl.sum(active_sum, axis=0), mask=is_feature)


@launch.kernel
def finish_kernel(
    W_dec, norm, grad_l1, partial_bias, partial_active, db_enc, dW_dec, row_ptr,
    num_tokens, num_features, width, capacity, num_chunks,
    SUM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Add up the chunks of one feature.

    db_enc[f] is the sum of da, and dW_dec[f] += dl1·(Σ_t m_t·a)·W_dec[f]/‖W_dec[f]‖.
    """
    if row_ptr is not None:
        if tl.load(row_ptr + num_tokens) <= capacity:
            return
    f = tl.program_id(0).to(tl.int64)
    bias = tl.zeros((), dtype=SUM)
    active_sum = tl.zeros((), dtype=SUM)
    for chunk in range(num_chunks):
        bias += tl.load(partial_bias + chunk * num_features + f)
        active_sum += tl.load(partial_active + chunk * num_features + f)
    tl.store(db_enc + f, bias)
    dl1 = tl.load(grad_l1).to(SUM)
    length = tl.load(norm + f)
    if (dl1 != 0) & (length != 0):
        d = tl.arange(0, WIDTH)
        at = f * width + d
        w = tl.load(W_dec + at, mask=d < width, other=0.0).to(SUM)
        summed = tl.load(dW_dec + at, mask=d < width, other=0.0).to(SUM)
        summed += (dl1 * active_sum / length) * w
        tl.store(dW_dec + at, summed, mask=d < width)

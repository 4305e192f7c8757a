"""Weighted sums of weight rows: decode, and the encoder's gradient to its input.

Shapes: T tokens, D model width, F features, C capacity.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tca_fast.kernels import launch


def norms(
    W_FD: Tensor, *, wanted: Tensor | None = None, overflow: launch.Overflow | None = None
) -> Tensor:
    """‖W[f]‖ as [F] in the dtype of sums; only where `wanted`, if given.

    With `overflow`, only on that condition.
    """
    num_features, width = W_FD.shape
    sums = launch.sum_dtype(W_FD.dtype)
    norm = torch.empty(num_features, dtype=sums, device=W_FD.device)
    block, warps = launch.row(width)
    norm_kernel[(num_features,)](
        W_FD, wanted, norm, *launch.condition(overflow), width,
        SUM=launch.triton_dtype(sums), WIDTH=block, num_warps=warps,
    )  # fmt: skip
    return norm


def gather_rows(
    row_ptr: Tensor,
    feature: Tensor,
    coefficient: Tensor,
    W_FD: Tensor,
    *,
    gain: Tensor | None = None,
    base: Tensor | None = None,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    token_mask: Tensor | None = None,
    poison: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """out[t] = base[t] + bias + Σ_e gain[f]·coefficient[e]·W[f], as [T, D] in the dtype of `W`.

    With `norm`, also l1[t] = Σ_e coefficient[e]·norm[f], [T], 0 for masked tokens. When more
    features fired than fit, nothing is written, or NaN with `poison`.
    """
    num_tokens, (num_features, width) = len(row_ptr) - 1, W_FD.shape
    out = torch.empty(num_tokens, width, dtype=W_FD.dtype, device=W_FD.device)
    l1 = None if norm is None else torch.empty(num_tokens, dtype=norm.dtype, device=norm.device)
    block, warps = launch.slice_of_row(width, num_tokens)
    gather_kernel[(num_tokens, triton.cdiv(width, block))](
        row_ptr, feature, coefficient, W_FD, gain, base, bias, norm, token_mask, out, l1,
        num_tokens, num_features, width, len(feature),
        SUM=launch.triton_dtype(launch.sum_dtype(W_FD.dtype)), POISON=poison,
        ROWS=launch.rows_in_flight(block, warps), WIDTH=block, num_warps=warps,
    )  # fmt: skip
    return out, l1


@launch.kernel
def norm_kernel(
    W, wanted, norm, row_ptr, num_tokens, capacity, width,
    SUM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """norm[f] = ‖W[f]‖ where wanted[f] (all where it is None); other rows are not read.

    With `row_ptr`, nothing happens unless row_ptr[T] > capacity.
    """
    if row_ptr is not None:
        if tl.load(row_ptr + num_tokens) <= capacity:
            return
    f = tl.program_id(0).to(tl.int64)
    if wanted is not None:
        if tl.load(wanted + f) == 0:
            return
    d = tl.arange(0, WIDTH)
    w = tl.load(W + f * width + d, mask=d < width, other=0.0).to(SUM)
    tl.store(norm + f, tl.sqrt(tl.sum(w * w, axis=0)))


@launch.kernel
def gather_kernel(
    row_ptr, feature, coefficient, W, gain, base, bias, norm, token_mask, out, l1,
    num_tokens, num_features, width, capacity,
    SUM: tl.constexpr, POISON: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out[t] = base[t] + bias + Σ_e gain[f]·coefficient[e]·W[f], rounded once.

    `gain`, `base` and `bias` may be None. With `norm`, l1[t] = Σ_e coefficient[e]·norm[f] for real
    tokens, 0 for others. When more features fired than fit, nothing is written, or NaN with
    `POISON`. A feature index outside 0..F-1 gives NaN and is not read.
    """
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    in_row = d < width
    overflowed = tl.load(row_ptr + num_tokens) > capacity
    total = tl.zeros((WIDTH,), dtype=SUM)
    if overflowed:
        if POISON:
            total += float("nan")
            tl.store(out + t * width + d, total, mask=in_row)
        return
    first = tl.maximum(tl.load(row_ptr + t), 0)
    last = tl.minimum(tl.load(row_ptr + t + 1), capacity)
    weighted = tl.zeros((), dtype=SUM)
    for start in range(first, last, ROWS):
        e = start + tl.arange(0, ROWS)
        exists = e < last
        f = tl.load(feature + e, mask=exists, other=0).to(tl.int64)
        is_feature = (f >= 0) & (f < num_features)
        c = tl.load(coefficient + e, mask=exists, other=0.0).to(SUM)
        c = tl.where(is_feature, c, float("nan"))
        f = tl.where(is_feature, f, 0)
        if norm is not None:
            weighted += tl.sum(c * tl.load(norm + f, mask=exists, other=0.0), axis=0)
        if gain is not None:
            c = c * tl.load(gain + f, mask=exists, other=0.0).to(SUM)
        rows = tl.load(
            W + f[:, None] * width + d[None, :],
            mask=exists[:, None] & in_row[None, :],
            other=0.0,
        ).to(SUM)
        total += tl.sum(c[:, None] * rows, axis=0)
    if bias is not None:
        total += tl.load(bias + d, mask=in_row, other=0.0).to(SUM)
    if base is not None:
        total += tl.load(base + t * width + d, mask=in_row, other=0.0).to(SUM)
    tl.store(out + t * width + d, total, mask=in_row)
    if norm is not None:
        if tl.program_id(1) == 0:
            if token_mask is not None:
                weighted = tl.where(tl.load(token_mask + t) != 0, weighted, 0.0)
            tl.store(l1 + t, weighted)

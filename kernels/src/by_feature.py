"""Gradients of the weights, one feature at a time: every pair is read once, every row written once.

Shapes: T tokens, D model width, F features, C capacity, S tokens per segment. The active pairs are
visited in the order of their feature; `order` lists their entries and `col_ptr` [F+1] says where
each feature begins. Program p < F works on the first S tokens of feature p; the others, C/S at
most, on what follows in features that fire more often. `extra_ptr` [F+1] counts these extra
segments. Sums over several segments go through float32 partial sums that are added in order, so
results are the same in every run (performance §5, K2). The decoder's and the encoder's gradients
are launches of their own: the registers of both leave room for one program on a multiprocessor.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tca_fast.kernels import launch
from tca_fast.kernels.dense import Upstream
from tca_fast.kernels.pack import ByFeature


def adapter_gradients(
    row_ptr: Tensor,
    pairs: ByFeature,
    value: Tensor,
    x_TD: Tensor,
    W_dec_FD: Tensor,
    upstream: Upstream,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(da [C] in the dtype of sums, dW_enc [F,D], db_enc [F], dW_dec [F,D])."""
    da = torch.empty(len(value), dtype=launch.sum_dtype(x_TD.dtype), device=x_TD.device)
    dW_dec = torch.empty_like(W_dec_FD)
    _launch(row_ptr, pairs, da, upstream.y, dW_dec, decoder=_Decoder(value, W_dec_FD, upstream))
    dW_enc, db_enc = encoder_gradients(row_ptr, pairs, da, x_TD)
    return da, dW_enc, db_enc, dW_dec


def decoder_gradients(
    row_ptr: Tensor,
    pairs: ByFeature,
    value: Tensor,
    grad_y_TD: Tensor,
    W_dec_FD: Tensor,
    gain_F: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(dvalue [C], dW_dec [F,D]) of a decode on its own; NaN where more fired than fit."""
    dvalue, dW_dec = torch.zeros_like(value), torch.full_like(W_dec_FD, torch.nan)
    decoder = _Decoder(value, W_dec_FD, Upstream(grad_y_TD, None, gain_F, None))
    _launch(row_ptr, pairs, dvalue, grad_y_TD, dW_dec, decoder=decoder)
    return dvalue, dW_dec


def encoder_gradients(
    row_ptr: Tensor, pairs: ByFeature, da: Tensor, x_TD: Tensor, *, poison: bool = False
) -> tuple[Tensor, Tensor]:
    """(dW_enc [F,D], db_enc [F]) of given gradients of the activations.

    Where more fired than fit nothing is written; with `poison` the gradients are NaN then.
    """
    num_features = len(pairs.col_ptr) - 1
    dW_enc, db_enc = x_TD.new_empty(num_features, x_TD.shape[1]), x_TD.new_empty(num_features)
    if poison:
        dW_enc.fill_(torch.nan)
        db_enc.fill_(torch.nan)
    _launch(row_ptr, pairs, da, x_TD, dW_enc, db_enc=db_enc)
    return dW_enc, db_enc


class _Decoder(NamedTuple):
    """What the decoder's gradients need beside the rows of the upstream gradient."""

    value: Tensor
    W: Tensor
    upstream: Upstream


def _launch(
    row_ptr: Tensor,
    pairs: ByFeature,
    da: Tensor,
    rows_TD: Tensor,
    dW: Tensor,
    *,
    decoder: _Decoder | None = None,
    db_enc: Tensor | None = None,
) -> None:
    """Run both kernels, for the decoder or, without it, for the encoder."""
    num_features, width = dW.shape
    sums = launch.sum_dtype(dW.dtype)
    partial, partial_sum = (
        torch.empty(2 * pairs.num_extras, columns, dtype=sums, device=dW.device)
        for columns in (width, 1)
    )
    value, W_dec, upstream = decoder or (None, None, Upstream(rows_TD, None, None, None))
    num_tokens, capacity = len(row_ptr) - 1, len(da)
    block, warps = launch.row(width)
    segment_kernel[(num_features + pairs.num_extras,)](
        pairs.col_ptr, pairs.extra_ptr, pairs.order, pairs.token, value, da, rows_TD,
        upstream.l1, W_dec, upstream.gain, upstream.token_mask, dW, db_enc, partial, partial_sum,
        row_ptr, num_tokens, num_features, width, capacity, pairs.num_extras, pairs.segment_tokens,
        SUM=launch.triton_dtype(sums), STEPS=num_features.bit_length(),
        ROWS=launch.rows_in_flight(block, warps), WIDTH=block, num_warps=warps,
    )  # fmt: skip
    if pairs.num_extras:
        add_segments_kernel[(num_features,)](
            pairs.extra_ptr, upstream.l1, W_dec, partial, partial_sum, dW, db_enc,
            row_ptr, num_tokens, width, capacity, pairs.num_extras,
            SUM=launch.triton_dtype(sums), WIDTH=block, num_warps=warps,
        )  # fmt: skip


@triton.jit
def _segment(extra_ptr, num_features, STEPS: tl.constexpr):
    """Feature and segment of this program; the feature is F where there is nothing to do."""
    program = tl.program_id(0)
    extra = program - num_features
    low = tl.zeros((), dtype=tl.int32)
    high = low + num_features
    for _ in range(tl.where(extra < 0, 0, STEPS)):
        middle = (low + high) // 2
        is_open = low < high
        is_after = tl.load(extra_ptr + middle + 1, mask=is_open, other=0) <= extra
        low = tl.where(is_open & is_after, middle + 1, low)
        high = tl.where(is_open & (is_after == 0), middle, high)
    before = tl.load(extra_ptr + low, mask=low < num_features, other=0).to(tl.int32)
    feature = tl.where(extra < 0, program, low)
    segment = tl.where(extra < 0, 0, extra - before + 1)
    return feature, segment


@launch.kernel
def segment_kernel(
    col_ptr, extra_ptr, order, token, value, da, rows,
    grad_l1, W_dec, gain, token_mask, dW, db_enc, partial, partial_sum,
    row_ptr, num_tokens, num_features, width, capacity, num_extras, segment_tokens,
    SUM: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One segment of one feature: the decoder's gradients, or the encoder's where `W_dec` is None.

        da = g·⟨dy_t, W_dec[f]⟩ + dl1·m_t·‖W_dec[f]‖                       (decoder, rows dy)
        dW_dec[f] = Σ_t g·a·dy_t + dl1·(Σ_t m_t·a)·W_dec[f]/‖W_dec[f]‖
        dW_enc[f] = Σ_t da·x_t,  db_enc[f] = Σ_t da                           (encoder, rows x)

    The norm's gradient is 0 where the norm is 0. Nothing is written when more features fired than
    fit. `grad_l1`, `gain` and `token_mask` may be None.
    """
    if tl.load(row_ptr + num_tokens) > capacity:
        return
    f, segment = _segment(extra_ptr, num_features, STEPS)
    if f >= num_features:
        return
    extras = (tl.load(extra_ptr + f + 1) - tl.load(extra_ptr + f)).to(tl.int32)
    first = tl.load(col_ptr + f) + segment * segment_tokens
    last = tl.minimum(tl.load(col_ptr + f + 1), first + segment_tokens)
    f = f.to(tl.int64)

    d = tl.arange(0, WIDTH)
    in_row = d < width
    if W_dec is not None:
        w = tl.load(W_dec + f * width + d, mask=in_row, other=0.0).to(SUM)
        norm = tl.sqrt(tl.sum(w * w, axis=0))
        dl1 = tl.zeros((), dtype=SUM)
        if grad_l1 is not None:
            dl1 += tl.load(grad_l1).to(SUM)
        of_norm = tl.where(dl1 != 0, dl1 * norm, 0.0)
        g = tl.full((), 1, dtype=SUM)
        if gain is not None:
            g = tl.load(gain + f).to(SUM)
    total = tl.zeros((WIDTH,), dtype=SUM)
    # Of da for the encoder's bias, of the real tokens' activations for the norm's gradient.
    summed = tl.zeros((), dtype=SUM)
    for start in range(first, last, ROWS):
        slot = start + tl.arange(0, ROWS)
        exists = slot < last
        e = tl.load(order + slot, mask=exists, other=0)
        t = tl.load(token + e, mask=exists, other=0).to(tl.int64)
        if W_dec is not None:
            a = tl.load(value + e, mask=exists, other=0.0).to(SUM)
        else:
            da_R = tl.load(da + e, mask=exists, other=0.0).to(SUM)
        inside = exists[:, None] & in_row[None, :]
        row = tl.load(rows + t[:, None] * width + d[None, :], mask=inside, other=0.0).to(SUM)
        if W_dec is not None:
            da_R = g * tl.sum(row * w[None, :], axis=1)
            total += tl.sum((g * a)[:, None] * row, axis=0)
            if grad_l1 is not None:
                counted = exists
                if token_mask is not None:
                    counted = exists & (tl.load(token_mask + t, mask=exists, other=0) != 0)
                da_R += tl.where(counted, of_norm, 0.0)
                summed += tl.sum(tl.where(counted, a, 0.0), axis=0)
            tl.store(da + e, da_R, mask=exists)
        else:
            total += tl.sum(da_R[:, None] * row, axis=0)
            summed += tl.sum(da_R, axis=0)

    if extras == 0:
        if W_dec is not None:
            if grad_l1 is not None:
                if (dl1 != 0) & (norm != 0):
                    total += (dl1 * summed / norm) * w
        else:
            tl.store(db_enc + f, summed)
        tl.store(dW + f * width + d, total, mask=in_row)
    else:
        begin = tl.load(extra_ptr + f).to(tl.int64)
        part = begin + segment - 1
        if segment == 0:
            part = begin + num_extras
        tl.store(partial + part * width + d, total, mask=in_row)
        tl.store(partial_sum + part, summed)


@launch.kernel
def add_segments_kernel(
    extra_ptr, grad_l1, W_dec, partial, partial_sum, dW, db_enc,
    row_ptr, num_tokens, width, capacity, num_extras,
    SUM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Add up, in order, the segments of a feature that has several."""
    if tl.load(row_ptr + num_tokens) > capacity:
        return
    f = tl.program_id(0).to(tl.int64)
    first = tl.load(extra_ptr + f).to(tl.int64)
    last = tl.load(extra_ptr + f + 1).to(tl.int64)
    if first == last:
        return
    d = tl.arange(0, WIDTH)
    in_row = d < width
    part = first + num_extras
    total = tl.zeros((WIDTH,), dtype=SUM)
    summed = tl.zeros((), dtype=SUM)
    for number in range(last - first + 1):
        if number > 0:
            part = first + number - 1
        total += tl.load(partial + part * width + d, mask=in_row, other=0.0)
        summed += tl.load(partial_sum + part)
    if W_dec is not None:
        if grad_l1 is not None:
            dl1 = tl.load(grad_l1).to(SUM)
            w = tl.load(W_dec + f * width + d, mask=in_row, other=0.0).to(SUM)
            norm = tl.sqrt(tl.sum(w * w, axis=0))
            if (dl1 != 0) & (norm != 0):
                total += (dl1 * summed / norm) * w
    else:
        tl.store(db_enc + f, summed)
    tl.store(dW + f * width + d, total, mask=in_row)

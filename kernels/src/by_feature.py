"""Gradients of the weights, one feature at a time: every pair is read once, every row written once.

Shapes: T tokens, D model width, F features, C capacity, S tokens per segment. The active pairs are
visited in the order of their feature; `order` lists their entries and `col_ptr` [F+1] says where
each feature begins. Program p < F works on the first S tokens of feature p; the others, C/S at
most, on what follows in features that fire more often. `extra_ptr` [F+1] counts these extra
segments. Sums over several segments go through float32 partial sums that are added in order, so
results are the same in every run (performance §5, K2).
"""

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
    dW_enc, dW_dec = torch.empty_like(W_dec_FD), torch.empty_like(W_dec_FD)
    db_enc = W_dec_FD.new_empty(len(W_dec_FD))
    _launch(row_ptr, pairs, value, da, upstream, x_TD, W_dec_FD, dW_enc, db_enc, dW_dec)
    return da, dW_enc, db_enc, dW_dec


def decoder_gradients(
    row_ptr: Tensor,
    pairs: ByFeature,
    value: Tensor,
    grad_y_TD: Tensor,
    W_dec_FD: Tensor,
    gain_F: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(dvalue [C], dW_dec [F,D]) of a decode on its own."""
    dvalue, dW_dec = torch.zeros_like(value), torch.empty_like(W_dec_FD)
    upstream = Upstream(grad_y_TD, None, gain_F, None)
    _launch(row_ptr, pairs, value, dvalue, upstream, None, W_dec_FD, None, None, dW_dec)
    return dvalue, dW_dec


def encoder_gradients(
    row_ptr: Tensor, pairs: ByFeature, da: Tensor, x_TD: Tensor
) -> tuple[Tensor, Tensor]:
    """(dW_enc [F,D], db_enc [F]) of given gradients of the activations."""
    num_features = len(pairs.col_ptr) - 1
    dW_enc, db_enc = x_TD.new_empty(num_features, x_TD.shape[1]), x_TD.new_empty(num_features)
    _launch(row_ptr, pairs, None, da, None, x_TD, None, dW_enc, db_enc, None)
    return dW_enc, db_enc


def _launch(
    row_ptr: Tensor,
    pairs: ByFeature,
    value: Tensor | None,
    da: Tensor,
    upstream: Upstream | None,
    x: Tensor | None,
    W_dec: Tensor | None,
    dW_enc: Tensor | None,
    db_enc: Tensor | None,
    dW_dec: Tensor | None,
) -> None:
    """Run both kernels; the encoder's or the decoder's half is left out where its result is."""
    result = dW_dec if dW_enc is None else dW_enc
    assert result is not None
    num_features, width = result.shape
    sums = launch.sum_dtype(result.dtype)
    has_encoder, has_decoder = dW_enc is not None, dW_dec is not None

    def partial(wanted: bool, columns: int) -> Tensor | None:
        if not wanted:
            return None
        return torch.empty(2 * pairs.num_extras, columns, dtype=sums, device=result.device)

    partials = partial(has_encoder, width), partial(has_decoder, width), partial(True, 2)
    grad_y, grad_l1, gain, token_mask = upstream or (None, None, None, None)
    num_tokens, capacity = len(row_ptr) - 1, len(da)
    block, warps = launch.row(width)
    segment_kernel[(num_features + pairs.num_extras,)](
        pairs.col_ptr, pairs.extra_ptr, pairs.order, pairs.token, value, da,
        grad_y, grad_l1, x, W_dec, gain, token_mask,
        dW_enc, db_enc, dW_dec, *partials,
        row_ptr, num_tokens, num_features, width, capacity, pairs.num_extras,
        SUM=launch.triton_dtype(sums), DECODER=has_decoder, ENCODER=has_encoder,
        STEPS=num_features.bit_length(), SEGMENT=launch.TOKENS_PER_SEGMENT,
        ROWS=launch.rows_in_flight(block, warps), WIDTH=block, num_warps=warps,
    )  # fmt: skip
    if pairs.num_extras:
        add_segments_kernel[(num_features,)](
            pairs.extra_ptr, grad_l1, W_dec, *partials, dW_enc, db_enc, dW_dec,
            row_ptr, num_tokens, width, capacity, pairs.num_extras,
            SUM=launch.triton_dtype(sums), DECODER=has_decoder, ENCODER=has_encoder,
            WIDTH=block, num_warps=warps,
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


@triton.jit
def segment_kernel(
    col_ptr, extra_ptr, order, token, value, da,
    grad_y, grad_l1, x, W_dec, gain, token_mask,
    dW_enc, db_enc, dW_dec, partial_enc, partial_dec, partial_sums,
    row_ptr, num_tokens, num_features, width, capacity, num_extras,
    SUM: tl.constexpr, DECODER: tl.constexpr, ENCODER: tl.constexpr, STEPS: tl.constexpr,
    SEGMENT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One segment of one feature.

        da = g·⟨dy_t, W_dec[f]⟩ + dl1·m_t·‖W_dec[f]‖              (DECODER; given otherwise)
        dW_dec[f] = Σ_t g·a·dy_t + dl1·(Σ_t m_t·a)·W_dec[f]/‖W_dec[f]‖            (DECODER)
        dW_enc[f] = Σ_t da·x_t,  db_enc[f] = Σ_t da                                 (ENCODER)

    The norm's gradient is 0 where the norm is 0. Nothing is written when more features fired than
    fit. `grad_l1`, `gain` and `token_mask` may be None.
    """
    if tl.load(row_ptr + num_tokens) > capacity:
        return
    f, segment = _segment(extra_ptr, num_features, STEPS)
    if f >= num_features:
        return
    extras = (tl.load(extra_ptr + f + 1) - tl.load(extra_ptr + f)).to(tl.int32)
    first = tl.load(col_ptr + f) + segment * SEGMENT
    last = tl.minimum(tl.load(col_ptr + f + 1), first + SEGMENT)
    f = f.to(tl.int64)

    d = tl.arange(0, WIDTH)
    in_row = d < width
    if DECODER:
        w = tl.load(W_dec + f * width + d, mask=in_row, other=0.0).to(SUM)
        norm = tl.sqrt(tl.sum(w * w, axis=0))
        dl1 = tl.zeros((), dtype=SUM)
        if grad_l1 is not None:
            dl1 += tl.load(grad_l1).to(SUM)
        of_norm = tl.where(dl1 != 0, dl1 * norm, 0.0)
    g = tl.full((), 1, dtype=SUM)
    if gain is not None:
        g = tl.load(gain + f).to(SUM)
    sum_dec = tl.zeros((WIDTH,), dtype=SUM)
    sum_enc = tl.zeros((WIDTH,), dtype=SUM)
    sum_bias = tl.zeros((), dtype=SUM)
    sum_active = tl.zeros((), dtype=SUM)
    for start in range(first, last, ROWS):
        slot = start + tl.arange(0, ROWS)
        exists = slot < last
        e = tl.load(order + slot, mask=exists, other=0)
        t = tl.load(token + e, mask=exists, other=0).to(tl.int64)
        inside = exists[:, None] & in_row[None, :]
        at = t[:, None] * width + d[None, :]
        if DECODER:
            a = tl.load(value + e, mask=exists, other=0.0).to(SUM)
            dy = tl.load(grad_y + at, mask=inside, other=0.0).to(SUM)
            da_R = g * tl.sum(dy * w[None, :], axis=1)
            sum_dec += tl.sum((g * a)[:, None] * dy, axis=0)
            if grad_l1 is not None:
                counted = exists
                if token_mask is not None:
                    counted = exists & (tl.load(token_mask + t, mask=exists, other=0) != 0)
                da_R += tl.where(counted, of_norm, 0.0)
                sum_active += tl.sum(tl.where(counted, a, 0.0), axis=0)
            tl.store(da + e, da_R, mask=exists)
        else:
            da_R = tl.load(da + e, mask=exists, other=0.0).to(SUM)
        if ENCODER:
            x_RD = tl.load(x + at, mask=inside, other=0.0).to(SUM)
            sum_enc += tl.sum(da_R[:, None] * x_RD, axis=0)
            sum_bias += tl.sum(da_R, axis=0)

    if extras == 0:
        if DECODER:
            if grad_l1 is not None:
                if (dl1 != 0) & (norm != 0):
                    sum_dec += (dl1 * sum_active / norm) * w
            tl.store(dW_dec + f * width + d, sum_dec, mask=in_row)
        if ENCODER:
            tl.store(dW_enc + f * width + d, sum_enc, mask=in_row)
            tl.store(db_enc + f, sum_bias)
    else:
        begin = tl.load(extra_ptr + f).to(tl.int64)
        part = begin + segment - 1
        if segment == 0:
            part = begin + num_extras
        if DECODER:
            tl.store(partial_dec + part * width + d, sum_dec, mask=in_row)
            tl.store(partial_sums + part * 2, sum_active)
        if ENCODER:
            tl.store(partial_enc + part * width + d, sum_enc, mask=in_row)
            tl.store(partial_sums + part * 2 + 1, sum_bias)


@triton.jit
def add_segments_kernel(
    extra_ptr, grad_l1, W_dec, partial_enc, partial_dec, partial_sums, dW_enc, db_enc, dW_dec,
    row_ptr, num_tokens, width, capacity, num_extras,
    SUM: tl.constexpr, DECODER: tl.constexpr, ENCODER: tl.constexpr, WIDTH: tl.constexpr,
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
    sum_dec = tl.zeros((WIDTH,), dtype=SUM)
    sum_enc = tl.zeros((WIDTH,), dtype=SUM)
    sum_active = tl.zeros((), dtype=SUM)
    sum_bias = tl.zeros((), dtype=SUM)
    for number in range(last - first + 1):
        if number > 0:
            part = first + number - 1
        if DECODER:
            sum_dec += tl.load(partial_dec + part * width + d, mask=in_row, other=0.0)
            sum_active += tl.load(partial_sums + part * 2)
        if ENCODER:
            sum_enc += tl.load(partial_enc + part * width + d, mask=in_row, other=0.0)
            sum_bias += tl.load(partial_sums + part * 2 + 1)
    if DECODER:
        if grad_l1 is not None:
            dl1 = tl.load(grad_l1).to(SUM)
            w = tl.load(W_dec + f * width + d, mask=in_row, other=0.0).to(SUM)
            norm = tl.sqrt(tl.sum(w * w, axis=0))
            if (dl1 != 0) & (norm != 0):
                sum_dec += (dl1 * sum_active / norm) * w
        tl.store(dW_dec + f * width + d, sum_dec, mask=in_row)
    if ENCODER:
        tl.store(dW_enc + f * width + d, sum_enc, mask=in_row)
        tl.store(db_enc + f, sum_bias)

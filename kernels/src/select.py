"""Which features are active: one pass over the pre-activations, to a bit mask and statistics.

Shapes: T tokens, F features, W = ⌈F/32⌉ words of 32 features. Bit b of word w of token t says
whether feature 32·w + b is active: its pre-activation is positive or NaN, and with TopK it is
among the k largest, ties to the lowest index (design §1). Reads T·F numbers, writes T·F/8 bytes.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tca_fast.kernels import launch

# Bits of a positive number that TopK compares, highest and lowest: float32's, or float64's own.
_KEY_BITS = {
    torch.float16: (30, 13),
    torch.bfloat16: (30, 16),
    torch.float32: (30, 0),
    torch.float64: (62, 0),
}


class Counts(NamedTuple):
    """What one pass over the pre-activations counts.

    Attributes:
        active: int64 [T], active features of each token.
        l0: int32 [T], the same, 0 for masked tokens.
        fired: uint8 [F], 1 for features active in some real token.
    """

    active: Tensor
    l0: Tensor
    fired: Tensor

    @staticmethod
    def empty(num_tokens: int, num_features: int, device: torch.device) -> "Counts":
        """Room for the counts; `fired` starts at 0."""
        return Counts(
            torch.empty(num_tokens, dtype=torch.int64, device=device),
            torch.empty(num_tokens, dtype=torch.int32, device=device),
            torch.zeros(num_features, dtype=torch.uint8, device=device),
        )

    def row_ptr(self) -> Tensor:
        """Where each token's entries begin, int64 [T+1]."""
        row_ptr = self.active.new_zeros(len(self.active) + 1)
        torch.cumsum(self.active, 0, out=row_ptr[1:])
        return row_ptr


def select(
    z_TF: Tensor,
    token_mask_T: Tensor | None,
    k: int | None,
    counts: Counts,
    overflow: launch.Overflow | None = None,
) -> Tensor:
    """Bit mask of the active features, int32 [T, W]; fills `counts`.

    With `overflow`, TopK does so only on that condition (ReLU has no need to).
    """
    num_tokens, num_features = z_TF.shape
    num_words = triton.cdiv(num_features, 32)
    bits = torch.empty(num_tokens, num_words, dtype=torch.int32, device=z_TF.device)
    if k is None:
        block, warps = launch.features_of_row(num_features)
        tokens = launch.TOKENS_PER_PROGRAM
        threshold_kernel[(triton.cdiv(num_tokens, tokens),)](
            z_TF, token_mask_T, bits, *counts, num_tokens, num_features, num_words,
            TOKENS=tokens, FEATURES=block, num_warps=warps,
        )  # fmt: skip
        return bits
    block, warps = launch.whole_feature_row(num_features)
    highest, lowest = _KEY_BITS[z_TF.dtype]
    row_ptr, _, capacity = launch.condition(overflow)
    topk_kernel[(num_tokens,)](
        z_TF, token_mask_T, bits, *counts, k, num_tokens, num_features, num_words,
        row_ptr, capacity,
        WIDE=z_TF.dtype == torch.float64, HIGHEST_BIT=highest, LOWEST_BIT=lowest,
        FEATURES=block, num_warps=warps,
    )  # fmt: skip
    return bits


@triton.jit
def is_active(z):
    """Whether pre-activations leave something behind: a NaN does, so that it stays visible."""
    z = z.to(tl.float64) if z.dtype == tl.float64 else z.to(tl.float32)
    return (z > 0) | (z != z)


@triton.jit
def _store_active(
    active, t, f, w, num_tokens, num_features, num_words, token_mask, bits, fired,
    FEATURES: tl.constexpr,
):  # fmt: skip
    """Write one block's words and mark its fired features; returns the counts of the tokens.

    Several programs may mark the same feature: all write the same value.
    """
    is_token = t < num_tokens
    active = active.to(tl.int32)
    shifted = tl.reshape(active, (active.shape[0], FEATURES // 32, 32)) << tl.arange(0, 32)
    words = tl.sum(shifted, axis=2)
    tl.store(
        bits + t[:, None] * num_words + w[None, :],
        words,
        mask=is_token[:, None] & (w < num_words)[None, :],
    )
    counted = active
    if token_mask is not None:
        is_real = tl.load(token_mask + t, mask=is_token, other=0) != 0
        counted = tl.where(is_real[:, None], active, 0)
    has_fired = tl.max(counted, axis=0) > 0
    tl.store(fired + f, 1, mask=has_fired & (f < num_features))
    return tl.sum(active, axis=1)


@triton.jit
def _store_counts(count, t, num_tokens, token_mask, counts, l0):
    """Active features of each token, and L0: the same for real tokens, 0 for masked ones."""
    is_token = t < num_tokens
    tl.store(counts + t, count.to(tl.int64), mask=is_token)
    if token_mask is not None:
        is_real = tl.load(token_mask + t, mask=is_token, other=0) != 0
        count = tl.where(is_real, count, 0)
    tl.store(l0 + t, count, mask=is_token)


@launch.kernel
def threshold_kernel(
    z, token_mask, bits, counts, l0, fired, num_tokens, num_features, num_words,
    TOKENS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """ReLU: the bit mask of every positive pre-activation of `TOKENS` tokens."""
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    count = tl.zeros((TOKENS,), dtype=tl.int32)
    for first in range(0, num_features, FEATURES):
        f = first + tl.arange(0, FEATURES)
        w = first // 32 + tl.arange(0, FEATURES // 32)
        inside = (t < num_tokens)[:, None] & (f < num_features)[None, :]
        z_TF = tl.load(z + t[:, None] * num_features + f[None, :], mask=inside, other=0.0)
        active = is_active(z_TF)
        count += _store_active(
            active, t, f, w, num_tokens, num_features, num_words, token_mask, bits, fired,
            FEATURES,
        )  # fmt: skip
    _store_counts(count, t, num_tokens, token_mask, counts, l0)


@launch.kernel
def topk_kernel(
    z, token_mask, bits, counts, l0, fired, k, num_tokens, num_features, num_words,
    row_ptr, capacity,
    WIDE: tl.constexpr, HIGHEST_BIT: tl.constexpr, LOWEST_BIT: tl.constexpr,
    FEATURES: tl.constexpr,
):  # fmt: skip
    """TopK: the bit mask of the k largest positive pre-activations of one token.

    The bits of a positive number order as the number does, so the k-th largest is found bit by
    bit from the top, with one count over the row for each bit: exact for every k, and the row is
    read once. `LOWEST_BIT` spares the bits that the dtype of `z` leaves zero. NaN is the largest
    of all. With `row_ptr`, nothing happens unless row_ptr[T] > capacity.
    """
    if row_ptr is not None:
        if tl.load(row_ptr + num_tokens) <= capacity:
            return
    t = tl.program_id(0).to(tl.int64)
    f = tl.arange(0, FEATURES)
    z_F = tl.load(z + t * num_features + f, mask=f < num_features, other=0.0)
    if WIDE:
        key = z_F.to(tl.int64, bitcast=True)
    else:
        z_F = z_F.to(tl.float32)
        key = z_F.to(tl.int32, bitcast=True)
    one = tl.full((), 1, dtype=key.dtype)
    largest = ((one << HIGHEST_BIT) - 1) + (one << HIGHEST_BIT)
    largest = (largest >> LOWEST_BIT) << LOWEST_BIT
    key = tl.where(is_active(z_F), tl.where(z_F > 0, key, largest), 0)

    limit = tl.zeros((), dtype=key.dtype)
    for step in range(HIGHEST_BIT - LOWEST_BIT + 1):
        candidate = limit | (one << (HIGHEST_BIT - step))
        reaching = tl.sum((key >= candidate).to(tl.int32), axis=0)
        limit = tl.where(reaching >= k, candidate, limit)
    above = (key > limit).to(tl.int32)
    tied = ((key == limit) & (key > 0)).to(tl.int32)
    places = k - tl.sum(above, axis=0)
    active = (above > 0) | ((tied > 0) & (tl.cumsum(tied, axis=0) <= places))

    rows = t + tl.arange(0, 1)
    w = tl.arange(0, FEATURES // 32)
    count = _store_active(
        tl.reshape(active, (1, FEATURES)), rows, f, w, num_tokens, num_features, num_words,
        token_mask, bits, fired, FEATURES,
    )  # fmt: skip
    _store_counts(count, rows, num_tokens, token_mask, counts, l0)

"""Packed active features (CSR) from a bit mask, and the way back.

Shapes: T tokens, F features, W words of 32 features, C capacity. Offsets come from a prefix sum
of the counts, so the order is by token and feature without a sort or an atomic operation.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tca_fast.kernels import launch


class Packed(NamedTuple):
    """Active features by token, see `tca_fast.reference`."""

    row_ptr: Tensor
    feature: Tensor
    value: Tensor


def fill(z_TF: Tensor, bits: Tensor, row_ptr: Tensor, capacity: int) -> Packed:
    """The set bits of the mask as packed features; entries beyond the last are 0."""
    num_tokens, num_features = z_TF.shape
    feature = torch.zeros(capacity, dtype=torch.int32, device=z_TF.device)
    value = z_TF.new_zeros(capacity)
    block, warps = launch.words_of_row(bits.shape[1])
    fill_kernel[(num_tokens,)](
        z_TF, bits, row_ptr, feature, value, num_features, bits.shape[1], capacity,
        WORDS=block, num_warps=warps,
    )  # fmt: skip
    return Packed(row_ptr, feature, value)


def unpack(packed: Packed, num_features: int) -> Tensor:
    """Dense activations [T, F] of packed features that all fit."""
    num_tokens = len(packed.row_ptr) - 1
    dense = packed.value.new_zeros(num_tokens, num_features)
    unpack_kernel[(num_tokens,)](
        *packed, dense, num_features, len(packed.feature), ENTRIES=64, num_warps=1
    )
    return dense


class ByFeature(NamedTuple):
    """The order of the active pairs by feature.

    Attributes:
        col_ptr: int64 [F+1], where each feature's pairs begin in `order`.
        order: int64 [C], entries in ascending order of feature, then token.
        token: int32 [C], token of every entry.
        extra_ptr: int64 [F+1], segments beyond the first of all features before.
        segment_tokens: tokens of a segment.
        num_extras: most segments there can be beyond the first ones.
    """

    col_ptr: Tensor
    order: Tensor
    token: Tensor
    extra_ptr: Tensor
    segment_tokens: int
    num_extras: int


def by_feature(row_ptr: Tensor, feature: Tensor, num_features: int) -> ByFeature:
    """Sort the pairs by feature; the sort is stable, so tokens stay in order."""
    capacity, device = len(feature), feature.device
    num_tokens = len(row_ptr) - 1
    token = torch.empty_like(feature)
    # Half as many bits are half as many passes of the sort.
    key_dtype = torch.int16 if num_features < 2**15 else torch.int32
    key = torch.empty(capacity, dtype=key_dtype, device=device)
    expand_kernel[(triton.cdiv(capacity, 256),)](
        row_ptr, feature, token, key, num_tokens, num_features, capacity,
        num_tokens.bit_length(), ENTRIES=256, num_warps=2,
    )  # fmt: skip
    key, order = torch.sort(key, stable=True)
    col_ptr = torch.searchsorted(
        key, torch.arange(num_features + 1, dtype=key_dtype, device=device)
    )
    segment_tokens = launch.segment_tokens(capacity)
    extras = ((col_ptr.diff() - 1) // segment_tokens).clamp(min=0)
    extra_ptr = torch.zeros_like(col_ptr)
    torch.cumsum(extras, 0, out=extra_ptr[1:])
    return ByFeature(col_ptr, order, token, extra_ptr, segment_tokens, capacity // segment_tokens)


@triton.jit
def _popcount(word):
    """Set bits of unsigned 32-bit words, by sums of ever wider fields."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@launch.kernel
def fill_kernel(
    z, bits, row_ptr, feature, value, num_features, num_words, capacity,
    WORDS: tl.constexpr,
):  # fmt: skip
    """Write the feature and value of every set bit of one token; those beyond C are left out.

    Each round takes the lowest remaining bit of every word, so there are as many rounds as the
    fullest word has bits: one or two in the regime this is for.
    """
    t = tl.program_id(0).to(tl.int64)
    start = tl.load(row_ptr + t)
    for first in range(0, num_words, WORDS):
        w = first + tl.arange(0, WORDS)
        words = tl.load(bits + t * num_words + w, mask=w < num_words, other=0)
        words = words.to(tl.uint32, bitcast=True)
        in_word = _popcount(words)
        slot = start + tl.cumsum(in_word, axis=0) - in_word
        for _ in range(tl.max(in_word, axis=0)):
            rest = words & (words - 1)
            f = w * 32 + _popcount((words ^ rest) - 1)
            kept = (words != 0) & (slot < capacity)
            z_W = tl.load(z + t * num_features + f, mask=kept, other=0.0)
            tl.store(feature + slot, f, mask=kept)
            tl.store(value + slot, z_W, mask=kept)
            slot += 1
            words = rest
        start += tl.sum(in_word, axis=0)


@launch.kernel
def expand_kernel(
    row_ptr, feature, token, key, num_tokens, num_features, capacity, num_steps,
    ENTRIES: tl.constexpr,
):  # fmt: skip
    """Token of every entry, and its feature as a sorting key: F where there is no entry.

    The token is found in `num_steps` halvings of 0..T.
    """
    e = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    last = tl.minimum(tl.load(row_ptr + num_tokens), capacity)
    low = tl.zeros((ENTRIES,), dtype=tl.int64)
    high = low + num_tokens
    for _ in range(num_steps):
        middle = (low + high) // 2
        open_ended = low < high
        is_after = tl.load(row_ptr + middle + 1, mask=open_ended, other=0) <= e
        low = tl.where(open_ended & is_after, middle + 1, low)
        high = tl.where(open_ended & (is_after == 0), middle, high)
    exists = e < last
    f = tl.load(feature + e, mask=exists, other=0)
    tl.store(token + e, low.to(tl.int32), mask=e < capacity)
    tl.store(key + e, tl.where(exists, f, num_features), mask=e < capacity)


@launch.kernel
def unpack_kernel(row_ptr, feature, value, dense, num_features, capacity, ENTRIES: tl.constexpr):
    """Scatter one token's entries into its row of the zeroed dense activations."""
    t = tl.program_id(0).to(tl.int64)
    first = tl.load(row_ptr + t)
    last = tl.minimum(tl.load(row_ptr + t + 1), capacity)
    for start in range(first, last, ENTRIES):
        e = start + tl.arange(0, ENTRIES)
        f = tl.load(feature + e, mask=e < last, other=0)
        a = tl.load(value + e, mask=e < last, other=0.0)
        tl.store(dense + t * num_features + f, a, mask=e < last)

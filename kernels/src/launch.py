"""Block sizes as plain functions of shape.

Shapes: T tokens, D model width, F features. Nothing here was chosen by measurement yet; the
reasons are bytes in flight and registers, and a results file may overrule them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Registers of a program hold a few float32 rows of the model width; this many numbers a thread.
_NUMBERS_PER_THREAD = 16
_MOST_WARPS = 16
# Tokens whose pre-activations one program walks over.
TOKENS_PER_PROGRAM = 4
# Tokens of one feature that one program adds up; a feature that fires for more is split.
TOKENS_PER_SEGMENT = 256
# Pieces beyond the first that all features may have together: each takes two rows of partial sums.
MOST_EXTRA_SEGMENTS = 4096


# Decorates what is launched. These sizes change from step to step, and none of them decides how
# memory is read, so that no kernel is compiled anew where one becomes a multiple of 16, or 1.
kernel = triton.jit(
    do_not_specialize=[
        "num_tokens",
        "capacity",
        "num_extras",
        "num_chunks",
        "num_steps",
        "segment_tokens",
    ]
)


class Overflow(NamedTuple):
    """A condition that only the device knows: more features fired than there was room for.

    Attributes:
        row_ptr: int64 [T+1], its last entry says how many fired.
        capacity: C, how many fit.
    """

    row_ptr: Tensor
    capacity: int


def condition(overflow: Overflow | None) -> tuple[Tensor | None, int, int]:
    """The arguments (row_ptr, T, C) of a kernel that runs on overflow only; None is always."""
    if overflow is None:
        return None, 0, 0
    return overflow.row_ptr, len(overflow.row_ptr) - 1, overflow.capacity


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def triton_dtype(dtype: torch.dtype) -> Any:
    """Triton's name of a dtype of sums."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def row(width: int) -> tuple[int, int]:
    """Block and warps of a program that holds whole rows of the model width."""
    block = max(16, triton.next_power_of_2(width))
    return block, _warps(block)


def slice_of_row(width: int, num_tokens: int) -> tuple[int, int]:
    """Block and warps of a program that writes a part of one token's row.

    Few tokens are spread over more programs, or most of the device would have nothing to do.
    """
    block = max(16, triton.next_power_of_2(width))
    if num_tokens < 512:
        block = min(block, 512)
    return min(block, 4096), _warps(min(block, 4096))


def rows_in_flight(block: int, warps: int) -> int:
    """Rows gathered at a time: as many as fit beside the sums in a thread's registers."""
    return max(2, min(8, 64 * warps * 32 // block))


def segment_tokens(capacity: int) -> int:
    """Tokens of one feature that one program adds up, where there is room for `capacity` pairs."""
    return max(TOKENS_PER_SEGMENT, triton.cdiv(capacity, MOST_EXTRA_SEGMENTS))


def features_of_row(num_features: int) -> tuple[int, int]:
    """Block and warps of a program that walks over the features of a few tokens."""
    block = min(1024, max(32, triton.next_power_of_2(num_features)))
    return block, 4


def whole_feature_row(num_features: int) -> tuple[int, int]:
    """Block and warps of a program that holds all features of one token."""
    block = max(32, triton.next_power_of_2(num_features))
    return block, _warps(block)


def words_of_row(num_words: int) -> tuple[int, int]:
    """Block and warps of a program that unpacks the bit mask of one token, 32 features a word.

    One word a thread: with more, every bit taken is exchanged between threads before it is stored.
    """
    block = min(256, triton.next_power_of_2(max(1, num_words)))
    return block, max(1, block // 32)


class ProductBlocks(NamedTuple):
    """Tile of a dense product and the warps that compute it."""

    M: int
    N: int
    K: int
    warps: int


def product_blocks(element_size: int) -> ProductBlocks:
    """Tiles by bytes of an element: 16-bit ones go to tensor cores."""
    if element_size == 2:
        return ProductBlocks(128, 128, 32, 8)
    return ProductBlocks(64, 64, 16, 4) if element_size == 4 else ProductBlocks(32, 32, 16, 4)


def _warps(block: int) -> int:
    return min(_MOST_WARPS, max(1, block // (32 * _NUMBERS_PER_THREAD)))

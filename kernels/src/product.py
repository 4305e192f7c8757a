"""A dense product that runs only when the packed arena overflowed.

The vendor's library cannot be told on the device not to run; this one can, and costs a launch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tca_fast.kernels import launch


@launch.kernel
def overflow_product_kernel(
    a, b, scale_of_k, scale_of_row, base, bias, out, row_ptr, num_tokens, capacity, M, N, K,
    a_row, a_column, b_row, b_column,
    SUM: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = base + bias + scale_of_row·Σ_k scale_of_k·a·b, if row_ptr[T] > capacity; rounded once.

    `base` [M, N], `bias` [N], `scale_of_row` [M] and `scale_of_k` [K] may be None; `a` [M, K] and
    `b` [K, N] may have any strides. `WIDEN` converts both before they are multiplied.
    """
    if tl.load(row_ptr + num_tokens) <= capacity:
        return
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=SUM)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K).to(tl.int64)
        a_MK = tl.load(
            a + m[:, None] * a_row + k[None, :] * a_column,
            mask=(m < M)[:, None] & (k < K)[None, :],
            other=0.0,
        )
        b_KN = tl.load(
            b + k[:, None] * b_row + n[None, :] * b_column,
            mask=(k < K)[:, None] & (n < N)[None, :],
            other=0.0,
        )
        if scale_of_k is not None:
            scale = tl.load(scale_of_k + k, mask=k < K, other=0.0).to(SUM)
            a_MK = a_MK.to(SUM) * scale[None, :]
        if WIDEN:
            a_MK = a_MK.to(SUM)
            b_KN = b_KN.to(SUM)
        else:
            a_MK = a_MK.to(b_KN.dtype)
        total = tl.dot(a_MK, b_KN, total, input_precision="ieee", out_dtype=SUM)
    if scale_of_row is not None:
        total *= tl.load(scale_of_row + m, mask=m < M, other=0.0).to(SUM)[:, None]
    at = m[:, None] * N + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    if bias is not None:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(SUM)[None, :]
    if base is not None:
        total += tl.load(base + at, mask=inside, other=0.0).to(SUM)
    tl.store(out + at, total, mask=inside)


def overflow_product(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    overflow: launch.Overflow,
    *,
    scale_of_k: Tensor | None = None,
    scale_of_row: Tensor | None = None,
    base: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """out = base + bias + scale_of_row·((a·scale_of_k) @ b) on overflow, else nothing."""
    (M, K), N = a.shape, b.shape[1]
    # Triton's interpreter takes bfloat16 for integers in a dot; a scaled float16 may overflow.
    widens = triton.knobs.runtime.interpret or a.dtype != b.dtype
    widens = widens or (scale_of_k is not None and a.dtype == torch.float16)
    blocks = launch.product_blocks(max(a.element_size(), 4 if widens else 2))
    overflow_product_kernel[(triton.cdiv(M, blocks.M), triton.cdiv(N, blocks.N))](
        a, b, scale_of_k, scale_of_row, base, bias, out, *launch.condition(overflow), M, N, K,
        *a.stride(), *b.stride(),
        SUM=launch.triton_dtype(launch.sum_dtype(out.dtype)),
        WIDEN=widens,
        BLOCK_M=blocks.M, BLOCK_N=blocks.N, BLOCK_K=blocks.K, num_warps=blocks.warps,
    )  # fmt: skip

"""A dense product that runs only when the packed arena overflowed.

The vendor's library cannot be told on the device not to run; this one can, and costs a launch.
"""

import triton
import triton.language as tl
from torch import Tensor

from tca_fast.kernels import launch


@triton.jit
def overflow_product_kernel(
    a, b, base, bias, out, row_ptr, num_tokens, capacity, M, N, K,
    a_row, a_column, b_row, b_column,
    SUM: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[M, N] = base + bias + a[M, K]·b[K, N], if row_ptr[T] > capacity; rounded once.

    `base` [M, N] and `bias` [N] may be None; `a` and `b` may have any strides. `WIDEN` converts
    both before they are multiplied: Triton's interpreter takes bfloat16 for integers in a dot.
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
        if WIDEN:
            a_MK = a_MK.to(SUM)
            b_KN = b_KN.to(SUM)
        total = tl.dot(a_MK, b_KN, total, input_precision="ieee", out_dtype=SUM)
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
    base: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """out = base + bias + a @ b on overflow; `out` is left alone otherwise."""
    (M, K), N = a.shape, b.shape[1]
    blocks = launch.product_blocks(out.element_size())
    overflow_product_kernel[(triton.cdiv(M, blocks.M), triton.cdiv(N, blocks.N))](
        a, b, base, bias, out, *launch.condition(overflow), M, N, K,
        *a.stride(), *b.stride(),
        SUM=launch.triton_dtype(launch.sum_dtype(out.dtype)),
        WIDEN=triton.knobs.runtime.interpret,
        BLOCK_M=blocks.M, BLOCK_N=blocks.N, BLOCK_K=blocks.K, num_warps=blocks.warps,
    )  # fmt: skip

"""csrc/cuda/inference.cu, host code and kernels, in the emulator: as `torch.ops` on CPU tensors."""

import pytest
import torch
from emulated import built, has_compiler
from torch import Tensor

from tca_fast import reference, registry

pytestmark = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(scope="module")
def cuda():
    assert registry.backends()  # the namespace exists by now
    torch.ops.load_library(built("inference.cpp"))
    return torch.ops.tca_fast_cuda


def arguments(T: int, dtype: torch.dtype, F: int = 70, D: int = 48) -> list[Tensor]:
    """x, mlp_out, W_enc, b_enc, W_dec, b_dec and gain: integers, whose sums are exact."""
    generator = torch.Generator().manual_seed(T)
    shapes = [(T, D), (T, D), (F, D), (F,), (F, D), (D,), (F,)]
    numbers = [torch.randn(s, generator=generator).round().clamp(-2, 2) for s in shapes]
    numbers[3] -= 8
    return [n.to(dtype) for n in numbers]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 8, 32])
def test_a_generation_step_is_the_adapter(cuda, dtype, T):
    x, mlp_out, W_enc, b_enc, W_dec, b_dec, gain = arguments(T, dtype)
    for optional in ((b_dec, gain), (None, None)):
        y = cuda.generation_step(x, mlp_out, W_enc, b_enc, W_dec, *optional)
        expected, *_ = reference.adapter(
            x, mlp_out, W_enc, b_enc, W_dec, *optional, None, None, T * 70
        )
        assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_screen_changes_no_bit(cuda, dtype):
    named = [t + 0.1 * torch.randn(t.shape).to(dtype) for t in arguments(8, dtype)]
    y = cuda.generation_step(*named)
    assert torch.equal(cuda.screened_generation_step(*named, *cuda.round_weights(named[2])), y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [0, 9])
def test_a_slab_decodes(cuda, dtype, T):
    x, _, W_enc, b_enc, W_dec, b_dec, gain = arguments(T, dtype)
    value, row_ptr, feature = reference.encode(x, W_enc, b_enc, None, T * 70)
    packed = (row_ptr, feature, value, W_dec.T.contiguous().T)
    for optional in ((b_dec, gain), (None, None)):
        y = cuda.slab_decode(*packed, *optional)
        assert torch.equal(y, reference.decode(*packed, *optional))


def test_arguments_that_do_not_fit_are_named(cuda):
    named = arguments(2, torch.float32)
    with pytest.raises(RuntimeError, match=r"b_dec: shape \[70\], expected \[48\]"):
        cuda.generation_step(*named[:5], named[3], None)
    with pytest.raises(RuntimeError, match="x: dtype Double, expected Float, BFloat16 or Half"):
        cuda.generation_step(*(t.double() for t in named))
    with pytest.raises(RuntimeError, match="x: 33 tokens, expected 1..32"):
        cuda.generation_step(*arguments(33, torch.float32))
    q, rows = cuda.round_weights(named[2])
    with pytest.raises(RuntimeError, match=r"rows: shape \[69, 3\], expected \[70, 3\]"):
        cuda.screened_generation_step(*named, q, rows[1:])

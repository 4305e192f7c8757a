"""The CUDA kernels that nothing chooses yet, on a device: what their emulator cannot show.

That is above all the wait of all blocks for each other. Needs the compiled CUDA kernels
(`TCA_FAST_CUDA=1`); without a device the same tests run at small shapes in the emulator.

Shapes: T tokens, D model width, F features.
"""

import pytest
import torch
from torch import Tensor

from tca_fast import reference, registry

ON_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_CUDA else "cpu")
needs_cuda = pytest.mark.skipif(not ON_CUDA, reason="needs a CUDA device")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(3584, 8192), (1536, 65_536), (5120, 16_384)] if ON_CUDA else [(48, 70)]
RUNS = 20 if ON_CUDA else 2


@pytest.fixture(scope="module")
def cuda():
    if ON_CUDA:
        if "cuda" not in registry.cuda_backends():
            pytest.skip("needs the compiled CUDA kernels: TCA_FAST_CUDA=1 pip install")
    else:
        emulated = pytest.importorskip("emulated", reason="needs a CUDA device, or the emulator")
        if not emulated.has_compiler():
            pytest.skip("needs a CUDA device, or a C++ compiler for the emulator")
        torch.ops.load_library(emulated.built("inference.cpp"))
    return torch.ops.tca_fast_cuda


def layer(T: int, D: int, F: int, dtype: torch.dtype, *, integers: bool = True) -> list[Tensor]:
    """x, mlp_out, W_enc, b_enc, W_dec, b_dec and gain; sums of integers are exact in any order."""
    generator = torch.Generator().manual_seed(T)

    def random(*shape: int) -> Tensor:
        numbers = torch.randn(shape, generator=generator)
        return numbers.round().clamp(-1, 1) if integers else numbers

    shapes = [(T, D), (T, D), (F, D), (F,), (F, D), (D,), (F,)]
    tensors = [random(*shape) for shape in shapes]
    tensors[3] -= round(1.5 * D**0.5)
    return [tensor.to(dtype).to(DEVICE) for tensor in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 5, 8, 32])
@pytest.mark.parametrize("D, F", SHAPES)
def test_a_generation_step_is_exact_in_every_run(cuda, dtype, T, D, F):
    named = layer(T, D, F, dtype)
    expected, *_ = reference.adapter(*named, None, None, T * F)
    for _ in range(RUNS):
        assert torch.equal(cuda.generation_step(*named), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 8])
@pytest.mark.parametrize("D, F", SHAPES)
def test_the_screen_changes_no_bit(cuda, dtype, T, D, F):
    named = layer(T, D, F, dtype, integers=False)
    rounded = cuda.round_weights(named[2])
    expected = cuda.generation_step(*named)
    for _ in range(RUNS):
        assert torch.equal(cuda.screened_generation_step(*named, *rounded), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [9, 2100] if ON_CUDA else [9])
@pytest.mark.parametrize("D, F", SHAPES[:1])
def test_a_slab_decodes_exactly_in_every_run(cuda, dtype, T, D, F):
    x, _, W_enc, b_enc, W_dec, b_dec, gain = layer(T, D, F, dtype)
    value, row_ptr, feature = reference.encode(x, W_enc, b_enc, None, T * 200)
    expected = reference.decode(row_ptr, feature, value, W_dec, b_dec, gain)
    for _ in range(RUNS):
        assert torch.equal(cuda.slab_decode(row_ptr, feature, value, W_dec, b_dec, gain), expected)


@needs_cuda
def test_a_step_is_captured_and_replayed(cuda):
    named = layer(8, 3584, 8192, torch.bfloat16)
    rounded = cuda.round_weights(named[2])
    expected = cuda.generation_step(*named)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plain = cuda.generation_step(*named)
        screened = cuda.screened_generation_step(*named, *rounded)
    for _ in range(3):
        plain.zero_(), screened.zero_()
        graph.replay()
        assert torch.equal(plain, expected) and torch.equal(screened, expected)

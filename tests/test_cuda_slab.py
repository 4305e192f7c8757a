"""csrc/cuda/slab.cuh in the emulator, against exact sums and against float64."""

from contextlib import suppress

import pytest
import torch
from emulated import Library, faulty, has_compiler
from torch import Tensor

pytestmark = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Rows of a slab: all, one half, a few.
SHARED_BYTES = {"one slab": 64 << 10, "several slabs": 128 * 20, "slabs of two rows": 128 * 2}


@pytest.fixture(scope="module")
def library() -> Library:
    return Library("slab.cpp")


class Sparse:
    """Random entries of R rows over N, with `heavy` rows that have all of them."""

    def __init__(self, R: int, N: int, dtype: torch.dtype, density: float, integers: bool) -> None:
        generator = torch.Generator().manual_seed(R + N)
        share = torch.full((R, 1), density)
        share[1::7], share[2::9] = 0, 1
        self.present = torch.rand(R, N, generator=generator) < share
        values = torch.randn(R, N, generator=generator)
        values = values.round().clamp(-2, 2) if integers else values
        self.dense = torch.where(self.present, values.to(dtype), 0)
        self.row_ptr = torch.zeros(R + 1, dtype=torch.int64)
        self.row_ptr[1:] = self.present.sum(1).cumsum(0)
        self.index = self.present.nonzero()[:, 1].to(torch.int32)
        self.coefficient = values.to(dtype)[self.present]


def numbers(*shape: int, dtype: torch.dtype, integers: bool = True) -> Tensor:
    random = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    return (random.round().clamp(-2, 2) if integers else random).to(dtype)


def run(
    library: Library,
    row_ptr: Tensor,
    index: Tensor,
    coefficient: Tensor,
    dense: Tensor,
    *,
    order: Tensor | None = None,
    gain: Tensor | None = None,
    base: Tensor | None = None,
    bias: Tensor | None = None,
    shared_bytes: int = 64 << 10,
    poison: bool = True,
) -> Tensor:
    R, (N, D), capacity = len(row_ptr) - 1, dense.shape, len(index)
    out = library.empty(R, D, dtype=dense.dtype)
    inputs = [row_ptr, index, coefficient, order, gain, dense, base, bias]
    guarded = [None if t is None else library.guarded(t) for t in inputs]
    name = str(dense.dtype).removeprefix("torch.")
    library.call(f"slab_{name}", *guarded, out, R, N, D, capacity, shared_bytes, int(poison))
    return out


def test_the_size_of_a_slab(library):
    """100,000 shapes: every row is in a slab, two of them fit, and none could be spared."""
    library.call("check_slab_rows", 100_000)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SHARED_BYTES)
@pytest.mark.parametrize("R, N, D", [(70, 90, 72), (3, 41, 8), (1100, 9, 16)])
def test_exact_sums(library, dtype, size, R, N, D):
    """Integers: rows without entries, with some and with all; more rows than a block has."""
    pairs = Sparse(R, N, dtype, 0.15, integers=True)
    dense, gain = numbers(N, D, dtype=dtype), numbers(N, dtype=dtype)
    base, bias = numbers(R, D, dtype=dtype), numbers(D, dtype=dtype)
    entries = (pairs.row_ptr, pairs.index, pairs.coefficient, dense)
    bytes_ = SHARED_BYTES[size]
    out = run(library, *entries, gain=gain, base=base, bias=bias, shared_bytes=bytes_)
    exact = (pairs.dense.double() * gain.double()) @ dense.double() + bias.double() + base.double()
    assert torch.equal(out, exact.float().to(dtype))
    out = run(library, *entries, shared_bytes=bytes_)
    assert torch.equal(out, (pairs.dense.double() @ dense.double()).float().to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_for_every_slab_and_close_to_the_truth(library, dtype):
    pairs = Sparse(40, 120, dtype, 0.3, integers=False)
    dense = numbers(120, 24, dtype=dtype, integers=False)
    entries = (pairs.row_ptr, pairs.index, pairs.coefficient, dense)
    results = [run(library, *entries, shared_bytes=size) for size in SHARED_BYTES.values()]
    assert all(torch.equal(results[0], other) for other in results[1:])
    exact = pairs.dense.double() @ dense.double()
    magnitudes = pairs.dense.double().abs() @ dense.double().abs()
    error = 121 * torch.finfo(torch.float32).eps / 2 * magnitudes
    stored = torch.finfo(dtype).eps / 2 * (exact.abs() + error)
    assert ((results[0].double() - exact).abs() <= 1.01 * (error + stored)).all()


def test_sums_by_feature(library):
    """dW_dec = aᵀ·dy: rows are features, and entries are found by their order."""
    pairs = Sparse(60, 33, torch.float32, 0.2, integers=True)
    token = torch.arange(60).repeat_interleave(pairs.row_ptr.diff()).to(torch.int32)
    order = pairs.index.long().argsort(stable=True)
    col_ptr = torch.zeros(34, dtype=torch.int64)
    col_ptr[1:] = pairs.present.sum(0).cumsum(0)
    dy = numbers(60, 40, dtype=torch.float32)
    out = run(library, col_ptr, token, pairs.coefficient, dy, order=order, shared_bytes=128 * 9)
    assert torch.equal(out, (pairs.dense.double().T @ dy.double()).float())


@pytest.mark.parametrize("index", [-1, 5, 2**31 - 1])
def test_an_index_that_does_not_exist_gives_nan(library, index):
    row_ptr, dense = torch.tensor([0, 2, 3, 4]), numbers(5, 8, dtype=torch.float32)
    entries = torch.tensor([1, index, 4, 0], dtype=torch.int32)
    for size in (64 << 10, 128):
        out = run(library, row_ptr, entries, torch.ones(4), dense, shared_bytes=size)
        assert out.isnan().tolist() == [[True] * 8, [False] * 8, [False] * 8]


def test_entries_that_do_not_fit(library):
    row_ptr, dense = torch.tensor([0, 1, 9]), torch.ones(5, 8)
    index, ones = torch.tensor([0, 4], dtype=torch.int32), torch.ones(2)
    assert run(library, row_ptr, index, ones, dense).isnan().all()
    untouched = run(library, row_ptr, index, ones, dense, poison=False)
    assert (untouched.view(torch.int32) == -1).all()


def test_nothing_to_do_and_a_width_that_it_does_not_serve(library):
    none = torch.zeros(0, dtype=torch.int32), torch.zeros(0)
    assert run(library, torch.zeros(1).long(), *none, torch.ones(5, 8)).shape == (0, 8)
    out = run(library, torch.zeros(3).long(), *none, torch.ones(0, 8), bias=torch.ones(8))
    assert torch.equal(out, torch.ones(2, 8))
    with pytest.raises(RuntimeError, match="width of 9, expected a multiple of 4"):
        run(library, torch.zeros(3).long(), *none, torch.ones(5, 9))


FAULTS = {
    "no wait for the slab": ("__pipeline_wait_prior(1);", ""),
    "a barrier less before the slab is overwritten": ("    __syncthreads();\n  }\n", "  }\n"),
    "a lane's neighbour": ("own_scale, entry, kSlab", "own_scale, entry ^ 1, kSlab"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_would_be_seen(fault):
    # Groups of several rows each, so that some are late.
    wrong = faulty("slab.cpp", "slab.cuh", *FAULTS[fault])
    pairs = Sparse(900, 90, torch.bfloat16, 0.15, integers=True)
    dense = numbers(90, 32, dtype=torch.bfloat16)
    entries = (pairs.row_ptr, pairs.index, pairs.coefficient, dense)
    exact = pairs.dense.double() @ dense.double()
    with suppress(RuntimeError):  # what the emulator itself sees
        out = run(wrong, *entries, shared_bytes=128 * 20)
        assert not torch.equal(out, exact.float().bfloat16())

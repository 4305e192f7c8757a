"""csrc/cuda/topk.cuh in the emulator: the k largest as the reference takes them."""

from contextlib import suppress

import pytest
import torch
from emulated import Library, bit_mask, faulty, has_compiler
from torch import Tensor

pytestmark = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(scope="module")
def library() -> Library:
    return Library("topk.cpp")


def active_by_sorting(z: Tensor, k: int) -> Tensor:
    """Which are active, bool [T, F]: a stable sort of the numbers themselves, NaN first."""
    order = z.double().argsort(dim=1, descending=True, stable=True)[:, :k]
    kept = torch.zeros_like(z, dtype=torch.bool).scatter_(1, order, True)
    return kept & ~(z <= 0)


def run(
    library: Library,
    z: Tensor,
    k: int,
    mask: Tensor | None = None,
    norm: Tensor | None = None,
    activates: bool = False,
) -> dict[str, Tensor]:
    """The outputs of the kernel for z [T, F]."""
    T, F = z.shape
    out = {
        "bits": library.empty(T, -(-F // 32), dtype=torch.int32),
        "count": library.empty(T, dtype=torch.int32),
        "l0": library.empty(T, dtype=torch.int32),
        "fired": library.guarded(torch.zeros(F, dtype=torch.uint8)),
    }
    l1 = None if norm is None else library.empty(T, dtype=torch.float32)
    z = library.guarded(z)
    mask = None if mask is None else library.guarded(mask.to(torch.uint8))
    norm = None if norm is None else library.guarded(norm)
    name = str(z.dtype).removeprefix("torch.")
    library.call(f"topk_{name}", z, mask, *out.values(), l1, norm, T, F, k, int(activates))
    return out | {"z": z} | ({} if l1 is None else {"l1": l1})


def numbers(T: int, F: int, dtype: torch.dtype, kind: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(T, F, generator=generator)
    if kind == "ties":
        z = (2 * z).round()
    if kind == "few positive":
        z -= 2.5
    if kind == "equal":
        z = torch.ones(T, F)
    if kind == "special":
        some = torch.tensor(
            [torch.nan, torch.inf, -torch.inf, -0.0, 0.0, torch.finfo(dtype).tiny / 4, -1.0, 1.0]
        )
        z = some[torch.randint(0, 8, (T, F), generator=generator)]
    return z.to(dtype)


def test_the_arithmetic_equals_sorting(library):
    """100,000 random rows of each dtype: ties, NaN, infinities, -0, denormals, k = F."""
    library.call("check_radix", 1, 100_000)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["random", "ties", "few positive", "equal", "special"])
@pytest.mark.parametrize("F", [17, 4096])
def test_the_largest_are_active(library, dtype, kind, F):
    z = numbers(3, F, dtype, kind)
    for k in (1, F // 9, F):
        out = run(library, z, k)
        expected = active_by_sorting(z, k)
        assert torch.equal(out["bits"], bit_mask(expected)), k
        assert torch.equal(out["count"], expected.sum(1, dtype=torch.int32))
        assert torch.equal(out["l0"], out["count"])
        assert torch.equal(out["fired"].bool(), expected.any(0))
        assert torch.equal(out["z"].view(torch.int8), z.view(torch.int8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("F", [8192, 16_384, 65_536])
def test_wide_rows(library, dtype, F):
    """Every kernel there is: 256, 512 and 1024 threads, and rows that registers do not hold."""
    z = numbers(1, F, dtype, "ties")
    out = run(library, z, 64)
    assert torch.equal(out["bits"], bit_mask(active_by_sorting(z, 64)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("F", [40, 45])
def test_statistics_and_activations(library, dtype, F):
    z = numbers(4, F, dtype, "ties")
    mask = torch.tensor([True, False, True, True])
    norm = torch.rand(F, generator=torch.Generator().manual_seed(1))
    out = run(library, z, 7, mask, norm, activates=True)
    active = active_by_sorting(z, 7)
    kept = torch.where(active, z, 0.0)
    assert torch.equal(out["z"], kept)
    assert torch.equal(out["l0"], active.sum(1, dtype=torch.int32) * mask)
    assert torch.equal(out["count"], active.sum(1, dtype=torch.int32))
    assert torch.equal(out["fired"].bool(), (active & mask[:, None]).any(0))
    terms = kept.double() * norm.double() * mask[:, None]
    error = F * torch.finfo(torch.float32).eps * terms.sum(1)
    assert ((out["l1"].double() - terms.sum(1)).abs() <= error).all()


def test_no_tokens(library):
    assert run(library, torch.zeros(0, 40), 3)["bits"].shape == (0, 2)


FAULTS = {
    "a barrier less after counting": ("    });\n    __syncthreads();", "    });"),
    "a barrier less before ties": ("  });\n  __syncthreads();\n  take", "  });\n  take"),
    "ties to the highest thread": ("left = places - block", "left = total - places + block"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_would_be_seen(fault):
    """These tests can fail: each of these kernels gives something wrong on ordinary rows."""
    wrong = faulty("topk.cpp", "topk.cuh", *FAULTS[fault])
    z = numbers(3, 4096, torch.bfloat16, "ties")
    with suppress(RuntimeError):  # what the emulator itself sees
        assert not torch.equal(run(wrong, z, 300)["bits"], bit_mask(active_by_sorting(z, 300)))

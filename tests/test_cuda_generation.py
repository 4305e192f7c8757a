"""csrc/cuda/generation.cuh in the emulator, against exact sums and against float64."""

from contextlib import suppress

import pytest
import torch
from emulated import Library, bit_mask, faulty, has_compiler
from torch import Tensor

pytestmark = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(scope="module")
def library() -> Library:
    return Library("generation.cpp")


def arguments(
    T: int, F: int, D: int, dtype: torch.dtype, *, integers: bool, shift: float = 0, seed: int = 0
) -> dict[str, Tensor | None]:
    """Random arguments; with `integers`, every sum is exact and many pre-activations are 0."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        normal = torch.randn(shape, generator=generator)
        return (normal.round().clamp(-2, 2) if integers else normal).to(dtype)

    named: dict[str, Tensor | None] = {
        "x": random(T, D), "W_enc": random(F, D), "b_enc": random(F) + shift,
        "W_dec": random(F, D), "base": random(T, D), "b_dec": random(D), "gain": random(F),
    }  # fmt: skip
    return named


def run(library: Library, named: dict[str, Tensor | None]) -> dict[str, Tensor]:
    x, W_enc = named["x"], named["W_enc"]
    (T, D), F = x.shape, W_enc.shape[0]
    out = {
        "out": library.empty(T, D, dtype=x.dtype),
        "activation": library.empty(T, F, dtype=x.dtype),
        "bits": library.empty(T, -(-F // 32), dtype=torch.int32),
    }
    guarded = [None if t is None else library.guarded(t) for t in named.values()]
    name = str(x.dtype).removeprefix("torch.")
    library.call(f"generation_{name}", *guarded, *out.values(), T, F, D)
    return out


def activations(named: dict[str, Tensor | None]) -> Tensor:
    """ReLU(x·W_encᵀ + b_enc) in float64."""
    return (named["x"].double() @ named["W_enc"].double().T + named["b_enc"].double()).relu()


def output(named: dict[str, Tensor | None], a: Tensor) -> Tensor:
    """What `a` decodes to, in float64."""
    gained = a if named["gain"] is None else a * named["gain"].double()
    added = [named[name].double() for name in ("base", "b_dec") if named[name] is not None]
    return gained @ named["W_dec"].double() + sum(added, torch.zeros(()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 3, 8, 32])
@pytest.mark.parametrize("F, D, shift", [(70, 264, -9), (33, 16, 0), (130, 520, 90)])
def test_exact_sums(library, dtype, T, F, D, shift):
    """Integers: sparse, half full and full; the bits of the result are known."""
    named = arguments(T, F, D, dtype, integers=True, shift=shift)
    out = run(library, named)
    a = activations(named).to(dtype)
    assert torch.equal(out["bits"], bit_mask(a != 0))
    assert torch.equal(out["activation"][a != 0], a[a != 0])
    assert torch.equal(out["out"], output(named, a.double()).float().to(dtype))


@pytest.mark.parametrize("absent", ["base", "b_dec", "gain"])
def test_what_may_be_absent(library, absent):
    named = arguments(2, 40, 24, torch.float32, integers=True) | {absent: None}
    assert torch.equal(run(library, named)["out"], output(named, activations(named)).float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_alone_is_between_it_and_the_truth(library, dtype):
    """Random numbers, by the bound of a sum (Higham §3.1) on either product."""
    named = arguments(5, 100, 264, dtype, integers=False)
    out = run(library, named)
    unit, stored = torch.finfo(torch.float32).eps / 2, torch.finfo(dtype).eps / 2
    magnitudes = {name: t.double().abs() for name, t in named.items()}
    z_error = 267 * unit * (magnitudes["x"] @ magnitudes["W_enc"].T + magnitudes["b_enc"])
    truth = activations(named)
    active = (out["bits"].unsqueeze(2) >> torch.arange(32) & 1).flatten(1)[:, :100].bool()
    found = torch.where(active, out["activation"], 0).double()
    assert ((found - truth).abs() <= z_error + 1.01 * stored * (truth + z_error)).all()
    error = 110 * unit * output(magnitudes, found)
    expected = output(named, found)
    assert ((out["out"].double() - expected).abs() <= error + 1.01 * stored * expected.abs()).all()


def test_more_features_than_a_block_lists_at_once(library):
    named = arguments(1, 8300, 8, torch.float32, integers=True, shift=-2)
    assert torch.equal(run(library, named)["out"], output(named, activations(named)).float())


def test_the_same_bits_in_every_run(library):
    """Blocks and threads run in another random order each time."""
    named = arguments(7, 100, 264, torch.float32, integers=False)
    first, again = run(library, named), run(library, named)
    assert torch.equal(first["out"], again["out"])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_visible(library, value):
    named = arguments(3, 40, 16, torch.bfloat16, integers=True)
    named["x"][1, 3] = value
    finite = run(library, named)["out"].isfinite().all(1)
    assert finite.tolist() == [True, False, True]


@pytest.mark.parametrize("T, D, message", [(33, 16, "33 tokens, expected 1..32"), (2, 9, "width")])
def test_shapes_it_does_not_serve(library, T, D, message):
    with pytest.raises(RuntimeError, match=message):
        run(library, arguments(T, 32, D, torch.float32, integers=True))


FAULTS = {
    "a barrier less after listing": (
        "word = without_lowest_bit(word);\n      }\n      __syncthreads();",
        "word = without_lowest_bit(word);\n      }\n",
    ),
    "a barrier less before the last sum": (
        "= total[i];\n    }\n    __syncthreads();", "= total[i];\n    }\n"
    ),
    "a token's neighbour": ("lane == t ? sum", "lane == (t ^ 1) ? sum"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_would_be_seen(fault):
    wrong = faulty("generation.cpp", "generation.cuh", *FAULTS[fault])
    named = arguments(3, 70, 264, torch.bfloat16, integers=True)
    expected = output(named, activations(named).to(torch.bfloat16).double())
    with suppress(RuntimeError):  # what the emulator itself sees
        assert not torch.equal(run(wrong, named)["out"], expected.float().bfloat16())

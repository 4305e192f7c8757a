"""csrc/cuda/screening.cuh in the emulator: the bound of docs/screening.md and its bits."""

import math

import pytest
import torch
from emulated import Library, faulty, has_compiler
from torch import Tensor

pytestmark = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")

DTYPES = [torch.bfloat16, torch.float32]
UNIT = 2.0**-24


@pytest.fixture(scope="module")
def library() -> Library:
    return Library("screening.cpp")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded_weights(library: Library, W: Tensor) -> tuple[Tensor, Tensor]:
    """(q int8 [F, D], and scale, error and norm of each row, float32 [F, 3])."""
    F, D = W.shape
    q, rows = library.empty(F, D, dtype=torch.int8), library.empty(F, 3, dtype=torch.float32)
    library.call(f"round_{str(W.dtype)[6:]}", library.guarded(W), q, rows, F, D)
    return q, rows


def rounded_inputs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(x̂, ‖x − x̂‖, ‖x‖) of docs/screening.md in float64, by 16-bit levels."""
    x = x.double()
    scale = x.abs().amax(1, keepdim=True) / 32639
    levels = torch.where(scale > 0, (x / scale).round(), 0.0)
    return levels * scale, (x - levels * scale).norm(dim=1), x.norm(dim=1)


def estimates(q: Tensor, rows: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """(the product with rounded numbers, its bound without roundings of floats), float64 [T, F]."""
    scale, error, norm = rows.double().unbind(1)
    x_hat, x_error, x_norm = rounded_inputs(x)
    bound = x_norm[:, None] * error + x_error[:, None] * (norm + error)
    return x_hat @ (q.double() * scale[:, None]).T, bound


def kinds_of_inputs(W: Tensor, remainder: Tensor) -> dict[str, Tensor]:
    """Inputs [8, D] of many kinds; the worst ones point along what rounding took from a row."""
    D = W.shape[1]
    outliers = normal(8, D, seed=1)
    outliers[:, ::97] *= 300
    one_hot = torch.zeros(8, D)
    one_hot[torch.arange(8), torch.arange(8) * 7 % D] = 3
    return {
        "random": normal(8, D),
        "outliers": outliers,
        "one component": one_hot,
        "along a row": W[:8].float(),
        "along a remainder": remainder[:8].float(),
        "against a remainder": -remainder[:8].float(),
        "signs of a remainder": remainder[:8].sign().float(),
        "log-normal": normal(8, D, seed=2).exp() * normal(8, D, seed=3).sign(),
    }


def weights(kind: str, dtype: torch.dtype, F: int = 24, D: int = 528) -> Tensor:
    W = normal(F, D, seed=4)
    if kind == "uniform":
        W = torch.rand(F, D, generator=torch.Generator().manual_seed(4)) - 0.5
    if kind == "one large":
        W[:, 5] *= 1000
    if kind == "levels":  # nothing is rounded away
        W = W.mul(40).round().clamp(-127, 127)
        W[:, 0] = 127
    return W.to(dtype)


KINDS = ["normal", "uniform", "one large", "levels"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_known_of_rounded_weights(library, dtype, kind):
    """Bounds from above, and not far above."""
    W = weights(kind, dtype)
    q, rows = rounded_weights(library, W)
    scale, error, norm = rows.double().unbind(1)
    true_error = (W.double() - q.double() * scale[:, None]).norm(dim=1)
    assert ((error >= true_error) & (error <= 1.002 * true_error + scale * 2**-19)).all()
    true_norm = W.double().norm(dim=1)
    assert ((norm >= true_norm) & (norm <= 1.002 * true_norm)).all()
    assert q.abs().amax(1).eq(127).all()


def test_halves_of_levels(library):
    library.call("check_halves")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_holds_for_sums_in_any_order(library, dtype, kind):
    """The proof's inequality, with products added in three orders in float32."""
    W = weights(kind, dtype)
    q, rows = rounded_weights(library, W)
    remainder = W.double() - q.double() * rows[:, :1].double()
    reached = 0.0
    for x in kinds_of_inputs(W, remainder).values():
        x = x.to(dtype)
        estimate, bound = estimates(q, rows, x)
        products = x.float()[:, None, :] * W.float()
        in_turn = torch.zeros(products.shape[:2])
        for d in range(W.shape[1]):
            in_turn += products[:, :, d]
        magnitudes = x.double().abs() @ W.double().abs().T
        for total in (x.float() @ W.float().T, products.sum(2), in_turn):
            rounding = W.shape[1] * UNIT * magnitudes
            off = (total.double() - estimate).abs()
            assert (off <= bound + 1.01 * rounding).all()
        exact = x.double() @ W.double().T
        reached = max(reached, float(((exact - estimate).abs() / bound.clamp(min=1e-300)).max()))
    # An input along the remainder reaches the bound: a smaller one would be wrong.
    assert reached <= 1 and (reached > 0.99 or kind == "levels")


def run(library: Library, entry: str, named: dict[str, Tensor], *rounded: Tensor) -> list[Tensor]:
    """(out, activations where a bit is set, bits)."""
    x, F = named["x"], len(named["W_enc"])
    (T, D), words = x.shape, -(-F // 32)
    out = [
        library.empty(T, D, dtype=x.dtype),
        library.guarded(torch.zeros(T, F, dtype=x.dtype)),
        library.empty(T, words, dtype=torch.int32),
    ]
    guarded = [library.guarded(t) for t in (*named.values(), *rounded)]
    library.call(f"{entry}_{str(x.dtype)[6:]}", *guarded, *out, T, F, D)
    return out


def both(library: Library, named: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """What the encoder of the weights gives, and the screened one."""
    screened = run(library, "screened", named, *rounded_weights(library, named["W_enc"]))
    return run(library, "plain", named), screened


def agree(named: dict[str, Tensor], library: Library) -> bool:
    plain, screened = both(library, named)
    whole = {2: torch.int16, 4: torch.int32}[named["x"].element_size()]
    return all(
        torch.equal(a.view(whole), b.view(whole)) for a, b in zip(plain, screened, strict=True)
    )


def arguments(W: Tensor, x: Tensor, b_enc: Tensor) -> dict[str, Tensor]:
    dtype, (F, D), T = W.dtype, W.shape, len(x)
    others = {"W_dec": normal(F, D, seed=5), "base": normal(T, D, seed=6),
              "b_dec": normal(D, seed=7), "gain": normal(F, seed=8)}  # fmt: skip
    tensors = {"x": x, "W_enc": W, "b_enc": b_enc} | others
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def just_active(library: Library, W: Tensor) -> dict[str, Tensor]:
    """Every row has an input along its remainder, and a bias that leaves a fifth of the bound.

    By the rounded weights alone each of these pairs looks inactive.
    """
    q, rows = rounded_weights(library, W)
    remainder = W.double() - q.double() * rows[:, :1].double()
    x = (remainder[:8] * 50).to(W.dtype)
    z = (x.double() * W[:8].double()).sum(1)
    b_enc = torch.full((len(W),), -1e4)
    b_enc[:8] = x.double().norm(dim=1) * remainder[:8].norm(dim=1) / 5 - z
    return arguments(W, x, b_enc)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 8])
@pytest.mark.parametrize("F, D, bias", [(70, 528, -30.0), (33, 16, 0.0), (20, 48, 99.0)])
def test_the_bits_of_the_encoder(library, dtype, T, F, D, bias):
    W = normal(F, D, seed=9).to(dtype)
    for x in kinds_of_inputs(W, W.double() % 0.01).values():
        assert agree(arguments(W, x[:T], normal(F) + bias), library)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_pairs_that_rounded_weights_call_inactive(library, dtype, kind):
    named = just_active(library, weights(kind, dtype))
    plain, screened = both(library, named)
    assert (torch.diagonal(plain[1]) > 0).all()
    assert agree(named, library) and torch.equal(screened[0], plain[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, 0.0, 3e38, 2.0**51, 2.0**-101, 1e-38, 1e-41]
)
@pytest.mark.parametrize("name", ["x", "W_enc", "b_enc"])
def test_numbers_that_cannot_be_rounded(library, dtype, value, name):
    """One of them, and a vector of nothing else."""
    named = arguments(weights("normal", dtype, 40, 48), normal(4, 48), normal(40))
    named[name].view(-1)[1] = value
    named[name].view(-1)[-1] = -value
    assert agree(named, library)
    named[name][0] = value
    assert agree(named, library)
    named[name][...] *= value
    assert agree(named, library)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["x", "W_enc"])
def test_a_bias_that_switches_a_feature_off_hides_no_nan(library, value, name):
    named = arguments(weights("normal", torch.float32, 40, 48), normal(4, 48), normal(40))
    named["b_enc"][:] = -math.inf
    named[name][0, 1] = value
    assert agree(named, library)


@pytest.mark.parametrize("T, D, message", [(9, 16, "9 tokens, expected at most 8"), (2, 24, "24")])
def test_shapes_it_does_not_serve(library, T, D, message):
    named = arguments(weights("normal", torch.float32, 32, D), normal(T, D), normal(32))
    with pytest.raises(RuntimeError, match=message):
        both(library, named)


FAULTS = {
    "weights taken for exact": ("x.norm * w.error + ", ""),
    "half of the bound": ("estimate + bound <=", "estimate + 0.5f * bound <="),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_would_be_seen(fault):
    wrong = faulty("screening.cpp", "screening.cuh", *FAULTS[fault])
    assert not agree(just_active(wrong, weights("uniform", torch.bfloat16)), wrong)

"""As many features as an adapter may have, as many kept as it may keep, and more than 2^31 pairs.

Shapes: T tokens, D model width, F features.
"""

import pytest
import torch
from operator_cases import gradients, weights

from tca_fast import ops


def selected(z, k):
    """The k largest pre-activations of every row and then those above 0, as a mask.

    Found by counting, in plain Python: a row is ordered by falling value, then by index.
    """
    kept = torch.zeros_like(z, dtype=torch.bool)
    for row, keep in zip(z.tolist(), kept, strict=True):
        order = sorted(range(len(row)), key=lambda f, row=row: (-row[f], f))
        keep[[f for f in order[:k] if row[f] > 0]] = True
    return kept


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("ties", [True, False], ids=["ties", "distinct"])
@pytest.mark.parametrize(
    ("F", "k"),
    [
        pytest.param(65_536, 512, id="largest F and k"),
        pytest.param(65_536, 1, id="one of the largest F"),
        pytest.param(40_009, 333, id="no multiple of anything"),
        pytest.param(513, 512, id="all but one"),
        pytest.param(512, 512, id="all"),
    ],
)
def test_the_selection_is_exact(F, k, ties):
    """Integers make thousands of ties; they and random float64 leave no room for rounding."""
    x, mlp_out, W_enc, b_enc, W_dec, b_dec = weights(T=3, D=2, F=F, grad=False)
    if ties:
        x, W_enc, b_enc = x.mul(2).round(), W_enc.round(), b_enc.round()
    z = x @ W_enc.T + b_enc
    kept = selected(z, k)
    active = ops.encode(x, W_enc, b_enc, k=k)
    assert torch.equal(active.to_dense() != 0, kept)
    torch.testing.assert_close(active.to_dense(), torch.where(kept, z, 0.0))

    inputs = [t.requires_grad_() for t in (x, mlp_out, W_enc, b_enc, W_dec, b_dec)]
    ours = ops.adapter(*inputs, k=k)
    dense = torch.where(kept, x @ W_enc.T + b_enc, 0.0)
    y, l1 = mlp_out + dense @ W_dec + b_dec, (dense @ W_dec.norm(dim=1)).sum()
    torch.testing.assert_close(ours.y, y)
    assert torch.equal(ours.l0, kept.sum(1, dtype=torch.int32))
    assert torch.equal(ours.fired, kept.any(0))
    for a, b in zip(gradients([ours.y, ours.l1], inputs), gradients([y, l1], inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.xdist_group("memory")
@pytest.mark.parametrize(
    "density",
    [
        pytest.param(1e-3, id="packed"),
        pytest.param(0.0, id="overflow"),
        pytest.param(1.0, id="dense"),
    ],
)
def test_more_than_two_to_the_31_pairs(density):
    """T·F = 33,000 · 65,536 in bfloat16; the oracle goes through it in slices of tokens.

    A dozen of 65,536 features fire, which are kept packed, not at all for want of room, or densely.
    """
    T, D, F = 33_000, 4, 65_536
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (T, D), "mlp_out": (T, D), "W_enc": (F, D), "b_enc": (F,), "W_dec": (F, D)}
    # Small integers: products and sums are exact, so the encoder has one right answer.
    tensors = {
        name: torch.randint(-3, 4, shape, generator=generator).bfloat16().requires_grad_()
        for name, shape in shapes.items()
    }
    with torch.no_grad():
        tensors["b_enc"] -= 29
    with ops.backend("cpp"):
        output = ops.adapter(**tensors, expected_density=density)
        (output.y.float().sum() + output.l1).backward()

    exact = {name: t.detach().double() for name, t in tensors.items()}
    norm = exact["W_dec"].norm(dim=1)
    direction = torch.where(norm == 0, 0.0, 1 / norm).unsqueeze(1) * exact["W_dec"]
    da_F = exact["W_dec"].sum(1) + norm
    active_sum, times, pairs = torch.zeros(F).double(), torch.zeros(F).double(), 0
    l1, dW_enc = 0.0, torch.zeros(F, D).double()
    for first in range(0, T, 500):
        rows = slice(first, first + 500)
        x = exact["x"][rows]
        token, feature = (
            x.float() @ exact["W_enc"].float().T + exact["b_enc"].float() > 0
        ).nonzero(as_tuple=True)
        a = (x[token] * exact["W_enc"][feature]).sum(1) + exact["b_enc"][feature]
        y = exact["mlp_out"][rows].index_add(0, token, a.unsqueeze(1) * exact["W_dec"][feature])
        assert torch.equal(output.y[rows], y.bfloat16())
        counts = torch.bincount(token, minlength=len(x))
        assert torch.equal(output.l0[rows].long(), counts)
        l1 += float((a * norm[feature]).sum())
        active_sum.index_add_(0, feature, a)
        times.index_add_(0, feature, torch.ones_like(a))
        dW_enc.index_add_(0, feature, x[token])
        dx = torch.zeros_like(x).index_add(
            0, token, da_F[feature].unsqueeze(1) * exact["W_enc"][feature]
        )
        torch.testing.assert_close(tensors["x"].grad[rows].double(), dx, rtol=2**-8, atol=1e-2)
        pairs += len(token)
    assert int(output.num_active) == pairs and 8 * T < pairs < 16 * T
    assert float(output.l1.detach()) == pytest.approx(l1, rel=1e-4)
    assert torch.equal(output.fired, times > 0)
    expected = {
        "W_enc": dW_enc * da_F.unsqueeze(1),
        "b_enc": times * da_F,
        "W_dec": active_sum.unsqueeze(1) * (1 + direction),
        "mlp_out": torch.ones(T, D).double(),
    }
    for name, gradient in expected.items():
        # Sums in float32 of terms that cancel, rounded to bfloat16.
        cancelled = 1e-6 * float(gradient.abs().max())
        torch.testing.assert_close(
            tensors[name].grad.double(), gradient, rtol=2**-8, atol=cancelled
        )

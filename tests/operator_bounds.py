"""How far a result may lie from the truth: what rounding alone can do to every element.

The law (style §6.5) is: our error is at most twice that of eager PyTorch in the same dtype, plus a
floor. The floor here is the forward error of the sums themselves (Higham, Accuracy and Stability of
Numerical Algorithms, §3.1): a sum of n terms, in any order, is off by at most n·u·Σ|terms|, with u
the unit roundoff of the numbers it is added in. Σ|terms| is computed in float64, for every element
apart, so an element made of small terms is held to a small error.

Whether a pre-activation within its own error of the threshold (0, or the k-th largest) is active is
for rounding to say: there, either answer is right, and its whole effect is allowed downstream.
Everywhere else there is one right answer. Sums of small integers are exact, so ties and zeros made
of integers leave no such room.

Shapes: T tokens, D model width, F features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Second-order terms are below this share of the first-order ones.
SLACK = 1.01


@dataclass(frozen=True)
class Arithmetic:
    """Unit roundoffs of a dtype's operators: numbers are stored as `dtype`, added as `sums`.

    For float64 there is no finer truth, so the errors of both sides count.
    """

    dtype: torch.dtype

    @property
    def sums(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def sides(self) -> int:
        return 2 if self.dtype == torch.float64 else 1

    def stored(self, x: Tensor) -> Tensor:
        """Error of storing `x` once; below the normal range the spacing no longer shrinks."""
        info = torch.finfo(self.dtype)
        return self.sides * SLACK * info.eps / 2 * (x.abs() + info.smallest_normal)

    def summed(self, terms: int, magnitudes: Tensor) -> Tensor:
        """Error of a sum of `terms` products whose magnitudes add up to `magnitudes`."""
        unit_roundoff = torch.finfo(self.sums).eps / 2
        return self.sides * SLACK * (terms + 1) * unit_roundoff * magnitudes


@dataclass(frozen=True)
class Activations:
    """Activations [T, F] in float64, how far each may be off, and which are beyond doubt active."""

    value: Tensor
    error: Tensor
    active: Tensor
    doubtful: Tensor

    @staticmethod
    def given(value: Tensor) -> "Activations":
        """Activations that are an argument, and so exact."""
        none = torch.zeros_like(value, dtype=torch.bool)
        return Activations(value, torch.zeros_like(value), value != 0, none)


def activations(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, features: Tensor, k: int | None, at: Arithmetic
) -> Activations:
    """What the encoder may yield, given the true activations `features`."""
    product = x @ W_enc.T
    z = product + b_enc
    magnitudes = x.abs() @ W_enc.abs().T + b_enc.abs()
    error = at.summed(x.shape[1] + 1, magnitudes) + at.stored(product) + at.stored(z)
    integers = all(bool((t == t.round()).all()) for t in (x, W_enc, b_enc))
    if integers and magnitudes.numel() and magnitudes.max() * torch.finfo(at.dtype).eps <= 1:
        error = torch.zeros_like(error)
    doubtful = (z.abs() <= error) & (error > 0)
    if k is not None and k < z.shape[1] and z.numel():
        threshold = z.topk(k, dim=1).values[:, -1:]
        margin = error + error.amax(dim=1, keepdim=True)
        close = ((z - threshold).abs() <= margin) & (margin > 0) & (z > -error)
        # Alone within the margin, the k-th largest has no rival.
        doubtful = doubtful | (close & (close.sum(1, keepdim=True) > 1))
    active = (features != 0) & ~doubtful
    error = torch.where(doubtful, z.relu() + error, torch.where(active, error, 0.0))
    return Activations(features, error, active, doubtful)


def decoded(
    a: Activations,
    W_dec: Tensor,
    gain: Tensor,
    added: list[Tensor],
    at: Arithmetic,
) -> Tensor:
    """Error of Σ_f g·a·W_dec[f] plus the `added` rows, [T, D]."""
    W, g = W_dec.abs(), gain.abs()
    terms = (g * (a.value + a.error)) @ W
    total = (gain * a.value) @ W_dec
    error = (g * a.error) @ W + at.stored((g * a.value) @ W) + at.stored(total)
    magnitudes = terms + sum(row.abs() for row in added)
    error = error + at.summed(W_dec.shape[0] + 1 + len(added), magnitudes)
    return error + at.stored(total + sum(added))


def weighted(a: Activations, W_dec: Tensor, mask: Tensor, at: Arithmetic) -> Tensor:
    """Error of the L1: Σ over real tokens of Σ_f a·‖W_dec[f]‖, 0-d; summed by token first."""
    norm = W_dec.norm(dim=1)
    largest = ((a.value + a.error) @ norm)[mask].sum()
    terms = W_dec.shape[0] + W_dec.shape[1] + len(mask)
    return (a.error @ norm)[mask].sum() + at.summed(terms, largest)


@dataclass(frozen=True)
class Gradient:
    """A gradient per pair [T, F] in float64, and how far each may be off."""

    value: Tensor
    error: Tensor

    def where_active(self, a: Activations) -> "Gradient":
        """The gradient of the pre-activations: nothing passes an inactive pair."""
        doubt = torch.where(a.doubtful, self.value.abs() + self.error, 0.0)
        error = torch.where(a.active, self.error, doubt)
        return Gradient(torch.where(a.value != 0, self.value, 0.0), error)


def activation_gradient(
    dy: Tensor, dl1: Tensor, W_dec: Tensor, gain: Tensor, mask: Tensor, at: Arithmetic
) -> Gradient:
    """g·⟨dy, W_dec[f]⟩ + dl1·m·‖W_dec[f]‖ for every pair."""
    norm = W_dec.norm(dim=1) * dl1
    product = gain * (dy @ W_dec.T)
    l1 = mask.unsqueeze(1) * norm
    magnitudes = gain.abs() * (dy.abs() @ W_dec.abs().T) + l1.abs()
    value = product + l1
    error = at.summed(W_dec.shape[1] + 3, magnitudes) + at.stored(product) + at.stored(value)
    # The dense product is stored before the gain multiplies it.
    return Gradient(value, error + gain.abs() * at.stored(dy @ W_dec.T))


def encoder_gradients(dz: Gradient, x: Tensor, W_enc: Tensor, at: Arithmetic) -> list[Tensor]:
    """Errors of (dx, dW_enc, db_enc)."""
    largest = dz.value.abs() + dz.error
    T, F = dz.value.shape
    W, X, one = W_enc.abs(), x.abs(), x.new_ones(T)
    return [
        dz.error @ W + at.summed(F, largest @ W) + at.stored(dz.value @ W_enc),
        dz.error.T @ X + at.summed(T, largest.T @ X) + at.stored(dz.value.T @ x),
        dz.error.T @ one + at.summed(T, largest.T @ one) + at.stored(dz.value.sum(0)),
    ]


def decoder_gradients(
    a: Activations,
    dy: Tensor,
    dl1: Tensor,
    W_dec: Tensor,
    gain: Tensor,
    mask: Tensor,
    at: Arithmetic,
) -> list[Tensor]:
    """Errors of (dW_dec, db_dec), the norm's share of the L1 included."""
    T, D = dy.shape
    g = gain.abs().unsqueeze(1)
    largest = a.value + a.error
    product = (gain * a.value).T @ dy
    error = g * (a.error.T @ dy.abs()) + at.summed(T + 1, g * (largest.T @ dy.abs()))
    error = error + at.stored(g * (a.value.T @ dy.abs())) + at.stored(product)
    norm = W_dec.norm(dim=1, keepdim=True)
    direction = torch.where(norm == 0, 0.0, W_dec / norm)
    per_unit = dl1.abs() * direction.abs()
    error = error + a.error[mask].sum(0).unsqueeze(1) * per_unit
    error = error + at.summed(T + D + 3, largest[mask].sum(0).unsqueeze(1) * per_unit)
    total = product + dl1 * a.value[mask].sum(0).unsqueeze(1) * direction
    db_dec = at.summed(T, dy.abs().sum(0)) + at.stored(dy.sum(0))
    return [error + at.stored(total), db_dec]


def assert_as_good_as(
    ours: dict[str, Tensor],
    eager: dict[str, Tensor],
    truth: dict[str, Tensor],
    floor: dict[str, Tensor],
) -> None:
    """Every element's error is at most twice eager PyTorch's at that element, plus its floor.

    Args:
        ours, eager: results in the dtype under test, by name.
        truth: the same in float64.
        floor: what rounding alone may do, of the same shapes; see this module.

    Raises:
        AssertionError: naming the result, the worst element, its error and what was allowed.
    """
    assert ours.keys() == eager.keys() == truth.keys() == floor.keys()
    for name, exact in truth.items():
        result = ours[name]
        assert result.shape == exact.shape, f"{name}: {result.shape}, expected {exact.shape}"
        if not exact.numel():
            continue
        # Where eager overflows, it allows nothing.
        eagers = (eager[name].double() - exact).abs().nan_to_num(0, posinf=0)
        allowed = 2 * eagers + floor[name]
        beyond = exact.abs() + allowed > torch.finfo(result.dtype).max
        error = (result.double() - exact).abs()
        wrong = ~(error <= allowed) & ~beyond
        if wrong.any():
            excess = torch.where(wrong, error - allowed, -torch.inf).nan_to_num(torch.inf)
            at = int(excess.argmax())
            raise AssertionError(
                f"{name}: {int(wrong.sum())} of {exact.numel()} elements; the worst is "
                f"{result.flatten()[at]:.9g}, expected {exact.flatten()[at]:.9g}, off by "
                f"{error.flatten()[at]:.3g} where {allowed.flatten()[at]:.3g} is allowed"
            )

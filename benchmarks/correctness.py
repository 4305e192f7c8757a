"""Nothing is timed when wrong: results against the dense layer in float64.

An error may be twice that of the dense layer in the same dtype, plus what rounding alone explains.
Where a pre-activation lies within rounding of the threshold (of zero, or of the k-th largest), any
arithmetic may fall on either side, and the pair comes or goes; how many such pairs there are is
counted from the exact pre-activations.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.layers import DenseEager
from benchmarks.operations import ARGUMENTS, Operation, Tensors

_TIMES_DENSE_ERROR = 2
# What a sum of some thousand terms gathers, in roundings of the dtype it is added in.
_SUM_ROUNDINGS = 64


def with_gradients(tensors: Tensors) -> Tensors:
    """The same tensors as leaves, those that have gradients requiring them."""
    return {name: t.detach().requires_grad_(name in ARGUMENTS) for name, t in tensors.items()}


def exact_results(operation: Operation, case: Case, tensors: Tensors) -> Tensors:
    """Results of the dense implementation in float64."""
    dense = DenseEager(case)
    exact = with_gradients({name: t.double() for name, t in tensors.items()})
    return operation.results(dense, operation.variant(dense, exact)())


def relative_errors(results: Tensors, truth: Tensors) -> dict[str, float]:
    """‖found - exact‖ / ‖exact‖ of every result."""
    smallest = torch.finfo(torch.float64).tiny
    return {
        name: (
            (results[name].double() - exact.double()).norm()
            / exact.double().norm().clamp(min=smallest)
        ).item()
        for name, exact in truth.items()
    }


def allowed_errors(case: Case, tensors: Tensors, dense: dict[str, float]) -> dict[str, float]:
    """Largest relative error that each result may have.

    Args:
        case: decides the threshold.
        tensors: the inputs, in the dtype that is timed.
        dense: errors of the dense implementation in that dtype.
    """
    pairs = case.tokens * case.active
    jump = 2 * math.sqrt(_undecided_pairs(case, tensors) / pairs)
    # At ReLU's threshold activations are continuous and gradients are not; TopK's moves both.
    continuous = {"features", "y", "l1"} if case.k is None else {"l1"}
    return {
        name: _TIMES_DENSE_ERROR * error
        + rounding_of_sums(tensors["x"].dtype)
        + (0.0 if name in continuous else jump)
        for name, error in dense.items()
    }


def rounding_of_sums(dtype: torch.dtype) -> float:
    """Relative error that rounding alone explains in a sum of products.

    16-bit numbers are added in float32, and their sum is then rounded once more.
    """
    eps, single = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    return _SUM_ROUNDINGS * eps if eps <= single else _SUM_ROUNDINGS * single + eps


def _undecided_pairs(case: Case, tensors: Tensors) -> int:
    """Pairs whose exact pre-activation lies within rounding of the threshold."""
    x, W_enc, b_enc = (tensors[name].detach().double() for name in ("x", "W_enc", "b_enc"))
    z_TF = torch.nn.functional.linear(x, W_enc, b_enc)
    if case.k is None:
        return int((z_TF.abs() < _rounding(tensors["x"], b_enc.abs() + 1)).sum())
    largest = z_TF.topk(min(case.k + 1, case.features), dim=1).values
    gap = largest[:, -2] - largest[:, -1]
    return 2 * int((gap < _rounding(tensors["x"], largest[:, -1].abs() + 1)).sum())


def _rounding(like: Tensor, scale: Tensor) -> Tensor:
    """Error of a pre-activation whose terms add up to `scale`.

    A 16-bit result is rounded after the product and after the bias; a wider one gathers the
    roundings of its sum.
    """
    roundings = 2 if torch.finfo(like.dtype).bits == 16 else 8
    return roundings * torch.finfo(like.dtype).eps * scale

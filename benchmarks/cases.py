"""Shapes and sparsity of every benchmark; the only place they are written down.

Shapes: T tokens, D model width, F features. `l0` is the mean number of active features per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One layer at one sparsity.

    Attributes:
        name: readable id.
        tokens, width, features: T, D, F.
        l0: mean active features per token; F/2 is a fresh adapter.
        rates: "uniform" gives every feature the same firing rate; "power" lets rates fall with
            rank and keeps a few features on for nearly every token, as trained dictionaries do.
        k: TopK instead of ReLU.
    """

    name: str
    tokens: int
    width: int
    features: int
    l0: float
    rates: str = "power"
    k: int | None = None


CPU_CASES = [
    Case("1.5B l0=8", 1024, 1536, 8192, 8),
    Case("1.5B l0=8 uniform", 1024, 1536, 8192, 8, "uniform"),
    Case("1.5B l0=64", 1024, 1536, 8192, 64),
    Case("1.5B half dense", 1024, 1536, 8192, 4096, "uniform"),
    Case("1.5B topk=64", 1024, 1536, 8192, 4096, "uniform", k=64),
]


def firing_rates(case: Case) -> Tensor:
    """Share of tokens for which each feature is active, float64 [F], summing to `l0`."""
    if case.rates == "uniform":
        return torch.full((case.features,), case.l0 / case.features, dtype=torch.float64)
    rank = torch.arange(case.features, dtype=torch.float64)
    shape = (rank + 4).reciprocal()
    low, high = 0.0, case.l0 * 1000.0
    for _ in range(100):  # bisect the scale, since rates saturate below 1
        scale = (low + high) / 2
        rates = (scale * shape).clamp(max=0.98)
        low, high = (scale, high) if rates.sum() < case.l0 else (low, scale)
    return rates[torch.randperm(case.features, generator=torch.Generator().manual_seed(1))]


def layer_inputs(case: Case, seed: int = 0) -> dict[str, Tensor]:
    """Random x, mlp_out, upstream gradient and weights whose features fire at the case's rates.

    Pre-activations are standard normal before the bias, so the bias is the normal quantile of the
    rate.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    T, D, F = case.tokens, case.width, case.features
    return {
        "x": normal(T, D),
        "mlp_out": normal(T, D),
        "W_enc": normal(F, D, scale=D**-0.5),
        "b_enc": torch.special.ndtri(firing_rates(case)).float(),
        "W_dec": normal(F, D, scale=0.05),
        "b_dec": normal(D, scale=0.05),
        "grad_y": normal(T, D),
    }

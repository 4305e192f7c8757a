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
        l0: mean active features per token before any TopK; F/2 is a fresh adapter.
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

    @property
    def active(self) -> float:
        """Mean active features per token that are left: `l0`, or `k` where TopK keeps fewer."""
        return self.l0 if self.k is None else min(self.k, self.l0)


# By the set's name; a run takes the one of its device unless told otherwise. On a CPU the wider
# models get fewer tokens, so that a round of all variants stays within seconds. "tiny" shows that
# the suites run, and its times mean nothing.
CASES = {
    "cpu": [
        Case("1.5B l0=8", 1024, 1536, 8192, 8),
        Case("1.5B l0=8 uniform", 1024, 1536, 8192, 8, "uniform"),
        Case("1.5B l0=64", 1024, 1536, 8192, 64),
        Case("1.5B half dense", 1024, 1536, 8192, 4096, "uniform"),
        Case("1.5B topk=64", 1024, 1536, 8192, 4096, "uniform", k=64),
        Case("7B l0=8", 512, 3584, 8192, 8),
        Case("7B half dense", 512, 3584, 8192, 4096, "uniform"),
        Case("7B topk=64", 512, 3584, 8192, 4096, "uniform", k=64),
        Case("32B l0=8", 256, 5120, 16384, 8),
        Case("32B half dense", 256, 5120, 16384, 8192, "uniform"),
        Case("32B topk=64", 256, 5120, 16384, 8192, "uniform", k=64),
    ],
    "cuda": [
        Case("1.5B l0=10", 8192, 1536, 8192, 10),
        Case("1.5B half dense", 8192, 1536, 8192, 4096, "uniform"),
        Case("7B l0=1.4", 8192, 3584, 8192, 1.4),
        Case("7B l0=10", 8192, 3584, 8192, 10),
        Case("7B l0=10 uniform", 8192, 3584, 8192, 10, "uniform"),
        Case("7B l0=64", 8192, 3584, 8192, 64),
        Case("7B half dense", 8192, 3584, 8192, 4096, "uniform"),
        Case("7B topk=64", 8192, 3584, 8192, 4096, "uniform", k=64),
        Case("32B l0=10", 8192, 5120, 16384, 10),
        Case("32B half dense", 8192, 5120, 16384, 8192, "uniform"),
        Case("32B topk=64", 8192, 5120, 16384, 8192, "uniform", k=64),
    ],
    "tiny": [
        Case("tiny l0=4", 48, 32, 160, 4),
        Case("tiny half dense", 48, 32, 160, 80, "uniform"),
        Case("tiny topk=6", 48, 32, 160, 80, "uniform", k=6),
    ],
    # Small enough for Triton's interpreter, which takes milliseconds for a program.
    "rehearsal": [
        Case("rehearsal l0=4", 3, 8, 24, 4),
        Case("rehearsal topk=3", 3, 8, 24, 12, "uniform", k=3),
    ],
}

# Tokens that are generated at once, by model.
GENERATION_CASES = {
    "cuda": [Case(f"7B, {T} tokens", T, 3584, 8192, 10) for T in (1, 2, 4, 8, 16, 32)],
    "rehearsal": [Case(f"rehearsal, {T} tokens", T, 8, 24, 4) for T in (1, 4)],
}


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


def layer_inputs(
    case: Case,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random x, mlp_out, upstream gradient and weights whose features fire at the case's rates.

    Tokens have norm √D and encoder rows norm 1, so that pre-activations are standard normal before
    the bias, and the bias is the normal quantile of the rate. Drawn on the CPU: every device gets
    the same data.

    Returns:
        x, mlp_out, grad_y [T, D], W_enc, W_dec [F, D], b_enc [F], b_dec [D].
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator).mul_(scale)

    T, D, F = case.tokens, case.width, case.features
    tensors = {
        "x": torch.nn.functional.normalize(normal(T, D)) * D**0.5,
        "mlp_out": normal(T, D),
        "W_enc": torch.nn.functional.normalize(normal(F, D)),
        "b_enc": torch.special.ndtri(firing_rates(case)),
        "W_dec": normal(F, D, scale=0.05),
        "b_dec": normal(D, scale=0.05),
        "grad_y": normal(T, D),
    }
    return {name: tensor.to(device, dtype) for name, tensor in tensors.items()}

"""Learning-rate schedule (contract §3.7)."""

from __future__ import annotations

import math


def warmup_steps(total_steps: int, warmup_ratio: float) -> int:
    """Steps of linear warm-up: the ratio of all steps, rounded down."""
    return int(total_steps * warmup_ratio)


def learning_rate(step: int, peak: float, total_steps: int, num_warmup_steps: int) -> float:
    """Learning rate used by optimizer step `step`, counted from 0.

    Linear warm-up from 0, so the first step of a warmed-up run has rate 0, then half a cosine to
    0 at `total_steps`, and 0 from there on (the reference's cosine rises again).
    """
    if step < num_warmup_steps:
        return peak * step / num_warmup_steps
    if step >= total_steps:
        return 0.0
    progress = (step - num_warmup_steps) / (total_steps - num_warmup_steps)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))

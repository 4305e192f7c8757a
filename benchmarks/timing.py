"""Interleaved timing: every round runs every variant once, so drift of the machine hits all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Milliseconds over the rounds: median, and the 20th and 80th percentile as spread."""

    median: float
    low: float
    high: float


def interleaved(
    variants: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2
) -> dict[str, Timing]:
    """Time callables against each other; the order rotates from round to round."""
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            started = time.perf_counter()
            variants[name]()
            elapsed = time.perf_counter() - started
            if number >= 0:
                seconds[name].append(elapsed * 1e3)
    return {name: _summary(values) for name, values in seconds.items()}


def _summary(milliseconds: list[float]) -> Timing:
    if len(milliseconds) < 2:
        return Timing(milliseconds[0], milliseconds[0], milliseconds[0])
    fifths = statistics.quantiles(milliseconds, n=5)
    return Timing(statistics.median(milliseconds), fifths[0], fifths[3])

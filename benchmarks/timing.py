"""Interleaved timing: every round runs every variant once, so drift of the machine hits all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

# More than the last-level cache of any machine this runs on; a rehearsal, which measures nothing,
# makes both small.
EVICTED_BYTES = 2**28
COPIED_BYTES = 2**28


@dataclass(frozen=True)
class Variant:
    """One thing to be timed.

    Attributes:
        prepare: makes what `run` is given; not timed.
        run: timed.
    """

    prepare: Callable[[], Any]
    run: Callable[[Any], Any]

    def __call__(self) -> Any:
        """Both, for its result."""
        return self.run(self.prepare())


def interleaved(
    variants: Mapping[str, Variant], device: torch.device, rounds: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Time variants against each other, with cold caches; the order rotates from round to round.

    Returns:
        Milliseconds of every round after the warm-up, by variant.
    """
    names = list(variants)
    milliseconds: dict[str, list[float]] = {name: [] for name in names}
    evicted = torch.empty(EVICTED_BYTES, dtype=torch.uint8, device=device)
    for number in range(-warmup, rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            argument = variants[name].prepare()
            if number >= 0:
                evicted.zero_()
            elapsed = stopwatch(device, variants[name].run, argument)
            del argument
            if number >= 0:
                milliseconds[name].append(elapsed)
    return milliseconds


def stopwatch(device: torch.device, call: Callable[..., object], *arguments: Any) -> float:
    """Milliseconds until the device has done one call, by its own clock where it has one."""
    if device.type == "cuda":
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started.record()
        result = call(*arguments)
        ended.record()
        ended.synchronize()
        elapsed = started.elapsed_time(ended)
    else:
        began = time.perf_counter()
        result = call(*arguments)
        elapsed = (time.perf_counter() - began) * 1e3
    del result  # freed outside the measured time
    return elapsed


def repeated(
    call: Callable[[], object], device: torch.device, rounds: int = 20, warmup: int = 2
) -> dict[str, float]:
    """Milliseconds of one call alone, with cold caches: median, 20th and 80th percentile."""
    times = interleaved({"": Variant(lambda: None, lambda _: call())}, device, rounds, warmup)[""]
    return dict(zip(("ms", "low_ms", "high_ms"), spread(times), strict=True))


def captured(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """A call as a CUDA graph, which leaves the host out of its time; on a CPU the call itself.

    Every replay returns the same tensors, filled anew.
    """
    if device.type != "cuda":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def replay() -> Any:
        graph.replay()
        return kept

    return replay


def copy_bandwidth(device: torch.device, rounds: int = 7) -> float:
    """Bytes read plus bytes written per second of a large copy; the best of some rounds."""
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    milliseconds = [stopwatch(device, target.copy_, source) for _ in range(rounds)]
    return 2 * COPIED_BYTES / (min(milliseconds) * 1e-3)


def spread(milliseconds: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    if len(milliseconds) < 2:
        return (milliseconds[0],) * 3
    fifths = statistics.quantiles(milliseconds, n=5, method="inclusive")
    return statistics.median(milliseconds), fifths[0], fifths[3]

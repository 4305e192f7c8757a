"""Where a step's time goes: data, forward, backward, optimizer, and what happens between steps."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch


class Moment:
    """A point in the work of a device: now on the CPU, an event in the queue of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(torch.cuda.current_stream(device))
        self._time = time.perf_counter()

    def wait(self) -> None:
        """Return once the device has come as far; work queued later is not waited for."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: Moment) -> float:
        """Seconds of the device between two moments; both must have been reached."""
        if self._event is not None and earlier._event is not None:
            return earlier._event.elapsed_time(self._event) / 1000
        return self._time - earlier._time


class Mark(NamedTuple):
    """The beginning of a phase in the work of the device."""

    phase: str
    moment: Moment


class Phases:
    """The phase that a rank is in: told at once, and timed by the device without waiting for it.

    A phase lasts until the next one begins. On a GPU its beginning is an event in the queue, so a
    host that runs ahead costs "data" nothing: only time in which the device had no work counts.

    Args:
        device: of the rank.
        told: called with the phase whenever one begins.
    """

    def __init__(self, device: torch.device, told: Callable[[str], None]) -> None:
        self._device, self._told = device, told
        self._marks: list[Mark] = []

    def enter(self, phase: str) -> Moment:
        """Begin a phase."""
        self._told(phase)
        mark = Mark(phase, Moment(self._device))
        self._marks.append(mark)
        return mark.moment

    def take(self) -> tuple[Mark, ...]:
        """Marks since the last call, which then begins with the last of them."""
        marks, self._marks = tuple(self._marks), self._marks[-1:]
        return marks


def seconds_by_phase(marks: Sequence[Mark]) -> dict[str, float]:
    """Seconds of the device in each phase; the last mark only ends the one before it."""
    seconds: dict[str, float] = {}
    for mark, following in zip(marks, marks[1:], strict=False):
        passed = following.moment.seconds_since(mark.moment)
        seconds[mark.phase] = seconds.get(mark.phase, 0.0) + passed
    return seconds


def peak_memory(device: torch.device) -> int:
    """Most bytes so far: allocated by torch on a GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    # Kilobytes, except on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

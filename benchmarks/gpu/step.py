"""The stage of whole training steps: time, memory by phase, the longest sequence that fits."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.facts import backends_of, clocks
from benchmarks.gpu.record import Absent, Case, Clock, Record, run_cases
from benchmarks.measure import Machine
from benchmarks.memory import peak_bytes
from benchmarks.results import find_machine
from benchmarks.step import BASELINE, StepBench, uniform_cutoffs
from benchmarks.step_cases import STEP_CASES, StepCase, make_batch, make_streams
from tca_fast import ops
from tca_fast.bridging.streams import Streams
from tca_fast.errors import one_line

_CUTOFFS = 3
# The one that needs most memory first.
_OURS = ["plain", "shared", "shared, checkpointed"]


def run(record: Record, clock: Clock, device: torch.device, out: Path) -> None:
    """Run what is not in the record yet, with the fastest backend that is known here."""
    backend = backend_of(device)
    record.facts["backend"] = backend or ops.backends()["adapter"][device.type.upper()]
    steps = StepStage(find_machine(device, backend))
    with ops.backend(backend) if backend else nullcontext():
        run_cases(steps.cases(), record, clock)
    record.facts["clocks"].append(clocks())
    record.write()


def backend_of(device: torch.device) -> str | None:
    """None, the package's own choice, on a CPU; on CUDA what was measured, else Triton by name."""
    if device.type == "cpu":
        return None
    served = ops.backends()["adapter"]["CUDA"]
    return "triton" if served == "reference" and "triton" in backends_of(device) else None


class StepStage:
    """The cases of one machine; models of one size are made once and serve all their cases."""

    def __init__(self, machine: Machine) -> None:
        """Nothing is made yet."""
        self._machine = machine
        self._is_full = machine.device.type == "cuda"
        self._cases = STEP_CASES["cuda" if self._is_full else "tiny"]
        # Sequences are sought in steps of so many tokens, and no further than to so many.
        self._step, self._most = (1024, 65_536) if self._is_full else (8, 32)
        self._streams: tuple[object, Streams] | None = None

    def cases(self) -> dict[str, Case]:
        """Every case by name, the largest model first."""
        named: dict[str, Case] = {}
        sizes = {case.widths: case for case in self._cases}
        for widths in reversed(sizes):
            same = [case for case in self._cases if case.widths == widths]
            for case in same:
                named[f"step: {case.name}"] = partial(self._time, case)
            for case in same:
                named[f"memory: {case.name}"] = partial(self._memory, case)
            for name in reversed(_OURS):
                size = sizes[widths].name.split(",")[0]
                longest = partial(self._longest, sizes[widths], name)
                named[f"longest sequence: {size}, {name}"] = longest
        return named

    def _bench(self, case: StepCase, names: list[str]) -> StepBench:
        if self._streams is None or self._streams[0] != case.widths:
            self._streams = None  # the models before go first
            gc.collect()
            longest = replace(case, tokens=self._most, sequences=1)
            streams = make_streams(longest, self._machine.device, self._machine.dtype)
            self._streams = case.widths, streams
        return StepBench(case, names, self._machine, self._streams[1])

    def _time(self, case: StepCase) -> dict[str, Any]:
        """Published, plain and shared steps, without those that do not fit."""
        found = self._of_those_that_fit([BASELINE, *_OURS], partial(self._rows, case))
        for row in found["rows"]:
            print(f"    {row['variant']:20} {row['tokens_per_s']:.0f} tokens/s", flush=True)
        return found

    def _of_those_that_fit(
        self, names: list[str], measured: Callable[[list[str]], list[dict[str, Any]]]
    ) -> dict[str, Any]:
        """Rows of the variants, given with the one that needs most memory first."""
        left_out: dict[str, str] = {}
        for first, name in enumerate(names):
            try:
                return {"rows": measured(names[first:]), "left_out": left_out}
            except torch.OutOfMemoryError as error:
                left_out[name] = one_line(error)
            gc.collect()
            if self._is_full:
                torch.cuda.empty_cache()
            print(f"    without {name}: {left_out[name]}", flush=True)
        raise Absent(f"not even {names[-1]} fits: {left_out[names[-1]]}")

    def _rows(self, case: StepCase, names: list[str]) -> list[dict[str, Any]]:
        bench = self._bench(case, names)
        return bench.rows(uniform_cutoffs(bench.streams.num_layers, _CUTOFFS))

    def _memory(self, case: StepCase) -> dict[str, Any]:
        found = self._of_those_that_fit(
            _OURS[:-1], lambda names: self._bench(case, names).phase_rows()
        )
        for row in found["rows"]:
            for name, peak in row["phase_peak_bytes"].items():
                print(f"    {row['variant']:8} {name:20} {peak / 2**20:.1f} MiB", flush=True)
        return found

    def _longest(self, case: StepCase, name: str) -> dict[str, Any]:
        """Most tokens of one sequence whose step fits, by trying.

        On CUDA a step fits that does not run out of the device's memory; on a CPU, for a
        rehearsal, one that takes no more than four times what the shortest takes.
        """
        device = self._machine.device
        bench = self._bench(replace(case, sequences=1), [name])
        cutoff = bench.streams.num_layers // 2

        def peak(tokens: int) -> int:
            sequence = replace(case, tokens=tokens, sequences=1)
            bench.batch = make_batch(sequence, bench.streams, device)
            return peak_bytes(device, bench.step, name, cutoff)

        most_bytes = None if self._is_full else 4 * peak(self._step)

        def fits(tokens: int) -> bool:
            found = None
            with suppress(torch.OutOfMemoryError):
                found = peak(tokens)
            gc.collect()
            if self._is_full:
                torch.cuda.empty_cache()
            does = found is not None and (most_bytes is None or found <= most_bytes)
            print(f"    {tokens} tokens {'fit' if does else 'do not fit'}", flush=True)
            return does

        tokens = longest(fits, self._step, self._most)
        return {
            "tokens": tokens,
            "in_steps_of": self._step,
            "sought_up_to": self._most,
            "most_bytes": most_bytes,
        }


def longest(fits: Callable[[int], bool], step: int, most: int) -> int:
    """The largest multiple of `step`, up to `most`, that fits; 0 if none does.

    What is longer than something that does not fit is taken not to fit either.
    """
    low, high = 0, 1
    while high * step <= most and fits(high * step):
        low, high = high, 2 * high
    high = min(high, most // step + 1)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle * step):
            low = middle
        else:
            high = middle
    return low * step

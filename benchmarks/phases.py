"""Peak memory of every phase of a training step.

    python -m benchmarks.phases --out benchmarks/results/NAME.json

A step is run once to warm up and to make the optimizer's state, and a second time to be measured.
The phases of the plain and the shared objective follow one another: reference pass, adapter pass,
each bridge, head and losses, backward, optimizer. A phase's peak is the most memory allocated
while it ran beyond what was allocated before the step (weights, adapters, optimizer state), so
what earlier phases left for the backward is in it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.measure import Machine
from benchmarks.results import find_machine, write_results
from benchmarks.step_cases import STEP_CASES
from tca_fast.bridging import plain
from tca_fast.bridging.objective import BridgingObjective
from tca_fast.bridging.plain import PlainObjective
from tca_fast.bridging.shared import SharedObjective

REFERENCE, ADAPTER, HEAD = "reference pass", "adapter pass", "head and losses"
BACKWARD, OPTIMIZER, REST = "backward", "optimizer", "between"
_MARK = "phase "


class PhaseMeter:
    """Most bytes allocated in each phase of a block beyond those allocated before it.

    On CUDA the caching allocator's counters are read where a phase begins and ends, which waits
    for nothing. On the CPU torch's profiler has every allocation with its time.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0
        self.peaks: dict[str, int] = {}

    @contextmanager
    def measuring(self) -> Iterator[PhaseMeter]:
        """Measure the block; `peaks` has the result afterwards."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            yield self
            self._take(REST)
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            yield self
        assert profile.profiler is not None and profile.profiler.kineto_results is not None
        self.peaks = _peaks_by_phase(profile.profiler.kineto_results.events())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block as a phase; phases do not nest."""
        if self._device.type == "cuda":
            self._take(REST)
            yield
            self._take(name)
            return
        with torch.profiler.record_function(_MARK + name):
            yield

    def _take(self, name: str) -> None:
        peak = torch.cuda.max_memory_allocated(self._device) - self._before
        self.peaks[name] = max(peak, self.peaks.get(name, 0))
        torch.cuda.reset_peak_memory_stats(self._device)


def _peaks_by_phase(events: list[Any]) -> dict[str, int]:
    """Highest running total of the allocations that fall into each phase's time."""
    marks = sorted(
        (event.start_ns(), event.start_ns() + event.duration_ns(), event.name()[len(_MARK) :])
        for event in events
        if event.name().startswith(_MARK)
    )
    peaks: dict[str, int] = {}
    held = position = 0
    allocations = (event for event in events if event.name() == "[memory]")
    for event in sorted(allocations, key=lambda event: event.start_ns()):
        while position < len(marks) and marks[position][1] < event.start_ns():
            # What was there when the phase ended counts even if nothing was allocated in it.
            peaks[marks[position][2]] = max(held, peaks.get(marks[position][2], 0))
            position += 1
        is_inside = position < len(marks) and marks[position][0] <= event.start_ns()
        name = marks[position][2] if is_inside else REST
        if is_inside:
            peaks[name] = max(held, peaks.get(name, 0))
        held += event.nbytes()
        peaks[name] = max(held, peaks.get(name, 0))
    return peaks


@contextmanager
def phases_of(objective: BridgingObjective, meter: PhaseMeter) -> Iterator[None]:
    """Let every phase of an objective's forward report to a meter."""
    if isinstance(objective, SharedObjective):
        names: dict[str, Callable[..., str]] = {
            "_adapter_pass": lambda *inputs: ADAPTER,
            "_a2r": lambda cutoff, *rest: f"bridge a2r({cutoff})",
            "_r2a": lambda cutoff, *rest: f"bridge r2a({cutoff})",
            "_distances": lambda *inputs: HEAD,
        }
        places: list[tuple[Any, str, Callable[..., str]]] = [
            (objective, method, name) for method, name in names.items()
        ]
        places.append((objective._reference, "run", lambda *inputs: REFERENCE))
    elif isinstance(objective, PlainObjective):
        models = {id(objective.reference_stream): REFERENCE, id(objective.adapter_stream): ADAPTER}
        places = [
            (plain, "_logits", lambda model, *rest: models.get(id(model), "bridge")),
            (plain.losses, "kl_sum", lambda *inputs: HEAD),
            (plain.losses, "lm_sum", lambda *inputs: HEAD),
        ]
    else:
        raise TypeError(f"{type(objective).__name__} has no known phases")
    patches = [
        mock.patch.object(place, method, _reporting(getattr(place, method), name, meter))
        for place, method, name in places
    ]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def _reporting(
    call: Callable[..., Any], name: Callable[..., str], meter: PhaseMeter
) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        with meter.phase(name(*arguments)):
            return call(*arguments)

    return run


def measure_phases(
    objective: BridgingObjective, batch: dict[str, Tensor], cutoff: int, device: torch.device
) -> dict[str, int]:
    """Peak bytes of every phase of one optimizer step, in the order in which they first ran.

    Args:
        objective: plain or shared; its adapters are moved by a learning rate of 0.
        batch: arguments of the objective beside the cutoffs.
        cutoff: of both bridges.
        device: of everything.
    """
    parameters = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0)
    meter = PhaseMeter(device)

    def step() -> None:
        loss = objective(**batch, cutoffs=[cutoff]).loss
        with meter.phase(BACKWARD):
            loss.backward()
            del loss
        with meter.phase(OPTIMIZER):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    meter.peaks.clear()
    with phases_of(objective, meter), meter.measuring():
        step()
    return meter.peaks


def main() -> None:
    """Measure the plain and the shared step of every case, print a table, write JSON."""
    from benchmarks.step import StepBench

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="results file to write")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", choices=STEP_CASES, help="default: the set of the device")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    options = parser.parse_args()
    if options.out and options.out.exists():
        parser.error(f"--out: {options.out} exists; give another name or remove it")
    machine: Machine = find_machine(torch.device(options.device), None)
    rows: list[dict[str, Any]] = []
    for case in STEP_CASES[options.cases or options.device]:
        if options.only in case.name:
            rows += StepBench(case, ["plain", "shared"], machine).phase_rows()
    for row in rows:
        print(f"{row['case']}, {row['variant']}")
        for name, peak in row["phase_peak_bytes"].items():
            print(f"  {name:22} {peak / 2**20:10.1f} MiB")
    if options.out:
        write_results(options.out, rows)


if __name__ == "__main__":
    main()

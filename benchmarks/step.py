"""Whole training steps against the published code's: tokens per second, passes, memory.

    python -m benchmarks.step --out benchmarks/results/NAME.json

One step is forward and backward of the objective on one batch, over cutoffs that stand for the
uniform distribution; all variants run in one process and take turns at every cutoff. Losses and
gradients are compared first and nothing is timed when they differ. Layer passes are counted by
hooks in the timed steps.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.measure import Machine
from benchmarks.memory import peak_bytes
from benchmarks.phases import measure_phases
from benchmarks.results import find_machine, write_results
from benchmarks.settings import Objective
from benchmarks.step_cases import STEP_CASES, StepCase, make_batch, make_sparse, make_streams
from benchmarks.step_variants import VARIANTS, LayerPasses, Variant, adapters_of
from benchmarks.timing import spread, stopwatch
from tca_fast.bridging.objective import StepOutput
from tca_fast.bridging.streams import Streams

if TYPE_CHECKING:
    from rich.console import Console

BASELINE = "published"
# Relative, of loss and gradients in norm: what accumulates over two models' layers.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
# What `tca-fast plan` needs of a model to know the operations of the measured step.
_SHAPE = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)
_PASSES = [f"{s} {d}" for d in ("forward", "backward") for s in ("adapter", "reference")]


class StepBench:
    """The variants of one case, on the same weights and batch."""

    def __init__(
        self,
        case: StepCase,
        names: Sequence[str],
        machine: Machine,
        streams: Streams | None = None,
    ) -> None:
        self.case, self.names, self.machine = case, names, machine
        if streams is None:
            streams = make_streams(case, machine.device, machine.dtype)
        self.streams = streams
        self.batch = make_batch(case, self.streams, machine.device)
        make_sparse(case, self.streams, self.batch)
        self.parameters = list(self.streams.adapted.parameters())
        self.objectives = {}
        for name in names:
            variant = VARIANTS[name]
            objective: Any = Objective(gradient_checkpointing=variant.is_checkpointed)
            self.objectives[name] = variant.step(self.streams, objective)

    def forward(self, name: str, cutoff: int) -> StepOutput:
        """The objective, with its graph."""
        with adapters_of(VARIANTS[name], self.streams):
            return self.objectives[name](**self.batch, cutoffs=[cutoff])

    def step(self, name: str, cutoff: int) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """Metrics and gradients of one step."""
        output = self.forward(name, cutoff)
        return output.metrics, torch.autograd.grad(output.loss, self.parameters)

    def check(self) -> float:
        """Compare all variants at a cutoff in the middle; returns the measured L0.

        Raises:
            SystemExit: they differ.
        """
        allowed = _TOLERANCE[self.machine.dtype]
        cutoff = self.streams.num_layers // 2
        metrics, expected = self.step(self.names[0], cutoff)
        for name in self.names[1:]:
            ours, gradients = self.step(name, cutoff)
            errors = [abs(ours["loss"] / metrics["loss"] - 1)]
            errors += [(a - b).norm() / b.norm() for a, b in zip(gradients, expected, strict=True)]
            if (worst := float(max(errors))) > allowed:
                raise SystemExit(f"{self.case.name}: {name} is off by {worst:.1e}; nothing timed")
        l0 = float(metrics["l0"])
        if abs(l0 / self.case.l0 - 1) > 0.2:
            raise SystemExit(f"{self.case.name}: L0 is {l0:.2f}, not {self.case.l0}; nothing timed")
        return l0

    def rows(self, cutoffs: Sequence[int]) -> list[dict[str, Any]]:
        """Check, time and count; one row per variant."""
        l0 = self.check()
        milliseconds: dict[str, list[float]] = {name: [] for name in self.names}
        passes: dict[str, Counter[str]] = {name: Counter() for name in self.names}
        for number, cutoff in enumerate(cutoffs):
            turn = number % len(self.names)
            for name in [*self.names[turn:], *self.names[:turn]]:
                with LayerPasses(self.streams) as counted:
                    elapsed = stopwatch(self.machine.device, self.step, name, cutoff)
                milliseconds[name].append(elapsed)
                passes[name] += counted.counts
        found = [self._row(name, milliseconds, passes[name], l0) for name in self.names]
        return [{**row, "cutoffs": list(cutoffs)} for row in found]

    def _row(
        self, name: str, milliseconds: dict[str, list[float]], passes: Counter[str], l0: float
    ) -> dict[str, Any]:
        case, ours = self.case, milliseconds[name]
        middle, low, high = spread(ours)
        cutoff = self.streams.num_layers // 2
        baseline = milliseconds.get(BASELINE)
        return {
            **self._identity("step", name, l0),
            "steps": len(ours),
            "median_ms": middle,
            "low_ms": low,
            "high_ms": high,
            "mean_ms": fmean(ours),
            "tokens_per_s": case.tokens / fmean(ours) * 1e3,
            # At the same cutoff, one after the other; then the median over cutoffs.
            "speedup": None
            if baseline is None
            else median(b / o for b, o in zip(baseline, ours, strict=True)),
            "throughput_ratio": None if baseline is None else fmean(baseline) / fmean(ours),
            "passes": {kind: passes[kind] / len(ours) for kind in _PASSES},
            "forward_peak_bytes": peak_bytes(self.machine.device, self.forward, name, cutoff),
            "peak_bytes": peak_bytes(self.machine.device, self.step, name, cutoff),
            "host_waits": host_waits(self.machine.device, lambda: self.step(name, cutoff)),
        }

    def phase_rows(self) -> list[dict[str, Any]]:
        """Peak memory of every phase at the cutoff in the middle; variants with known phases."""
        l0, cutoff = self.check(), self.streams.num_layers // 2
        rows = []
        for name in self.names:
            with adapters_of(VARIANTS[name], self.streams):
                objective, batch = self.objectives[name], self.batch
                peaks = measure_phases(objective, batch, cutoff, self.machine.device)
            row = self._identity("memory of a step", name, l0)
            state = sum(3 * p.numel() * p.element_size() for p in self.parameters)
            rows.append({**row, "phase_peak_bytes": peaks, "gradient_and_optimizer_bytes": state})
        return rows

    def _identity(self, operation: str, name: str, l0: float) -> dict[str, Any]:
        variant: Variant = VARIANTS[name]
        return {
            "operation": operation,
            "case": self.case.name,
            "variant": name,
            "tokens": self.case.tokens,
            "width": self.streams.reference.config.hidden_size,
            "features": self.case.features,
            "layers": self.streams.num_layers,
            "sequences": self.case.sequences,
            "shape": {name: getattr(self.streams.reference.config, name) for name in _SHAPE},
            "l0": self.case.l0,
            "rates": "power",
            "k": None,
            **self.machine.facts,
            "backend": "dense" if variant.is_dense else self.machine.backend_of("adapter"),
            "measured_l0": l0,
        }


def host_waits(device: torch.device, call: Callable[[], object]) -> int | None:
    """How often the host waited for the device during a call; None on a CPU, which is both."""
    if device.type == "cpu":
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def uniform_cutoffs(num_layers: int, number: int | None) -> list[int]:
    """All L+1 cutoffs, or the middles of as many equal parts of them."""
    if number is None or number > num_layers:
        return list(range(num_layers + 1))
    return [int((i + 0.5) * (num_layers + 1) / number) for i in range(number)]


def print_rows(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """One table for a case."""
    from rich import box
    from rich.table import Table

    first = rows[0]
    title = f"{first['case']}: T {first['tokens']}, D {first['width']}, F {first['features']}"
    title += f", {first['layers']} layers, L0 {first['measured_l0']:.1f}, {first['steps']} cutoffs"
    table = Table(box=box.SIMPLE, title=title, title_justify="left")
    table.add_column("variant")
    for heading in ("median ms", "20-80 %", "tokens/s", "ratio", "speed-up"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("A fwd", "R fwd", "A bwd", "R bwd", "forward MiB", "peak MiB", "waits"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        ratios = (row["throughput_ratio"], row["speedup"])
        table.add_row(
            row["variant"],
            f"{row['median_ms']:.0f}",
            f"{row['low_ms']:.0f}-{row['high_ms']:.0f}",
            f"{row['tokens_per_s']:.0f}",
            *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
            *(f"{row['passes'][kind]:.2f}" for kind in _PASSES),
            f"{row['forward_peak_bytes'] / 2**20:.0f}",
            f"{row['peak_bytes'] / 2**20:.0f}",
            "" if row["host_waits"] is None else str(row["host_waits"]),
        )
    console.print(table)


def main() -> None:
    """Run the cases of the device, print a table for each, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="results file to write")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", choices=STEP_CASES, help="default: the set of the device")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[*VARIANTS])
    parser.add_argument("--cutoffs", type=int, help="how many; default: all L+1")
    options = parser.parse_args()
    from rich.console import Console

    from benchmarks.tables import WIDTH

    if options.out and options.out.exists():
        parser.error(f"--out: {options.out} exists; give another name or remove it")
    machine = find_machine(torch.device(options.device), None)
    console = Console(width=WIDTH, file=sys.stdout)
    rows: list[dict[str, Any]] = []
    for case in STEP_CASES[options.cases or options.device]:
        if options.only not in case.name:
            continue
        bench = StepBench(case, options.variants, machine)
        found = bench.rows(uniform_cutoffs(bench.streams.num_layers, options.cutoffs))
        print_rows(console, found)
        rows += found
        if options.out:  # after every case: the next one may not fit
            write_results(options.out, rows)


if __name__ == "__main__":
    main()

"""KL and LM loss with their gradient: whole logits against chunks of tokens.

    python -m benchmarks.losses --out benchmarks/results/NAME.json

From residual states of teacher and student through one frozen head to the gradient with respect to
the student's states. Values and gradients are compared first; nothing is timed when they differ.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.measure import Machine
from benchmarks.memory import peak_bytes
from benchmarks.results import find_machine, write_results
from benchmarks.timing import Variant, interleaved, spread
from tca_fast import losses
from tca_fast.bridging.head import Readout, distances

if TYPE_CHECKING:
    from rich.console import Console

# Relative, in norm: float32's sums over V, bfloat16's rounding of the logits.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class LossCase:
    """Tokens T of width D before a vocabulary of V."""

    name: str
    tokens: int
    width: int
    vocab_size: int


LOSS_CASES = {
    # A narrow model: the products with the head are the same in both variants.
    "cpu": [LossCase("Qwen2 vocabulary, narrow", 2048, 256, 152_064)],
    "cuda": [LossCase(f"7B, {T} tokens", T, 3584, 152_064) for T in (2048, 8192, 10_000)],
    "tiny": [LossCase("tiny", 64, 8, 100)],
    "rehearsal": [LossCase("rehearsal", 64, 8, 100)],
}


class LinearHead:
    """A frozen output embedding."""

    def __init__(self, weight_VD: Tensor) -> None:
        self.weight = weight_VD
        self.vocab_size = weight_VD.shape[0]

    def logits(self, states_TD: Tensor) -> Tensor:
        """[T, V]."""
        return states_TD @ self.weight.T


class LossBench:
    """Both variants of one case, on the same states."""

    def __init__(self, case: LossCase, machine: Machine) -> None:
        self.case, self.machine = case, machine
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            values = torch.randn(shape, generator=generator)
            return values.to(machine.device, machine.dtype)

        head = LinearHead(normal(case.vocab_size, case.width) * case.width**-0.5)
        states = normal(1, case.tokens, case.width)
        self.teacher = Readout(states, head)
        # Far enough from the teacher for a KL that rounding does not decide.
        self.student = Readout((states + 0.3 * normal(*states.shape)).requires_grad_(), head)
        labels = torch.randint(case.vocab_size, (1, case.tokens), generator=generator)
        self.labels = labels.to(machine.device)

    def whole(self) -> list[Tensor]:
        """KL, LM loss and gradient by logits [T, V]."""
        with torch.no_grad():
            reference = self.teacher.head.logits(self.teacher.states)
        logits = self.student.head.logits(self.student.states)
        kl = losses.kl_sum(reference, logits, self.labels)
        lm = losses.lm_sum(logits.detach(), self.labels)
        return [kl.detach(), lm, *torch.autograd.grad(kl, self.student.states)]

    def chunked(self) -> list[Tensor]:
        """The same by `head.distances`."""
        found = distances(self.teacher, [self.student], self.labels)
        gradient = torch.autograd.grad(found.kl[0], self.student.states)
        return [found.kl.detach()[0], found.lm[0], *gradient]

    def rows(self, rounds: int) -> list[dict[str, Any]]:
        """Check, time and measure; one row per variant.

        Raises:
            SystemExit: the variants differ.
        """
        calls = {"whole logits": self.whole, "chunks": self.chunked}
        for ours, theirs in zip(self.chunked(), self.whole(), strict=True):
            error = float((ours - theirs).norm() / theirs.norm())
            if error > _TOLERANCE[self.machine.dtype]:
                raise SystemExit(f"{self.case.name}: chunks are off by {error:.1e}; nothing timed")
        peaks = {name: peak_bytes(self.machine.device, call) for name, call in calls.items()}
        variants = {name: Variant(lambda: None, _ignoring(call)) for name, call in calls.items()}
        milliseconds = interleaved(variants, self.machine.device, rounds, warmup=0)
        baseline = spread(milliseconds["whole logits"])[0]
        rows = []
        for name, times in milliseconds.items():
            middle, low, high = spread(times)
            rows.append(
                {
                    "operation": "KL and LM",
                    "case": self.case.name,
                    "variant": name,
                    "tokens": self.case.tokens,
                    "width": self.case.width,
                    "features": 0,
                    "vocab_size": self.case.vocab_size,
                    "l0": 0,
                    "rates": "none",
                    "k": None,
                    **self.machine.facts,
                    "backend": "torch",
                    "median_ms": middle,
                    "low_ms": low,
                    "high_ms": high,
                    "speedup": baseline / middle,
                    "peak_bytes": peaks[name],
                    "peak_share": peaks[name] / peaks["whole logits"],
                }
            )
        return rows


def _ignoring(call: Any) -> Any:
    return lambda nothing: call()


def print_rows(console: Console, rows: list[dict[str, Any]]) -> None:
    """One table for a case."""
    from rich import box
    from rich.table import Table

    first = rows[0]
    title = f"{first['operation']}, {first['case']}: T {first['tokens']}, D {first['width']}, "
    title += f"V {first['vocab_size']}, {first['dtype']}"
    table = Table(box=box.SIMPLE, title=title, title_justify="left")
    table.add_column("variant")
    for heading in ("median ms", "20-80 %", "speed-up", "peak MiB", "share of peak"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["variant"],
            f"{row['median_ms']:.0f}",
            f"{row['low_ms']:.0f}-{row['high_ms']:.0f}",
            f"{row['speedup']:.2f}",
            f"{row['peak_bytes'] / 2**20:.1f}",
            f"{row['peak_share']:.2%}",
        )
    console.print(table)


def main() -> None:
    """Run the cases of the device, print a table for each, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="results file to write")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", choices=LOSS_CASES, help="default: the set of the device")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    from rich.console import Console

    from benchmarks.tables import WIDTH

    if options.out and options.out.exists():
        parser.error(f"--out: {options.out} exists; give another name or remove it")
    machine = find_machine(torch.device(options.device), None)
    rows: list[dict[str, Any]] = []
    for case in LOSS_CASES[options.cases or options.device]:
        found = LossBench(case, machine).rows(options.rounds)
        print_rows(Console(width=WIDTH, file=sys.stdout), found)
        rows += found
    if options.out:
        write_results(options.out, rows)


if __name__ == "__main__":
    main()

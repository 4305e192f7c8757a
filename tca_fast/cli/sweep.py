"""`tca-fast sweep`: faithfulness against sparsity over L1 weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from tca_fast.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tca_fast.config import TrainConfig
    from tca_fast.sweep.runs import Point

_WEIGHTS = "0.001,0.003,0.01,0.03,0.1"


def sweep(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings that win over the file's."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file; by default the miniature's recipe.")
    ] = None,
    l1_weights: Annotated[str, typer.Option(help="Weights, divided by commas.")] = _WEIGHTS,
    out: Annotated[Path, typer.Option(help="Directory of the runs and the curve.")] = Path(
        "runs/sweep"
    ),
    num_samples: Annotated[
        int, typer.Option(min=1, help="Held-out sequences of each measurement.")
    ] = 400,
) -> None:
    """Train once for each L1 weight and plot KL and NMSE against L0; status 1 if L0 ever rises.

    The same command goes on after an interruption: what is trained or measured is not done again.
    """
    from tca_fast.sweep.plot import write_curve
    from tca_fast.sweep.runs import Interrupted, rising, run_sweep

    console = Console(highlight=False)
    configs = [_config(config, out, weight, overrides or []) for weight in _weights(l1_weights)]
    total, done = len(configs), 0

    def told(run: TrainConfig, what: str) -> None:
        nonlocal done
        done += 1
        console.print(f"{done} of {total}: l1_weight {run.objective.l1_weight:g} {what}")

    try:
        points = run_sweep(configs, num_samples=num_samples, told=told)
    except Interrupted:
        console.print("Interrupted; the same command goes on from here.")
        raise typer.Exit(130) from None
    _show(console, points, configs[0].adapter.num_features)
    for path in write_curve(points, out):
        console.print(f"wrote {path}", soft_wrap=True)
    pairs = rising(points)
    for low, high in pairs:
        console.print(
            f"L0 does not fall from l1_weight {low.l1_weight:g} ({low.l0:.2f}) to "
            f"{high.l1_weight:g} ({high.l0:.2f}); train longer (run.max_steps)",
            style="red",
        )
    if pairs:
        raise typer.Exit(1)


def _weights(text: str) -> list[float]:
    try:
        weights = sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise UserError(
            f"--l1-weights: {text!r} is not numbers divided by commas; write {_WEIGHTS}"
        ) from None
    return weights


def _config(path: Path | None, out: Path, weight: float, overrides: Sequence[str]) -> TrainConfig:
    from tca_fast.cli.demo import miniature_config, recipe_path
    from tca_fast.config import load_config

    directory = out / f"l1_{weight:g}"
    own = [f"objective.l1_weight={weight}"]
    if path is None:
        return miniature_config(recipe_path(), directory, [*overrides, *own])
    return load_config(path, [*overrides, *own, f"run.output_dir={directory}"])


def _show(console: Console, points: Sequence[Point], num_features: int) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("L1 weight", "L0", "% of F", "KL", "NMSE", "steps"):
        table.add_column(heading, justify="right")
    for point in points:
        table.add_row(
            f"{point.l1_weight:g}",
            f"{point.l0:.2f}",
            f"{100 * point.l0 / num_features:.2f}",
            f"{point.kl:.4f}",
            f"{point.nmse:.4f}",
            f"{point.steps:,}",
        )
    console.print(table)

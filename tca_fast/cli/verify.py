"""`tca-fast verify DIR`: recompute a golden folder and print every comparison."""

from __future__ import annotations

import math
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from tca_fast.bridging.golden import Check

# A report is also read in a pipe or a CI log, where a table cut to 80 columns loses its numbers.
_WIDTH = 200


def verify(
    directory: Annotated[Path, typer.Argument(help="Golden folder.", show_default=False)],
    step: Annotated[str, typer.Option(help="Form of the training step to verify.")] = "plain",
    only_failures: Annotated[
        bool, typer.Option("--only-failures", help="Leave passing checks out of the table.")
    ] = False,
) -> None:
    """Compare every quantity of a golden folder; exit status 1 on any miss.

    Raises:
        UserError: a missing or invalid folder, or an unknown step.
    """
    from transformers.utils import logging

    from tca_fast.bridging import golden
    from tca_fast.training.schedule import learning_rate

    logging.disable_progress_bar()
    checks = golden.verify(directory, step=step, learning_rate=learning_rate)
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    compared = [check for check in checks if check.ok is not None]
    shown = [check for check in compared if not (only_failures and check.ok)]
    if shown:
        console.print(_comparison_table(shown, f"{directory}, {step} step"))
    unchecked = [check for check in checks if check.ok is None]
    if unchecked:
        console.print(_unchecked_table(unchecked))
    missed = sum(not check.ok for check in compared)
    console.print(_summary(compared, unchecked, missed), style="red" if missed else "green")
    raise typer.Exit(1 if missed else 0)


def _comparison_table(checks: list[Check], title: str) -> Table:
    table = Table(box=box.SIMPLE, title=title, title_justify="left")
    table.add_column("name", overflow="fold")
    for heading in ("ours", "golden"):
        table.add_column(heading, justify="right", overflow="fold")
    for heading in ("error", "tolerance"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("note", overflow="fold", max_width=50)
    for check in checks:
        table.add_row(
            Text(check.name),
            Text(_show(check.ours)),
            Text(_show(check.golden)),
            _show_error(check.error),
            _show_error(check.tolerance),
            Text("ok" if check.ok else "MISS", style="green" if check.ok else "bold red"),
            Text(check.note),
        )
    return table


def _unchecked_table(checks: list[Check]) -> Table:
    """One row per reason and block, naming every entry."""
    table = Table(box=box.SIMPLE, title="not checked", title_justify="left")
    table.add_column("name", overflow="fold", ratio=2)
    table.add_column("reason", overflow="fold", ratio=1)
    for (block, reason), group in groupby(checks, key=lambda c: (_block(c.name), c.note)):
        names = [check.name.removeprefix(block) for check in group]
        listed = f"{block}{{{', '.join(names)}}}" if len(names) > 1 else f"{block}{names[0]}"
        table.add_row(Text(listed), Text(reason))
    return table


def _block(name: str) -> str:
    head, dot, _ = name.partition(".")
    return head + dot if dot and not name.startswith(("relp.safetensors", "adapter/")) else ""


def _show(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.8g}"


def _show_error(error: float) -> str:
    return "" if math.isnan(error) else f"{error:.1e}"


def _summary(compared: list[Check], unchecked: list[Check], missed: int) -> Text:
    def worst(gradients: bool) -> str:
        relative = [
            check.error
            for check in compared
            if check.golden and not isinstance(check.golden, str)
            if ("grad" in check.name) == gradients
        ]
        return f"{max(relative, default=0.0):.1e}"

    return Text(
        f"{len(compared) - missed} of {len(compared)} checks passed, {missed} missed, "
        f"{len(unchecked)} not checked; worst relative error: values {worst(False)}, "
        f"gradients {worst(True)}"
    )

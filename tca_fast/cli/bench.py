"""`tca-fast bench compare OLD NEW`: what changed between two files of benchmark results.

Reads the JSON that the benchmark suites write; the suites themselves are no part of the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tca_fast.errors import UserError
from tca_fast.results import IDENTITY, TIMES, Row, is_timed, read_results

# A comparison is also read in a pipe or a CI log, where 80 columns would cut the numbers.
_WIDTH = 200

bench = typer.Typer(
    help="Benchmark results; `make bench` in the repository measures them.", no_args_is_help=True
)


@dataclass(frozen=True, slots=True)
class Change:
    """One measurement before and after.

    Attributes:
        old, new: rows of the two files.
    """

    old: Row
    new: Row

    @property
    def ratio(self) -> float:
        """New median time over old; below 1 is faster."""
        return self.new["median_ms"] / self.old["median_ms"]

    @property
    def verdict(self) -> str:
        """ "faster" or "slower" where the spreads do not overlap, else empty."""
        if self.new["high_ms"] < self.old["low_ms"]:
            return "faster"
        if self.new["low_ms"] > self.old["high_ms"]:
            return "slower"
        return ""


def changes(old: Sequence[Row], new: Sequence[Row]) -> tuple[list[Change], list[Row], list[Row]]:
    """Measurements that both files have, in the order of the new one.

    Returns:
        Changes; rows that only the old file has; rows that only the new one has. Absent variants
        count as not measured.
    """
    before, after = _by_identity(old), _by_identity(new)
    return (
        [Change(before[key], row) for key, row in after.items() if key in before],
        [row for key, row in before.items() if key not in after],
        [row for key, row in after.items() if key not in before],
    )


@bench.command("compare")
def compare(
    old: Annotated[Path, typer.Argument(help="Earlier results file.", show_default=False)],
    new: Annotated[Path, typer.Argument(help="Later results file.", show_default=False)],
) -> None:
    """Show how times changed; marks those whose 20-80 % ranges do not overlap.

    Raises:
        UserError: a missing or foreign file, or two files with nothing in common.
    """
    old_rows, new_rows = read_results(old), read_results(new)
    found, only_old, only_new = changes(old_rows, new_rows)
    if not found:
        raise UserError(
            f"results: {old} and {new} have no measurement in common; compare files of the same "
            "cases and dtype"
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    for field in ("device", "versions"):
        values = [_distinct(rows, field) for rows in (old_rows, new_rows)]
        if values[0] != values[1]:
            console.print(
                Text(f"warning: {field} differs: {values[0]} before, {values[1]} now"),
                style="yellow",
            )
    console.print(_table(found, _distinct(old_rows, "commit"), _distinct(new_rows, "commit")))
    for path, rows in ((old, only_old), (new, only_new)):
        for line in _names(rows):
            console.print(Text(f"only in {path}: {line}"))
    verdicts = [change.verdict for change in found]
    console.print(
        f"{len(found)} compared: {verdicts.count('faster')} faster, "
        f"{verdicts.count('slower')} slower, {verdicts.count('')} within the spread"
    )


def _by_identity(rows: Sequence[Row]) -> dict[tuple[Any, ...], Row]:
    measured = [row for row in rows if is_timed(row)]
    return {tuple(row[field] for field in IDENTITY): row for row in measured}


def _names(rows: Sequence[Row]) -> list[str]:
    """One line for each operation and case, naming the variants."""
    variants: dict[str, list[str]] = {}
    for row in rows:
        variants.setdefault(f"{row['operation']}, {row['case']}", []).append(row["variant"])
    return [f"{measured} ({', '.join(names)})" for measured, names in variants.items()]


def _distinct(rows: Sequence[Row], field: str) -> str:
    """All values of one field, usually one."""
    values = {_show(row[field]): None for row in rows}
    return "; ".join(values)


def _show(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    return str(value)


def _table(found: Sequence[Change], old_commit: str, new_commit: str) -> Table:
    table = Table(
        box=box.SIMPLE, title=f"{old_commit} → {new_commit}, milliseconds", title_justify="left"
    )
    for heading in ("operation", "case", "variant", "backend"):
        table.add_column(heading, overflow="fold")
    for heading in ("before", "20-80 %", "now", "20-80 %", "change"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for change in found:
        old, new = change.old, change.new
        backend = str(new["backend"])
        if old["backend"] != new["backend"]:
            backend = f"{old['backend']} → {backend}"
        table.add_row(
            *(Text(str(new[field])) for field in ("operation", "case", "variant")),
            Text(backend),
            *(text for row in (old, new) for text in _time(row)),
            f"{change.ratio - 1:+.1%}",
            Text(change.verdict, style="green" if change.verdict == "faster" else "bold red"),
        )
    return table


def _time(row: Row) -> tuple[str, str]:
    """Median and spread, to four digits."""
    median, low, high = (f"{row[field]:.4g}" for field in TIMES)
    return median, f"{low}-{high}"

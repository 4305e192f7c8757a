"""Rows of a run, printed."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

# Of the printed tables.
WIDTH = 170


def print_results(console: Console, rows: Iterable[dict[str, Any]]) -> None:
    """One table for each operation and case; columns as in README.md."""
    for (operation, case), group in groupby(rows, key=lambda r: (r["operation"], r["case"])):
        console.print(_table(f"{operation}, {case}", list(group)))


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    first = rows[0]
    shape = f"T {first['tokens']}, D {first['width']}, F {first['features']}, {first['dtype']}"
    table = Table(box=box.SIMPLE, title=f"{title} ({shape})", title_justify="left")
    table.add_column("variant")
    table.add_column("backend")
    for heading in ("ms", "20-80 %", "/ product", "speed-up", "of floor"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("MB moved", "GB/s", "peak MiB", "saved MiB", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    absent = [f"{row['variant']}: absent, {row['absent']}" for row in rows if "absent" in row]
    if absent:
        table.caption, table.caption_justify = "; ".join(absent), "left"
    for row in rows:
        if "absent" in row:
            continue
        table.add_row(
            row["variant"],
            row["backend"],
            f"{row['median_ms']:.4g}",
            f"{row['low_ms']:.4g}-{row['high_ms']:.4g}",
            f"{row['over_product']:.2f}",
            _optional(row["speedup"], "{:.2f}"),
            f"{row['of_floor']:.0%}",
            f"{row['bytes'] * 1e-6:.1f}",
            f"{row['gb_per_s']:.1f} of {row['bandwidth_gb_per_s']:.1f}",
            f"{row['peak_bytes'] / 2**20:.2f}",
            _optional(row["saved_bytes"], "{:.2f}", 2**-20),
            _optional(row["error"], "{:.0e}"),
        )
    return table


def _optional(value: float | None, form: str, scale: float = 1.0) -> str:
    return "" if value is None else form.format(value * scale)

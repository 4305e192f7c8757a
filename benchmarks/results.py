"""Rows of a run: what they say about the machine, how they are stored and printed."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import tca_fast
from benchmarks.measure import Machine
from benchmarks.timing import copy_bandwidth
from tca_fast.cli.bench import FORMAT, read_results
from tca_fast.cli.env import describe_machine
from tca_fast.durable import Replacement

# What is trained with there: float32 on a CPU, bfloat16 on a GPU.
_DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
# Of the printed tables.
WIDTH = 170


def find_machine(device: torch.device, backend: str | None) -> Machine:
    """Look at a device and measure its copy bandwidth."""
    dtype = _DTYPES[device.type]
    facts = {
        "device": _describe(device),
        "commit": _commit(),
        "versions": _versions(device),
        "dtype": str(dtype).removeprefix("torch."),
    }
    return Machine(device, dtype, copy_bandwidth(device), facts, backend)


def write_results(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Store rows whole or not at all, read back before anything is replaced.

    Raises:
        UserError: the file cannot be written.
    """
    content = {"format": FORMAT, "rows": list(rows)}

    def write(temporary: Path) -> None:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        if read_results(temporary) != content["rows"]:
            raise RuntimeError(f"{path}: what was written is not what is read back")

    with Replacement(path.parent) as files:
        files.write(path.name, write)
        files.commit()


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


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    machine = describe_machine()
    return f"{machine['processor']}, {machine['cores']} cores, {torch.get_num_threads()} threads"


def _versions(device: torch.device) -> dict[str, str]:
    versions = {
        "tca_fast": tca_fast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        versions["CUDA"] = str(torch.version.cuda)
    return versions


def _commit() -> str:
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return described.stdout.strip() or "unknown"

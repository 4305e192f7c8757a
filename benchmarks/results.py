"""Rows of a run: what they say about the machine, and how they are stored."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import tca_fast
from benchmarks.measure import Machine
from benchmarks.timing import copy_bandwidth
from tca_fast.durable import Replacement
from tca_fast.machine import describe_machine
from tca_fast.results import FORMAT, read_results

# What is trained with there: float32 on a CPU, bfloat16 on a GPU.
_DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}


def find_machine(device: torch.device, backend: str | None) -> Machine:
    """Look at a device and measure its copy bandwidth."""
    dtype = _DTYPES[device.type]
    facts = {
        "device": describe_device(device),
        "commit": describe_commit(),
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


def describe_device(device: torch.device) -> str:
    """Name of a GPU; processor, cores and threads of a CPU."""
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


def describe_commit() -> str:
    """The commit, or what TCA_FAST_COMMIT says where the tree came without its history."""
    if given := os.environ.get("TCA_FAST_COMMIT"):
        return given
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        )
    except OSError:  # no git here
        return "unknown"
    return described.stdout.strip() or "unknown"

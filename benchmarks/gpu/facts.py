"""The device and the software, without which a figure is worth nothing."""

from __future__ import annotations

import importlib.util
import subprocess
import time
from importlib import metadata
from typing import Any

import torch

from benchmarks.results import describe_commit, describe_device
from tca_fast import registry, selection

_PACKAGES = ("torch", "triton", "numpy", "transformers", "pytest", "liger-kernel", "eai-sparsify")
_SMI = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw"


def facts(stage: str, device: torch.device) -> dict[str, Any]:
    """Everything that a reader must know of where a stage ran.

    A rehearsal on the CPU says so: its figures mean nothing.
    """
    found: dict[str, Any] = {
        "stage": stage,
        "device": describe_device(device),
        "device_type": device.type,
        "rehearsal": device.type == "cpu",
        "commit": describe_commit(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda,
        "backends": backends_of(device),
        "family": family_of(device),
        "clocks": [clocks()],
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["memory_bytes"] = properties.total_memory
        found["multiprocessors"] = properties.multi_processor_count
        found["driver"] = _smi("driver_version")
    return found


def clocks() -> dict[str, str]:
    """Clocks, temperature and power as the driver reports them now."""
    return {"at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), _SMI: _smi(_SMI)}


def family_of(device: torch.device) -> str:
    """Family whose table of backends the measurements of a device belong to."""
    return selection.family(device) or "cpu" if device.type == "cuda" else "cpu"


def backends_of(device: torch.device) -> list[str]:
    """Backends that are installed and can run on tensors of a device.

    On a CPU Triton's kernels run in its interpreter.
    """
    others = registry.cuda_backends()
    if device.type == "cuda":
        return list(others)
    has_extension = importlib.util.find_spec("tca_fast._C") is not None
    present = {"reference": True, "cpp": has_extension, "triton": "triton" in others}
    return [name for name, is_present in present.items() if is_present]


def _smi(fields: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return "no nvidia-smi here"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None

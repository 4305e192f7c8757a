"""`tca-fast env`: what is installed, what would run where, and what is missing."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata, util
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tca_fast.machine import describe_machine

REQUIRED = (
    "torch",
    "transformers",
    "safetensors",
    "huggingface-hub",
    "numpy",
    "pydantic",
    "PyYAML",
    "typer",
    "rich",
    "tqdm",
    "matplotlib",
)
OPTIONAL: Mapping[str, tuple[str, str, str]] = {
    # distribution: (module, purpose, command)
    "triton": ("triton", "Triton kernels on CUDA", "pip install triton"),
    "deepspeed": ("deepspeed", "more than one process, ZeRO", "pip install deepspeed"),
    "flash-attn": (
        "flash_attn",
        "pair.attn_implementation=flash_attention_2",
        "pip install flash-attn --no-build-isolation",
    ),
    "tensorboard": ("tensorboard", "run.report_to=[tensorboard]", "pip install tensorboard"),
    "wandb": ("wandb", "run.report_to=[wandb]", "pip install wandb"),
    "trackio": ("trackio", "run.report_to=[trackio]", "pip install trackio"),
}
_TABLE_STYLE: dict[str, Any] = {
    "box": box.SIMPLE,
    "title_justify": "left",
    "title_style": "bold",
}
EXTENSION = "tca_fast._C"


@dataclass(frozen=True, slots=True)
class Serving:
    """Which implementation of one operator runs on one kind of device, and why."""

    operator: str
    device: str
    backend: str
    reason: str


@dataclass(frozen=True, slots=True)
class Missing:
    """Something that is not there: what it would give, and the command that adds it."""

    name: str
    purpose: str
    command: str


@dataclass(frozen=True, slots=True)
class Environment:
    """Everything `tca-fast env` shows.

    Attributes:
        versions: installed version by distribution; None where it is absent.
        machine: operating system, processor, cores, memory, threads torch uses.
        devices: CUDA devices with memory and compute capability; empty without one.
        measured: the measurements that choose among backends on CUDA, or that there are none.
        operators: which backend serves each operator on each device.
        missing: what could be added, with the command.
    """

    versions: dict[str, str | None]
    machine: dict[str, str]
    devices: list[str]
    measured: str
    operators: list[Serving]
    missing: list[Missing]


def collect() -> Environment:
    """Look at this process's environment; nothing heavy is imported but torch."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("tca_fast", *REQUIRED, *OPTIONAL):
        versions[name] = _version(name)
    devices = _devices()
    from tca_fast import selection

    measured = selection.in_force(selection.family())
    operators, missing = _operators(), _missing(devices)
    return Environment(versions, describe_machine(), devices, measured, operators, missing)


def environment(device: str) -> dict[str, str]:
    """Machine, backend and versions, as reports of measured figures show them.

    Args:
        device: type of the device that was measured on, "cpu" or "cuda".
    """
    found, kind = collect(), device.upper()
    backends = sorted({serving.backend for serving in found.operators if serving.device == kind})
    versions = {name: version for name, version in found.versions.items() if version}
    return {
        **found.machine,
        "device": kind,
        "operator backend": ", ".join(backends),
        **versions,
    }


def env(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show versions, devices, operator backends, and what is missing."""
    found = collect()
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
        return
    console = Console()
    versions = {name: version or "absent" for name, version in found.versions.items()}
    console.print(_pairs("Versions", versions))
    devices = found.devices or ["none, computing on the CPU"]
    shown = {"CUDA devices": "\n".join(devices), "measured backends": found.measured}
    console.print(_pairs("Machine", {**found.machine, **shown}))
    operators = _table("Operators", "operator", "device", "backend", "why")
    for serving in found.operators:
        _add_row(operators, serving.operator, serving.device, serving.backend, serving.reason)
    console.print(operators)
    if found.missing:
        missing = _table("Not here", "what", "needed for", "command")
        for item in found.missing:
            _add_row(missing, item.name, item.purpose, item.command)
        console.print(missing)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _present(module: str) -> bool:
    try:
        return util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _devices() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    described = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        described.append(
            f"cuda:{index} {device.name}, {device.total_memory / 2**30:.0f} GiB, "
            f"compute capability {device.major}.{device.minor}"
        )
    return described


def _operators() -> list[Serving]:
    from tca_fast import ops

    return [
        Serving(operator, device, backend, reason)
        for operator, by_device in ops.serving().items()
        for device, (backend, reason) in by_device.items()
    ]


def _missing(devices: list[str]) -> list[Missing]:
    import torch

    missing = [
        Missing(name, purpose, command)
        for name, (module, purpose, command) in OPTIONAL.items()
        if not _present(module) and (name not in ("triton", "flash-attn") or devices)
    ]
    if not _present(EXTENSION):
        missing.append(
            Missing(
                EXTENSION,
                "sparse operators on the CPU",
                "pip install --no-build-isolation --force-reinstall --no-deps tca_fast "
                "(needs a C++ compiler)",
            )
        )
    if not devices:
        built = torch.version.cuda is not None
        missing.append(
            Missing(
                "CUDA device",
                "training at full size",
                "none: torch is built for CUDA but sees no device; check the driver (nvidia-smi)"
                if built
                else "with an NVIDIA GPU: pip install --force-reinstall torch",
            )
        )
    return missing


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, header_style="dim", **_TABLE_STYLE)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _pairs(title: str, pairs: Mapping[str, str]) -> Table:
    table = Table(title=title, show_header=False, **_TABLE_STYLE)
    for key, value in pairs.items():
        _add_row(table, key, value)
    return table


def _add_row(table: Table, *cells: str) -> None:
    # Text, because rich would read "[wandb]" as markup.
    table.add_row(*(Text(cell) for cell in cells))

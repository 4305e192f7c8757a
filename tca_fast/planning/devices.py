"""Devices a run may be planned for, and the rates that are assumed of them or were measured.

Memory, bandwidths and peaks are the vendor's data sheets; what of them is reached is an assumption
(three quarters of the peak in products, 70 % of a link) and printed as such.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from tca_fast.config import ObjectiveConfig
from tca_fast.errors import UserError
from tca_fast.planning.passes import layer_passes, layer_work, step_flops
from tca_fast.planning.shapes import ModelShape

GIB = 2**30
OF_PEAK, OF_LINK = 0.75, 0.7


@dataclass(frozen=True)
class Device:
    """One accelerator in a usual node.

    Attributes:
        name: as `--gpu` has it.
        memory_bytes: that a process finds free.
        memory_bandwidth: bytes per second.
        peak_flops: bfloat16 products, dense, per second.
        link_bandwidth: bytes per second and direction to another device of the node.
        network_bandwidth: bytes per second, direction and device to another node.
        per_node: devices in a node.
        product_name: part of the name by which the driver and results files call it.
    """

    name: str
    memory_bytes: int
    memory_bandwidth: float
    peak_flops: float
    link_bandwidth: float
    network_bandwidth: float
    per_node: int
    product_name: str


# peak, link, network, devices in a node.
_A100 = (312e12, 300e9, 25e9, 8)
_HOPPER = (989e12, 450e9, 50e9, 8)
DEVICES = {
    device.name: device
    for device in (
        Device("a100-40gb", 39 * GIB, 1.555e12, *_A100, "A100-SXM4-40GB"),
        Device("a100-80gb", 79 * GIB, 2.039e12, *_A100, "A100-SXM4-80GB"),
        Device("h100-80gb", 79 * GIB, 3.35e12, *_HOPPER, "H100 80GB"),
        Device("h200-141gb", 139 * GIB, 4.8e12, *_HOPPER, "H200"),
    )
}


@dataclass(frozen=True)
class Rate:
    """Floating-point operations per second that a whole step reaches, and how that is known."""

    flops: float
    source: str
    is_measured: bool


def find_device(name: str) -> Device:
    """A device by its name.

    Raises:
        UserError: unknown; names those that are known.
    """
    try:
        return DEVICES[name.lower()]
    except KeyError:
        raise UserError(f"--gpu: {name!r} is not known; choose {', '.join(DEVICES)}") from None


def step_rate(device: Device, results: Iterable[Path]) -> Rate:
    """The rate of a step: measured where a results file of `benchmarks.step` has this device.

    The largest measured case counts: its operations, by the arithmetic of `passes`, over its time.

    Args:
        device: to be looked for.
        results: JSON files of the benchmarks.
    """
    best: tuple[float, Rate] | None = None
    for path in results:
        for row in _rows(path):
            if row.get("operation") != "step" or row.get("variant") not in _SHARED:
                continue
            is_device = re.search(rf"\b{device.product_name}\b", str(row.get("device")))
            if not (is_device and row.get("mean_ms")):
                continue
            flops = _row_flops(row)
            if flops and (best is None or flops > best[0]):
                rate = flops / row["mean_ms"] * 1e3
                source = f"measured: {path.name}, {row['case']}, commit {row.get('commit', '?')}"
                best = flops, Rate(rate, source, is_measured=True)
    if best is not None:
        return best[1]
    source = f"assumed rates: {OF_PEAK:.0%} of {device.peak_flops / 1e12:.0f} Tflop/s"
    return Rate(OF_PEAK * device.peak_flops, source, is_measured=False)


# Variants of the step benchmark that are what training runs, and whether they recompute layers.
_SHARED = {"shared": False, "shared, checkpointed": True}


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8")).get("rows", [])
    except (OSError, ValueError, AttributeError):
        return []
    return [row for row in rows if isinstance(row, dict)]


def _row_flops(row: dict[str, Any]) -> float | None:
    """Operations of the mean of the measured steps; None where the row does not say what ran."""
    shape, cutoffs = row.get("shape"), row.get("cutoffs")
    if not (isinstance(shape, dict) and cutoffs):
        return None
    model = ModelShape.from_config(shape, "results file", "results")
    work = layer_work(
        model, row["features"], row["tokens"], row.get("sequences", 1), is_dense=False
    )
    recomputes = _SHARED[row["variant"]]
    steps = [ObjectiveConfig(cutoffs=[k], gradient_checkpointing=recomputes) for k in cutoffs]
    passes = [layer_passes(model.num_hidden_layers, step, shares_ends=True) for step in steps]
    return fmean(step_flops(step, work) for step in passes)

"""The stage that decides: which backend and regime is fastest where, and which block sizes.

Its crossovers become the device family's table (`benchmarks.gpu.table`), from which the package
chooses. Block sizes are tried one at a time; they are a proposal to a person, not to the package.

Shapes: T tokens, D model width, F features.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.cases import CASES, layer_inputs
from benchmarks.cases import Case as LayerCase
from benchmarks.correctness import with_gradients
from benchmarks.gpu.facts import backends_of, clocks
from benchmarks.gpu.record import Absent, Case, Clock, Record, run_cases
from benchmarks.gpu.table import write_table
from benchmarks.layers import BY_BACKEND, OURS
from benchmarks.operations import ARGUMENTS, LAYER
from benchmarks.timing import captured, repeated
from tca_fast import ops, registry

# T, D and F of the layers of 1.5B, 7B and 32B, and of 7B where it generates.
_FULL = [(8192, 3584, 8192), (8192, 1536, 8192), (8192, 5120, 16_384)]
_FULL += [(1, 3584, 8192), (32, 3584, 8192)]
_REHEARSAL = [(3, 8, 24), (1, 8, 24)]
# Active features of a token; the last two are shares of all features.
_L0 = [1.4, 8, 20, 40, 64, 100, 160]
_SHARES = [0.05, 0.5]

# Other settings of kernels.launch, each tried on its own: (function, what it returns instead).
TRIALS: dict[str, tuple[str, Callable[..., Any]]] = {
    "2 rows in flight": ("rows_in_flight", lambda block, warps: 2),
    "8 rows in flight": ("rows_in_flight", lambda block, warps: 8),
    "16 rows in flight": ("rows_in_flight", lambda block, warps: 16),
    "4 warps a row": ("row", lambda width: (_power(width), 4)),
    "16 warps a row": ("row", lambda width: (_power(width), 16)),
    "slices of 1024": ("slice_of_row", lambda width, tokens: (1024, 4)),
    "slices of 2048": ("slice_of_row", lambda width, tokens: (2048, 8)),
    "8 warps for 1024 features": ("features_of_row", lambda features: (1024, 8)),
    "4 warps for 512 features": ("features_of_row", lambda features: (512, 4)),
    "8 warps for all features": ("whole_feature_row", lambda features: (_power(features), 8)),
    "32 warps for all features": ("whole_feature_row", lambda features: (_power(features), 32)),
}


def run(record: Record, clock: Clock, device: torch.device, out: Path) -> None:
    """Measure what is not in the record yet; write the table as soon as the checks are there."""
    run_cases(cases(device), record, clock)
    record.facts["clocks"].append(clocks())
    record.write()
    print(write_table(out), flush=True)


def cases(device: torch.device) -> dict[str, Case]:
    """Every case of the stage by name, crossovers first."""
    is_full = device.type == "cuda"
    named: dict[str, Case] = {}
    for T, D, F in _FULL if is_full else _REHEARSAL:
        densities = [l0 / F for l0 in _L0] + _SHARES if is_full else [0.1, 0.5]
        for density in densities if T > 1 else densities[:3]:
            case = LayerCase(f"T {T}, D {D}, F {F}", T, D, F, density * F, _rates(density))
            for operator in ("adapter", "encode", "decode"):
                # What an encode costs does not depend on the density, but for what it packs.
                if operator == "adapter" or density == densities[0]:
                    name = f"{operator}: {case.name}, density {density:.2g}"
                    named[name] = partial(_point, operator, case, density, device)
    layers = [case for case in CASES["cuda"] if case.name.startswith("7B")]
    for case in layers if is_full else CASES["rehearsal"][:1]:
        trials: dict[str, Any] = {"as it is": ("", None), **TRIALS}
        for name in trials if is_full else list(trials)[:2]:
            trial = partial(_trial, case, *trials[name], device)
            named[f"blocks: {case.name}, {name}"] = trial
    return named


def _rates(density: float) -> str:
    """Uniform where features that are always on would exceed the mean."""
    return "uniform" if density > 0.2 else "power"


def _point(operator: str, case: LayerCase, density: float, device: torch.device) -> dict[str, Any]:
    """Time of one operator by every backend and regime."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tensors = with_gradients(layer_inputs(case, device, dtype))
    milliseconds: dict[str, dict[str, float]] = {}
    spreads: dict[str, Any] = {}
    for backend in backends_of(device):
        # The reference computes densely whatever is active, and waits for the device.
        regimes = ["sparse", "dense"] if operator == "adapter" else ["sparse"]
        if backend == "reference":
            regimes = ["dense"] if operator == "adapter" else []
        for regime in regimes:
            with ops.backend(backend):
                call = _call(operator, case, tensors, regime)
                if backend != "reference":
                    call = captured(call, device)
                found = repeated(call, device, 10 if device.type == "cuda" else 1, 1)
            milliseconds.setdefault(backend, {})[regime] = found["ms"]
            spreads[f"{backend}, {regime}"] = found
            print(f"    {backend:10} {regime:8} {found['ms']:.4f} ms", flush=True)
    point = {
        "operator": operator,
        "tokens": case.tokens,
        "width": case.width,
        "features": case.features,
        "density": density,
        "milliseconds": milliseconds,
    }
    return {"point": point, "spreads": spreads}


def _call(
    operator: str, case: LayerCase, tensors: dict[str, Tensor], regime: str
) -> Callable[[], object]:
    """Forward and backward of an operator; the forward alone for a few tokens."""
    given = [tensors[name] for name in ARGUMENTS]
    pairs = case.tokens * case.features
    expected = max(1, int(case.l0 * case.tokens))
    if operator == "adapter":
        capacity = pairs if regime == "dense" else min(pairs - 1, 2 * expected)
        run = registry.operator("adapter")

        def outputs() -> tuple[list[Tensor], list[Tensor]]:
            y, l1, *_ = run(*given, None, None, None, capacity)
            return [y, l1], [tensors["grad_y"], torch.ones_like(l1)]

    elif operator == "encode":
        x, W_enc, b_enc = (tensors[name] for name in ("x", "W_enc", "b_enc"))
        run = registry.operator("encode")
        given = [x, W_enc, b_enc]

        def outputs() -> tuple[list[Tensor], list[Tensor]]:
            value, *_ = run(x, W_enc, b_enc, None, pairs)
            return [value], [torch.ones_like(value)]

    else:
        with torch.no_grad():
            active = ops.encode(*(tensors[name] for name in ("x", "W_enc", "b_enc"))).trim()
        value = active.value.requires_grad_()
        given = [value, tensors["W_dec"]]
        run = registry.operator("decode")

        def outputs() -> tuple[list[Tensor], list[Tensor]]:
            y = run(active.row_ptr, active.feature, *given, tensors["b_dec"], None)
            return [y], [tensors["grad_y"]]

    def both() -> object:
        found, upstream = outputs()
        return found, torch.autograd.grad(found, given, upstream)

    def forward() -> object:
        with torch.no_grad():
            return outputs()

    return forward if case.tokens <= 32 else both


def _trial(
    case: LayerCase, function: str, value: Callable[..., Any] | None, device: torch.device
) -> dict[str, Any]:
    """The layer with one setting changed, or none."""
    if "triton" not in backends_of(device):
        raise Absent("triton is not installed")
    from tca_fast.kernels import launch

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tensors = with_gradients(layer_inputs(case, device, dtype))
    with ExitStack() as changed:
        if value is not None:
            changed.enter_context(mock.patch.object(launch, function, value))
        step = LAYER.variant(BY_BACKEND[f"{OURS}, triton"](case), tensors)
        return repeated(captured(step, device), device, 10 if device.type == "cuda" else 1, 1)


def _power(size: int) -> int:
    return 1 << (size - 1).bit_length()

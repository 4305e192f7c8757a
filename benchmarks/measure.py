"""One operation at one case: correctness first, then time, memory, and the share of the floor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks import work
from benchmarks.cases import Case, layer_inputs
from benchmarks.correctness import allowed_errors, exact_results, relative_errors, with_gradients
from benchmarks.layers import BY_BACKEND, DENSE, IMPLEMENTATIONS, OURS, DenseEager
from benchmarks.memory import peak_bytes, saved_bytes
from benchmarks.operations import ARGUMENTS, FORWARD, LAYER, Operation, Tensors, run_layer
from benchmarks.timing import Variant, interleaved, spread
from benchmarks.work import Work
from tca_fast import ops
from tca_fast.errors import one_line

PRODUCT = "encoder product"
VARIANTS = (PRODUCT, *IMPLEMENTATIONS)


@dataclass(frozen=True)
class Machine:
    """Where a run takes place.

    Attributes:
        device: of all tensors.
        dtype: of all tensors.
        bandwidth: of a large copy, bytes per second.
        facts: device, commit, versions and dtype by name; part of every row.
        backend: forced by name, or None for the one that serves the device.
    """

    device: torch.device
    dtype: torch.dtype
    bandwidth: float
    facts: dict[str, Any]
    backend: str | None = None

    def backend_of(self, operator: str) -> str:
        """The backend that computes one of our operators here."""
        return self.backend or ops.backends()[operator][self.device.type.upper()]


@dataclass(frozen=True)
class Measured:
    """One variant of one operation at one case.

    Attributes:
        row: what is stored and printed.
        milliseconds: of every round; empty where the variant is absent.
    """

    row: dict[str, Any]
    milliseconds: list[float]


def measure(
    operation: Operation, case: Case, names: Sequence[str], machine: Machine, rounds: int
) -> dict[str, Measured]:
    """Check and time the named variants against each other.

    Args:
        operation: what is computed.
        case: shapes and sparsity.
        names: of `VARIANTS` or `BY_BACKEND`; the encoder product always runs, since it is the
            floor's unit.
        machine: where.
        rounds: timed rounds after two of warm-up.

    Raises:
        AssertionError: one of our results is wrong; then nothing is timed. Another's that is
            wrong, or cannot be had here, is absent with the reason.
    """
    tensors = with_gradients(layer_inputs(case, machine.device, machine.dtype))
    itemsize = tensors["x"].itemsize
    absent = {name: operation.absence(name, case, itemsize) for name in names}
    present = [name for name in names if name != PRODUCT and absent[name] is None]
    known = {**IMPLEMENTATIONS, **BY_BACKEND}
    implementations = {name: known[name](case) for name in present}
    variants = {name: operation.variant(i, tensors) for name, i in implementations.items()}
    variants[PRODUCT] = _encoder_product(tensors)

    errors, refused = _checked(operation, case, tensors, implementations, variants)
    for name, reason in refused.items():
        absent[name] = reason
        del implementations[name], variants[name]
    peaks = {
        name: peak_bytes(machine.device, variant.run, variant.prepare())
        for name, variant in variants.items()
    }
    saved = {
        name: saved_bytes(
            lambda i=implementation: run_layer(i, tensors), [tensors[name] for name in ARGUMENTS]
        )
        for name, implementation in implementations.items()
        if operation in (FORWARD, LAYER)
    }
    milliseconds = interleaved(variants, machine.device, rounds)

    product = work.encoder_product(case, itemsize)
    times = {name: spread(values)[0] for name, values in milliseconds.items()}
    measured = {}
    for name in names:
        row = _identity(operation, case, name, machine)
        if absent[name] is not None:
            found = {"absent": absent[name], "is_refused": name in refused}
            measured[name] = Measured({**row, **found}, [])
            continue
        needed = product if name == PRODUCT else operation.work(case, itemsize)
        median, low, high = spread(milliseconds[name])
        row.update(
            median_ms=median,
            low_ms=low,
            high_ms=high,
            rounds=rounds,
            over_product=median / times[PRODUCT],
            speedup=times[DENSE] / median if DENSE in times else None,
            bytes=needed.bytes,
            gb_per_s=needed.bytes / median * 1e-6,
            bandwidth_gb_per_s=machine.bandwidth * 1e-9,
            of_bandwidth=needed.bytes / median * 1e3 / machine.bandwidth,
            of_product_rate=needed.flops / median * times[PRODUCT] / product.flops,
            of_floor=floor_ms(needed, times[PRODUCT], product, machine.bandwidth) / median,
            peak_bytes=peaks[name],
            saved_bytes=saved.get(name),
            error=max(errors[name].values()) if name in errors else None,
        )
        measured[name] = Measured(row, milliseconds[name])
    return measured


def floor_ms(needed: Work, product_ms: float, product: Work, bandwidth: float) -> float:
    """Least time of some work on a machine, from what was measured there.

    Its arithmetic, over active pairs only, at the rate of the vendor's encoder product, and its
    traffic beside the products at the bandwidth of a copy, each tensor once.
    """
    return product_ms * needed.flops / product.flops + needed.streamed_bytes / bandwidth * 1e3


def _encoder_product(tensors: Tensors) -> Variant:
    x, W_enc = tensors["x"].detach(), tensors["W_enc"].detach()
    return Variant(lambda: None, lambda _: x @ W_enc.T)


def _checked(
    operation: Operation,
    case: Case,
    tensors: Tensors,
    implementations: dict[str, Any],
    variants: dict[str, Variant],
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Relative errors of every implementation's results, and why some of them are not timed."""
    truth = exact_results(operation, case, tensors)
    eager = DenseEager(case)
    dense = operation.results(eager, operation.variant(eager, tensors)())
    allowed = allowed_errors(case, tensors, relative_errors(dense, truth))
    errors: dict[str, dict[str, float]] = {}
    refused: dict[str, str] = {}
    for name, implementation in implementations.items():
        is_ours = name == OURS or name in BY_BACKEND
        try:
            results = operation.results(implementation, variants[name]())
        except (RuntimeError, NotImplementedError) as error:
            if is_ours:
                raise
            refused[name] = f"fails: {one_line(error)}"
            continue
        errors[name] = relative_errors(results, truth)
        wrong = [
            f"{result} is off by {error:.1e}, allowed {allowed[result]:.1e}"
            for result, error in errors[name].items()
            if not error <= allowed[result]
        ]
        said = f"{case.name}, {operation.name}, {name}: {'; '.join(wrong)}; not timed"
        assert not (wrong and is_ours), said
        if wrong:
            refused[name] = f"wrong, not timed: {'; '.join(wrong)}"
    return errors, refused


def _identity(operation: Operation, case: Case, name: str, machine: Machine) -> dict[str, Any]:
    shape = asdict(case)
    backend = "torch"
    if name == OURS:
        backend = machine.backend_of(operation.operator)
    elif name in BY_BACKEND:
        backend = name.removeprefix(f"{OURS}, ")
    return {
        "operation": operation.name,
        "case": shape.pop("name"),
        "variant": name,
        **shape,
        "active": case.active,
        "backend": backend,
        **machine.facts,
    }

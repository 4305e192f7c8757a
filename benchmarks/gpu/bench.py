"""The stage that measures: rates of the device, layers, generation, operators, peers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import CASES, GENERATION_CASES, layer_inputs
from benchmarks.cases import Case as LayerCase
from benchmarks.correctness import with_gradients
from benchmarks.gpu.candidates import candidates
from benchmarks.gpu.facts import backends_of, clocks
from benchmarks.gpu.rates import Rates
from benchmarks.gpu.record import Case, Clock, Record, run_cases
from benchmarks.layers import BY_BACKEND, COMPILED, DENSE, OURS, TORCH_SPARSE
from benchmarks.losses import LOSS_CASES
from benchmarks.measure import PRODUCT, Machine, measure
from benchmarks.operations import (
    BACKWARD,
    DECODE,
    ENCODE,
    FORWARD,
    GENERATION,
    LAYER,
    Operation,
)
from benchmarks.peers import PEER_CASES, rows_of
from benchmarks.results import find_machine
from benchmarks.timing import captured, repeated


def run(record: Record, clock: Clock, device: torch.device, out: Path) -> None:
    """Run what is not in the record yet, the most telling first."""
    run_cases(cases(find_machine(device, None)), record, clock)
    record.facts["clocks"].append(clocks())
    record.write()


def cases(machine: Machine) -> dict[str, Case]:
    """Every case of the stage by name, in the order in which they are run."""
    device = machine.device
    kind, rounds = ("cuda", 20) if device.type == "cuda" else ("rehearsal", 1)
    fused = [name for name in backends_of(device) if name != "reference"]
    # Compiling takes most of a minute on a CPU, and a rehearsal would show nothing by it.
    compiled = [COMPILED] if kind == "cuda" else []
    layers = CASES[kind]
    middle = [case for case in layers if case.name.startswith(("7B", "rehearsal"))]

    # In a rehearsal Triton's kernels run in its slow interpreter: at the first cases only.
    few = (layers[0], GENERATION_CASES[kind][0])

    def ours(case: LayerCase) -> list[str]:
        return [f"{OURS}, {name}" for name in fused_at(case)]

    def fused_at(case: LayerCase) -> list[str]:
        is_slow = kind == "rehearsal" and case not in few
        return [name for name in fused if not (is_slow and name == "triton")]

    def measured(operation: Operation, case: LayerCase, names: Sequence[str]) -> Case:
        def run() -> dict[str, Any]:
            found = measure(operation, case, [PRODUCT, *names], machine, rounds)
            for name, one in found.items():
                if "absent" not in one.row:
                    print(f"    {name:24} {one.row['median_ms']:.4g} ms", flush=True)
            return {"rows": [one.row for one in found.values()]}

        return run

    named = Rates(device).cases()
    for case in layers:
        names = [*ours(case), DENSE, *compiled, TORCH_SPARSE]
        named[f"layer: {case.name}"] = measured(LAYER, case, names)
    for case in layers:
        for name in fused_at(case):
            named[f"kernels of {name}: {case.name}"] = partial(kernels, case, name, machine, rounds)
    for case in GENERATION_CASES[kind]:
        named[f"generation: {case.name}"] = measured(GENERATION, case, [*ours(case), DENSE])
    named.update(candidates(machine, rounds))
    for operation in (ENCODE, DECODE, FORWARD, BACKWARD):
        for case in middle if kind == "cuda" else middle[1:]:
            names = [*ours(case), DENSE, TORCH_SPARSE]
            named[f"{operation.name}: {case.name}"] = measured(operation, case, names)
    for peers_of in (*PEER_CASES[kind], *LOSS_CASES[kind]):
        named[f"peers: {peers_of.name}"] = partial(_peers, peers_of, machine, rounds)
    return named


def kernels(case: LayerCase, backend: str, machine: Machine, rounds: int) -> dict[str, Any]:
    """The layer forward and backward replayed from a CUDA graph, and where its time goes."""
    tensors = with_gradients(layer_inputs(case, machine.device, machine.dtype))
    step = LAYER.variant(BY_BACKEND[f"{OURS}, {backend}"](case), tensors)
    found: dict[str, Any] = repeated(captured(step, machine.device), machine.device, rounds)
    # Not of a graph's replay, whose kernels not every version of the profiler tells apart.
    activity = torch.profiler.ProfilerActivity
    is_cuda = machine.device.type == "cuda"
    with torch.profiler.profile(activities=[activity.CUDA if is_cuda else activity.CPU]) as profile:
        for _ in range(rounds):
            step()
        if is_cuda:
            torch.cuda.synchronize()
    field = "device_time_total" if is_cuda else "self_cpu_time_total"  # microseconds
    averages = profile.key_averages()
    times = {event.key: getattr(event, field) / (rounds * 1e3) for event in averages}
    longest = sorted(times.items(), key=lambda item: -item[1])[:25]
    return {**found, "kernel_ms": dict(longest)}


def _peers(case: Any, machine: Machine, rounds: int) -> dict[str, Any]:
    rows = rows_of(case, machine, rounds)
    for row in rows:
        why = row.get("absent") or f"{row['median_ms']:.4g} ms"
        print(f"    {row['operation']:14} {row['variant']:24} {why}", flush=True)
    return {"rows": rows}

"""One adapter layer, forward and backward with statistics, against what people run today.

    python -m benchmarks.layer --out benchmarks/results/NAME.json

Correctness is checked first: every variant must agree with the dense layer in float64. Gradients
are freshly allocated in every run. The floor is the encoder product alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import CPU_CASES, Case, layer_inputs
from benchmarks.layers import BASELINES, Layer, dense_eager, ours
from benchmarks.timing import interleaved
from tca_fast import ops
from tca_fast.cli.env import describe_machine

WEIGHTS = ("x", "mlp_out", "W_enc", "b_enc", "W_dec", "b_dec")
# A pre-activation within rounding of zero may fall on either side in any float32 computation, so
# errors are judged against those of the dense layer in the same dtype.
TOLERANCE = 2e-4
TIMES_DENSE_ERROR = 4
MOST_GATHERED_BYTES = 2 * 2**30


def forward_backward(layer: Layer, tensors: dict[str, Tensor]) -> list[Tensor]:
    """Outputs and the gradients of every argument, freshly allocated."""
    arguments = [tensors[name] for name in WEIGHTS]
    y, l1 = layer(*arguments)
    upstream = [tensors["grad_y"], torch.ones_like(l1)]
    return [y, l1, *torch.autograd.grad([y, l1], arguments, upstream)]


def saved_bytes(layer: Layer, tensors: dict[str, Tensor]) -> int:
    """Bytes kept for the backward beside the arguments."""
    sizes: dict[int, int] = {}

    def save(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        layer(*[tensors[name] for name in WEIGHTS])
    arguments = {tensors[name].untyped_storage().data_ptr() for name in WEIGHTS}
    return sum(size for pointer, size in sizes.items() if pointer not in arguments)


def exact_results(case: Case, tensors: dict[str, Tensor]) -> list[Tensor]:
    """Outputs and gradients of the dense layer in float64."""
    exact = {name: t.detach().double().requires_grad_(True) for name, t in tensors.items()}
    return forward_backward(dense_eager(case), exact)


def worst_error(layer: Layer, truth: list[Tensor], tensors: dict[str, Tensor]) -> float:
    """Largest relative error, in norm, of outputs and gradients."""
    return max(
        ((found.double() - exact).norm() / exact.norm().clamp(min=1e-12)).item()
        for found, exact in zip(forward_backward(layer, tensors), truth, strict=True)
    )


def run(case: Case, rounds: int) -> dict[str, Any]:
    """Rows of one case: time, ratio to the floor and to dense eager, saved bytes, error."""
    tensors = {name: t.requires_grad_(name in WEIGHTS) for name, t in layer_inputs(case).items()}
    layers = {"tca_fast": ours(case), **{name: make(case) for name, make in BASELINES.items()}}
    rows: dict[str, Any] = {}
    gathered_rows = case.tokens * (case.k or case.l0) * case.width * 4
    if gathered_rows > MOST_GATHERED_BYTES:
        del layers["torch sparse"]
        rows["torch sparse"] = {"absent": f"would gather {gathered_rows / 2**30:.0f} GiB of rows"}
    truth = exact_results(case, tensors)
    allowed = max(TOLERANCE, TIMES_DENSE_ERROR * worst_error(dense_eager(case), truth, tensors))
    for name, layer in layers.items():
        layer(*[tensors[argument] for argument in WEIGHTS])
        error = worst_error(layer, truth, tensors)
        if error > allowed:
            raise SystemExit(f"{case.name}: {name} is off by {error:.1e}; nothing was timed")
        rows[name] = {"error": error, "saved_bytes": saved_bytes(layer, tensors)}
    x, W_enc = tensors["x"].detach(), tensors["W_enc"].detach()
    variants = {
        name: lambda layer=layer: forward_backward(layer, tensors) for name, layer in layers.items()
    }
    timings = interleaved({"encoder product": lambda: x @ W_enc.T, **variants}, rounds)
    floor, dense = timings["encoder product"].median, timings["dense eager"].median
    for name, timing in timings.items():
        rows.setdefault(name, {}).update(
            asdict(timing), over_floor=timing.median / floor, speedup=dense / timing.median
        )
    return {"case": asdict(case), "rows": rows}


def facts() -> dict[str, Any]:
    """What a figure is worth nothing without."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True
    ).stdout.strip()
    return {
        "device": describe_machine(),
        "torch": torch.__version__,
        "commit": commit,
        "dtype": "float32",
        "backend": ops.backends()["adapter"]["CPU"],
    }


def main() -> None:
    """Run all CPU cases, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="results file to write")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    arguments = parser.parse_args()
    results: dict[str, Any] = {**facts(), "cases": []}
    for case in CPU_CASES:
        if arguments.only not in case.name:
            continue
        result = run(case, arguments.rounds)
        results["cases"].append(result)
        print(f"\n{case.name}  (T {case.tokens}, D {case.width}, F {case.features})")
        for name, row in result["rows"].items():
            if "absent" in row:
                print(f"  {name:16} absent: {row['absent']}")
                continue
            print(
                f"  {name:16} {row['median']:8.1f} ms [{row['low']:.1f}, {row['high']:.1f}]"
                f"  {row['over_floor']:5.2f}x floor  {row['speedup']:5.2f}x dense eager"
                f"  saved {row.get('saved_bytes', 0) / 2**20:7.2f} MiB"
            )
    if arguments.out:
        text = json.dumps(results, indent=2) + "\n"
        arguments.out.write_text(text, encoding="utf-8")
        assert json.loads(arguments.out.read_text(encoding="utf-8")) == results


if __name__ == "__main__":
    main()

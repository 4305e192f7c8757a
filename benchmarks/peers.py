"""What others offer for the same work, at our shapes: correctness first, then time.

    python -m benchmarks.peers --out benchmarks/results/NAME.json

Sparse decode and TopK encode, each forward and backward, and KL from residual states. A peer that
is not installed, or cannot run on this device, is listed as absent with the reason; one whose
results are wrong is listed so and not timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case, layer_inputs
from benchmarks.correctness import allowed_errors, relative_errors, rounding_of_sums
from benchmarks.layers import DenseEager
from benchmarks.losses import LOSS_CASES, LossBench, LossCase
from benchmarks.measure import Machine
from benchmarks.peer_calls import (
    DECODERS,
    ENCODERS,
    LOSSES,
    OURS,
    Peer,
    Tensors,
    dense_decode,
    torch_topk,
    whole_kl,
)
from benchmarks.results import find_machine, write_results
from benchmarks.timing import Variant, interleaved, spread
from tca_fast import ops

# TopK keeps equally many of every token, which is all that most peers can decode.
PEER_CASES = {
    "cpu": [
        Case("1.5B topk=64", 512, 1536, 8192, 4096, "uniform", k=64),
        Case("1.5B l0=8", 512, 1536, 8192, 8),
    ],
    "cuda": [
        Case("7B topk=32", 8192, 3584, 8192, 4096, "uniform", k=32),
        Case("7B topk=64", 8192, 3584, 8192, 4096, "uniform", k=64),
        Case("7B l0=10", 8192, 3584, 8192, 10),
    ],
    "rehearsal": [
        Case("rehearsal topk=3", 6, 16, 40, 20, "uniform", k=3),
        Case("rehearsal l0=4", 6, 16, 40, 4),
    ],
}


def decode_rows(case: Case, machine: Machine, rounds: int) -> list[dict[str, Any]]:
    """Decode of given active features, with the gradients of activations and decoder."""
    given = layer_inputs(case, machine.device, machine.dtype)
    features = DenseEager(case).encode(given["x"], given["W_enc"], given["b_enc"])
    active = ops.ActiveFeatures.from_dense(features)
    tensors = {
        "row_ptr": active.row_ptr,
        "feature": active.feature,
        "value": active.value,
        "token": active.tokens(),
        "W_dec": given["W_dec"],
        "grad_y": given["grad_y"],
    }
    truth = dense_decode(None, _exact(tensors))()
    # No threshold, so rounding alone.
    allowed = dict.fromkeys(truth, rounding_of_sums(machine.dtype))
    return _rows("sparse decode", case, DECODERS, tensors, truth, allowed, machine, rounds)


def encode_rows(case: Case, machine: Machine, rounds: int) -> list[dict[str, Any]]:
    """TopK encode with the gradients of x and the encoder; needs a case with k."""
    assert case.k is not None
    tensors = layer_inputs(case, machine.device, machine.dtype)
    generator = torch.Generator().manual_seed(3)
    shape = case.tokens, case.features
    tensors["grad_features"] = torch.randn(shape, generator=generator).to(tensors["x"])
    tensors["k"] = torch.tensor(case.k)
    truth = torch_topk(None, _exact(tensors))()
    dense = relative_errors(torch_topk(None, tensors)(), truth)
    allowed = allowed_errors(case, tensors, dense)
    return _rows("TopK encode", case, ENCODERS, tensors, truth, allowed, machine, rounds)


def _exact(tensors: Tensors) -> Tensors:
    return {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}


def loss_rows(case: LossCase, machine: Machine, rounds: int) -> list[dict[str, Any]]:
    """KL of a frozen head's logits, every position counted, with the gradient of the states."""
    bench = LossBench(case, machine)
    tensors = {
        "states": bench.student.states.detach()[0],
        "teacher": bench.teacher.states[0],
        "head": bench.student.head.weight,
    }
    some = slice(0, 256)  # float64 logits of more would not fit beside the rest
    few = {**tensors, "states": tensors["states"][some], "teacher": tensors["teacher"][some]}
    truth = whole_kl(None, _exact(few))()
    dense = relative_errors(whole_kl(None, few)(), truth)
    allowed = {n: 2 * error + rounding_of_sums(machine.dtype) for n, error in dense.items()}
    shape = Case(case.name, case.tokens, case.width, case.vocab_size, 1, "none")
    return _rows("KL", shape, LOSSES, tensors, truth, allowed, machine, rounds, few)


def _rows(
    operation: str,
    case: Case,
    peers: Sequence[Peer],
    tensors: Tensors,
    truth: Tensors,
    allowed: dict[str, float],
    machine: Machine,
    rounds: int,
    checked: Tensors | None = None,
) -> list[dict[str, Any]]:
    """Check every peer that is there, time those that are right, list the others."""
    absent: dict[str, str] = {}
    errors: dict[str, float] = {}
    variants: dict[str, Variant] = {}
    for peer in peers:
        reason = peer.absence(machine.device, case.k)
        if reason is None:
            reason, errors[peer.name] = _wrong(peer, checked or tensors, truth, allowed)
        if reason is not None:
            absent[peer.name] = reason
            continue
        call = peer.make(tensors)
        variants[peer.name] = Variant(lambda: None, lambda _, call=call: call())
    milliseconds = interleaved(variants, machine.device, rounds) if variants else {}
    ours = spread(milliseconds[OURS])[0] if OURS in milliseconds else None
    rows = []
    for peer in peers:
        shape = asdict(case)
        backend = machine.backend_of("decode") if peer.name == OURS else peer.module or "torch"
        row: dict[str, Any] = {
            "operation": operation,
            "case": shape.pop("name"),
            "variant": peer.name,
            **shape,
            **machine.facts,
            "backend": backend,
        }
        if peer.name in absent:
            rows.append({**row, "absent": absent[peer.name]})
            continue
        median, low, high = spread(milliseconds[peer.name])
        row.update(median_ms=median, low_ms=low, high_ms=high, error=errors[peer.name])
        rows.append({**row, "over_ours": None if ours is None else median / ours})
    return rows


def _wrong(
    peer: Peer, tensors: Tensors, truth: Tensors, allowed: dict[str, float]
) -> tuple[str | None, float]:
    """What is wrong with a peer's results, None where nothing is; and its worst error."""
    try:
        errors = relative_errors(peer.make(tensors)(), truth)
    except (RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
        return f"fails: {' '.join(str(error).split())[:200]}", float("nan")
    wrong = [
        f"{name} is off by {error:.1e}, allowed {allowed[name]:.1e}"
        for name, error in errors.items()
        if not error <= allowed[name]
    ]
    return (f"wrong, not timed: {'; '.join(wrong)}" if wrong else None), max(errors.values())


def rows_of(case: Case | LossCase, machine: Machine, rounds: int) -> list[dict[str, Any]]:
    """Everything that is compared at one case."""
    if isinstance(case, LossCase):
        return loss_rows(case, machine, rounds)
    rows = decode_rows(case, machine, rounds)
    return rows + (encode_rows(case, machine, rounds) if case.k is not None else [])


def line(row: dict[str, Any]) -> str:
    """One row, printed."""
    what = f"{row['operation']:14} {row['case']:26} {row['variant']:24}"
    if "absent" in row:
        return f"{what} absent: {row['absent']}"
    spread_ms = f"[{row['low_ms']:.4g}, {row['high_ms']:.4g}]"
    against = "" if row["over_ours"] is None else f"{row['over_ours']:.2f} x ours"
    return f"{what} {row['median_ms']:10.4g} ms {spread_ms:20} {against}, error {row['error']:.0e}"


def main() -> None:
    """Run the cases of the device, print a line for each peer, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="results file to write")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", choices=PEER_CASES, help="default: the set of the device")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.out and options.out.exists():
        parser.error(f"--out: {options.out} exists; give another name or remove it")
    machine = find_machine(torch.device(options.device), None)
    name = options.cases or options.device
    rows: list[dict[str, Any]] = []
    for case in [*PEER_CASES[name], *LOSS_CASES[name]]:
        for row in rows_of(case, machine, options.rounds):
            print(line(row), flush=True)
            rows.append(row)
    if options.out:
        write_results(options.out, rows)


if __name__ == "__main__":
    main()

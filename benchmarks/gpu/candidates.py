"""CUDA operators that no backend chooses yet, against what is chosen: checked first, then timed.

The slab for 20 to 128 active features of a token, and the generation step in one launch, with and
without the int8 screen (docs/kernels.md). Each is replayed from a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import GENERATION_CASES, layer_inputs
from benchmarks.cases import Case as LayerCase
from benchmarks.gpu.record import Absent, Case
from benchmarks.measure import Machine
from benchmarks.timing import captured, repeated
from tca_fast import ops

_SLAB_L0 = (20, 64, 128)
_SCREENED_TOKENS = 8


def candidates(machine: Machine, rounds: int) -> dict[str, Case]:
    """Every candidate by name."""
    kind = "cuda" if machine.device.type == "cuda" else "rehearsal"
    named: dict[str, Case] = {}
    for case in GENERATION_CASES[kind]:
        named[f"candidate generation step: {case.name}"] = partial(
            _generation, case, machine, rounds
        )
    for l0 in _SLAB_L0:
        case = LayerCase(f"7B l0={l0}", 8192, 3584, 8192, l0, "power")
        named[f"candidate slab decode: {case.name}"] = partial(_slab, case, machine, rounds)
    return named


def _kernels() -> Any:
    if not hasattr(torch.ops.tca_fast_cuda, "generation_step"):
        raise Absent("the compiled CUDA kernels are not here")
    return torch.ops.tca_fast_cuda


@torch.no_grad()
def _generation(case: LayerCase, machine: Machine, rounds: int) -> dict[str, Any]:
    cuda = _kernels()
    tensors = layer_inputs(case, machine.device, machine.dtype)
    names = ("x", "mlp_out", "W_enc", "b_enc", "W_dec", "b_dec")
    given = [tensors[name] for name in names]
    calls: dict[str, Callable[[], Tensor]] = {
        "dense": lambda: _dense(*given),
        "generation step": lambda: cuda.generation_step(*given, None),
    }
    if case.tokens <= _SCREENED_TOKENS:
        rounded = cuda.round_weights(tensors["W_enc"])
        calls["with the int8 screen"] = lambda: cuda.screened_generation_step(
            *given, None, *rounded
        )
    return _compared(calls, _dense(*(tensor.double() for tensor in given)), machine, rounds)


@torch.no_grad()
def _slab(case: LayerCase, machine: Machine, rounds: int) -> dict[str, Any]:
    cuda = _kernels()
    tensors = layer_inputs(case, machine.device, machine.dtype)
    active = ops.encode(tensors["x"], tensors["W_enc"], tensors["b_enc"]).trim()
    features, W_dec, b_dec = active.to_dense(), tensors["W_dec"], tensors["b_dec"]
    packed = (active.row_ptr, active.feature, active.value, W_dec, b_dec, None)
    calls: dict[str, Callable[[], Tensor]] = {
        "dense": lambda: torch.addmm(b_dec, features, W_dec),
        "gather": lambda: cuda.decode(*packed),
        "slab": lambda: cuda.slab_decode(*packed),
    }
    truth = torch.addmm(b_dec.double(), features.double(), W_dec.double())
    return _compared(calls, truth, machine, rounds)


def _dense(
    x: Tensor, mlp_out: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor
) -> Tensor:
    return mlp_out + torch.addmm(b_dec, torch.addmm(b_enc, x, W_enc.T).relu(), W_dec)


def _compared(
    calls: dict[str, Callable[[], Tensor]], truth: Tensor, machine: Machine, rounds: int
) -> dict[str, Any]:
    """Times of all calls, none of which may have more than twice the dense one's error.

    Raises:
        AssertionError: a result is wrong; then nothing is timed.
    """

    def error(found: Tensor) -> float:
        return float((found.double() - truth).norm() / truth.norm())

    errors = {name: error(call()) for name, call in calls.items()}
    allowed = 2 * errors["dense"] + torch.finfo(machine.dtype).eps
    wrong = {name: found for name, found in errors.items() if not found <= allowed}
    assert not wrong, f"off by {wrong}, allowed {allowed:.1e}; not timed"
    found = {
        name: {**repeated(captured(call, machine.device), machine.device, rounds), "error": e}
        for (name, call), e in zip(calls.items(), errors.values(), strict=True)
    }
    for name, times in found.items():
        print(f"    {name:24} {times['ms']:.4f} ms", flush=True)
    return found

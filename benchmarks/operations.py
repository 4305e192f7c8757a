"""What is timed: each operator by itself, and the layer forward and backward.

An operation makes a `Variant` of an implementation and given tensors, and knows the names of its
results, so that any two implementations can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import work
from benchmarks.cases import Case
from benchmarks.layers import TORCH_SPARSE, Implementation, LayerOutput
from benchmarks.timing import Variant, captured
from benchmarks.work import Work

Tensors = dict[str, Tensor]
ARGUMENTS = ("x", "mlp_out", "W_enc", "b_enc", "W_dec", "b_dec")

# Gathered rows of a torch-only sparse pass are a tensor of their own; beyond this it is absent.
_MOST_GATHERED_BYTES = 8 * 2**30


@dataclass(frozen=True)
class Operation:
    """One thing to be computed, by any implementation.

    Attributes:
        name: readable id.
        operator: the name in `ops.backends()` of what serves it.
        work: arithmetic and traffic it needs.
        variant: what is timed, from an implementation and tensors.
        results: named dense tensors of what the variant returned.
    """

    name: str
    operator: str
    work: Callable[[Case, int], Work]
    variant: Callable[[Implementation, Tensors], Variant]
    results: Callable[[Implementation, Any], Tensors]

    def absence(self, implementation: str, case: Case, itemsize: int) -> str | None:
        """Why an implementation is not run at a case, or None where it is."""
        if implementation != TORCH_SPARSE or not self.work(case, itemsize).gathered_bytes:
            return None
        rows = case.tokens * case.active * case.width * itemsize
        if rows <= _MOST_GATHERED_BYTES:
            return None
        return f"would gather {rows / 2**30:.0f} GiB of rows"


def run_layer(implementation: Implementation, tensors: Tensors) -> LayerOutput:
    """The layer on named tensors; its graph is kept where they require gradients."""
    return implementation.layer(*[tensors[name] for name in ARGUMENTS])


def _gradients(output: LayerOutput, tensors: Tensors) -> list[Tensor]:
    """Gradients of every argument, freshly allocated."""
    upstream = [tensors["grad_y"], torch.ones_like(output.l1)]
    arguments = [tensors[name] for name in ARGUMENTS]
    return list(torch.autograd.grad([output.y, output.l1], arguments, upstream))


def _encode(implementation: Implementation, tensors: Tensors) -> Variant:
    @torch.no_grad()
    def run(_: None) -> Any:
        return implementation.encode(tensors["x"], tensors["W_enc"], tensors["b_enc"])

    return Variant(lambda: None, run)


def _decode(implementation: Implementation, tensors: Tensors) -> Variant:
    features = _encode(implementation, tensors)()

    @torch.no_grad()
    def run(features: Any) -> Tensor:
        return implementation.decode(features, tensors["W_dec"], tensors["b_dec"])

    return Variant(lambda: features, run)


def _forward(implementation: Implementation, tensors: Tensors) -> Variant:
    return Variant(lambda: None, lambda _: run_layer(implementation, tensors))


def _backward(implementation: Implementation, tensors: Tensors) -> Variant:
    return Variant(
        lambda: run_layer(implementation, tensors), lambda output: _gradients(output, tensors)
    )


def _layer(implementation: Implementation, tensors: Tensors) -> Variant:
    def run(_: None) -> tuple[LayerOutput, list[Tensor]]:
        output = run_layer(implementation, tensors)
        return output, _gradients(output, tensors)

    return Variant(lambda: None, run)


def _generation(implementation: Implementation, tensors: Tensors) -> Variant:
    @torch.no_grad()
    def run() -> LayerOutput:
        return run_layer(implementation, tensors)

    replay = captured(run, tensors["x"].device)
    return Variant(lambda: None, lambda _: replay())


def _outputs(output: LayerOutput) -> Tensors:
    return {name: tensor.detach() for name, tensor in output._asdict().items()}


def _named_gradients(gradients: list[Tensor]) -> Tensors:
    return {f"d{name}": gradient for name, gradient in zip(ARGUMENTS, gradients, strict=True)}


ENCODE = Operation(
    "encode",
    "encode",
    work.encode,
    _encode,
    lambda implementation, features: {"features": implementation.to_dense(features)},
)
DECODE = Operation("decode", "decode", work.decode, _decode, lambda _, y: {"y": y})
FORWARD = Operation(
    "adapter forward", "adapter", work.forward, _forward, lambda _, output: _outputs(output)
)
# The forward of a few tokens, without a graph of autograd; on CUDA replayed from a CUDA graph.
GENERATION = Operation(
    "generation", "adapter", work.forward, _generation, lambda _, output: _outputs(output)
)
BACKWARD = Operation(
    "adapter backward",
    "adapter_backward",
    work.backward,
    _backward,
    lambda _, gradients: _named_gradients(gradients),
)
LAYER = Operation(
    "layer",
    "adapter",
    work.layer,
    _layer,
    lambda _, both: {**_outputs(both[0]), **_named_gradients(both[1])},
)

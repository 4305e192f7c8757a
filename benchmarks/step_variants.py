"""The training steps that are compared: as the published code runs it, ours, and what is between.

All return the same metrics. Each idea stands alone once: sharing, sparse adapters, chunked logits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tca_fast import losses
from tca_fast.adapter import TranscoderAdapter
from tca_fast.architectures.structure import decoder_parts
from tca_fast.bridging.head import Distances, Readout, distances
from tca_fast.bridging.inputs import Inputs
from tca_fast.bridging.objective import BridgingObjective, Passes
from tca_fast.bridging.partial import PartialRunner
from tca_fast.bridging.plain import PlainObjective
from tca_fast.bridging.shared import SharedObjective
from tca_fast.bridging.streams import Streams
from tca_fast.ops import AdapterOutput
from tca_fast.residual_stream import residual_states
from tca_fast.sparsity import record


class _ChunkedPlain(PlainObjective):
    """The plain step with its losses taken in chunks."""

    def _passes(self, inputs: Inputs, cutoffs: Sequence[int]) -> Passes:
        def read(model: Any) -> tuple[Readout, list[Tensor]]:
            runner = PartialRunner(model)
            states = runner.run(inputs).states
            return Readout(states[-1], runner), states

        with torch.no_grad():
            teacher, reference_states = read(self.reference_stream)
        with record(inputs.token_mask) as recorder:
            main, states = read(self.adapter_stream)
        mixed = {
            f"{direction}_{{}}/cutoff_{cutoff}": read(model)[0]
            for cutoff in cutoffs
            for direction, model in self._mixed_models(cutoff).items()
        }
        found = distances(teacher, [main, *mixed.values()], inputs.labels, self.config.loss)
        sums = {"kl": found.kl, "lm": found.lm}
        bridges = {
            name.format(kind): sums[kind][i]
            for i, name in enumerate(mixed, start=1)
            for kind in sums
        }
        main_sums = {kind: values[0] for kind, values in sums.items()}
        return Passes(found.teacher_lm, main_sums, bridges, states, reference_states, recorder)


class _RepeatedForNMSE(BridgingObjective):
    """NMSE from two whole passes of its own, as in the published code (contract §3.6)."""

    def _passes(self, inputs: Inputs, cutoffs: Sequence[int]) -> Passes:
        passes = super()._passes(inputs, cutoffs)
        with torch.no_grad(), residual_states(self.reference_stream) as reference_states:
            _run_decoder(self.reference_stream, inputs)
        with residual_states(self.adapter_stream) as states:
            _run_decoder(self.adapter_stream, inputs)
        return passes._replace(states=states, reference_states=reference_states)


def _run_decoder(model: Any, inputs: Inputs) -> None:
    decoder_parts(model).decoder(**inputs.arguments(model))


class _Published(_RepeatedForNMSE, PlainObjective):
    """The step as the published code runs it."""


class _PublishedChunked(_RepeatedForNMSE, _ChunkedPlain):
    """The same with chunked losses."""


class _SharedWithLogits(SharedObjective):
    """The shared step with whole logits."""

    def _distances(
        self, teacher: Readout, students: Sequence[Readout], labels: Tensor
    ) -> Distances:
        def logits(readout: Readout) -> Tensor:
            return readout.head.logits(readout.states.flatten(0, 1)).unflatten(0, labels.shape)

        with torch.no_grad():
            reference = logits(teacher)
        found = [
            (losses.kl_sum(reference, of, labels), losses.lm_sum(of, labels))
            for of in map(logits, students)
        ]
        kl, lm = (torch.stack(values) for values in zip(*found, strict=True))
        return Distances(kl, lm, losses.lm_sum(reference, labels))


class Variant(NamedTuple):
    """One way of running the step.

    Attributes:
        step: class of the objective.
        is_dense: adapters compute densely, as in the published code, and not sparsely.
        is_checkpointed: layers are recomputed in the backward.
    """

    step: type[BridgingObjective]
    is_dense: bool
    is_checkpointed: bool = False


VARIANTS = {
    "published": Variant(_Published, True),
    "published, sparse adapters": Variant(_Published, False),
    "published, chunked losses": Variant(_PublishedChunked, True),
    "published, shared passes": Variant(_SharedWithLogits, True),
    "plain": Variant(PlainObjective, False),
    "shared": Variant(SharedObjective, False),
    "shared, checkpointed": Variant(SharedObjective, False, is_checkpointed=True),
}


@contextmanager
def dense_adapters(streams: Streams) -> Iterator[None]:
    """Adapters compute two dense products, and statistics where they are recorded."""
    for adapter in streams.adapted.layers:
        adapter.forward = partial(_dense_forward, adapter)
    try:
        yield
    finally:
        for adapter in streams.adapted.layers:
            del adapter.forward


def _dense_forward(
    adapter: TranscoderAdapter, x: Tensor, mlp_out: Tensor, token_mask: Tensor | None = None
) -> AdapterOutput:
    W_enc, b_enc, W_dec = (p.to(x.dtype) for p in (adapter.W_enc, adapter.b_enc, adapter.W_dec))
    features = F.linear(x, W_enc, b_enc).relu()
    bias = None if adapter.b_dec is None else adapter.b_dec.to(x.dtype)
    y = mlp_out + F.linear(features, W_dec.T, bias)
    none = torch.zeros((), dtype=torch.int64, device=x.device)
    if token_mask is None:
        return AdapterOutput(y, none, none, none, none)
    l1 = (features * W_dec.norm(dim=1)).sum(-1)[token_mask].sum()
    with torch.no_grad():
        active = (features > 0) & token_mask.unsqueeze(-1)
        l0_T = active.float().sum(-1).flatten().int()
        return AdapterOutput(y, l1, l0_T, active.flatten(0, -2).any(0), none)


class LayerPasses:
    """Counts forward and backward passes of the decoder layers while it is open, by hooks."""

    def __init__(self, streams: Streams) -> None:
        self.counts: Counter[str] = Counter()
        self._models = {"adapter": streams.adapted.model, "reference": streams.reference}
        self._hooks: list[Any] = []

    def __enter__(self) -> LayerPasses:
        """Start counting."""
        for stream, model in self._models.items():
            count = self._counter(stream)
            self._hooks += [
                layer.register_forward_hook(count) for layer in decoder_parts(model).layers
            ]
        return self

    def __exit__(self, *error: object) -> None:
        """Stop counting."""
        for hook in self._hooks:
            hook.remove()

    def _counter(self, stream: str) -> Callable[[nn.Module, Any, Any], None]:
        def count(module: nn.Module, args: Any, output: Any) -> None:
            state = output if isinstance(output, Tensor) else output[0]
            self.counts[f"{stream} forward"] += 1
            if state.requires_grad:
                state.register_hook(lambda _: self.counts.update([f"{stream} backward"]))

        return count


def adapters_of(variant: Variant, streams: Streams) -> Any:
    """A context in which the adapters compute as the variant says."""
    return dense_adapters(streams) if variant.is_dense else nullcontext()

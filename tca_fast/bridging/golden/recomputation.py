"""What our streams and objective make of the weights and inputs of a golden folder.

Shapes: L layers, B sequences, S positions, D model width, F features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tca_fast.bridging.golden.folder import GoldenFolder
from tca_fast.bridging.objective import BridgingObjective, StepOutput
from tca_fast.bridging.pair import ACCEPTABLE
from tca_fast.bridging.streams import Streams, graft, load_streams
from tca_fast.config import ObjectiveConfig, PairConfig
from tca_fast.formats.paper import tensor_name, to_paper
from tca_fast.residual_stream import residual_states
from tca_fast.sparsity import record

# A pre-activation this close to zero, relative to |x|·|W_enc[f]|, may round to either side.
_UNDECIDED = 1e-6


@dataclass(frozen=True)
class Features:
    """Activations of one forward pass.

    Attributes:
        active: [L, B, S, F].
        undecided: bool [L, B, S, F], pre-activations within rounding of zero.
        logits: [B, S, V].
        states: [L+1, B, S, D], residual stream (contract §3.3).
    """

    active: Tensor
    undecided: Tensor
    logits: Tensor
    states: Tensor


@dataclass(frozen=True)
class Recomputation:
    """A golden folder and the form of the training step under test.

    Attributes:
        folder: weights, inputs and settings.
        objective: class of the training step.
    """

    folder: GoldenFolder
    objective: type[BridgingObjective]

    def streams(self, backbone: str = "target", *, fresh: bool = False) -> Streams:
        """Both streams from base/ and target/, with the adapters of adapter/ unless fresh.

        Raises:
            UserError: the pair does not fit.
        """
        pair = PairConfig.model_validate(
            {
                "base": str(self.folder.directory / "base"),
                "target": str(self.folder.directory / "target"),
                "backbone": backbone,
                "dtype": "float32",
                "accept_differences": ACCEPTABLE,
            }
        )
        streams = load_streams(pair, self.folder.adapter_config)
        if not fresh:
            with torch.no_grad():
                for layer, adapter in enumerate(streams.adapted.layers):
                    for name, parameter in adapter.named_parameters():
                        parameter.copy_(self.folder.adapters[layer][name])
        return streams

    def metrics(
        self, streams: Streams, cutoffs: Sequence[int], labels: Tensor | None = None
    ) -> dict[str, float]:
        """Metrics of the objective on the golden batch, with other labels if given."""
        with torch.no_grad():
            output = self._step(streams, self.folder.objective, cutoffs, labels)
        return {name: value.item() for name, value in output.metrics.items()}

    def gradients(
        self, streams: Streams, cutoffs: Sequence[int], weights: dict[str, float] | None = None
    ) -> dict[str, Tensor]:
        """Gradients of the objective by the paper's tensor name and in its layout.

        Args:
            streams: with golden adapters.
            cutoffs: of the step.
            weights: of the objective; those left out are 0. None is the folder's own.
        """
        config = self.folder.objective
        if weights is not None:
            zero = dict.fromkeys(("lambda_adapt", "l1_weight", "lambda_nmse", "lambda_bridge"), 0.0)
            config = ObjectiveConfig.model_validate(zero | weights)
        adapters = nn.ModuleList(streams.adapted.layers)
        adapters.zero_grad()
        self._step(streams, config, cutoffs).loss.backward()
        return {
            tensor_name(layer, name): to_paper(
                name, torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            ).clone()
            for layer, adapter in enumerate(streams.adapted.layers)
            for name, parameter in adapter.named_parameters()
        }

    def _step(
        self,
        streams: Streams,
        config: ObjectiveConfig,
        cutoffs: Sequence[int],
        labels: Tensor | None = None,
    ) -> StepOutput:
        inputs = dict(self.folder.inputs)
        if labels is not None:
            inputs["labels"] = labels
        return self.objective(streams, config)(**inputs, cutoffs=list(cutoffs))

    def fired_with_padding(self, streams: Streams) -> Tensor:
        """Features active at any position, padding included, bool [L, F] (contract §1.5)."""
        with torch.no_grad(), record() as recorder:
            streams.adapted(**self.model_inputs())
        return recorder.fired()

    def reference_pass(self, streams: Streams) -> tuple[Tensor, Tensor]:
        """Logits [B, S, V] and residual states [L+1, B, S, D] of the target."""
        with torch.no_grad(), residual_states(streams.reference) as states:
            logits = streams.reference(**self.model_inputs()).logits
        return logits, torch.stack(states)

    def adapter_pass(self, streams: Streams, prompt: Tensor | None = None) -> Features:
        """Activations of the adapter stream on the golden batch or on a prompt [1, S]."""
        inputs = self.model_inputs() if prompt is None else {"input_ids": prompt}
        with torch.no_grad(), residual_states(streams.adapted.model) as states:  # noqa: SIM117
            with _mlp_inputs(streams) as mlp_inputs:
                logits = streams.adapted(**inputs).logits
        active, undecided = [], []
        with torch.no_grad():
            for adapter, x in zip(streams.adapted.layers, mlp_inputs, strict=True):
                active.append(adapter.encode(x).to_dense().unflatten(0, x.shape[:-1]))
                z = nn.functional.linear(x, adapter.W_enc, adapter.b_enc)
                scale = x.norm(dim=-1, keepdim=True) * adapter.W_enc.norm(dim=1)
                undecided.append(z.abs() <= _UNDECIDED * scale)
        return Features(torch.stack(active), torch.stack(undecided), logits, torch.stack(states))

    def mixed_logits(self, streams: Streams, direction: str, cutoff: int) -> Tensor:
        """Logits [B, S, V] of a crossed model, direction "a2r" or "r2a" (contract §3.4)."""
        front, back = streams.adapted.model, streams.reference
        if direction == "r2a":
            front, back = back, front
        with torch.no_grad():
            return graft(front, back, cutoff)(**self.model_inputs()).logits

    def model_inputs(self) -> dict[str, Tensor]:
        """Input ids and attention mask of the golden batch, as a model's arguments."""
        return {name: self.folder.inputs[name] for name in ("input_ids", "attention_mask")}


def total_norm(gradients: dict[str, Tensor]) -> float:
    """2-norm over all tensors, summed in float64."""
    return sum(tensor.double().square().sum().item() for tensor in gradients.values()) ** 0.5


@contextmanager
def _mlp_inputs(streams: Streams) -> Iterator[list[Tensor]]:
    """Collect the input of every adapter, [B, S, D]."""
    inputs: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.append(args[0])

    hooks = [wrapped.register_forward_pre_hook(keep) for wrapped in streams.adapted.wrapped]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()

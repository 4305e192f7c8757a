"""The plain step: every model of the objective is a whole forward pass of its own.

It computes shared prefixes again and holds logits [B, S, V] of every model, and is short for it:
the result is what any faster step must equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tca_fast import losses
from tca_fast.bridging.inputs import Inputs
from tca_fast.bridging.objective import BridgingObjective, Passes
from tca_fast.bridging.streams import graft
from tca_fast.residual_stream import residual_states
from tca_fast.sparsity import record

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PlainObjective(BridgingObjective):
    """The objective by whole passes and whole logits."""

    def _passes(self, inputs: Inputs, cutoffs: Sequence[int]) -> Passes:
        with torch.no_grad(), residual_states(self.reference_stream) as reference_states:
            reference_logits = _logits(self.reference_stream, inputs)
        with (
            record(inputs.token_mask, keeps_inputs=self.keeps_inputs) as recorder,
            residual_states(self.adapter_stream) as states,
        ):
            logits = _logits(self.adapter_stream, inputs)

        def distances(logits: Tensor) -> dict[str, Tensor]:
            return {
                "kl": losses.kl_sum(reference_logits, logits, inputs.labels),
                "lm": losses.lm_sum(logits, inputs.labels),
            }

        main = distances(logits)
        bridges = {}
        for cutoff in cutoffs:
            for direction, mixed in self._mixed_models(cutoff).items():
                for name, value in distances(_logits(mixed, inputs)).items():
                    bridges[f"{direction}_{name}/cutoff_{cutoff}"] = value
        reference_lm = losses.lm_sum(reference_logits, inputs.labels)
        return Passes(reference_lm, main, bridges, states, reference_states, recorder)

    def _mixed_models(self, cutoff: int) -> dict[str, PreTrainedModel]:
        models = {}
        if cutoff >= 1:
            models["a2r"] = graft(self.adapter_stream, self.reference_stream, cutoff)
        if cutoff < self.num_layers:
            models["r2a"] = graft(self.reference_stream, self.adapter_stream, cutoff)
        return models


def _logits(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    return model(**inputs.arguments(model)).logits

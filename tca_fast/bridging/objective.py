"""The training objective in its plain form (contract §3.1-3.5).

Every bridge is a full forward pass of its own; the result is what any faster step must equal.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from tca_fast import losses
from tca_fast.attachment import residual_states
from tca_fast.bridging.streams import Streams, graft
from tca_fast.config import ObjectiveConfig
from tca_fast.errors import UserError
from tca_fast.sparsity import record

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StepOutput(NamedTuple):
    """What one micro-batch adds to its optimizer step.

    Attributes:
        loss: 0-d, the objective as optimised.
        metrics: 0-d tensors on the device, without gradient: loss, kl, lm, reference_lm, l1, l0
            (mean over layers), nmse, bridge, and by depth l1/layer_i, l0/layer_i, nmse/state_i,
            {a2r,r2a}_{kl,lm}/cutoff_k.
        fired: bool [L, F], features active in some real token.

    Loss and metrics are shares: their sum over the micro-batches and ranks of a step is the
    figure of the global batch.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    fired: Tensor


class BridgingObjective(nn.Module):
    """KL, NMSE, L1 and both bridging directions, with the weights as optimised (contract §3.5).

    J = lambda_adapt·KL + l1_weight·Σ_l L1_l + lambda_nmse·NMSE
        + lambda_bridge/C · Σ_k [a2r(k)·(k≥1) + r2a(k)·(k≤L-1)]
    """

    def __init__(self, streams: Streams, config: ObjectiveConfig) -> None:
        """Hold both streams; only the adapters have gradients."""
        super().__init__()
        self.adapter_stream = streams.adapted.model
        self._adapters = tuple(streams.adapted.layers)
        self.reference_stream = streams.reference
        self.config = config
        self.num_layers = streams.num_layers

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        cutoffs: Sequence[int],
        label_tokens: Tensor | None = None,
        real_tokens: Tensor | None = None,
    ) -> StepOutput:
        """Evaluate the objective on one micro-batch, without waiting for the device.

        Args:
            input_ids: int64 [B, S], padded on the right.
            attention_mask: int64 or bool [B, S], nonzero for real tokens.
            labels: int64 [B, S], -100 where KL and LM do not count.
            cutoffs: layers at which the streams are crossed, each in 0..L.
            label_tokens: 0-d, positions that count in KL and LM over the whole optimizer step;
                None is those of this micro-batch.
            real_tokens: 0-d, real tokens over the whole optimizer step; None likewise.

        The micro-batch's NMSE, a ratio, is weighted by its share of the real tokens.
        """
        for adapter in self._adapters:
            adapter.expect_observed_density()
        token_mask = attention_mask.bool()
        own_real_tokens = token_mask.sum()
        if label_tokens is None:
            label_tokens = losses.label_mask(labels).sum()
        if real_tokens is None:
            real_tokens = own_real_tokens
        label_tokens, real_tokens = label_tokens.clamp(min=1), real_tokens.clamp(min=1)

        with torch.no_grad(), residual_states(self.reference_stream) as reference_states:
            reference_logits = _logits(self.reference_stream, input_ids, attention_mask)
        with record(token_mask) as recorder, residual_states(self.adapter_stream) as states:
            logits = _logits(self.adapter_stream, input_ids, attention_mask)

        def distances(logits: Tensor) -> dict[str, Tensor]:
            return {
                "kl": losses.kl_sum(reference_logits, logits, labels) / label_tokens,
                "lm": losses.lm_sum(logits, labels) / label_tokens,
            }

        main = distances(logits)
        l1_L = recorder.l1() / real_tokens
        nmse_states = _nmse_by_state(states, reference_states, token_mask)
        nmse_states = nmse_states * (own_real_tokens / real_tokens)
        bridges = self._bridges(input_ids, attention_mask, cutoffs, distances)

        config = self.config
        bridge = torch.zeros_like(l1_L[0])
        for name, value in bridges.items():
            if name.split("/")[0].endswith(config.loss):
                bridge = bridge + value / len(cutoffs)
        terms = (
            (config.lambda_adapt, main[config.loss]),
            (config.l1_weight, l1_L.sum()),
            (config.lambda_nmse, nmse_states.mean()),
            (config.lambda_bridge, bridge),
        )
        loss = torch.stack([weight * term for weight, term in terms if weight > 0]).sum()

        l0_L = recorder.l0() / real_tokens
        metrics = {
            "loss": loss,
            **main,
            "reference_lm": losses.lm_sum(reference_logits, labels) / label_tokens,
            "l1": l1_L.sum(),
            "l0": l0_L.mean(),
            "nmse": nmse_states.mean(),
            "bridge": bridge,
            **{f"l1/layer_{i}": value for i, value in enumerate(l1_L)},
            **{f"l0/layer_{i}": value for i, value in enumerate(l0_L)},
            **{f"nmse/state_{i}": value for i, value in enumerate(nmse_states)},
            **bridges,
        }
        return StepOutput(
            loss, {name: value.detach() for name, value in metrics.items()}, recorder.fired()
        )

    def _bridges(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        cutoffs: Sequence[int],
        distances: Callable[[Tensor], dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """KL and LM of every mixed model; the end cutoffs have one direction only."""
        values = {}
        for cutoff in cutoffs:
            directions = {}
            if cutoff >= 1:
                directions["a2r"] = (self.adapter_stream, self.reference_stream)
            if cutoff < self.num_layers:
                directions["r2a"] = (self.reference_stream, self.adapter_stream)
            for direction, (front, back) in directions.items():
                logits = _logits(graft(front, back, cutoff), input_ids, attention_mask)
                for name, value in distances(logits).items():
                    values[f"{direction}_{name}/cutoff_{cutoff}"] = value
        return values


def sample_cutoffs(config: ObjectiveConfig, num_layers: int, *, seed: int, step: int) -> list[int]:
    """The cutoffs of one optimizer step: equal on all ranks and after a resume.

    Args:
        config: fixed cutoffs, or how many distinct ones to draw uniformly from {0..L}.
        num_layers: L.
        seed, step: together seed the draw (design §4.6).

    Raises:
        UserError: a fixed cutoff outside 0..L, or more cutoffs than L+1.
    """
    if config.lambda_bridge == 0 or config.num_cutoffs == 0:
        return []
    if config.cutoffs != "uniform":
        outside = [k for k in config.cutoffs if not 0 <= k <= num_layers]
        if outside:
            raise UserError(
                f"objective.cutoffs: {outside[0]} is outside 0..{num_layers}, the model's layers"
            )
        return list(config.cutoffs)
    if config.num_cutoffs > num_layers + 1:
        raise UserError(
            f"objective.num_cutoffs: {config.num_cutoffs} exceeds the {num_layers + 1} distinct "
            f"cutoffs of {num_layers} layers; lower it"
        )
    draw = random.Random(f"{seed}:{step}")
    return sorted(draw.sample(range(num_layers + 1), config.num_cutoffs))


def _logits(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def _nmse_by_state(
    states: Sequence[Tensor], reference_states: Sequence[Tensor], token_mask_BS: Tensor
) -> Tensor:
    """NMSE of every residual state h_0..h_L (contract §3.3), [L+1]."""
    num_elements = token_mask_BS.sum() * states[0].shape[-1]
    return torch.stack(
        [
            losses.nmse(*losses.squared_error_sums(ours, theirs, token_mask_BS), num_elements)
            for ours, theirs in zip(states, reference_states, strict=True)
        ]
    )

"""The training objective (contract §3.1-3.5): what it weighs and what it reports.

How its forward passes are run is the business of the steps, `plain` and `shared`, which must agree
key by key.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from tca_fast import losses
from tca_fast.bridging.auxiliary import auxiliary_loss
from tca_fast.bridging.inputs import Inputs, Packing
from tca_fast.bridging.streams import Streams
from tca_fast.errors import UserError
from tca_fast.sparsity import SparsityRecorder

if TYPE_CHECKING:
    from tca_fast.config import ObjectiveConfig


class StepOutput(NamedTuple):
    """What one micro-batch adds to its optimizer step.

    Attributes:
        loss: 0-d, the objective as optimised.
        metrics: 0-d tensors on the device, without gradient: loss, kl, lm, reference_lm, l1, l0
            (mean over layers), nmse, bridge, and by depth l1/layer_i, l0/layer_i, nmse/state_i,
            {a2r,r2a}_{kl,lm}/cutoff_k; l0_at_least/bits_i is the share of layers and tokens with
            at least 2^i active features; and auxk where it has a weight.
        fired: bool [L, F], features active in some real token.

    Loss and metrics are shares: their sum over the micro-batches and ranks of a step is the
    figure of the global batch.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    fired: Tensor


class Passes(NamedTuple):
    """What the forward passes of a step found.

    Attributes:
        reference_lm: 0-d, LM loss of the target summed over counted positions, in nats.
        main: "kl" and "lm" of the adapter stream, 0-d sums likewise.
        bridges: "{a2r,r2a}_{kl,lm}/cutoff_k" of every mixed model, 0-d sums likewise.
        states, reference_states: residual streams h_0..h_L of the two models, each [B, S, D].
        recorder: what the adapters did in the main pass.
    """

    reference_lm: Tensor
    main: dict[str, Tensor]
    bridges: dict[str, Tensor]
    states: Sequence[Tensor]
    reference_states: Sequence[Tensor]
    recorder: SparsityRecorder


class BridgingObjective(nn.Module, ABC):
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
        packing: Packing | None = None,
        l1_scale: float = 1.0,
        dead: Tensor | None = None,
    ) -> StepOutput:
        """Evaluate the objective on one micro-batch.

        Nothing here waits for the device. Hugging Face's attention masks do, once for every time
        they are built, to see whether the batch has any padding.

        Args:
            input_ids: int64 [B, S], padded on the right, or one packed row [1, S].
            attention_mask: int64 or bool [B, S], nonzero for real tokens.
            labels: int64 [B, S], -100 where KL and LM do not count.
            cutoffs: layers at which the streams are crossed, each in 0..L.
            label_tokens: 0-d, positions that count in KL and LM over the whole optimizer step;
                None is those of this micro-batch.
            real_tokens: 0-d, real tokens over the whole optimizer step; None likewise.
            packing: where the sequences of a packed row lie. None of them attends to another or
                predicts the first token of another, so that all figures are those of padded rows.
            l1_scale: of the L1 weight in this step, see `l1_scale_at`.
            dead: bool [L, F], features that the auxiliary loss is to revive; None is none.

        The micro-batch's NMSE, a ratio, is weighted by its share of the real tokens.
        """
        for adapter in self._adapters:
            adapter.expect_observed_density()
        token_mask = attention_mask.bool()
        if packing is not None:
            labels = packing.without_borders(labels)
        own_real_tokens = token_mask.sum()
        if label_tokens is None:
            label_tokens = losses.label_mask(labels).sum()
        if real_tokens is None:
            real_tokens = own_real_tokens
        label_tokens, real_tokens = label_tokens.clamp(min=1), real_tokens.clamp(min=1)

        passes = self._passes(Inputs(input_ids, token_mask, labels, packing), cutoffs)
        main = {name: value / label_tokens for name, value in passes.main.items()}
        bridges = {name: value / label_tokens for name, value in passes.bridges.items()}
        l1_L = passes.recorder.l1() / real_tokens
        nmse_states = _nmse_by_state(passes.states, passes.reference_states, token_mask)
        nmse_states = nmse_states * (own_real_tokens / real_tokens)

        config = self.config
        bridge = torch.zeros_like(l1_L[0])
        for name, value in bridges.items():
            if name.split("/")[0].endswith(config.loss):
                bridge = bridge + value / len(cutoffs)
        auxiliary = {}
        if self.keeps_inputs:
            auxiliary["auxk"] = self._auxiliary(passes, token_mask, dead)
            auxiliary["auxk"] = auxiliary["auxk"] * (own_real_tokens / real_tokens)
        terms = (
            (config.lambda_adapt, main[config.loss]),
            (config.l1_weight, l1_scale * l1_L.sum()),
            (config.lambda_nmse, nmse_states.mean()),
            (config.lambda_bridge, bridge),
            *((config.auxk_weight, value) for value in auxiliary.values()),
        )
        loss = torch.stack([weight * term for weight, term in terms if weight > 0]).sum()

        l0_L = passes.recorder.l0() / real_tokens
        num_powers = self._adapters[0].config.num_features.bit_length()
        at_least = passes.recorder.l0_at_least(num_powers) / (real_tokens * self.num_layers)
        metrics = {
            "loss": loss,
            **main,
            "reference_lm": passes.reference_lm / label_tokens,
            "l1": l1_L.sum(),
            "l0": l0_L.mean(),
            "nmse": nmse_states.mean(),
            "bridge": bridge,
            **auxiliary,
            **{f"l1/layer_{i}": value for i, value in enumerate(l1_L)},
            **{f"l0/layer_{i}": value for i, value in enumerate(l0_L)},
            **{f"l0_at_least/bits_{i}": value for i, value in enumerate(at_least)},
            **{f"nmse/state_{i}": value for i, value in enumerate(nmse_states)},
            **bridges,
        }
        metrics = {name: value.detach() for name, value in metrics.items()}
        return StepOutput(loss, metrics, passes.recorder.fired())

    @property
    def keeps_inputs(self) -> bool:
        """Whether the main pass has to keep what the adapters read, for the auxiliary loss."""
        return self.config.auxk_weight > 0

    def _auxiliary(self, passes: Passes, token_mask: Tensor, dead: Tensor | None) -> Tensor:
        if dead is None:
            return torch.zeros((), device=token_mask.device)
        return auxiliary_loss(
            self._adapters,
            passes.recorder.inputs(),
            passes.states,
            passes.reference_states,
            token_mask,
            dead,
            self.config.auxk_k,
        )

    @abstractmethod
    def _passes(self, inputs: Inputs, cutoffs: Sequence[int]) -> Passes:
        """Run both streams and every mixed model; at the end cutoffs one direction only."""


def l1_scale_at(step: int, config: ObjectiveConfig) -> float:
    """Share of the L1 weight in optimizer step `step`, counted from 0: min(1, step / warm-up)."""
    if not config.l1_warmup_steps:
        return 1.0
    return min(1.0, step / config.l1_warmup_steps)


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

"""How closely a model follows the target: KL, residual NMSE, next-token agreement, L0.

Shapes: B sequences, S positions, D model width, L layers. Every figure is pooled over the whole
data set (a ratio of sums, never a mean of batch means), so batch size and padding do not move it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tca_fast.errors import UserError
from tca_fast.losses import IGNORED_LABEL, kl_sum, label_mask, lm_sum, nmse, squared_error_sums
from tca_fast.residual_stream import residual_states
from tca_fast.sparsity import record
from tca_fast.subject import evaluated

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tca_fast.adapted_model import AdaptedModel


class Batch(NamedTuple):
    """Token ids, attention mask (nonzero = real) and labels (-100 = not counted), each [B, S].

    The label of a sequence's first token never counts, for nothing predicts it, and nor does that
    of padding.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


@dataclass(frozen=True, slots=True)
class Faithfulness:
    """Distances of one model from the target on one data set.

    Attributes:
        kl: KL(target || model) per counted token, nats (contract §3.1).
        lm_loss: next-token cross-entropy of the model per counted token, nats (contract §3.2).
        agreement: share of counted positions at which both models rank the same token first.
        nmse: NMSE of the residual states h_0..h_L, dimensionless (contract §3.3).
        l0: mean active features per real token in each layer; None for a model without enabled
            adapters.
        num_counted: positions behind `kl`, `lm_loss` and `agreement`.
        num_real: tokens behind `nmse` and `l0`.
    """

    kl: float
    lm_loss: float
    agreement: float
    nmse: tuple[float, ...]
    l0: tuple[float, ...] | None
    num_counted: int
    num_real: int

    @property
    def mean_nmse(self) -> float:
        """Mean over all L+1 residual states, as the objective has it."""
        return sum(self.nmse) / len(self.nmse)

    @property
    def mean_l0(self) -> float | None:
        """Mean over layers of the active features per token (contract §1.5)."""
        return None if self.l0 is None else sum(self.l0) / len(self.l0)


@dataclass(slots=True)
class _Sums:
    kl: float = 0.0
    lm: float = 0.0
    agreed: int = 0
    counted: int = 0
    real: int = 0
    error: list[float] = field(default_factory=list)
    energy: list[float] = field(default_factory=list)
    active: list[float] = field(default_factory=list)


@torch.no_grad()
def measure_faithfulness(
    model: PreTrainedModel | AdaptedModel,
    target: PreTrainedModel | AdaptedModel,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
) -> Faithfulness:
    """Compare a causal language model with the target it should follow.

    Args:
        model, target: Hugging Face causal LMs with the same vocabulary and layer shapes; either
            may carry adapters. Both are left in the train/eval mode they came in.
        batches: (input_ids, attention_mask, labels) as in `Batch`, on any device.

    Raises:
        UserError: no batch, no counted position, or models of different depth, width or
            vocabulary.
    """
    sums = _Sums()
    width = 0
    with evaluated(target) as bare_target, evaluated(model) as bare_model:
        for batch in batches:
            width = _add_batch(sums, bare_model, bare_target, Batch(*batch))
    if not sums.counted:
        raise UserError(
            "evaluation data: 0 counted tokens; give at least one sequence with two or more "
            "labelled tokens"
        )
    return Faithfulness(
        kl=sums.kl / sums.counted,
        lm_loss=sums.lm / sums.counted,
        agreement=sums.agreed / sums.counted,
        nmse=tuple(
            _pooled_nmse(error, energy, width * sums.real)
            for error, energy in zip(sums.error, sums.energy, strict=True)
        ),
        l0=tuple(count / sums.real for count in sums.active) if sums.active else None,
        num_counted=sums.counted,
        num_real=sums.real,
    )


def _add_batch(sums: _Sums, model: PreTrainedModel, target: PreTrainedModel, batch: Batch) -> int:
    """Add one batch to the running sums; returns the model width D."""
    ids, mask, labels = (tensor.to(model.device) for tensor in batch)
    mask = mask.bool()
    with residual_states(target) as target_states:
        target_logits = _logits(target, ids, mask)
    with residual_states(model) as states, record(mask) as recorder:
        logits = _logits(model, ids, mask)
    _check_comparable(states, target_states, logits, target_logits)
    # A first token after padding on the left is predicted from padding, elsewhere from nothing.
    after_padding = torch.nn.functional.pad(~mask[:, :-1], (1, 0), value=True)
    labels = labels.masked_fill(after_padding | ~mask, IGNORED_LABEL)
    counted = label_mask(labels)
    agreed = logits[:, :-1].argmax(-1) == target_logits[:, :-1].argmax(-1)
    sums.kl += kl_sum(target_logits, logits, labels).item()
    sums.lm += lm_sum(logits, labels).item()
    sums.agreed += int((agreed & counted).sum())
    sums.counted += int(counted.sum())
    sums.real += int(mask.sum())
    pairs = [squared_error_sums(*pair, mask) for pair in zip(states, target_states, strict=True)]
    _accumulate(sums.error, [error.item() for error, _ in pairs])
    _accumulate(sums.energy, [energy.item() for _, energy in pairs])
    if recorder.layers:
        _accumulate(sums.active, recorder.l0().tolist())
    return states[0].shape[-1]


def _accumulate(total: list[float], addition: list[float]) -> None:
    if not total:
        total.extend(0.0 for _ in addition)
    for index, value in enumerate(addition):
        total[index] += value


def _pooled_nmse(error: float, energy: float, num_elements: int) -> float:
    sums = torch.tensor([error, energy], dtype=torch.float64)
    return nmse(sums[0], sums[1], num_elements).item()


def _logits(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    # Positions count real tokens, so that left padding gives the figures of right padding.
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    return output.logits


def _check_comparable(
    states: list[Tensor], target_states: list[Tensor], logits: Tensor, target_logits: Tensor
) -> None:
    shape = (len(states) - 1, states[0].shape[-1], logits.shape[-1])
    target_shape = (len(target_states) - 1, target_states[0].shape[-1], target_logits.shape[-1])
    if shape != target_shape:
        raise UserError(
            f"evaluation: model has (layers, width, vocabulary) {shape}, target {target_shape}; "
            "compare models of the same shape"
        )

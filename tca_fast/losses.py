"""The distances between two models that training minimises and evaluation reports.

Shapes: B sequences, S positions, V vocabulary, D model width. Sums and counts are returned
separately, so that micro-batches and ranks of different length add up to the figure of the
whole batch. Reductions run in float32 (float64 for float64 inputs) whatever the dtype of the
models, because bfloat16 cannot resolve a small KL over a large vocabulary (contract §3.8).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED_LABEL = -100
NMSE_EPSILON = 1e-8


def label_mask(labels_BS: Tensor) -> Tensor:
    """Which positions predict a label that counts (contract §3.1).

    Args:
        labels_BS: token ids, `IGNORED_LABEL` where nothing is to be predicted.

    Returns:
        Bool [B, S-1]: position t counts when the label at t+1 does; the last position never does.
    """
    return labels_BS[:, 1:] != IGNORED_LABEL


def kl_sum(reference_logits_BSV: Tensor, logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """KL(reference || model) summed over counted positions, in nats (contract §3.1).

    Args:
        reference_logits_BSV: logits of the target; no gradient flows into them by itself.
        logits_BSV: logits of the model under training or study.
        labels_BS: labels that say which positions count.

    Returns:
        0-d tensor; divide by `label_mask(labels).sum()` for the mean.
    """
    dtype = accumulation_dtype(logits_BSV)
    reference = reference_logits_BSV[:, :-1].to(dtype).log_softmax(-1)
    model = logits_BSV[:, :-1].to(dtype).log_softmax(-1)
    kl_BS = F.kl_div(model, reference, reduction="none", log_target=True).sum(-1)
    return torch.where(label_mask(labels_BS), kl_BS, 0.0).sum()


def lm_sum(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Next-token cross-entropy summed over counted positions, in nats (contract §3.2).

    Unlike the mean of the reference this is 0, not NaN, when no position counts.
    """
    logits = logits_BSV[:, :-1].to(accumulation_dtype(logits_BSV))
    return F.cross_entropy(
        logits.flatten(0, 1),
        labels_BS[:, 1:].flatten(),
        ignore_index=IGNORED_LABEL,
        reduction="sum",
    )


def squared_error_sums(
    states_BSD: Tensor, reference_states_BSD: Tensor, token_mask_BS: Tensor
) -> tuple[Tensor, Tensor]:
    """Squared distance to, and energy of, the reference's residual stream over real tokens.

    Args:
        states_BSD, reference_states_BSD: residual streams of the two models at the same depth.
        token_mask_BS: nonzero where a token is real.

    Returns:
        Two 0-d tensors: sum of M·(h - h_ref)² and sum of M·h_ref² (contract §3.3).
    """
    mask = token_mask_BS.bool().unsqueeze(-1)
    error = _SquaredError.apply(states_BSD, reference_states_BSD, mask)
    reference = reference_states_BSD.to(accumulation_dtype(states_BSD))
    return error, torch.where(mask, reference.square(), 0.0).sum()


class _SquaredError(torch.autograd.Function):
    """Sum of M·(h - h_ref)², which keeps its arguments for the backward and nothing else.

    A model has one such sum for every state, whose differences in float32 would together be
    larger than the states.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(states, reference, mask)
        return _masked_difference(states, reference, mask).square_().sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # d/dh Σ M·(h - h_ref)² = 2·M·(h - h_ref)
        gradient = _masked_difference(*ctx.saved_tensors).mul_(2 * upstream)
        states, reference, _ = ctx.saved_tensors
        of_states, of_reference, _ = ctx.needs_input_grad
        return (
            gradient.to(states.dtype) if of_states else None,
            -gradient.to(reference.dtype) if of_reference else None,
            None,
        )


def _masked_difference(states: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    dtype = accumulation_dtype(states)
    # Not a product with the mask: what lies in the padding may not be finite.
    return torch.where(mask, states.to(dtype) - reference.to(dtype), 0.0)


def nmse(error_sum: Tensor, energy_sum: Tensor, num_elements: Tensor | int) -> Tensor:
    """Normalised mean squared error of one residual state (contract §3.3).

    Args:
        error_sum, energy_sum: from `squared_error_sums`.
        num_elements: D times the number of real tokens; 0 gives 0.

    Returns:
        0-d tensor: (error/N) / (energy/N + 1e-8), dimensionless.
    """
    num_elements = torch.as_tensor(num_elements, device=error_sum.device).clamp(min=1)
    return (error_sum / num_elements) / (energy_sum / num_elements + NMSE_EPSILON)


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype sums are computed in: float64 for float64, float32 for everything else."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32

"""AuxK: a gradient for dead features of TopK adapters (Gao et al. 2024, arXiv 2406.04093, §A.2).

A feature that is never among the k largest gets no gradient and stays dead. Here the dead features
alone explain what the adapter stream still gets wrong after their layer, and are trained to.

Shapes: B sequences, S positions, D model width, F features, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tca_fast import ops
from tca_fast.adapter import TranscoderAdapter
from tca_fast.losses import squared_error_sums


def auxiliary_loss(
    adapters: Sequence[TranscoderAdapter],
    inputs: Sequence[Tensor],
    states: Sequence[Tensor],
    reference_states: Sequence[Tensor],
    token_mask_BS: Tensor,
    dead_LF: Tensor,
    k: int | None = None,
) -> Tensor:
    """The mean over layers of how badly dead features explain the error of their layer.

    With e = h_ref - h, the error of the residual stream after layer l, and
    ê = Σ over the k largest dead features of relu(W_enc·x + b_enc)·W_dec:

        aux_l = min(1, dead_l / k) · Σ_t m_t‖ê_t - e_t‖² / Σ_t m_t‖e_t‖²

    e and x are constants, so no other layer and no living feature gets a gradient. `b_dec`, which
    is in h already, is not added again. The quotient makes the weight mean the same at any error,
    and a handful of dead features does not weigh as much as k. Without dead features it is 0. A
    dead feature whose pre-activation is positive for no token gets no gradient either.

    Args:
        adapters: of all layers.
        inputs: what they read, L tensors [B, S, D].
        states, reference_states: residual streams h_0..h_L of both models, [B, S, D].
        token_mask_BS: nonzero where a token is real.
        dead_LF: bool, features that have not fired for long.
        k: dead features of a token; None is half the model width, at most F.

    Returns:
        0-d, dimensionless; differentiable with respect to the dead features' W_enc, b_enc, W_dec.
    """
    terms = []
    for layer, (adapter, x, dead_F) in enumerate(zip(adapters, inputs, dead_LF, strict=True)):
        error = (reference_states[layer + 1] - states[layer + 1]).detach()
        num_features, width = adapter.W_enc.shape
        most = min(num_features, k or max(1, width // 2))
        explained = explain(adapter, x.to(error.dtype), dead_F, most)
        missed, energy = squared_error_sums(explained, error, token_mask_BS)
        weight = (dead_F.sum() / most).clamp(max=1)
        # A stream without error has nothing to explain.
        terms.append(weight * missed / energy.clamp(min=torch.finfo(energy.dtype).tiny))
    return torch.stack(terms).mean()


def explain(adapter: TranscoderAdapter, x: Tensor, dead_F: Tensor, k: int) -> Tensor:
    """What the k largest dead features of each token add, the shape of `x`, without any bias."""
    W_enc, b_enc, W_dec = (
        weight.to(x.dtype) for weight in (adapter.W_enc, adapter.b_enc, adapter.W_dec)
    )
    # Below every dead feature, and dropped by the ReLU.
    alone = torch.where(dead_F, b_enc, -torch.inf)
    return ops.decode(ops.encode(x, W_enc, alone, k=k), W_dec).view(x.shape)

"""The layers that are compared: ours, and what people run today.

Each takes x, mlp_out and the weights and returns (y, l1): the output and the L1 summed over
tokens. All compute the statistics a training step needs (L1, L0, features that fired).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cases import Case
from tca_fast import ops

Layer = Callable[..., tuple[Tensor, Tensor]]


def dense_eager(case: Case) -> Layer:
    """Two dense products with bias and the statistics as passes over [T, F] (contract §1)."""

    def layer(
        x: Tensor, mlp_out: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor
    ) -> tuple[Tensor, Tensor]:
        features = F.linear(x, W_enc, b_enc)
        if case.k is not None:
            values, indices = features.topk(case.k, dim=1)
            features = torch.zeros_like(features).scatter(1, indices, values)
        features = features.relu()
        y = mlp_out + F.linear(features, W_dec.T, b_dec)
        l1 = (features * W_dec.norm(dim=1)).sum(-1).sum()
        with torch.no_grad():
            active = features > 0
            active.float().sum(-1).mean()
            active.any(dim=0)
        return y, l1

    return layer


def torch_sparse(case: Case) -> Layer:
    """Skips zeros with torch's own `nonzero`, `index_select` and `index_add`."""

    def layer(
        x: Tensor, mlp_out: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor
    ) -> tuple[Tensor, Tensor]:
        features = F.linear(x, W_enc, b_enc)
        if case.k is not None:
            values, indices = features.topk(case.k, dim=1)
            features = torch.zeros_like(features).scatter(1, indices, values)
        features = features.relu()
        token, feature = features.nonzero(as_tuple=True)
        value = features[token, feature]
        rows = W_dec.index_select(0, feature)
        y = (mlp_out + b_dec).index_add(0, token, rows * value.unsqueeze(1))
        l1 = (value * W_dec.norm(dim=1)[feature]).sum()
        with torch.no_grad():
            torch.bincount(token, minlength=case.tokens).float().mean()
            torch.zeros(case.features, dtype=torch.bool).index_fill_(0, feature, True)
        return y, l1

    return layer


def ours(case: Case) -> Layer:
    """`ops.adapter` with the backend that serves the device."""
    density: list[float | None] = [None]

    def layer(
        x: Tensor, mlp_out: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor
    ) -> tuple[Tensor, Tensor]:
        output = ops.adapter(
            x, mlp_out, W_enc, b_enc, W_dec, b_dec, k=case.k, expected_density=density[0]
        )
        density[0] = int(output.num_active) / (case.tokens * case.features)
        return output.y, output.l1

    return layer


def compiled_dense(case: Case) -> Layer:
    """`torch.compile` of the dense layer."""
    return torch.compile(dense_eager(case), dynamic=False)


BASELINES: dict[str, Callable[[Case], Layer]] = {
    "dense eager": dense_eager,
    "dense compiled": compiled_dense,
    "torch sparse": torch_sparse,
}

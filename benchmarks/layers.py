"""The implementations that are compared: ours, and what people run today.

Each has an encoder, a decoder and the layer with the statistics that a training step needs (L1,
L0, features that fired: contract §1). What `encode` returns is the implementation's own form of
the active features; `to_dense` makes [T, F] of it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cases import Case
from tca_fast import ops


class LayerOutput(NamedTuple):
    """What a layer computes.

    Attributes:
        y: [T, D].
        l1: 0-d, decoder-norm-weighted L1 summed over tokens.
        l0: 0-d, mean active features per token.
        fired: bool [F].
    """

    y: Tensor
    l1: Tensor
    l0: Tensor
    fired: Tensor


class Implementation(Protocol):
    """One way of computing the adapter branch at one case."""

    def encode(self, x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Any:
        """Active features of every token."""

    def to_dense(self, features: Any) -> Tensor:
        """What `encode` returned as [T, F]."""

    def decode(self, features: Any, W_dec: Tensor, b_dec: Tensor) -> Tensor:
        """What the branch adds, [T, D]."""

    def layer(
        self, x: Tensor, mlp_out: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor
    ) -> LayerOutput:
        """Branch added to `mlp_out`, with statistics."""


class DenseEager:
    """Two dense products with bias, and the statistics as passes over [T, F] (contract §1)."""

    def __init__(self, case: Case) -> None:
        self.k = case.k

    def encode(self, x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
        """Dense activations [T, F]."""
        z = F.linear(x, W_enc, b_enc)
        if self.k is not None:
            values, indices = z.topk(self.k, dim=1)
            z = torch.zeros_like(z).scatter(1, indices, values)
        return z.relu()

    def to_dense(self, features: Tensor) -> Tensor:
        """The activations as they are."""
        return features

    def decode(self, features: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
        """One dense product with bias."""
        return F.linear(features, W_dec.T, b_dec)

    def layer(
        self, x: Tensor, mlp_out: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor
    ) -> LayerOutput:
        """The layer as the published code computes it."""
        features = self.encode(x, W_enc, b_enc)
        y = mlp_out + self.decode(features, W_dec, b_dec)
        l1 = (features * W_dec.norm(dim=1)).sum(-1).sum()
        with torch.no_grad():
            active = features > 0
            return LayerOutput(y, l1, active.float().sum(-1).mean(), active.any(dim=0))


class DenseCompiled(DenseEager):
    """`torch.compile` of the dense implementation, one graph for each method and shape."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        # Graphs of earlier cases count against the compiler's limit, beyond which it refuses.
        torch.compiler.reset()
        for name in ("encode", "decode", "layer"):
            compiled = torch.compile(getattr(super(), name), dynamic=False, fullgraph=True)
            setattr(self, name, compiled)


class TorchSparse:
    """Skips zeros with torch's own `nonzero`, `index_select` and `index_add`."""

    def __init__(self, case: Case) -> None:
        self.dense = DenseEager(case)
        self.shape = case.tokens, case.features

    def encode(self, x: Tensor, W_enc: Tensor, b_enc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Token, feature and activation of every active pair."""
        features = self.dense.encode(x, W_enc, b_enc)
        token, feature = features.nonzero(as_tuple=True)
        return token, feature, features[token, feature]

    def to_dense(self, features: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Scattered into zeros."""
        token, feature, value = features
        return value.new_zeros(self.shape).index_put((token, feature), value)

    def decode(
        self, features: tuple[Tensor, Tensor, Tensor], W_dec: Tensor, b_dec: Tensor
    ) -> Tensor:
        """One gathered row for every active pair, added to its token."""
        return self._add(b_dec.expand(self.shape[0], -1), features, W_dec)

    def layer(
        self, x: Tensor, mlp_out: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor
    ) -> LayerOutput:
        """Statistics over active pairs only."""
        token, feature, value = features = self.encode(x, W_enc, b_enc)
        y = self._add(mlp_out + b_dec, features, W_dec)
        l1 = (value * W_dec.norm(dim=1)[feature]).sum()
        with torch.no_grad():
            l0 = torch.bincount(token, minlength=self.shape[0]).float().mean()
            fired = torch.zeros(self.shape[1], dtype=torch.bool, device=x.device)
            return LayerOutput(y, l1, l0, fired.index_fill_(0, feature, True))

    def _add(self, y: Tensor, features: tuple[Tensor, Tensor, Tensor], W_dec: Tensor) -> Tensor:
        token, feature, value = features
        return y.index_add(0, token, W_dec.index_select(0, feature) * value.unsqueeze(1))


class Ours:
    """The operators of the package, with the backend that serves the device or a named one.

    The layer is told the case's density, as training tells it that of the last step.
    """

    def __init__(self, case: Case, backend: str | None = None) -> None:
        self.k = case.k
        self.density = case.active / case.features
        self._backend = backend

    def _chosen(self) -> AbstractContextManager[None]:
        return ops.backend(self._backend) if self._backend else nullcontext()

    def encode(self, x: Tensor, W_enc: Tensor, b_enc: Tensor) -> ops.ActiveFeatures:
        """`ops.encode`."""
        with self._chosen():
            return ops.encode(x, W_enc, b_enc, k=self.k)

    def to_dense(self, features: ops.ActiveFeatures) -> Tensor:
        """Unpacked."""
        return features.to_dense()

    def decode(self, features: ops.ActiveFeatures, W_dec: Tensor, b_dec: Tensor) -> Tensor:
        """`ops.decode`."""
        with self._chosen():
            return ops.decode(features, W_dec, b_dec)

    def layer(
        self, x: Tensor, mlp_out: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor
    ) -> LayerOutput:
        """`ops.adapter`."""
        with self._chosen():
            output = ops.adapter(
                x, mlp_out, W_enc, b_enc, W_dec, b_dec, k=self.k, expected_density=self.density
            )
        return LayerOutput(output.y, output.l1, output.l0.float().mean(), output.fired)


OURS = "tca_fast"
DENSE = "dense eager"
COMPILED = "dense compiled"
TORCH_SPARSE = "torch sparse"
IMPLEMENTATIONS: dict[str, Callable[[Case], Implementation]] = {
    OURS: Ours,
    DENSE: DenseEager,
    COMPILED: DenseCompiled,
    TORCH_SPARSE: TorchSparse,
}
BY_BACKEND = {
    f"{OURS}, {name}": partial(Ours, backend=name)
    for name in ("reference", "cpp", "triton", "cuda")
}

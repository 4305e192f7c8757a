"""What the adapters of one forward pass did: L1, L0 and the features that fired.

A recorder is opened around a forward pass and handed back to whoever opened it; nothing is left
behind on the modules. Without one, the adapters keep no statistics.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from tca_fast.ops import AdapterOutput


class _Statistics(NamedTuple):
    """Of one layer: an `AdapterOutput` without `y`, which would be kept until the backward."""

    l1: Tensor
    l0: Tensor
    fired: Tensor


class SparsityRecorder:
    """Statistics of every adapter that ran while it was open, by layer (contract §1.4-1.5).

    Sums run over the real tokens of the pass; divide by their number for the means.
    """

    def __init__(self, token_mask: Tensor | None = None, *, keeps_inputs: bool = False) -> None:
        """Start with nothing.

        Args:
            token_mask: bool, the leading dimensions of the hidden states; None is all.
            keeps_inputs: hold on to what every adapter read, see `inputs`.
        """
        self.token_mask = token_mask
        self._keeps_inputs = keeps_inputs
        self._statistics: dict[int, _Statistics] = {}
        self._inputs: dict[int, Tensor] = {}

    def add(self, layer: int, output: AdapterOutput, x: Tensor | None = None) -> None:
        """Record the pass of one layer, and its input.

        Raises:
            RuntimeError: that layer already ran in this recording.
        """
        if layer in self._statistics:
            raise RuntimeError(f"layer {layer} ran twice in one sparsity recording")
        self._statistics[layer] = _Statistics(output.l1, output.l0, output.fired)
        if self._keeps_inputs and x is not None:
            self._inputs[layer] = x.detach()

    def inputs(self) -> list[Tensor]:
        """What the adapters read, without gradient, [B, S, D] for each layer that ran."""
        return [self._inputs[layer] for layer in self.layers]

    @property
    def layers(self) -> list[int]:
        """Layers that ran, ascending."""
        return sorted(self._statistics)

    def l1(self) -> Tensor:
        """Decoder-norm-weighted L1 summed over tokens, [layers that ran]; differentiable."""
        return torch.stack([self._statistics[layer].l1 for layer in self.layers])

    def l0(self) -> Tensor:
        """Active features summed over tokens, float32 [layers that ran]."""
        totals = [self._statistics[layer].l0.sum(dtype=torch.float32) for layer in self.layers]
        return torch.stack(totals)

    def l0_by_token(self) -> Tensor:
        """Active features of each token, int32 [layers that ran, T]; 0 for masked tokens."""
        return torch.stack([self._statistics[layer].l0 for layer in self.layers])

    def l0_at_least(self, num_powers: int) -> Tensor:
        """Pairs of a layer and a token with at least 1, 2, 4, … active features.

        Args:
            num_powers: how many powers of two, from 2⁰ on.

        Returns:
            int64 [num_powers], sums over layers and real tokens: a histogram of L0 from above.
        """
        counts = self.l0_by_token().flatten()
        powers = 2 ** torch.arange(num_powers, device=counts.device)
        return (counts.unsqueeze(1) >= powers).sum(0)

    def fired(self) -> Tensor:
        """Features active in some real token, bool [layers that ran, F]."""
        return torch.stack([self._statistics[layer].fired for layer in self.layers])


_open: list[SparsityRecorder] = []


@contextmanager
def record(
    token_mask: Tensor | None = None, *, keeps_inputs: bool = False
) -> Iterator[SparsityRecorder]:
    """Record the sparsity of the adapters that run inside the block.

    Args:
        token_mask: bool, one entry per token of the batch; False leaves padding out.
        keeps_inputs: also hold on to what the adapters read.
    """
    recorder = SparsityRecorder(token_mask, keeps_inputs=keeps_inputs)
    _open.append(recorder)
    try:
        yield recorder
    finally:
        _open.remove(recorder)


def current() -> SparsityRecorder | None:
    """The innermost open recorder, or None."""
    return _open[-1] if _open else None


class FeatureAges(torch.nn.Module):
    """How many real tokens ago each feature last fired.

    Counts tokens, not sequences, and leaves padding and validation out, so that the figure means
    the same for any batch shape (the reference counts sequences and padding: contract §1.5).

    Attributes:
        tokens: int64 buffer [L, F]; saved with the training state.
    """

    tokens: Tensor

    def __init__(self, num_layers: int, num_features: int) -> None:
        super().__init__()
        self.register_buffer("tokens", torch.zeros(num_layers, num_features, dtype=torch.int64))

    def update(self, fired_LF: Tensor, num_tokens: Tensor | int) -> None:
        """Age all features by `num_tokens` and reset those that fired (bool [L, F])."""
        self.tokens.add_(num_tokens).masked_fill_(fired_LF, 0)

    def dead(self, after_tokens: int) -> Tensor:
        """Features that have not fired for `after_tokens` tokens, bool [L, F]."""
        return self.tokens >= after_tokens

    def num_dead(self, after_tokens: int) -> Tensor:
        """How many these are in each layer, int64 [L]."""
        return self.dead(after_tokens).sum(1)

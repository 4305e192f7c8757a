"""Which features were active, by layer and pass: a recording of whole passes or of a generation.

Nothing is computed or kept unless a recording is open.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from tca_fast.errors import UserError
from tca_fast.ops import ActiveFeatures


class Step(NamedTuple):
    """One forward pass.

    Attributes:
        shape: leading dimensions of the hidden states, usually [B, S]; T is their product.
        layers: active features of the T tokens, by layer; values are those before any gain.
    """

    shape: tuple[int, ...]
    layers: dict[int, ActiveFeatures]


class Recording:
    """Active features of every layer in every pass while it was open.

    During `generate` with a KV cache the first step is the prompt, and each later one holds the
    token that was generated before it, of every row of the batch. Beam search reorders the rows
    between steps, and assisted generation runs tokens that it may not keep; both are as they ran.

    Attributes:
        steps: in the order they ran.
    """

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def add(self, layer: int, active: ActiveFeatures, shape: tuple[int, ...]) -> None:
        """Record one layer; the one that follows a higher or equal layer begins a new step."""
        if not self.steps or layer <= max(self.steps[-1].layers):
            self.steps.append(Step(tuple(shape), {}))
        kept = active.trim()
        # A copy: what is trimmed off would otherwise stay in memory, [T, F] of it.
        self.steps[-1].layers[layer] = ActiveFeatures(
            kept.row_ptr, kept.feature.clone(), kept.value.detach().clone(), kept.num_features
        )

    def layer(self, layer: int) -> ActiveFeatures:
        """Active features of one layer, the tokens of all steps one after another.

        Raises:
            UserError: that layer did not run in every step, or nothing ran.
        """
        if not self.steps or any(layer not in step.layers for step in self.steps):
            raise UserError(
                f"layer: {layer} did not run in every step of this recording of "
                f"{len(self.steps)} steps; run the adapted model inside the block"
            )
        parts = [step.layers[layer] for step in self.steps]
        counts = torch.cat([part.counts() for part in parts])
        return ActiveFeatures(
            torch.nn.functional.pad(counts.cumsum(0), (1, 0)),
            torch.cat([part.feature for part in parts]),
            torch.cat([part.value for part in parts]),
            parts[0].num_features,
        )


_open: list[Recording] = []


@contextmanager
def record() -> Iterator[Recording]:
    """Record the active features of the adapters that run inside the block.

    Outputs are unchanged to the last bit: features are computed once more beside the adapter, which
    costs one encoder product per layer and waits for the device.
    """
    recording = Recording()
    _open.append(recording)
    try:
        yield recording
    finally:
        _open.remove(recording)


def current() -> Recording | None:
    """The innermost open recording, or None."""
    return _open[-1] if _open else None

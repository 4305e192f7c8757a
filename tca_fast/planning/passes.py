"""How often a training step runs a layer or the head, and what that costs (performance §4).

Shapes: T tokens, D model width, F features, V vocabulary, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tca_fast.config import ObjectiveConfig
from tca_fast.planning.shapes import ModelShape


class Passes(NamedTuple):
    """Layer and head passes of one step of the shared objective, expected over its cutoffs.

    Attributes:
        adapter_forward, reference_forward: layers run of either stream.
        adapter_backward, reference_backward: layers back-propagated.
        head_forward, head_backward: evaluations of the head over all tokens.
    """

    adapter_forward: float
    reference_forward: float
    adapter_backward: float
    reference_backward: float
    head_forward: float
    head_backward: float

    def with_checkpointing(self) -> Passes:
        """Every layer that is back-propagated is run once more before."""
        return self._replace(
            adapter_forward=self.adapter_forward + self.adapter_backward,
            reference_forward=self.reference_forward + self.reference_backward,
        )


def layer_passes(num_layers: int, objective: ObjectiveConfig, *, shares_ends: bool) -> Passes:
    """Passes of the shared step.

    Both streams run whole once. A cutoff k adds layers k..L-1 of the reference from the adapter
    stream's state (a2r) and of the adapter stream from the reference's (r2a), each forward and
    backward, and two heads. For k uniform on {0..L} that is L·(L-1)/(2·(L+1)) layers each, 13.03
    at L = 28. Where the streams share embedding and head, r2a(0) and a2r(L) are the main pass.

    Args:
        num_layers: L.
        objective: cutoffs, and whether layers are recomputed in the backward.
        shares_ends: the backbone is the target.
    """
    cutoffs: list[int] = []
    share = 1.0
    if objective.lambda_bridge > 0 and objective.num_cutoffs > 0:
        if objective.cutoffs == "uniform":
            cutoffs = list(range(num_layers + 1))
            share = objective.num_cutoffs / len(cutoffs)
        else:
            cutoffs = list(objective.cutoffs)
    a2r = [k for k in cutoffs if k >= 1 and not (shares_ends and k == num_layers)]
    r2a = [k for k in cutoffs if k < num_layers and not (shares_ends and k == 0)]
    reference = share * sum(num_layers - k for k in a2r)
    adapter = share * sum(num_layers - k for k in r2a)
    heads = share * (len(a2r) + len(r2a))
    passes = Passes(
        num_layers + adapter, num_layers + reference, num_layers + adapter, reference,
        2 + heads, 1 + heads,
    )  # fmt: skip
    return passes.with_checkpointing() if objective.gradient_checkpointing else passes


@dataclass(frozen=True)
class LayerWork:
    """Floating-point operations, 2 for each multiplication, of one layer or head over T tokens."""

    base_forward: float
    base_backward: float
    adapter_forward: float
    adapter_backward: float
    head: float


def layer_work(
    shape: ModelShape, num_features: int, tokens: int, sequences: float, *, is_dense: bool
) -> LayerWork:
    """Products of one layer pass.

    Frozen layers have no weight gradients, so their backward is as many products as their forward;
    attention, causal, costs 2.5 times its forward (scores are computed again). A sparse adapter
    costs its encoder product, whose active pairs are too few to count; a dense one has two products
    forward and four backward.

    Args:
        shape: of the model.
        num_features: F.
        tokens, sequences: T, in sequences of equal length.
        is_dense: adapters with many active features, as at the start of training.
    """
    product = 2.0 * tokens
    linear = product * (shape.mlp_parameters + shape.attention_parameters)
    attention = 2.0 * tokens * (tokens / sequences) * shape.query_width
    encoder = product * shape.hidden_size * num_features
    return LayerWork(
        linear + attention,
        linear + 2.5 * attention,
        2 * encoder if is_dense else encoder,
        4 * encoder if is_dense else 0.0,
        product * shape.hidden_size * shape.vocab_size,
    )


def step_flops(passes: Passes, work: LayerWork) -> float:
    """Floating-point operations of one step."""
    return (
        passes.adapter_forward * (work.base_forward + work.adapter_forward)
        + passes.reference_forward * work.base_forward
        + passes.adapter_backward * (work.base_backward + work.adapter_backward)
        + passes.reference_backward * work.base_backward
        + (passes.head_forward + passes.head_backward) * work.head
    )

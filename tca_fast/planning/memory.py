"""Memory of one rank, by part, at the fullest moment of a training step.

What a step keeps is what autograd saves, tensor by tensor, for the layers of Qwen2 and Llama under
the shared objective; docs/planning.md lists it and compares it with measured runs. The moments
looked at are the end of the forward, when every graph is whole, and each layer's backward after it,
in which activations go and gradients come.

Shapes: T tokens, D model width, F features, V vocabulary, L layers, k a cutoff.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tca_fast.config import AdapterConfig, ObjectiveConfig
from tca_fast.planning.shapes import ModelShape

FLOAT32 = 4
# `bridging.head`: chunks of a sixteenth of the tokens, but of at least so many bytes.
_NUM_CHUNKS, _LEAST_CHUNK_BYTES = 16, 2**23
# Tensors [C, V] alive at once in a chunk: both of the teacher, the student's and their difference.
_CHUNK_TENSORS = 4
# DeepSpeed's defaults: elements in a reduction bucket, and parameters of ZeRO-3 held whole.
REDUCE_BUCKET = 500_000_000
MAX_LIVE_PARAMETERS = 1_000_000_000


@dataclass(frozen=True)
class Placement:
    """Where a rank runs and how the training state is divided.

    Attributes:
        stage: of ZeRO; None is one process without DeepSpeed.
        num_ranks: that divide the state.
        itemsize: bytes of a frozen weight and of an activation.
        device: "cuda" or "cpu".
        backbone: model that gives everything but the MLPs; "base" stores two whole models.
    """

    stage: int | None = None
    num_ranks: int = 1
    itemsize: int = 2
    device: str = "cuda"
    backbone: str = "target"


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one rank.

    Attributes:
        parts: by name, at the fullest moment; they add up to `peak`.
        moment: which moment that is.
    """

    parts: Mapping[str, int]
    moment: str

    @property
    def peak(self) -> int:
        """Bytes at the fullest moment."""
        return sum(self.parts.values())


def adapter_parameters(shape: ModelShape, config: AdapterConfig) -> int:
    """Of all layers: L·(2·D·F + F + D)."""
    width, features = shape.hidden_size, config.num_features
    bias = width if config.decoder_bias else 0
    return shape.num_hidden_layers * (2 * width * features + features + bias)


def plan_memory(
    shape: ModelShape,
    adapter: AdapterConfig,
    objective: ObjectiveConfig,
    *,
    tokens: int,
    placement: Placement,
    sequences: int = 1,
    has_mask: bool | None = None,
    micro_batches: int = 1,
) -> MemoryPlan:
    """Memory of one rank whose forward takes `tokens` tokens.

    Features count as at the start of training, where half of them fire and activations are kept
    densely. The cutoffs are those that need most memory.

    Args:
        shape: of either model of the pair.
        adapter: features and activation.
        objective: cutoffs and activation checkpointing.
        tokens, sequences: T, in sequences of equal length.
        placement: where.
        has_mask: attention is given a mask rather than told that it is causal, as with padding and
            with packed rows unless flash attention is used; None is whether there is padding.
        micro_batches: forwards of a rank in one optimizer step.
    """
    mask = tokens // sequences if (sequences > 1 if has_mask is None else has_mask) else 0
    step = _Step(shape, adapter, objective, tokens, mask, placement)
    trained = adapter_parameters(shape, adapter)
    gradients = _Gradients(trained, shape, placement, accumulates=micro_batches > 1)
    moments = step.moments(gradients)
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    return MemoryPlan({**_state(shape, trained, adapter, placement), **moments[moment]}, moment)


def _state(
    shape: ModelShape, trained: int, adapter: AdapterConfig, placement: Placement
) -> dict[str, int]:
    """Weights and optimizer: what does not depend on the batch."""
    mlps = shape.num_hidden_layers * shape.mlp_parameters
    shared = shape.parameters - mlps
    copies = 2 if placement.backbone == "base" else 1
    stage, ranks = placement.stage, placement.num_ranks
    of_optimizer = ranks if stage else 1
    of_weights = ranks if stage == 3 else 1
    # One process trains float32 parameters; DeepSpeed computes in the dtype of the frozen weights
    # and ZeRO updates a float32 copy of its part.
    stored = FLOAT32 if stage is None else placement.itemsize
    return {
        "frozen, in both streams": copies * shared * placement.itemsize // of_weights,
        "frozen, MLPs of both": 2 * mlps * placement.itemsize // of_weights,
        "adapters": trained * stored // of_weights,
        "adapters, master copy": trained * FLOAT32 // ranks if stage else 0,
        "optimizer": 2 * trained * FLOAT32 // of_optimizer,
        "feature ages": 8 * shape.num_hidden_layers * adapter.num_features,
    }


class _Gradients:
    """Gradients of the adapters and the buffers that reduce them, through a step.

    A parameter that two passes use gets its gradient when the backward of both is done; until then
    the first one's waits whole on every rank, whatever the stage.
    """

    def __init__(
        self, trained: int, shape: ModelShape, placement: Placement, *, accumulates: bool
    ) -> None:
        stage, ranks, size = placement.stage, placement.num_ranks, placement.itemsize
        self.layer = trained * (FLOAT32 if stage is None else size) // shape.num_hidden_layers
        # A bucket is reserved in full; untouched pages of it cost a CPU nothing.
        elements = min(REDUCE_BUCKET, trained) if placement.device == "cpu" else REDUCE_BUCKET
        bucket = 0 if stage is None else size * elements
        # What a rank keeps in the end: everything, or its part in float32.
        whole = self.layer * shape.num_hidden_layers
        part = trained * FLOAT32 // ranks
        #: Bytes before a backward; of buffers throughout; the most that arrived gradients take; of
        #: buffers once all have arrived.
        self.before, self.buffers, self.most, self.at_end = 0, 0, whole, 0
        if stage in (None, 0):
            self.before = whole if accumulates else 0
            self.at_end = bucket
        elif stage == 1:
            # DeepSpeed accumulates in float32 beside bfloat16 gradients.
            self.before = trained * FLOAT32 if size < FLOAT32 else whole if accumulates else 0
            self.at_end = part + bucket
        elif stage == 2:
            # The bucket is made anew in every backward, which a CPU notices as it fills.
            self.before = part if accumulates else 0
            self.buffers = 0 if placement.device == "cpu" else bucket
            self.most = part + bucket - self.buffers
        else:
            self.before, self.buffers, self.most = part, bucket, 0
        mlps = shape.num_hidden_layers * shape.mlp_parameters
        live = min(MAX_LIVE_PARAMETERS, shape.parameters + mlps + trained)
        #: Weights that ZeRO-3 holds whole while it uses them.
        self.gathered = live * size if stage == 3 else 0

    def during(self, waiting: int, arrived: int) -> int:
        """Bytes while gradients of some layers wait and those of others have arrived."""
        return self.before + waiting * self.layer + min(arrived * self.layer, self.most)


class _Step:
    """What a forward keeps and its backward frees, layer by layer."""

    def __init__(
        self,
        shape: ModelShape,
        adapter: AdapterConfig,
        objective: ObjectiveConfig,
        tokens: int,
        mask: int,
        placement: Placement,
    ) -> None:
        self.shape, self.objective = shape, objective
        self.tokens, self.placement = tokens, placement
        self.num_layers = shape.num_hidden_layers
        size = placement.itemsize
        self.state = tokens * shape.hidden_size * size
        self.frozen_layer = _frozen_layer(shape, tokens, mask, size)
        self.adapter_layer = self.frozen_layer + _adapter(shape, adapter, tokens, placement)
        # The backward of one layer: gradients of the pre-activations, then, when these are gone, of
        # the three inner tensors of the MLP.
        inner = max(3 * shape.intermediate_size, adapter.num_features)
        self.layer_backward = tokens * inner * size

    def moments(self, gradients: _Gradients) -> dict[str, dict[str, int]]:
        """Parts by moment."""
        a2r, r2a = self._suffixes()
        depth = self.num_layers
        students = 1 + len(a2r) + len(r2a)
        kept = {
            "residual states": (2 * (depth + 1) + students) * self.state,
            "activations, adapter stream": self._kept_by_stream(depth),
            "activations, a2r": sum(self._kept(n, is_adapter=False) for n in a2r),
            "activations, r2a": sum(self._kept(n, is_adapter=True) for n in r2a),
            "logits": 0,
            "backward of one layer": 0,
            "gradients": gradients.during(0, 0),
            "communication": gradients.buffers + gradients.gathered,
        }
        found = {"end of the forward": {**kept, "logits": self._logits()}}
        # Autograd goes back through what was made last first: r2a, then a2r, then the main pass.
        recomputed = self.adapter_layer if self.objective.gradient_checkpointing else 0
        backward = {**kept, "backward of one layer": self.layer_backward + recomputed}
        crossed = max([0, *r2a])
        if r2a:
            found["start of the backward through r2a"] = dict(backward)
            backward["activations, r2a"] = self._kept(1, is_adapter=True)
            found["end of the backward through r2a"] = {
                **backward,
                "gradients": gradients.during(waiting=crossed, arrived=0),
            }
        backward |= {"activations, r2a": 0, "activations, a2r": 0}
        for layer in reversed(range(depth)):
            arrived = depth - layer - 1
            # The gradient of this layer is made beside the one that r2a may have left.
            waiting = max(0, crossed - arrived) + 1
            found[f"backward of layer {layer}"] = {
                **backward,
                "activations, adapter stream": self._kept_by_stream(layer + 1),
                "gradients": gradients.during(waiting, arrived),
            }
        nothing = {name: 0 for name in kept}
        found["reduction of gradients"] = {
            **nothing,
            "gradients": gradients.during(0, arrived=depth),
            "communication": gradients.at_end + gradients.buffers + gradients.gathered,
        }
        return found

    def _suffixes(self) -> tuple[list[int], list[int]]:
        """Layers run again by a2r and r2a, for the cutoffs that keep most."""
        objective, depth = self.objective, self.num_layers
        if objective.lambda_bridge == 0 or objective.num_cutoffs == 0:
            return [], []
        shares_ends = self.placement.backbone == "target"
        if objective.cutoffs == "uniform":
            cutoffs = list(range(1, 1 + objective.num_cutoffs))
        else:
            cutoffs = list(objective.cutoffs)
        a2r = [depth - k for k in cutoffs if k >= 1 and not (shares_ends and k >= depth)]
        r2a = [depth - k for k in cutoffs if k < depth and not (shares_ends and k == 0)]
        return a2r, r2a

    def _kept_by_stream(self, num_layers: int) -> int:
        """Of the main pass, beside its residual states, which are the inputs of its layers."""
        if self.objective.gradient_checkpointing:
            return 0
        return self._kept(num_layers, is_adapter=True)

    def _kept(self, num_layers: int, *, is_adapter: bool) -> int:
        if self.objective.gradient_checkpointing:
            return num_layers * self.state
        return num_layers * (self.adapter_layer if is_adapter else self.frozen_layer)

    def _logits(self) -> int:
        vocab_size = self.shape.vocab_size
        least = _LEAST_CHUNK_BYTES // (FLOAT32 * vocab_size)
        rows = min(self.tokens, max(-(-self.tokens // _NUM_CHUNKS), least, 1))
        return rows * vocab_size * _CHUNK_TENSORS * FLOAT32


def _frozen_layer(shape: ModelShape, tokens: int, mask: int, size: int) -> int:
    """What one frozen decoder layer keeps for the gradient of its input.

    Queries, keys, values and output of attention with one float32 per head; gate, its SiLU and the
    up product of the MLP; both norms' inputs in float32 (in float32 itself the first is the
    residual state, which is there anyway) and their scales. With a mask, of so many numbers per
    token, keys and values are repeated for every query head and every layer keeps the mask.
    """
    key_width = shape.query_width if mask else shape.key_width
    attention = 2 * shape.query_width + 2 * key_width + mask
    norms = (2 if size < FLOAT32 else 1) * shape.hidden_size + 2 + shape.num_attention_heads
    return tokens * ((attention + 3 * shape.intermediate_size) * size + norms * FLOAT32)


def _adapter(shape: ModelShape, adapter: AdapterConfig, tokens: int, placement: Placement) -> int:
    """What an adapter keeps: its input, its active features, and its weights if they are cast."""
    size, width, features = placement.itemsize, shape.hidden_size, adapter.num_features
    active = tokens * features * size
    if adapter.k is not None:
        active = tokens * adapter.k * (size + 4)
    is_cast = placement.stage is None and size < FLOAT32
    cast = 2 * width * features * size if is_cast else 0
    return tokens * width * size + active + cast

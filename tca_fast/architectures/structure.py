"""Find the parts of a Hugging Face causal language model.

Models are recognised by structure, not by class name: a list of decoder layers, each with a child
named `mlp`, one normalisation after them, and the embedding before them.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from tca_fast.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MLP_NAME = "mlp"
_HOW_TO_ADD = "docs/architectures.md says how an architecture is added"


@dataclass(frozen=True)
class Architecture:
    """What the structure of an architecture leaves open.

    Attributes:
        final_norm: name of the normalisation after the layers, a child of the decoder. Without
            one, the only child with weights beside layers and embedding is taken.
        inputs: names of the decoder's children that make the first layer's input together with
            the token embedding, such as learned positions.
        refused: why adapters cannot stand beside the MLPs of this architecture, or None.
    """

    final_norm: str | None = None
    inputs: tuple[str, ...] = ()
    refused: str | None = None

    def __post_init__(self) -> None:
        """Refuse one name where several are expected: it would be taken for its letters."""
        if isinstance(self.inputs, str):
            raise UserError(f"inputs: {self.inputs!r} is one name; write ({self.inputs!r},)")


@dataclass(frozen=True)
class DecoderParts:
    """The parts of a causal language model that adapters and partial runs need.

    Attributes:
        decoder: the module that holds the layers (`model.model` in Qwen2 and Llama).
        layers: its decoder layers, in order.
        layers_name: their dotted path in the model, for example "model.layers".
        embedding: the input embedding.
        inputs: everything with weights that makes the first layer's input, by name in `decoder`;
            the embedding is one of them.
        final_norm: the normalisation between the last layer and the head.
        final_norm_name: its name in `decoder`.
        head: the output embedding.
        width: D.
    """

    decoder: nn.Module
    layers: nn.ModuleList
    layers_name: str
    embedding: nn.Module
    inputs: dict[str, nn.Module]
    final_norm: nn.Module
    final_norm_name: str
    head: nn.Module
    width: int


def decoder_parts(model: PreTrainedModel) -> DecoderParts:
    """Find the decoder layers, embeddings, final norm and head of a causal language model.

    Args:
        model: a Hugging Face `…ForCausalLM`.

    Raises:
        UserError: the structure is not that of a decoder with an MLP in every layer; the message
            says which part is missing.
    """
    name = type(model).__name__
    if not hasattr(model, "named_modules"):
        raise UserError(f"model: {name} is no module; pass the model itself, such as adapted.model")
    config = getattr(model, "config", None)
    num_layers = getattr(config, "num_hidden_layers", None)
    if num_layers is None:
        raise UserError(
            f"model: {name} has no config.num_hidden_layers; pass a Hugging Face causal "
            "language model"
        )
    model_type = getattr(config, "model_type", "")
    architecture = _architecture(model_type)
    if architecture.refused is not None:
        raise UserError(f"model: {name} cannot have adapters, because {architecture.refused}")
    layers_name, layers = _layers(model, num_layers)
    decoder = model.get_submodule(layers_name.rpartition(".")[0])
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is None or head is None:
        raise UserError(f"model: {name} has no language-model head; pass a causal language model")
    children = dict(decoder.named_children())
    for child_name in filter(None, (*architecture.inputs, architecture.final_norm)):
        if child_name not in children:
            raise UserError(
                f"model: {name} has no {child_name!r} in its decoder, as architectures/"
                f"{model_type}.py says, only {', '.join(children)}; mend that file"
            )
    inputs = {
        child_name: child
        for child_name, child in children.items()
        if child is embedding or child_name in architecture.inputs
    }
    known = [layers, *inputs.values()]
    norm_name = architecture.final_norm or _final_norm(decoder, known, name)
    norm = children[norm_name]
    if left := _with_weights(decoder, [*known, norm]):
        raise UserError(
            f"model: {name} has {', '.join(left)} beside its layers and final norm; where they "
            f"make the first layer's input, architectures/{model_type}.py names them in inputs"
        )
    width = _width(model, norm)
    return DecoderParts(
        decoder, layers, layers_name, embedding, inputs, norm, norm_name, head, width
    )


def _architecture(model_type: str) -> Architecture:
    """What the file named after a model type says, or nothing where there is none."""
    model_type = model_type.replace("-", "_")
    path = f"tca_fast.architectures.{model_type}"
    if not model_type.isidentifier() or importlib.util.find_spec(path) is None:
        return Architecture()
    return getattr(importlib.import_module(path), "ARCHITECTURE", Architecture())


def _layers(model: PreTrainedModel, num_layers: int) -> tuple[str, nn.ModuleList]:
    """The one list of decoder layers that all have an MLP."""
    name = type(model).__name__
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    found = [
        (path, module)
        for path, module in lists
        if all(isinstance(getattr(layer, MLP_NAME, None), nn.Module) for layer in module)
    ]
    if len(found) == 1:
        return found[0]
    reason = f"{len(found)} lists of {num_layers} decoder layers with a child named {MLP_NAME!r}"
    if not found and lists:
        path, layers = lists[0]
        without = next(i for i, layer in enumerate(layers) if not hasattr(layer, MLP_NAME))
        children = ", ".join(child for child, _ in layers[without].named_children())
        reason = f"no child named {MLP_NAME!r} in {path}.{without}, only {children}"
    raise UserError(
        f"model: {name} has {reason}; adapters stand beside the one MLP module of every decoder "
        f"layer, and {_HOW_TO_ADD}"
    )


def _with_weights(decoder: nn.Module, known: list[nn.Module]) -> list[str]:
    """Names of the other children that have weights."""
    return [
        child_name
        for child_name, child in decoder.named_children()
        if all(child is not module for module in known) and any(True for _ in child.parameters())
    ]


def _final_norm(decoder: nn.Module, known: list[nn.Module], name: str) -> str:
    """The one child beside layers and embeddings that has weights."""
    candidates = _with_weights(decoder, known)
    if len(candidates) != 1:
        found = ", ".join(candidates) or "none"
        raise UserError(
            f"model: {name} should have exactly one normalisation after its layers, found "
            f"{found}; {_HOW_TO_ADD}"
        )
    return candidates[0]


def _width(model: PreTrainedModel, norm: nn.Module) -> int:
    """D, checked against the normalisation that feeds the head.

    It may have no weights, or none here (ZeRO-3 partitions them).
    """
    width = getattr(model.config, "hidden_size", None)
    weight = next(norm.parameters(), None)
    found = width if weight is None or weight.numel() == 0 else weight.shape[-1]
    if not isinstance(width, int) or width != found:
        raise UserError(
            f"model: config.hidden_size is {width}, but the final norm has width {found}; "
            "this architecture is not supported"
        )
    return width

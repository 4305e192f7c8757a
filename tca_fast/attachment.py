"""Find the MLPs of a Hugging Face causal language model and put adapters beside them.

Models are recognised by structure, not by class name: a list of decoder layers, each with a
child named `mlp`, and one normalisation module after them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tca_fast.adapter import AdaptedMLP, TranscoderAdapter
from tca_fast.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from tca_fast.checkpoint import Provenance
    from tca_fast.config import AdapterConfig

MLP_NAME = "mlp"


@dataclass(frozen=True)
class DecoderParts:
    """The parts of a causal language model that adapters and partial runs need.

    Attributes:
        decoder: the module that holds the layers (`model.model` in Qwen2 and Llama).
        layers: its decoder layers, in order.
        layers_name: their dotted path in the model, for example "model.layers".
        embedding: the input embedding.
        final_norm: the normalisation between the last layer and the head.
        final_norm_name: its name in `decoder`.
        head: the output embedding.
    """

    decoder: nn.Module
    layers: nn.ModuleList
    layers_name: str
    embedding: nn.Module
    final_norm: nn.Module
    final_norm_name: str
    head: nn.Module


def decoder_parts(model: PreTrainedModel) -> DecoderParts:
    """Find the decoder layers, embedding, final norm and head of a causal language model.

    Args:
        model: a Hugging Face `…ForCausalLM`.

    Raises:
        UserError: the structure is not that of a Qwen2- or Llama-like decoder; the message says
            which part is missing.
    """
    name = type(model).__name__
    num_layers = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    if num_layers is None:
        raise UserError(
            f"model: {name} has no config.num_hidden_layers; pass a Hugging Face causal "
            "language model"
        )
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == num_layers
        and all(hasattr(layer, MLP_NAME) for layer in module)
    ]
    if len(lists) != 1:
        raise UserError(
            f"model: {name} has {len(lists)} lists of {num_layers} decoder layers with a child "
            f"named {MLP_NAME!r}, expected exactly one; this architecture is not supported"
        )
    layers_name, layers = lists[0]
    decoder = model.get_submodule(layers_name.rpartition(".")[0])
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is None or head is None:
        raise UserError(f"model: {name} has no language-model head; pass a causal language model")
    norm_name, norm = _final_norm(decoder, layers, embedding, name)
    return DecoderParts(decoder, layers, layers_name, embedding, norm, norm_name, head)


def _final_norm(
    decoder: nn.Module, layers: nn.Module, embedding: nn.Module, name: str
) -> tuple[str, nn.Module]:
    """The one child beside embedding and layers that has weights."""
    candidates = [
        (child_name, child)
        for child_name, child in decoder.named_children()
        if child is not layers and child is not embedding and any(True for _ in child.parameters())
    ]
    if len(candidates) != 1:
        found = ", ".join(child_name for child_name, _ in candidates) or "none"
        raise UserError(
            f"model: {name} should have exactly one normalisation after its layers, found "
            f"{found}; this architecture is not supported"
        )
    return candidates[0]


@contextmanager
def residual_states(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collect the residual stream of the forward pass inside the block (contract §3.3).

    Yields:
        A list that receives h_0..h_L, each [B, S, D]: the input of every decoder layer and the
        input of the final norm. (`output_hidden_states` has the last one after the norm.)
    """
    parts = decoder_parts(model)
    states: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    watched = [*parts.layers, parts.final_norm]
    hooks = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in watched]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


class AdaptedModel:
    """A model whose MLPs have adapters beside them; made by `attach` or `load`.

    Attributes:
        model: the Hugging Face model, changed in place; use it as before.
        config: shape and activation of the adapters.
        layers: the adapters, one per decoder layer.
        provenance: models they were trained on, where they come from a checkpoint.
    """

    provenance: Provenance | None = None

    def __init__(self, model: PreTrainedModel, config: AdapterConfig) -> None:
        """Collect the adapters of a model; use `attach` to make them."""
        self.model = model
        self.config = config
        self.wrapped = [module for module in model.modules() if isinstance(module, AdaptedMLP)]
        self.layers = [wrapped.adapter for wrapped in self.wrapped]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward."""
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate`."""
        return self.model.generate(*args, **kwargs)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The adapters' parameters, which are all that is trained."""
        for layer in self.layers:
            yield from layer.parameters()

    @contextmanager
    def disabled(self) -> Iterator[AdaptedModel]:
        """Run the block without the adapters: the model as it was before `attach`."""
        before = [wrapped.enabled for wrapped in self.wrapped]
        for wrapped in self.wrapped:
            wrapped.enabled = False
        try:
            yield self
        finally:
            for wrapped, enabled in zip(self.wrapped, before, strict=True):
                wrapped.enabled = enabled

    def set_gain(self, layer: int, feature: int, value: float) -> None:
        """Multiply one feature's activation in every pass from now on (1 by default, 0 ablates).

        Raises:
            UserError: no such layer or feature, or a gain that is not finite.
        """
        if not 0 <= layer < len(self.layers):
            raise UserError(f"layer: {layer} is outside 0..{len(self.layers) - 1}")
        self.layers[layer].set_gain(feature, value)

    def clear_gains(self) -> None:
        """Set the gain of every feature back to 1."""
        for adapter in self.layers:
            adapter.clear_gain()

    def save_pretrained(self, directory: str | Path, provenance: Provenance | None = None) -> None:
        """Write the adapters (and nothing of the model) to a directory; see `checkpoint`."""
        from tca_fast import checkpoint

        checkpoint.save_pretrained(self, directory, provenance)


def attach(
    model: PreTrainedModel,
    config: AdapterConfig | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> AdaptedModel:
    """Put a fresh adapter beside the MLP of every decoder layer, in place.

    A fresh adapter changes nothing: its decoder is zero. The model's own parameters are frozen;
    `detach` gives them back as they were.

    Args:
        model: a Hugging Face causal language model with Qwen2- or Llama-like decoder layers.
        config: shape and activation; the default is the paper's 8192 ReLU features.
        seed: of the encoder weights, which are drawn on the CPU and so equal on every device.
        dtype: of the adapters' parameters.

    Raises:
        UserError: adapters are already attached, or the structure is not supported.
    """
    if config is None:
        from tca_fast.config import AdapterConfig

        config = AdapterConfig()
    if any(isinstance(module, AdaptedMLP) for module in model.modules()):
        raise UserError("model: adapters are already attached; call tca_fast.detach(model) first")
    parts = decoder_parts(model)
    width = _model_width(model, parts)
    generator = torch.Generator().manual_seed(seed)
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    model.requires_grad_(False)
    for index, layer in enumerate(parts.layers):
        mlp = getattr(layer, MLP_NAME)
        parameter = next(mlp.parameters(), None)
        device = parameter.device if parameter is not None else None
        adapter = TranscoderAdapter(width, config, generator=generator, device=device, dtype=dtype)
        setattr(layer, MLP_NAME, AdaptedMLP(mlp, adapter, index))
    model._tca_fast_trainable = trainable
    return AdaptedModel(model, config)


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Take the adapters off again; the model is exactly what it was before `attach`.

    Raises:
        UserError: no adapters are attached.
    """
    found = False
    for layer in decoder_parts(model).layers:
        wrapped = getattr(layer, MLP_NAME)
        if isinstance(wrapped, AdaptedMLP):
            setattr(layer, MLP_NAME, wrapped.mlp)
            found = True
    if not found:
        raise UserError("model: no adapters are attached, so there is nothing to detach")
    trainable = model.__dict__.pop("_tca_fast_trainable", {})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable.get(name, parameter.requires_grad))
    return model


def _model_width(model: PreTrainedModel, parts: DecoderParts) -> int:
    """D, checked against the normalisation that feeds the head."""
    width = getattr(model.config, "hidden_size", None)
    norm_width = next(parts.final_norm.parameters()).shape[-1]
    if width != norm_width:
        raise UserError(
            f"model: config.hidden_size is {width}, but the final norm has width {norm_width}; "
            "this architecture is not supported"
        )
    return norm_width

"""Put adapters beside the MLPs of a Hugging Face causal language model, and take them off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from tca_fast.adapted_model import AdaptedModel, fresh_adapters
from tca_fast.adapter import AdaptedMLP
from tca_fast.architectures.structure import MLP_NAME, decoder_parts
from tca_fast.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tca_fast.config import AdapterConfig


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
        model: a Hugging Face causal language model whose decoder layers have an MLP.
        config: shape and activation; the default is the paper's 8192 ReLU features.
        seed: of the encoder weights, which are drawn on the CPU and so equal on every device.
        dtype: of the adapters' parameters.

    Raises:
        UserError: adapters are already attached (by PEFT too), the structure is not supported,
            MLPs are offloaded, or `config` is no configuration of adapters.
    """
    parts = decoder_parts(model)
    if any(isinstance(module, AdaptedMLP) for module in model.modules()):
        raise UserError("model: adapters are already attached; call tca_fast.detach(model) first")
    mlps = [getattr(layer, MLP_NAME) for layer in parts.layers]
    refuse_peft(mlps)
    _check_in_memory(mlps)
    adapters = fresh_adapters(mlps, parts.width, config, seed, dtype)
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    model.requires_grad_(False)
    for index, (layer, mlp) in enumerate(zip(parts.layers, mlps, strict=True)):
        setattr(layer, MLP_NAME, AdaptedMLP(mlp, adapters.layers[index], index))
    model._tca_fast_trainable = trainable
    return AdaptedModel(model, adapters.config)


def refuse_peft(mlps: Sequence[nn.Module]) -> None:
    """Refuse MLPs that PEFT has wrapped: the adapters of both would add up.

    Raises:
        UserError: says how to take PEFT's off.
    """
    # By what all its layers have and not by their class, because PEFT may not be installed.
    if any(hasattr(mlp, "base_layer") for mlp in mlps):
        raise UserError(
            "model: its MLPs have PEFT adapters; take them off first, with model = "
            "peft_model.unload() (set_adapter switches between several within PEFT)"
        )


def _check_in_memory(mlps: Sequence[nn.Module]) -> None:
    """Refuse MLPs that accelerate fetches for each call: an adapter has no place to be then."""
    for index, mlp in enumerate(mlps):
        hooked = any(hasattr(module, "_hf_hook") for module in mlp.modules())
        if hooked and any(parameter.is_meta for parameter in mlp.parameters()):
            raise UserError(
                f"device_map: the MLP of layer {index} is offloaded to CPU or disk, and adapters "
                "stand beside MLPs that are in memory; choose a device_map without offloading"
            )


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
            wrapped.is_attached = False
            found = True
    if not found:
        raise UserError("model: no adapters are attached, so there is nothing to detach")
    trainable = model.__dict__.pop("_tca_fast_trainable", {})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable.get(name, parameter.requires_grad))
    return model

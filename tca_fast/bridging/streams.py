"""The two models of training, sharing every tensor but the MLPs (contract §2, design §4.9).

The adapter stream is the backbone with the base's MLPs and an adapter beside each; the reference
stream is the target. With the target as backbone the two are separate module trees over the same
parameters, so there is no switch to set and nothing stored twice.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import nn

from tca_fast import checkpoint
from tca_fast.adapted_model import AdaptedModel
from tca_fast.adapter_config import mark_hybrid
from tca_fast.architectures.structure import MLP_NAME, decoder_parts
from tca_fast.attachment import attach
from tca_fast.bridging.pair import ACCEPTABLE, check_pair, check_tokenizers
from tca_fast.bridging.placement import Place, placed, placed_as_loaded
from tca_fast.errors import UserError, one_line
from tca_fast.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tca_fast.config import AdapterConfig, PairConfig


class Streams(NamedTuple):
    """The model under training and the model it must reproduce.

    Attributes:
        adapted: backbone with the base's MLPs and adapters; `adapted.disabled()` is the hybrid.
        reference: the target, frozen.
    """

    adapted: AdaptedModel
    reference: PreTrainedModel

    @property
    def num_layers(self) -> int:
        """L, decoder layers."""
        return len(self.adapted.layers)


def build_streams(
    base: PreTrainedModel,
    target: PreTrainedModel,
    config: AdapterConfig,
    *,
    backbone: str = "target",
    accept: tuple[str, ...] = (),
    seed: int = 0,
) -> Streams:
    """Assemble the adapter and reference streams from two loaded models (contract §2).

    Args:
        base: gives its MLPs (backbone "target") or everything (backbone "base"). With backbone
            "target" the rest of it is not referenced afterwards; with "base" it becomes the
            adapter stream.
        target: becomes the reference stream; frozen and set to eval mode.
        config: shape and activation of the adapters.
        backbone: "target" or "base".
        accept: differences to accept, see `pair.ACCEPTABLE`.
        seed: of the adapters.

    Raises:
        UserError: the pair does not fit, or an architecture is not supported.
    """
    stream = build_backbone(base, target, backbone=backbone, accept=accept)
    target.eval().requires_grad_(False)
    return Streams(attach(stream, config, seed=seed), target)


def build_backbone(
    base: PreTrainedModel,
    target: PreTrainedModel,
    *,
    backbone: str = "target",
    accept: tuple[str, ...] = (),
) -> PreTrainedModel:
    """The model that adapters stand in, beside the two it is made of; it stores nothing twice.

    Args:
        base, target, backbone, accept: as in `build_streams`.

    Returns:
        With backbone "target" the hybrid, a module tree of its own; with "base" the base itself.

    Raises:
        UserError: the pair does not fit, or an architecture is not supported.
    """
    check_pair(base.config, target.config, backbone=backbone, accept=accept)
    if backbone == "base":
        if base is target:
            raise UserError(
                "pair: base and target are one object, so that adapters in the base would be in "
                "the target as well; load the model twice"
            )
        _end_like(base, target)
        return base.eval()
    hybrid = share_parameters(target)
    take_mlps(hybrid, base)
    return hybrid.eval()


def take_mlps(model: PreTrainedModel, donor: PreTrainedModel) -> None:
    """Put the MLPs of `donor` into `model`, in place: the hybrid of contract §2.1."""
    layers, donors = decoder_parts(model).layers, decoder_parts(donor).layers
    for layer, donor_layer in zip(layers, donors, strict=True):
        setattr(layer, MLP_NAME, getattr(donor_layer, MLP_NAME))
    mark_hybrid(model, donor)


def _end_like(base: PreTrainedModel, target: PreTrainedModel) -> None:
    """Let the base stop where the target stops and read as far (contract §1.7)."""
    base.config.eos_token_id = target.config.eos_token_id
    base.config.max_position_embeddings = target.config.max_position_embeddings
    if base.generation_config is not None and target.generation_config is not None:
        base.generation_config.eos_token_id = target.generation_config.eos_token_id


def share_parameters(model: PreTrainedModel) -> PreTrainedModel:
    """A second module tree over the same parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def graft(front: PreTrainedModel, back: PreTrainedModel, cutoff: int) -> PreTrainedModel:
    """mixed(front, back, cutoff) of contract §3.4, as a model of its own.

    The embeddings and layers 0..cutoff-1 are those of `front`; the other layers, the final norm
    and the head are those of `back`. All modules are shared; only the containers are new, so the
    architecture's own forward runs.
    """
    front_parts, back_parts = decoder_parts(front), decoder_parts(back)
    mixed = copy_container(back)
    decoder: nn.Module = mixed
    *path, layers_name = back_parts.layers_name.split(".")
    for name in path:
        decoder._modules[name] = copy_container(decoder.get_submodule(name))
        decoder = decoder.get_submodule(name)
    layers = [*front_parts.layers[:cutoff], *back_parts.layers[cutoff:]]
    decoder._modules[layers_name] = nn.ModuleList(layers)
    for name, module in front_parts.inputs.items():
        decoder._modules[name] = module
    return mixed


def copy_container(module: Any) -> Any:
    """A module whose children can be exchanged; children and everything else are shared."""
    container = copy.copy(module)
    container._modules = dict(module._modules)
    return container


def load_streams(
    pair: PairConfig,
    config: AdapterConfig,
    *,
    seed: int = 0,
    device: str = "cpu",
    place: Place | None = None,
) -> Streams:
    """Load a pair from disk or hub and assemble its streams.

    Configurations and tokenizers are compared before any weight is read.

    Args:
        pair: the two models, their dtype and backbone.
        config: shape and activation of the adapters.
        seed: of the adapters.
        device: where everything lives in the end.
        place: is given every weight, adapters too, as soon as it is read or drawn.

    Raises:
        UserError: a model that cannot be read, or a pair that does not fit.
    """
    if pair.attn_implementation == "flex_attention" and device == "cpu":
        raise UserError(
            "pair.attn_implementation: PyTorch's 'flex_attention' has no backward on a CPU; set "
            "pair.attn_implementation=sdpa"
        )
    check_models(pair)
    base, target = (
        load_model(f"pair.{role}", name, revision, pair, device, place)
        for role, (name, revision) in _models(pair).items()
    )
    accept = tuple(pair.accept_differences)
    with placed(place):
        return build_streams(base, target, config, backbone=pair.backbone, accept=accept, seed=seed)


def check_models(pair: PairConfig) -> None:
    """Compare configurations and tokenizers of a pair; no weight is read.

    Raises:
        UserError: a model that cannot be found, or a pair that does not fit.
    """
    from transformers import AutoConfig

    configs = {
        role: _read(f"pair.{role}", AutoConfig, name, revision)
        for role, (name, revision) in _models(pair).items()
    }
    accept = tuple(pair.accept_differences)
    check_pair(configs["base"], configs["target"], backbone=pair.backbone, accept=accept)
    tokenizers = [load_tokenizer(name, revision) for name, revision in _models(pair).values()]
    if tokenizers[0] is not None and tokenizers[1] is not None:
        check_tokenizers(tokenizers[0], tokenizers[1])


def _models(pair: PairConfig) -> dict[str, tuple[str, str | None]]:
    """Name and revision of the two models by role."""
    return {"base": (pair.base, pair.base_revision), "target": (pair.target, pair.target_revision)}


def load_adapted(
    directory: str | Path,
    *,
    base: str | None = None,
    target: str | None = None,
    revision: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: str = "cpu",
) -> AdaptedModel:
    """The whole model of a checkpoint: backbone, the base's MLPs, and the trained adapters.

    Args:
        directory: written by `save_pretrained` or a training run, or a hub id.
        base, target: where the two models are now; None is where they were in training. With
            backbone "base" there need not be a target; one that is named says where to stop.
        revision: of the adapters' hub repository.
        dtype: of the frozen weights, as in `PairConfig`.
        device: where the model goes.

    Raises:
        UserError: the checkpoint or a model cannot be read, names no models, or does not fit; no
            such dtype or device.
    """
    directory = checkpoint.local_directory(directory, revision)
    model = load_backbone(directory, base=base, target=target, dtype=dtype, device=device)
    return checkpoint.load(model, directory)


def load_backbone(
    directory: str | Path,
    *,
    base: str | None = None,
    target: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: str = "cpu",
) -> PreTrainedModel:
    """The model that the adapters of a local checkpoint stand in, still without them.

    With backbone "target" that is the hybrid, the target with the base's MLPs.

    Args:
        directory: written by `save_pretrained` or a training run.
        base, target, dtype, device: as in `load_adapted`.

    Raises:
        UserError: the checkpoint or a model cannot be read, names no models, or does not fit; no
            such dtype or device.
    """
    from tca_fast.config import PairConfig

    dtypes = get_args(PairConfig.model_fields["dtype"].annotation)
    if dtype not in dtypes:
        known = ", ".join(map(repr, dtypes))
        raise UserError(f"dtype: {dtype!r} does not fit; give one of {known}")
    device = str(device)  # a torch.device is as clear
    _check_device(device)
    origin = checkpoint.read_adapter_config(directory).provenance
    base, target = base or origin.base, target or origin.target
    if base is None or (target is None and origin.backbone == "target"):
        role = "base" if base is None else "target"
        raise UserError(f"{role}: {directory} does not say which model it was; pass {role}=…")
    # Not an attention implementation of ours: not every architecture has the one that trains.
    donor = _load("base", base, origin.base_revision, dtype, None, device)
    if target is None:
        return donor.eval()
    model = _load("target", target, origin.target_revision, dtype, None, device)
    if origin.backbone == "target":
        check_pair(donor.config, model.config, accept=ACCEPTABLE)
        take_mlps(model, donor)
    else:
        check_pair(donor.config, model.config, backbone="base")
        _end_like(donor, model)
        model = donor
    return model.eval()


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    # Without CUDA in the build it is an AssertionError.
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device: {device!r} cannot be used here ({one_line(error)}); give 'cpu', or 'cuda' "
            "where PyTorch finds a GPU"
        ) from None


def load_model(
    field: str,
    name: str,
    revision: str | None,
    pair: PairConfig,
    device: str,
    place: Place | None = None,
) -> PreTrainedModel:
    """Load one causal language model in the pair's dtype.

    Args:
        field: of the configuration, for errors.
        name, revision: of the model.
        pair: its dtype and attention implementation.
        device: where it lives in the end.
        place: is given every weight as soon as it is read.

    Raises:
        UserError: names `field` and the model that cannot be read.
    """
    return _load(field, name, revision, pair.dtype, pair.attn_implementation, device, place)


def resolve_dtype(name: str, device: str) -> str:
    """The dtype that `PairConfig.dtype` means on a device."""
    if name != "auto":
        return name
    return "bfloat16" if device.startswith("cuda") else "float32"


def _load(
    field: str,
    name: str,
    revision: str | None,
    dtype: str,
    attn_implementation: str | None,
    device: str,
    place: Place | None = None,
) -> PreTrainedModel:
    """As `load_model`; without an attention implementation transformers chooses one."""
    from transformers import AutoModelForCausalLM

    with placed_as_loaded(place):
        model = _read(
            field,
            AutoModelForCausalLM,
            name,
            revision,
            dtype=getattr(torch, resolve_dtype(dtype, device)),
            attn_implementation=attn_implementation,
        )
    return model.to(device)


def _read(field: str, loader: Any, name: str, revision: str | None, **options: Any) -> Any:
    from safetensors import SafetensorError

    try:
        return loader.from_pretrained(name, revision=revision, **options)
    except (ImportError, OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        remedy = "give a local model directory or a hub id"
        if re.search("attn_implementation|FlashAttention", reason):
            remedy = "choose another pair.attn_implementation, such as eager"
        raise UserError(f"{field}: {name!r} cannot be loaded ({reason}); {remedy}") from None

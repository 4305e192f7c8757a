"""Adapter checkpoints: a PEFT-shaped directory with the adapters and nothing else.

    adapter_config.json         which models, which shapes; what PEFT calls the base model is the
                                one the adapters attach to
    adapter_model.safetensors   base_model.model.{path of the MLP}.adapter.{W_enc,b_enc,W_dec,b_dec}
    README.md                   model card

A save is written beside the previous files, read back, and only then moved into place, so a full
disk or an interrupted job leaves the previous checkpoint whole. Nothing is pickled.

Shapes: F features per layer, D model width, L layers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tca_fast.adapted_model import AdaptedModel
from tca_fast.adapter_config import (
    CARD_NAME,
    CONFIG_NAME,
    WEIGHTS_NAME,
    CheckpointInfo,
    Provenance,
    adapter_config_json,
    provenance_of,
    read_adapter_config,
    target_modules,
    tensor_shapes,
)
from tca_fast.architectures.structure import MLP_NAME, decoder_parts
from tca_fast.attachment import attach, refuse_peft
from tca_fast.durable import Replacement
from tca_fast.errors import UserError, one_line
from tca_fast.fingerprint import Fingerprint, fingerprint, refuse_quantised
from tca_fast.formats.shards import read_tensors
from tca_fast.model_card import model_card, model_to_load

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tca_fast.adapter import TranscoderAdapter

_TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec")
_KEY = re.compile(
    rf"base_model\.model\.(?:[^.]*[^.\d][^.]*\.)*(\d+)\.(?:[^.]+\.)*adapter\.({'|'.join(_TENSORS)})"
)


def save_pretrained(
    adapted: AdaptedModel, directory: str | Path, provenance: Provenance | None = None
) -> None:
    """Write the adapters of a model to a directory, leaving its other files alone.

    Parameters are stored in the dtype they have, gains (an intervention, not a parameter) are
    not stored. Equal adapters and provenance give byte-equal files.

    Args:
        adapted: model with adapters.
        directory: created if missing.
        provenance: names for `adapter_config.json` and the model card; None is what the adapters
            were loaded with, and for fresh ones what the model says, see `provenance_of`.

    Raises:
        UserError: the files cannot be written (full disk, no permission) or do not read back as
            written; files of an earlier save are then still whole.
    """
    directory = Path(directory)
    provenance = provenance or adapted.provenance or provenance_of(adapted.model)
    if provenance.fingerprint is None:
        provenance = replace(provenance, fingerprint=fingerprint(adapted.model))
    layers_name = decoder_parts(adapted.model).layers_name
    tensors = {
        f"base_model.model.{layers_name}.{index}.{MLP_NAME}.adapter.{name}": (
            parameter.detach().cpu().contiguous()
        )
        for index, adapter in enumerate(adapted.layers)
        for name, parameter in adapter.named_parameters()
    }
    info = CheckpointInfo(
        adapted.config,
        provenance,
        num_layers=len(adapted.layers),
        hidden_size=adapted.layers[0].W_enc.shape[1],
        dtype=str(adapted.layers[0].W_enc.dtype).removeprefix("torch."),
    )
    config = adapter_config_json(info, target_modules(layers_name))
    card = model_card(info)
    with Replacement(directory) as files:
        files.write(WEIGHTS_NAME, lambda path: _write_tensors(path, tensors))
        files.write(CONFIG_NAME, lambda path: _write_text(path, config))
        files.write(CARD_NAME, lambda path: _write_text(path, card))
        files.commit()


def load(
    model: PreTrainedModel,
    directory: str | Path,
    *,
    revision: str | None = None,
    check_model: bool = True,
) -> AdaptedModel:
    """Attach the adapters of a checkpoint to a model, in place and bit-exact.

    With backbone "target" the adapters belong beside the base model's MLPs, so the model to give
    is the hybrid (the target with the base's MLPs), not the plain target.

    Args:
        model: Hugging Face causal LM without adapters.
        directory: directory written by `save_pretrained`, or a hub id.
        revision: of the hub repository.
        check_model: compare the model with the fingerprint in the checkpoint. Turn it off for
            weights that are meant to differ (quantised, edited, tuned further).

    Returns:
        The adapted model; adapter parameters have the dtype of the file and the device of the
        MLP they belong to.

    Raises:
        UserError: no adapter there, unreadable file, tensors missing, left over or of the wrong
            shape, a model of other shape or other weights, a format newer than this version.
            The model is then unchanged.
    """
    info, tensors = read(model, directory, revision=revision, check_model=check_model)
    adapted = attach(model, info.adapter, dtype=getattr(torch, info.dtype))
    copy_into(adapted.layers, tensors)
    adapted.provenance = info.provenance
    return adapted


def read(
    model: PreTrainedModel,
    directory: str | Path,
    *,
    revision: str | None = None,
    check_model: bool = True,
) -> tuple[CheckpointInfo, list[dict[str, Tensor]]]:
    """What `load` attaches: the checked configuration, and the tensors of every layer by name.

    Args and errors are those of `load`; the model is not changed.
    """
    directory = local_directory(directory, revision)
    info = read_adapter_config(directory)
    check_shape(model, info, directory)
    refuse_peft([getattr(layer, MLP_NAME) for layer in decoder_parts(model).layers])
    if check_model and (expected := info.provenance.fingerprint) is not None:
        found = fingerprint(model)
        if found.mlp != expected.mlp:
            refuse_quantised(model)
        check_fingerprint(found, info, directory, "pass check_model=False")
    return info, _read_layers(directory / WEIGHTS_NAME, info)


def copy_into(adapters: Sequence[TranscoderAdapter], layers: Sequence[dict[str, Tensor]]) -> None:
    """Set the parameters of every layer's adapter to tensors of their shapes."""
    with torch.no_grad():
        for adapter, tensors in zip(adapters, layers, strict=True):
            for name, parameter in adapter.named_parameters():
                parameter.copy_(tensors[name])


def check_shape(model: PreTrainedModel, info: CheckpointInfo, source: str | Path) -> None:
    """Refuse a model with other layers or another width than the adapters of `source` have.

    Raises:
        UserError: names what differs and the model to load.
    """
    parts = decoder_parts(model)
    for field, saved, found in (
        ("num_layers", info.num_layers, len(parts.layers)),
        ("hidden_size", info.hidden_size, parts.width),
    ):
        if saved != found:
            raise UserError(
                f"{field}: the adapters in {source} were trained with {saved}, this model has "
                f"{found}; load {model_to_load(info.provenance)}"
            )


def check_fingerprint(
    found: Fingerprint, info: CheckpointInfo, source: str | Path, otherwise: str
) -> None:
    """Refuse a model whose weights are not those that the adapters were trained beside.

    Args:
        found: of the model; nothing is checked where the checkpoint has none to compare it with.
        info, source: the checkpoint, and where it is.
        otherwise: how to load it all the same, for the message.

    Raises:
        UserError: names what differs and the model to load.
    """
    expected = info.provenance.fingerprint
    if expected is None:
        return
    differing = [
        f"{what} {theirs} instead of {ours}"
        for what, ours, theirs in (
            ("MLP weights", expected.mlp, found.mlp),
            ("attention and norm weights", expected.rest, found.rest),
        )
        if ours != theirs
    ]
    if differing:
        raise UserError(
            f"model: its fingerprint has {' and '.join(differing)}, so it is not the model the "
            f"adapters in {source} were trained beside; load "
            f"{model_to_load(info.provenance)}, or {otherwise} if that is meant"
        )


def local_directory(directory: str | Path, revision: str | None) -> Path:
    """The directory itself, or the snapshot of a hub repository.

    Raises:
        UserError: no path, a file, or neither a directory here nor a repository that the hub gives.
    """
    if not isinstance(directory, str | os.PathLike):
        raise UserError(f"directory: {type(directory).__name__} is no path; give the adapter's")
    path = Path(directory)
    if path.is_file():
        raise UserError(f"directory: {path} is a file; give its directory, {path.parent}")
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(directory)):
        return path
    from huggingface_hub import snapshot_download

    try:
        files = [CONFIG_NAME, WEIGHTS_NAME]
        return Path(snapshot_download(str(directory), revision=revision, allow_patterns=files))
    except Exception as error:
        raise UserError(
            f"directory: {directory} is neither a directory here nor a repository that the hub "
            f"gives ({type(error).__name__}: {one_line(error)}); check the path or the hub id"
        ) from None


def _read_layers(path: Path, info: CheckpointInfo) -> list[dict[str, Tensor]]:
    """The tensors of every layer, after every name, shape and dtype was checked."""
    if not path.is_file():
        raise UserError(f"{path}: missing beside {CONFIG_NAME}; copy it there")
    shapes = tensor_shapes(info.adapter, info.hidden_size)
    layers: list[dict[str, Tensor]] = [{} for _ in range(info.num_layers)]
    foreign = []
    for key, tensor in read_tensors({path: None}).items():
        match = _KEY.fullmatch(key)
        layer, name = (int(match[1]), match[2]) if match else (-1, "")
        if not (0 <= layer < len(layers) and name in shapes) or name in layers[layer]:
            foreign.append(key)
            continue
        found = (list(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        expected = (list(shapes[name]), info.dtype)
        if found != expected:
            raise UserError(
                f"{path}: {key} is {found[0]} {found[1]}, but {CONFIG_NAME} calls for "
                f"{expected[0]} {expected[1]}; the two files are not of one save"
            )
        layers[layer][name] = tensor
    missing = [
        f"layer {layer} {name}"
        for layer, tensors in enumerate(layers)
        for name in shapes
        if name not in tensors
    ]
    for problem, names in (("lacks", missing), ("has unknown tensors", foreign)):
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            raise UserError(
                f"{path}: {problem} {', '.join(names[:4])}{more}; save the adapters again"
            )
    return layers


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file, then read its header back and compare it."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})
    try:
        with safe_open(path, framework="pt") as file:
            written = {
                key: (tuple(tensor.shape), tensor.dtype)
                for key in file.keys()  # noqa: SIM118  (a safe_open handle is not iterable)
                for tensor in [file.get_tensor(key)]
            }
    except SafetensorError as error:
        raise UserError(
            f"{path}: does not read back after writing ({error}); check the disk"
        ) from None
    expected = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
    if written != expected:
        wrong = sorted(key for key in expected | written if expected.get(key) != written.get(key))
        raise UserError(f"{path}: {wrong[0]} reads back otherwise than written; check the disk")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    if path.read_text(encoding="utf-8") != text:
        raise UserError(f"{path}: reads back otherwise than written; check the disk")

"""Our own checkpoints (see `tca_fast.checkpoint`), one tensor at a time.

    adapter_config.json         as `save_pretrained` writes it, key for key
    README.md                   its model card
    adapter_model.safetensors   base_model.model.{layers}.{i}.mlp.adapter.{W_enc,b_enc,W_dec,b_dec}

`save_pretrained` needs the model the adapters are attached to; this needs none.
"""

from __future__ import annotations

import re
from pathlib import Path

from tca_fast.adapter_config import (
    CARD_NAME,
    CONFIG_NAME,
    WEIGHTS_NAME,
    adapter_config_json,
    read_adapter_config,
    target_modules,
)
from tca_fast.architectures.structure import MLP_NAME
from tca_fast.errors import UserError
from tca_fast.formats.adapter_set import AdapterSet, Export, Placement, open_adapters
from tca_fast.formats.tensor_files import read_headers
from tca_fast.model_card import model_card

_KEY = re.compile(rf"base_model\.model\.(.+)\.0\.{MLP_NAME}\.adapter\.W_enc")
_NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


def recognises(directory: Path) -> bool:
    """Whether a directory holds one of our checkpoints."""
    return (directory / CONFIG_NAME).is_file()


def read(directory: Path) -> AdapterSet:
    """Open a checkpoint of ours.

    Raises:
        UserError: not such a directory, or names, shapes and dtypes that do not fit.
    """
    info = read_adapter_config(directory)
    keys = read_headers(directory / WEIGHTS_NAME)
    found = [match for key in keys if (match := _KEY.fullmatch(key))]
    if len(found) != 1:
        raise UserError(
            f"{directory / WEIGHTS_NAME}: has {len(found)} encoders of layer 0, expected one; "
            "save the adapters again"
        )
    layers_name = found[0][1]
    names = [name for name in _NAMES if name != "b_dec" or info.adapter.decoder_bias]
    opened = open_adapters(
        directory,
        info.adapter,
        info.provenance,
        lambda layer: _placements(layers_name, layer, names),
        num_layers=info.num_layers,
        hidden_size=info.hidden_size,
        layers_name=layers_name,
    )
    if opened.info.dtype != info.dtype:
        raise UserError(
            f"{directory}: tensors are {opened.info.dtype}, but {CONFIG_NAME} calls for "
            f"{info.dtype}; the two files are not of one save"
        )
    return opened


def export(adapters: AdapterSet) -> Export:
    """A checkpoint that `tca_fast.load` reads."""
    names = list(adapters.shapes())
    notes = []
    if adapters.info.provenance.fingerprint is None:
        notes.append(
            "the model the adapters belong to is not known by its weights: tca_fast.load cannot "
            "refuse a wrong one"
        )
    config = adapter_config_json(adapters.info, target_modules(adapters.layers_name))
    return Export(
        lambda layer: _placements(adapters.layers_name, layer, names),
        {CONFIG_NAME: config.encode(), CARD_NAME: model_card(adapters.info).encode()},
        notes,
        {},
    )


def _placements(layers_name: str, layer: int, names: list[str]) -> list[Placement]:
    prefix = f"base_model.model.{layers_name}.{layer}.{MLP_NAME}.adapter"
    return [Placement(name, WEIGHTS_NAME, f"{prefix}.{name}") for name in names]

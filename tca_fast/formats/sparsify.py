"""TopK transcoders of EleutherAI's sparsify (ecosystem §2.1).

    layers.{i}.mlp/cfg.json             activation "topk", k, num_latents, d_in, transcode
    layers.{i}.mlp/sae.safetensors      encoder.weight [F, D]   encoder.bias [F]
                                        W_dec [F, D]            b_dec [D]
    tca_fast.json                       what sparsify has no field for; it lists what it drops
                                        from cfg.json at every load, so this stands apart

A transcoder there is `topk(relu(x·W + b))·W_dec + b_dec`, the k largest being kept. With
`transcode` false it is an autoencoder, which subtracts `b_dec` from its input.

Shapes: F features per layer, D model width.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tca_fast.adapter_config import Provenance
from tca_fast.architectures.structure import MLP_NAME
from tca_fast.errors import UserError
from tca_fast.formats.adapter_set import (
    AdapterSet,
    Export,
    Origin,
    Placement,
    check_no_decoder_bias,
    foreign_config,
    open_adapters,
    origin_record,
    read_origin,
)

CONFIG_NAME = "cfg.json"
ORIGIN_NAME = "tca_fast.json"
WEIGHTS_NAME = "sae.safetensors"
_KEYS = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}
_HOOKPOINT = re.compile(rf"(.+)\.(\d+)\.{MLP_NAME}")


def recognises(directory: Path) -> bool:
    """Whether a directory holds sparsify's files, itself or in its folders."""
    return any(directory.glob(WEIGHTS_NAME)) or any(directory.glob(f"*/{WEIGHTS_NAME}"))


def read(directory: Path) -> AdapterSet:
    """Open the transcoders of every layer.

    Raises:
        UserError: not transcoders beside the MLPs of layers 0..L-1, or something an adapter has
            no place for: GroupMax, a skip connection, an autoencoder.
    """
    prefix, num_layers = _hookpoints(directory)
    configs = [
        _read_config(directory / f"{prefix}.{layer}.{MLP_NAME}" / CONFIG_NAME)
        for layer in range(num_layers)
    ]
    for layer, config in enumerate(configs):
        if differing := sorted(key for key in configs[0] if config.get(key) != configs[0][key]):
            raise UserError(
                f"{directory}: {differing[0]} is {config.get(differing[0])!r} in layer {layer} and "
                f"{configs[0][differing[0]]!r} in layer 0; adapters have one shape in every layer"
            )
    config = configs[0]
    if (directory / ORIGIN_NAME).is_file():
        origin = read_origin(_read_json(directory / ORIGIN_NAME), str(directory / ORIGIN_NAME))
        notes: list[str] = []
        unknown: tuple[str, ...] = ()
    else:
        origin = Origin(Provenance(), f"model.{prefix}", decoder_bias=True)
        notes = [
            "nothing says that these features decode to a difference: an adapter adds to the MLP's "
            "output, so transcoders that were trained to replace the MLP would count it twice",
        ]
        unknown = ("base", "target", "backbone")
    if not origin.decoder_bias:
        check_no_decoder_bias(
            directory / f"{prefix}.{layer}.{MLP_NAME}" / WEIGHTS_NAME for layer in range(num_layers)
        )
    adapter = foreign_config(
        directory / f"{prefix}.0.{MLP_NAME}" / CONFIG_NAME,
        num_features_key="num_latents",
        num_features=config.get("num_latents") or config["d_in"] * config["expansion_factor"],
        activation="topk",
        k=config["k"],
        decoder_bias=origin.decoder_bias,
    )
    names = [name for name in _KEYS if name != "b_dec" or origin.decoder_bias]
    return open_adapters(
        directory,
        adapter,
        origin.provenance,
        lambda layer: _placements(prefix, layer, names),
        num_layers=num_layers,
        hidden_size=config["d_in"],
        layers_name=origin.layers_name,
        notes=notes,
        unknown=unknown,
        other_keys=lambda key: key == "b_dec",
    )


def export(adapters: AdapterSet) -> Export:
    """One TopK transcoder per layer.

    Raises:
        UserError: a ReLU adapter, which sparsify cannot express.
    """
    adapter, width = adapters.info.adapter, adapters.info.hidden_size
    if adapter.activation != "topk":
        raise UserError(
            f"activation: {adapter.activation!r} has no counterpart in sparsify, which keeps "
            "exactly k features; use circuit-tracer or saelens"
        )
    config = {
        "activation": "topk",
        "expansion_factor": max(1, adapter.num_features // width),
        "normalize_decoder": False,
        "num_latents": adapter.num_features,
        "k": adapter.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": True,
        "d_in": width,
    }
    prefix = adapters.layers_name.partition(".")[2] or adapters.layers_name
    notes = [
        "decoding to a difference has no counterpart: sparsify takes the output of the MLP as the "
        "target, so its FVU on these files means nothing",
    ]
    if not adapter.decoder_bias:
        notes.append("b_dec is required: zeros are written")
    text = _json(config)
    return Export(
        lambda layer: _placements(prefix, layer, list(_KEYS)),
        {
            f"{prefix}.{layer}.{MLP_NAME}/{CONFIG_NAME}": text
            for layer in range(adapters.info.num_layers)
        }
        | {ORIGIN_NAME: _json(origin_record(adapters))},
        notes,
        others={},
    )


def _placements(prefix: str, layer: int, names: list[str]) -> list[Placement]:
    file = f"{prefix}.{layer}.{MLP_NAME}/{WEIGHTS_NAME}"
    return [Placement(name, file, _KEYS[name]) for name in names]


def _hookpoints(directory: Path) -> tuple[str, int]:
    """The part of every hookpoint before the layer, and L."""
    found: dict[str, set[int]] = {}
    for path in sorted(directory.glob(f"*/{WEIGHTS_NAME}")):
        match = _HOOKPOINT.fullmatch(path.parent.name)
        if match is None:
            raise UserError(
                f"{path.parent}: {path.parent.name!r} is not an MLP of a layer such as "
                "'layers.0.mlp', beside which an adapter stands; give those folders only"
            )
        found.setdefault(match[1], set()).add(int(match[2]))
    if len(found) != 1:
        listed = ", ".join(sorted(found)) or "none"
        raise UserError(
            f"{directory}: folders such as 'layers.0.mlp' should have one prefix, found {listed}"
        )
    [(prefix, layers)] = found.items()
    if gaps := sorted(set(range(max(layers) + 1)) - layers):
        raise UserError(f"{directory}: lacks {prefix}.{gaps[0]}.{MLP_NAME}; give every layer")
    return prefix, len(layers)


def _json(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, indent=2) + "\n").encode()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); copy the file again") from None


def _read_config(path: Path) -> dict[str, Any]:
    config = _read_json(path)
    if not isinstance(config, dict) or not isinstance(config.get("d_in"), int):
        raise UserError(f"{path}: has no d_in; give a configuration that sparsify wrote")
    for field, only, reason in (
        ("activation", "topk", "an adapter has relu or topk"),
        ("skip_connection", False, "an adapter has no skip connection"),
        ("transcode", True, "an autoencoder reads what it writes, an adapter does not"),
    ):
        if config.get(field) != only:
            raise UserError(f"{path}: {field} is {config.get(field)!r}, not {only!r}; {reason}")
    if not isinstance(config.get("k"), int):
        raise UserError(f"{path}: k is {config.get('k')!r}; give the number of features kept")
    if not isinstance(config.get("num_latents") or config.get("expansion_factor"), int):
        raise UserError(f"{path}: has neither num_latents nor expansion_factor; add one")
    return config

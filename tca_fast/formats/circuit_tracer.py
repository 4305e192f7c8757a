"""Transcoder sets of circuit-tracer, as it reads them since version 0.2 (ecosystem §2.3).

    config.yaml               model_kind, model_name, hooks, activation, k
    layer_{i}.safetensors     W_enc [F, D]   b_enc [F]   W_dec [F, D]   b_dec [D]

A layer there is `act(x·W_encᵀ + b_enc)·W_dec + b_dec`, in the place of the MLP. Ours is the same
sum beside the MLP: what an adapter decodes to is a difference.

Shapes: F features per layer, D model width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tca_fast.adapter_config import Provenance
from tca_fast.errors import UserError
from tca_fast.formats.adapter_set import (
    DEFAULT_LAYERS_NAME,
    ORIGIN_KEY,
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
from tca_fast.formats.tensor_files import read_headers

CONFIG_NAME = "config.yaml"
_KIND = "transcoder_set"
_HOOKS = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "mlp.hook_out"}
_NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


def recognises(directory: Path) -> bool:
    """Whether a directory holds a circuit-tracer configuration."""
    return (directory / CONFIG_NAME).is_file()


def read(directory: Path) -> AdapterSet:
    """Open a transcoder set.

    Raises:
        UserError: not a transcoder set, or one that an adapter cannot be: other hooks, another
            activation, a skip connection, layers missing.
    """
    config = _read_config(directory / CONFIG_NAME)
    num_layers = _num_layers(directory)
    first = directory / "layer_0.safetensors"
    headers = read_headers(first)
    for key, what in (
        ("W_skip", "a skip connection"),
        ("activation_function.threshold", "JumpReLU thresholds"),
    ):
        if key in headers:
            raise UserError(f"{first}: has {key}, {what}, which an adapter has no place for")
    if missing := [name for name in _NAMES if name not in headers]:
        raise UserError(f"{first}: lacks {missing[0]}; give a set that circuit-tracer reads")
    for bias in ("b_enc", "b_dec"):
        if len(headers[bias].shape) != 1:
            raise UserError(
                f"{first}: {bias} is of shape {list(headers[bias].shape)}, expected one dimension; "
                "give a set that circuit-tracer reads"
            )
    origin, notes = _origin(config, directory)
    if not origin.decoder_bias:
        check_no_decoder_bias(
            directory / f"layer_{layer}.safetensors" for layer in range(num_layers)
        )
    adapter = foreign_config(
        directory / CONFIG_NAME,
        num_features=headers["b_enc"].shape[0],
        activation=config.get("activation") or "relu",
        k=config.get("k"),
        decoder_bias=origin.decoder_bias,
    )
    names = [name for name in _NAMES if name != "b_dec" or origin.decoder_bias]
    return open_adapters(
        directory,
        adapter,
        origin.provenance,
        lambda layer: _placements(layer, names),
        num_layers=num_layers,
        hidden_size=headers["b_dec"].shape[0],
        layers_name=origin.layers_name,
        notes=notes,
        unknown=() if ORIGIN_KEY in config or "model_name" in config else ("base",),
        other_keys=lambda key: key == "b_dec",
    )


def export(adapters: AdapterSet) -> Export:
    """A set for circuit-tracer's viewer and for looking features up."""
    provenance, adapter = adapters.info.provenance, adapters.info.adapter
    model = provenance.target if provenance.backbone == "target" else provenance.base
    config: dict[str, Any] = {"model_kind": _KIND}
    notes = [
        "decoding to a difference has no counterpart: circuit-tracer puts transcoders in the "
        "place of the MLP, so its own `attribute` counts the frozen MLP as error",
        "circuit-tracer zeroes the features of the first token; the adapter does not",
    ]
    if model is None:
        notes.append("no model is known: circuit-tracer then needs --model")
    else:
        config["model_name"] = model
    if model is not None and provenance.backbone == "target":
        notes.append(
            "the base's MLPs have no counterpart: model_name is the target, whose own MLPs are "
            "not those the adapters were trained beside"
        )
    if not adapter.decoder_bias:
        notes.append("b_dec is required: zeros are written")
    config |= _HOOKS | {"activation": adapter.activation}
    if adapter.k is not None:
        config["k"] = adapter.k
    config[ORIGIN_KEY] = origin_record(adapters)
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    return Export(
        lambda layer: _placements(layer, _NAMES), {CONFIG_NAME: text.encode()}, notes, others={}
    )


def _placements(layer: int, names: Sequence[str]) -> list[Placement]:
    return [Placement(name, f"layer_{layer}.safetensors", name) for name in names]


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not readable as YAML ({reason}); copy the file again") from None
    kind = config.get("model_kind") if isinstance(config, dict) else None
    if kind != _KIND:
        raise UserError(
            f"{path}: model_kind is {kind!r}; only {_KIND!r} is one transcoder per layer"
        )
    for field, hook in _HOOKS.items():
        if config.get(field) != hook:
            raise UserError(
                f"{path}: {field} is {config.get(field)!r}; an adapter reads the input of the MLP "
                f"and adds to its output, so only {hook!r} can be one"
            )
    if config.get("activation") not in (None, "relu", "topk"):
        raise UserError(
            f"{path}: activation is {config['activation']!r}; an adapter has relu or topk"
        )
    if "transcoders" in config:
        raise UserError(
            f"{path}: transcoders names files elsewhere; put them here as layer_0.safetensors, "
            "layer_1.safetensors and so on, and remove the field"
        )
    return config


def _num_layers(directory: Path) -> int:
    found = {
        int(match[1])
        for path in directory.glob("layer_*.safetensors")
        if (match := re.fullmatch(r"layer_(\d+)\.safetensors", path.name))
    }
    if not found or found != set(range(len(found))):
        gaps = sorted(set(range(max(found, default=0) + 1)) - found)
        raise UserError(f"{directory}: lacks layer_{gaps[0]}.safetensors; give a whole set")
    return len(found)


def _origin(config: dict[str, Any], directory: Path) -> tuple[Origin, list[str]]:
    if ORIGIN_KEY in config:
        return read_origin(config[ORIGIN_KEY], str(directory / CONFIG_NAME)), []
    provenance = Provenance(base=config.get("model_name"), backbone="base")
    notes = [
        "nothing says that these features decode to a difference: an adapter adds to the MLP's "
        "output, so transcoders that were trained to replace the MLP would count it twice",
        f"the path of the decoder layers is not in the files: {DEFAULT_LAYERS_NAME} is taken",
    ]
    return Origin(provenance, DEFAULT_LAYERS_NAME, True), notes

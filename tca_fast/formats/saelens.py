"""Transcoders of SAELens 6, written and not read (ecosystem §2.1).

    layer_{i}/cfg.json                    architecture "transcoder", shapes, metadata
    layer_{i}/sae_weights.safetensors     W_enc [D, F]   b_enc [F]   W_dec [F, D]   b_dec [D]

A transcoder there is `relu(x·W_enc + b_enc)·W_dec + b_dec`.

Shapes: F features per layer, D model width.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tca_fast.architectures.structure import MLP_NAME
from tca_fast.errors import UserError
from tca_fast.formats.adapter_set import (
    ORIGIN_KEY,
    AdapterSet,
    Export,
    Placement,
    origin_record,
)

CONFIG_NAME = "cfg.json"
WEIGHTS_NAME = "sae_weights.safetensors"
# A configuration without a version, or with an older one, is rewritten when SAELens reads it.
_FORMAT_VERSION = "6.0.0"


def recognises(directory: Path) -> bool:
    """Whether a directory holds SAELens files, itself or in its folders."""
    return any(directory.glob(WEIGHTS_NAME)) or any(directory.glob(f"*/{WEIGHTS_NAME}"))


def export(adapters: AdapterSet) -> Export:
    """One transcoder per layer.

    Raises:
        UserError: a TopK adapter, for which SAELens has no transcoder.
    """
    if adapters.info.adapter.activation != "relu":
        raise UserError(
            f"activation: {adapters.info.adapter.activation!r} has no counterpart among SAELens' "
            "transcoders, which have ReLU or JumpReLU; use sparsify or circuit-tracer"
        )
    notes = [
        "decoding to a difference has no counterpart: SAELens takes W_dec to give the output of "
        f"the MLP, so read metadata.{ORIGIN_KEY} before comparing reconstructions",
    ]
    if not adapters.info.adapter.decoder_bias:
        notes.append("b_dec is required: zeros are written")
    texts = {
        f"layer_{layer}/{CONFIG_NAME}": (json.dumps(_config(adapters, layer), indent=2) + "\n")
        for layer in range(adapters.info.num_layers)
    }
    return Export(
        _placements, {name: text.encode() for name, text in texts.items()}, notes, others={}
    )


def _placements(layer: int) -> list[Placement]:
    file = f"layer_{layer}/{WEIGHTS_NAME}"
    return [
        Placement("W_enc", file, "W_enc", transposed=True),
        *(Placement(name, file, name) for name in ("b_enc", "W_dec", "b_dec")),
    ]


def _config(adapters: AdapterSet, layer: int) -> dict[str, Any]:
    info = adapters.info
    provenance = info.provenance
    hook = f"{adapters.layers_name}.{layer}.{MLP_NAME}"
    return {
        "architecture": "transcoder",
        "d_in": info.hidden_size,
        "d_sae": info.adapter.num_features,
        "d_out": info.hidden_size,
        "dtype": info.dtype,
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": _FORMAT_VERSION,
            "model_name": provenance.target if provenance.backbone == "target" else provenance.base,
            "model_class_name": "AutoModelForCausalLM",
            "hook_name": hook,
            "hook_name_out": hook,
            "reads": "input of hook_name",
            "decodes_to": "a difference added to the output of hook_name_out",
            ORIGIN_KEY: origin_record(adapters),
        },
    }

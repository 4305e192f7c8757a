"""SAELens transcoders, out."""

import json

import pytest
import torch
from formats_cases import (
    FEATURES,
    LAYERS,
    TOPK,
    WIDTH,
    branch,
    contents,
    convert,
    described,
    inputs,
    saved,
)
from safetensors.torch import load_file

from tca_fast.errors import UserError
from tca_fast.formats import conversion

GOLDEN = {
    "W_enc": ([WIDTH, FEATURES], "F32"),
    "W_dec": ([FEATURES, WIDTH], "F32"),
    "b_enc": ([FEATURES], "F32"),
    "b_dec": ([WIDTH], "F32"),
}


def test_files_names_shapes_and_dtypes(tmp_path):
    saved(tmp_path / "ours")
    directory = convert(tmp_path / "ours", tmp_path / "sae", "saelens")
    assert list(contents(directory)) == [
        f"layer_{layer}/{name}"
        for layer in range(LAYERS)
        for name in ("cfg.json", "sae_weights.safetensors")
    ]
    for layer in range(LAYERS):
        assert described(directory / f"layer_{layer}/sae_weights.safetensors") == GOLDEN


def test_config(tmp_path):
    saved(tmp_path / "ours", dtype=torch.bfloat16)
    directory = convert(tmp_path / "ours", tmp_path / "sae", "saelens")
    config = json.loads((directory / "layer_1/cfg.json").read_text())
    metadata = config.pop("metadata")
    assert config == {
        "architecture": "transcoder",
        "d_in": WIDTH,
        "d_sae": FEATURES,
        "d_out": WIDTH,
        "dtype": "bfloat16",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    assert metadata["sae_lens_version"] >= "6"
    assert metadata["hook_name"] == "model.layers.1.mlp"
    assert metadata["model_name"] == "org/target"
    assert metadata["tca_fast"]["base"] == "org/base"


@pytest.mark.parametrize("decoder_bias", [True, False])
def test_their_formula_gives_our_output(tmp_path, decoder_bias):
    adapted = saved(tmp_path / "ours", decoder_bias=decoder_bias)
    directory = convert(tmp_path / "ours", tmp_path / "sae", "saelens")
    x = inputs()
    for layer in range(LAYERS):
        t = load_file(directory / f"layer_{layer}/sae_weights.safetensors")
        theirs = torch.relu(x @ t["W_enc"] + t["b_enc"]) @ t["W_dec"] + t["b_dec"]
        torch.testing.assert_close(branch(adapted, layer, x), theirs)
        assert bool(t["b_dec"].count_nonzero()) is decoder_bias


def test_topk_is_refused(tmp_path):
    saved(tmp_path / "ours", **TOPK)
    with pytest.raises(UserError, match="'topk' has no counterpart among SAELens"):
        conversion.prepare(tmp_path / "ours", "saelens")


def test_reading_is_refused(tmp_path):
    saved(tmp_path / "ours")
    directory = convert(tmp_path / "ours", tmp_path / "sae", "saelens")
    with pytest.raises(UserError, match="saelens files are written and not read; give"):
        conversion.prepare(directory, "tca_fast")

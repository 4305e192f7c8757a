"""sparsify's TopK transcoders, out and in."""

import json
import shutil

import pytest
import torch
from formats_cases import (
    FEATURES,
    LAYERS,
    TOPK,
    WIDTH,
    K,
    branch,
    contents,
    convert,
    described,
    inputs,
    saved,
)
from safetensors.torch import load_file, save_file

from tca_fast.errors import UserError
from tca_fast.formats import conversion

GOLDEN = {
    "encoder.weight": ([FEATURES, WIDTH], "F32"),
    "encoder.bias": ([FEATURES], "F32"),
    "W_dec": ([FEATURES, WIDTH], "F32"),
    "b_dec": ([WIDTH], "F32"),
}


def transcoder(tensors, x, k):
    """As sparsify's fused encoder and eager decoder compute it: ReLU first, then the k largest."""
    pre_acts = torch.relu(x @ tensors["encoder.weight"].T + tensors["encoder.bias"])
    acts, indices = pre_acts.topk(k, dim=-1)
    rows = tensors["W_dec"][indices]
    return (acts.unsqueeze(-1) * rows).sum(1) + tensors["b_dec"]


@pytest.fixture
def exported(tmp_path):
    saved(tmp_path / "ours", **TOPK)
    return convert(tmp_path / "ours", tmp_path / "sparsify", "sparsify")


def test_files_names_shapes_and_dtypes(exported):
    assert list(contents(exported)) == [
        f"layers.{layer}.mlp/{name}"
        for layer in range(LAYERS)
        for name in ("cfg.json", "sae.safetensors")
    ] + ["tca_fast.json"]
    for layer in range(LAYERS):
        assert described(exported / f"layers.{layer}.mlp/sae.safetensors") == GOLDEN


def test_config(exported):
    config = json.loads((exported / "layers.2.mlp/cfg.json").read_text())
    assert json.loads((exported / "tca_fast.json").read_text())["target"] == "org/target"
    assert config == {
        "activation": "topk",
        "expansion_factor": 1,
        "normalize_decoder": False,
        "num_latents": FEATURES,
        "k": K,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": True,
        "d_in": WIDTH,
    }


@pytest.mark.parametrize("k", [1, K, FEATURES])
def test_their_formula_gives_our_output(tmp_path, k):
    adapted = saved(tmp_path / "ours", activation="topk", k=k)
    directory = convert(tmp_path / "ours", tmp_path / "sparsify", "sparsify")
    for layer in range(LAYERS):
        tensors = load_file(directory / f"layers.{layer}.mlp/sae.safetensors")
        theirs = transcoder(tensors, inputs(), k)
        torch.testing.assert_close(branch(adapted, layer, inputs()), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("decoder_bias", [True, False])
def test_there_and_back_is_bit_exact(tmp_path, dtype, decoder_bias):
    saved(tmp_path / "ours", dtype=dtype, decoder_bias=decoder_bias, **TOPK)
    convert(tmp_path / "ours", tmp_path / "sparsify", "sparsify")
    back = contents(convert(tmp_path / "sparsify", tmp_path / "back", "tca_fast"))
    ours = contents(tmp_path / "ours")
    assert back == ours


def test_foreign_files_are_read_with_what_they_leave_open(exported, tmp_path):
    (exported / "tca_fast.json").unlink()
    edit(exported, num_latents=0, expansion_factor=1)
    for layer in range(LAYERS):
        path = exported / f"layers.{layer}.mlp/sae.safetensors"
        wide = {"W_dec": (WIDTH, WIDTH), "encoder.weight": (WIDTH, WIDTH), "encoder.bias": (WIDTH,)}
        tensors = {name: torch.randn(shape) for name, shape in wide.items()}
        save_file(tensors | {"b_dec": torch.randn(WIDTH)}, path)
    prepared = conversion.prepare(exported, "tca_fast", base="org/mlp")
    info = prepared.adapters.info
    assert (info.adapter.num_features, info.adapter.k) == (WIDTH, K)
    assert info.provenance.base == "org/mlp"
    notes = " ".join(prepared.adapters.notes)
    assert "--target" in notes and "--base" not in notes
    assert prepared.adapters.layers_name == "model.layers"
    assert any("trained to replace the MLP" in note for note in prepared.adapters.notes)


def test_relu_is_refused(tmp_path):
    saved(tmp_path / "ours")
    with pytest.raises(UserError, match="'relu' has no counterpart in sparsify"):
        conversion.prepare(tmp_path / "ours", "sparsify")


def edit(directory, layers=range(LAYERS), **changes):
    for layer in layers:
        path = directory / f"layers.{layer}.mlp/cfg.json"
        config = json.loads(path.read_text()) | changes
        config = {key: value for key, value in config.items() if value is not None}
        path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: edit(d, activation="groupmax"), "activation is 'groupmax'"),
        (lambda d: edit(d, skip_connection=True), "skip_connection is True"),
        (lambda d: edit(d, transcode=False), "an autoencoder reads what it writes"),
        (lambda d: edit(d, k=None), "k is None"),
        (lambda d: edit(d, k=FEATURES + 1), r"0\.mlp/cfg\.json: .*k=8 exceeds num_latents=7"),
        (lambda d: edit(d, d_in=None), "has no d_in"),
        (lambda d: edit(d, [1], k=3), "k is 3 in layer 1 and 2 in layer 0"),
        (lambda d: edit(d, num_latents=None, expansion_factor=None), "neither num_latents nor"),
        (lambda d: edit(d, num_latents=6), r"expected of shape \[6, 24\]"),
        (lambda d: shutil.rmtree(d / "layers.1.mlp"), r"lacks layers\.1\.mlp"),
        (
            lambda d: (d / "layers.1.mlp").rename(d / "layers.1"),
            "'layers.1' is not an MLP of a layer",
        ),
        (lambda d: (d / "layers.2.mlp").rename(d / "h.2.mlp"), "one prefix, found h, layers"),
        (lambda d: (d / "layers.0.mlp/cfg.json").unlink(), "not readable as JSON"),
    ],
)
def test_what_an_adapter_cannot_be_is_one_line(exported, spoil, message):
    spoil(exported)
    with pytest.raises(UserError, match=message) as caught:
        conversion.prepare(exported, "tca_fast")
    assert "\n" not in str(caught.value)

"""circuit-tracer transcoder sets, out and in."""

import pytest
import torch
import yaml
from formats_cases import (
    FEATURES,
    LAYERS,
    RELU,
    TOPK,
    WIDTH,
    branch,
    contents,
    convert,
    described,
    inputs,
    saved,
)
from safetensors.torch import load_file, save_file

from tca_fast.adapter_config import Provenance
from tca_fast.errors import UserError
from tca_fast.formats import conversion

# Names, shapes and dtypes that circuit-tracer's loader asks for.
GOLDEN = {
    "W_enc": ([FEATURES, WIDTH], "F32"),
    "W_dec": ([FEATURES, WIDTH], "F32"),
    "b_enc": ([FEATURES], "F32"),
    "b_dec": ([WIDTH], "F32"),
}


def transcoder(tensors, x, k=None):
    """A layer as circuit-tracer computes it: F.linear, activation, acts @ W_dec + b_dec."""
    acts = torch.nn.functional.linear(x, tensors["W_enc"], tensors["b_enc"])
    if k is not None:
        kept = acts.topk(k, dim=-1)
        acts = torch.zeros_like(acts).scatter(-1, kept.indices, kept.values)
    return torch.relu(acts) @ tensors["W_dec"] + tensors["b_dec"]


@pytest.fixture
def exported(tmp_path):
    saved(tmp_path / "ours")
    return convert(tmp_path / "ours", tmp_path / "set", "circuit-tracer")


def test_files_names_shapes_and_dtypes(exported):
    layers = [f"layer_{layer}.safetensors" for layer in range(LAYERS)]
    assert list(contents(exported)) == sorted(["config.yaml", *layers])
    for file in layers:
        assert described(exported / file) == GOLDEN


def test_config(exported):
    config = yaml.safe_load((exported / "config.yaml").read_text())
    origin = config.pop("tca_fast")
    assert config == {
        "model_kind": "transcoder_set",
        "model_name": "org/target",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "mlp.hook_out",
        "activation": "relu",
    }
    assert (origin["base"], origin["base_revision"], origin["backbone"]) == (
        "org/base",
        "v1",
        "target",
    )


@pytest.mark.parametrize("config", [RELU, TOPK, {"decoder_bias": False}], ids=str)
def test_their_formula_gives_our_output(tmp_path, config):
    adapted = saved(tmp_path / "ours", **config)
    directory = convert(tmp_path / "ours", tmp_path / "set", "circuit-tracer")
    k = yaml.safe_load((directory / "config.yaml").read_text()).get("k")
    assert k == config.get("k")
    for layer in range(LAYERS):
        tensors = load_file(directory / f"layer_{layer}.safetensors")
        theirs = transcoder(tensors, inputs(), k)
        assert theirs.abs().max() > 0.1
        torch.testing.assert_close(branch(adapted, layer, inputs()), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", [RELU, TOPK, {"decoder_bias": False}], ids=str)
def test_there_and_back_is_bit_exact(tmp_path, dtype, config):
    saved(tmp_path / "ours", dtype=dtype, **config)
    convert(tmp_path / "ours", tmp_path / "set", "circuit-tracer")
    back = contents(convert(tmp_path / "set", tmp_path / "back", "tca_fast"))
    ours = contents(tmp_path / "ours")
    assert back == ours


def test_no_model_is_said_once(tmp_path):
    saved(tmp_path / "ours", provenance=Provenance())
    notes = conversion.prepare(tmp_path / "ours", "circuit-tracer").export.notes
    assert any("no model is known" in note for note in notes)
    assert not any("model_name is" in note for note in notes)


def test_a_foreign_set_is_read_with_what_it_leaves_open(exported, tmp_path):
    edit(exported, tca_fast=None, activation=None)
    prepared = conversion.prepare(exported, "tca_fast")
    info = prepared.adapters.info
    assert (info.adapter.activation, info.adapter.decoder_bias) == ("relu", True)
    assert (info.provenance.base, info.provenance.backbone) == ("org/target", "base")
    assert any("trained to replace the MLP" in note for note in prepared.adapters.notes)


def edit(directory, **changes):
    path = directory / "config.yaml"
    config = yaml.safe_load(path.read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    path.write_text(yaml.safe_dump(config))


def change(directory, action, file="layer_0.safetensors"):
    tensors = load_file(directory / file)
    action(tensors)
    save_file(tensors, directory / file)


def edit_record(directory, **changes):
    config = yaml.safe_load((directory / "config.yaml").read_text())
    edit(directory, tca_fast=config["tca_fast"] | changes)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "config.yaml").write_text("{"), "not readable as YAML"),
        (lambda d: edit(d, model_kind="cross_layer_transcoder"), "model_kind is 'cross_layer"),
        (lambda d: edit(d, feature_input_hook="ln2.hook_normalized"), "reads the input of the MLP"),
        (lambda d: edit(d, feature_output_hook="hook_resid_post"), "feature_output_hook is"),
        (lambda d: edit(d, activation="jumprelu"), "activation is 'jumprelu'"),
        (lambda d: edit(d, activation="topk"), r"config\.yaml: .*needs k"),
        (lambda d: edit(d, activation="topk", k="many"), r"config\.yaml: .*'many' does not fit"),
        (lambda d: edit(d, transcoders=["hf://a/b/c.safetensors"]), "names files elsewhere"),
        (lambda d: edit(d, tca_fast={"base": 3}), "record of tca_fast does not fit"),
        (lambda d: edit_record(d, backbone="head"), "record of tca_fast .*backbone 'head'"),
        (lambda d: edit_record(d, layers_name=3), "record of tca_fast .*layers_name 3"),
        (lambda d: edit_record(d, base=3), "record of tca_fast .*base 3"),
        (lambda d: edit_record(d, decoder_bias="no"), "record of tca_fast .*decoder_bias 'no'"),
        (lambda d: edit_record(d, decoder_bias=False), "b_dec is not zero"),
        (lambda d: (d / "layer_1.safetensors").unlink(), r"lacks layer_1\.safetensors"),
        (lambda d: [p.unlink() for p in d.glob("*.safetensors")], r"lacks layer_0\.safetensors"),
        (lambda d: change(d, lambda t: t.pop("b_enc")), "lacks b_enc"),
        (
            lambda d: change(d, lambda t: t.update(b_dec=torch.tensor(1.0))),
            r"b_dec is of shape \[\]",
        ),
        (lambda d: change(d, lambda t: t.update(W_skip=torch.ones(1))), "a skip connection"),
        (
            lambda d: change(
                d, lambda t: t.update({"activation_function.threshold": torch.ones(7)})
            ),
            "JumpReLU thresholds",
        ),
        (lambda d: change(d, lambda t: t.update(x=torch.ones(1))), "x is of shape .*not to be"),
        (
            lambda d: change(d, lambda t: t.update(W_enc=t["W_enc"].T.contiguous())),
            r"W_enc is of shape \[24, 7\], expected of shape \[7, 24\]",
        ),
        (
            lambda d: change(d, lambda t: t.update(b_enc=t["b_enc"].half()), "layer_2.safetensors"),
            "is float16; .* is float32; adapters have one floating dtype",
        ),
    ],
)
def test_what_an_adapter_cannot_be_is_one_line(exported, spoil, message):
    spoil(exported)
    with pytest.raises(UserError, match=message) as caught:
        conversion.prepare(exported, "tca_fast")
    assert "\n" not in str(caught.value)

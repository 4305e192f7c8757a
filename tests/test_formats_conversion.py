"""Conversions in general: our own format, files replaced whole, what is not recognised."""

import errno
import json
import re

import pytest
import torch
from formats_cases import RELU, TOPK, contents, convert, saved
from safetensors.torch import load_file, save_file
from tiny import tiny_qwen2

import tca_fast
from tca_fast.adapter_config import Provenance
from tca_fast.errors import UserError
from tca_fast.formats import conversion, tensor_files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("config", [RELU, TOPK, {"decoder_bias": False}], ids=str)
def test_our_own_files_are_those_of_save_pretrained(tmp_path, dtype, config):
    saved(tmp_path / "ours", dtype=dtype, **config)
    copied = contents(convert(tmp_path / "ours", tmp_path / "copy", "tca_fast"))
    ours = contents(tmp_path / "ours")
    assert ours.keys() == copied.keys() and "README.md" in ours
    assert copied == {name: ours[name] for name in copied}


def test_what_was_converted_loads(tmp_path):
    adapted = saved(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "set", "circuit-tracer")
    convert(tmp_path / "set", tmp_path / "back", "tca_fast")
    loaded = tca_fast.load(tiny_qwen2(), tmp_path / "back")
    for ours, theirs in zip(loaded.parameters(), adapted.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(UserError, match="is not the model"):
        tca_fast.load(tiny_qwen2(seed=9), tmp_path / "back")


def test_names_that_are_given_replace_those_in_the_files(tmp_path):
    saved(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "copy", "tca_fast", base="org/other", target="org/tuned")
    config = json.loads((tmp_path / "copy/adapter_config.json").read_text())
    assert (config["base"], config["base_revision"]) == ("org/other", None)
    assert config["base_model_name_or_path"] == "org/tuned"


def test_a_backbone_that_is_given_replaces_that_in_the_files(tmp_path):
    saved(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "copy", "tca_fast", backbone="base")
    config = json.loads((tmp_path / "copy/adapter_config.json").read_text())
    assert (config["backbone"], config["base_model_name_or_path"]) == ("base", "org/base")


def test_a_failed_write_leaves_earlier_files_and_no_others(tmp_path, monkeypatch):
    saved(tmp_path / "ours", **TOPK)
    saved(tmp_path / "theirs", provenance=Provenance(), **TOPK)
    convert(tmp_path / "ours", tmp_path / "out", "sparsify")
    before = contents(tmp_path / "out")
    write, calls = conversion.write_tensors, []

    def fails_at_the_last_layer(path, entries):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "full")
        write(path, entries)

    monkeypatch.setattr(conversion, "write_tensors", fails_at_the_last_layer)
    with pytest.raises(UserError, match="No space left on device"):
        convert(tmp_path / "theirs", tmp_path / "out", "sparsify")
    assert contents(tmp_path / "out") == before
    calls.clear()
    with pytest.raises(UserError, match="No space left on device"):
        convert(tmp_path / "ours", tmp_path / "new/deep", "sparsify")
    assert not (tmp_path / "new").exists()


def test_other_files_of_the_directory_are_left_alone(tmp_path):
    saved(tmp_path / "ours")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    convert(tmp_path / "ours", tmp_path / "out", "circuit-tracer")
    assert (tmp_path / "out/notes.txt").read_text() == "mine"


def deeper(directory, **config):
    """Adapters of five layers, two more than those of `saved`."""
    adapted = tca_fast.attach(
        tiny_qwen2(num_hidden_layers=5), tca_fast.AdapterConfig(num_features=7, **config)
    )
    adapted.save_pretrained(directory, Provenance())
    return directory


@pytest.mark.parametrize(
    ("older", "to", "left"),
    [
        ("circuit-tracer", "circuit-tracer", "layer_3.safetensors"),
        ("sparsify", "sparsify", "layers.3.mlp/sae.safetensors"),
        ("sparsify", "circuit-tracer", "layers.0.mlp/sae.safetensors"),
        ("tca_fast", "circuit-tracer", "adapter_config.json"),
        ("circuit-tracer", "tca_fast", "config.yaml"),
    ],
)
def test_files_that_would_be_read_with_the_new_ones_are_refused(tmp_path, older, to, left):
    saved(tmp_path / "ours", **TOPK)
    convert(deeper(tmp_path / "deeper", **TOPK), tmp_path / "out", older)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=f"out: {re.escape(left)} of earlier files would stay"):
        convert(tmp_path / "ours", tmp_path / "out", to)
    assert contents(tmp_path) == before


def test_transcoders_of_more_layers_than_are_written_are_refused(tmp_path):
    saved(tmp_path / "ours")
    convert(deeper(tmp_path / "deeper"), tmp_path / "out", "saelens")
    with pytest.raises(UserError, match=r"layer_3/sae_weights\.safetensors of earlier files"):
        convert(tmp_path / "ours", tmp_path / "out", "saelens")


@pytest.mark.parametrize("to", ["tca_fast", "circuit-tracer", "sparsify"])
def test_a_set_of_the_same_files_is_replaced(tmp_path, to):
    saved(tmp_path / "ours", **TOPK)
    convert(deeper(tmp_path / "deeper", **TOPK), tmp_path / "out", to)
    theirs = contents(convert(tmp_path / "deeper", tmp_path / "new", to))
    assert contents(convert(tmp_path / "deeper", tmp_path / "out", to)) == theirs


def test_preparing_reads_no_values_and_converting_each_tensor_once(tmp_path, monkeypatch):
    saved(tmp_path / "ours", **TOPK)
    from tca_fast.formats import adapter_set

    reads = []
    read = tensor_files.read_tensor
    monkeypatch.setattr(
        adapter_set, "read_tensor", lambda path, key: reads.append(key) or read(path, key)
    )
    prepared = conversion.prepare(tmp_path / "ours", "sparsify")
    assert reads == []
    conversion.convert(prepared, tmp_path / "out")
    assert len(reads) == len(set(reads)) == 3 * 4


def test_writing_onto_what_is_read_is_refused(tmp_path):
    saved(tmp_path / "ours")
    with pytest.raises(UserError, match="is what is being read"):
        convert(tmp_path / "ours", tmp_path / "ours", "circuit-tracer")


def run_with_an_adapter(directory):
    saved(directory / "adapter")
    (directory / "config.yaml").write_text("run: {output_dir: in}")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: None, "no such directory"),
        (lambda d: d.write_text(""), "in: is a file; give its directory"),
        (lambda d: d.mkdir(), "holds no format that is read.*found nothing"),
        (lambda d: tiny_qwen2().save_pretrained(d), "holds no format that is read.*config.json"),
        (lambda d: run_with_an_adapter(d), "is that of a run; give its adapter, .*in/adapter$"),
    ],
)
def test_what_is_not_recognised_is_one_line(tmp_path, make, message):
    make(tmp_path / "in")
    with pytest.raises(UserError, match=message) as caught:
        conversion.prepare(tmp_path / "in", "tca_fast")
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_there_are_said_to_be_missing(tmp_path):
    saved(tmp_path / "ours")
    (tmp_path / "ours/adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: is missing; copy"):
        conversion.prepare(tmp_path / "ours", "saelens")


def test_an_unknown_format_names_the_known_ones(tmp_path):
    saved(tmp_path / "ours")
    expected = "'gguf' is unknown; formats are tca_fast, paper, circuit-tracer, saelens, sparsify"
    with pytest.raises(UserError, match=re.escape(expected)):
        conversion.prepare(tmp_path / "ours", "gguf")


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda t: t.clear() or t.update(x=torch.ones(1)), "0 encoders of layer 0"),
        (lambda t: t.update({k: v.half() for k, v in t.items()}), "calls for float32"),
        (lambda t: t.update(x=torch.ones(1)), "x is of shape"),
        (lambda t: t.pop(sorted(t)[-1]), "is missing, expected of shape"),
    ],
)
def test_our_own_files_are_checked(tmp_path, action, message):
    saved(tmp_path / "ours")
    path = tmp_path / "ours/adapter_model.safetensors"
    tensors = load_file(path)
    action(tensors)
    save_file(tensors, path)
    with pytest.raises(UserError, match=message):
        conversion.prepare(tmp_path / "ours", "circuit-tracer")


class TestNamesOfModulesInFilesOfOthers:
    """sparsify's folders are named after the decoder layers, so a name must not lead elsewhere."""

    def write_out(self, source, tmp_path):
        before = contents(tmp_path)
        with pytest.raises(UserError, match="is no path of a module"):
            convert(source, tmp_path / "out", "sparsify")
        assert contents(tmp_path) == before

    def test_of_our_own(self, tmp_path):
        saved(tmp_path / "ours", **TOPK)
        path = tmp_path / "ours/adapter_model.safetensors"
        names = f"model.{tmp_path}/elsewhere/layers"
        save_file({k.replace("model.layers", names): t for k, t in load_file(path).items()}, path)
        self.write_out(tmp_path / "ours", tmp_path)

    def test_of_a_record(self, tmp_path):
        saved(tmp_path / "ours", **TOPK)
        config = convert(tmp_path / "ours", tmp_path / "set", "circuit-tracer") / "config.yaml"
        record = "layers_name: model.layers"
        assert record in (text := config.read_text())
        config.write_text(text.replace(record, "layers_name: model.x/../../elsewhere"))
        self.write_out(tmp_path / "set", tmp_path)

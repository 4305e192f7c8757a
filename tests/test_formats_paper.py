"""Import of the checkpoints released with the paper (contract §1.7)."""

import json
import os
from pathlib import Path

import pytest
import torch
from golden_oracle import random_adapter, write_adapter
from safetensors.torch import load_file, save_file
from tiny import batch, tiny_qwen2
from tiny_pair import character_tokenizer

from tca_fast.errors import UserError
from tca_fast.fingerprint import fingerprint
from tca_fast.formats.paper import (
    load_paper_checkpoint,
    read,
    read_paper_checkpoint,
    tensor_name,
    to_paper,
)

GOLDEN = Path(__file__).parent / "golden"
LAYERS, WIDTH, FEATURES = 3, 24, 7


def write(directory, decoder_bias=True, **config):
    """A released checkpoint, the assembled plain model and its adapters."""
    base, target = tiny_qwen2(0, **config), tiny_qwen2(1, **config)
    torch.manual_seed(2)
    adapters = [random_adapter(FEATURES, WIDTH, decoder_bias) for _ in range(LAYERS)]
    return write_adapter(directory, base, target, adapters, FEATURES), adapters


@pytest.fixture
def released(tmp_path):
    directory = tmp_path / "released"
    write(directory)
    return directory


@pytest.mark.parametrize("decoder_bias", [True, False])
def test_tensors_arrive_in_our_layout_and_bit_exact(tmp_path, decoder_bias):
    _, adapters = write(tmp_path, decoder_bias)
    config, layers = read_paper_checkpoint(tmp_path)
    assert (config.num_features, config.activation) == (FEATURES, "relu")
    assert config.decoder_bias is decoder_bias
    assert list(layers) == list(range(LAYERS))
    for layer, adapter in enumerate(adapters):
        expected = {
            "W_enc": adapter["enc.weight"],
            "b_enc": adapter["enc.bias"],
            "W_dec": adapter["dec.weight"].T,
        } | ({"b_dec": adapter["dec.bias"]} if decoder_bias else {})
        assert layers[layer].keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(layers[layer][name], tensor)
            assert torch.equal(
                to_paper(name, layers[layer][name]),
                load_file(tmp_path / "model.safetensors")[tensor_name(layer, name)],
            )


@pytest.mark.parametrize("tied", [False, True])
def test_the_model_computes_what_the_formula_says(tmp_path, tied):
    plain, adapters = write(tmp_path, tie_word_embeddings=tied)
    adapted = load_paper_checkpoint(tmp_path)
    inputs = batch()
    inputs.pop("labels")

    def add(adapter):
        def hook(module, args, output):
            features = torch.relu(args[0] @ adapter["enc.weight"].T + adapter["enc.bias"])
            return output + features @ adapter["dec.weight"].T + adapter["dec.bias"]

        return hook

    with torch.no_grad(), adapted.disabled():
        assert torch.equal(adapted(**inputs).logits, plain(**inputs).logits)
    for layer, adapter in zip(plain.model.layers, adapters, strict=True):
        layer.mlp.register_forward_hook(add(adapter))
    with torch.no_grad():
        torch.testing.assert_close(
            adapted(**inputs).logits, plain(**inputs).logits, rtol=1e-5, atol=1e-5
        )


def test_the_golden_checkpoint_gives_the_references_logits():
    adapted = load_paper_checkpoint(GOLDEN / "adapter")
    inputs = load_file(GOLDEN / "inputs.safetensors")
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        logits = adapted(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    golden = load_file(GOLDEN / "outputs.safetensors")["logits_adapter"]
    torch.testing.assert_close(logits[real], golden[real], rtol=1e-5, atol=1e-5)


def test_the_imported_model_is_a_plain_qwen2(released):
    config = load_paper_checkpoint(released).model.config
    assert config.architectures == ["Qwen2ForCausalLM"]
    assert not hasattr(config, "transcoder_n_features")


def test_generation_and_tokenizer_are_those_of_the_directory(tmp_path):
    released, tokenizer = tmp_path / "released", character_tokenizer()
    write(released, vocab_size=len(tokenizer))
    path = released / "generation_config.json"
    stops = {"do_sample": True, "temperature": 0.5, "eos_token_id": [2, 5]}
    path.write_text(json.dumps(json.loads(path.read_text()) | stops))
    tokenizer.save_pretrained(released)
    adapted = load_paper_checkpoint(released)
    found = adapted.model.generation_config.to_dict()
    assert {name: found[name] for name in stops} == stops
    assert adapted.features("abc").tokens == ["<bos>", "a", "b", "c"]
    path.write_text("{")
    with pytest.raises(UserError, match="generation_config.json: not readable"):
        load_paper_checkpoint(released)


def test_the_stored_dtype_is_kept_and_the_backbones_can_be_chosen(released):
    path = released / "model.safetensors"
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    edit(released, dtype="bfloat16")
    adapted = load_paper_checkpoint(released)
    assert {p.dtype for p in adapted.model.parameters()} == {torch.bfloat16}
    adapted = load_paper_checkpoint(released, dtype=torch.float32)
    assert adapted.model.lm_head.weight.dtype == torch.float32
    assert adapted.layers[0].W_enc.dtype == torch.bfloat16


def shard(directory):
    """Split the one file into two shards with an index."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_are_one_checkpoint(released):
    whole = load_paper_checkpoint(released)
    shard(released)
    sharded = load_paper_checkpoint(released)
    for ours, theirs in zip(
        sharded.model.state_dict().items(), whole.model.state_dict().items(), strict=True
    ):
        assert ours[0] == theirs[0] and torch.equal(ours[1], theirs[1])


def edit(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change(directory, action):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    action(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


ENCODER = tensor_name(1, "W_enc")
SHARD = "model-00001-of-00002.safetensors"
QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "has no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "not readable as JSON"),
        (lambda d: edit(d, model_type="llama"), "model_type is not 'qwen2'"),
        (lambda d: edit(d, transcoder_n_features=None), "n_features is None; give a checkpoint"),
        (lambda d: edit(d, transcoder_n_features=8), r"\[7, 24\].*calls for \[8, 24\], and 8 more"),
        (lambda d: edit(d, transcoder_dec_bias=False), "dec.bias.*calls for no such tensor"),
        (lambda d: edit(d, num_hidden_layers=4), "layers.3.*missing, config.json calls for"),
        (lambda d: edit(d, num_hidden_layers="3"), "num_hidden_layers is '3', not a number"),
        (lambda d: edit(d, hidden_size=None), "hidden_size is None, not a number"),
        (lambda d: (d / "model.safetensors").unlink(), "neither model.safetensors nor"),
        (lambda d: os.truncate(d / "model.safetensors", 900), "not a whole safetensors file"),
        (lambda d: change(d, lambda t: t.pop(ENCODER)), "transcoder_enc.weight has shape missing"),
        (
            lambda d: change(d, lambda t: t.update({ENCODER + "2": torch.ones(1)})),
            "transcoder_enc.weight2.*no such tensor",
        ),
        (lambda d: change(d, lambda t: t.pop(QUERY)), "backbone has missing keys.*q_proj"),
        (lambda d: change(d, lambda t: t.update(extra=torch.ones(1))), "unexpected keys: extra"),
        (lambda d: change(d, lambda t: t.update({QUERY: t[QUERY][:-1]})), "mismatched keys.*q_pr"),
        (
            lambda d: (shard(d), (d / "model-00002-of-00002.safetensors").unlink()),
            "00002-of-00002.safetensors: not a whole safetensors file",
        ),
        (
            lambda d: (shard(d), (d / "model.safetensors.index.json").write_text("{}")),
            "index.json: not a weight index",
        ),
        (
            lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"x": 5}}'),
            "index.json: not a weight index",
        ),
        (
            lambda d: (shard(d), save_file({"x": torch.ones(1)}, d / SHARD)),
            "differs from model.safetensors.index.json",
        ),
    ],
)
def test_what_does_not_fit_is_one_line_that_names_it(released, spoil, message):
    spoil(released)
    with pytest.raises(UserError, match=message) as caught:
        load_paper_checkpoint(released)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: edit(d, model_type="llama"), "model_type is not 'qwen2'"),
        (
            lambda d: edit(d, transcoder_n_features=8),
            r"shape \[7, 24\], expected of shape \[8, 24\]",
        ),
        (lambda d: edit(d, transcoder_dec_bias=False), "dec.bias is not called for"),
        (
            lambda d: edit(d, transcoder_n_features=-3),
            r"released/config\.json: .*transcoder_n_features: -3 does not fit",
        ),
        (lambda d: edit(d, num_hidden_layers=2), "layers.2.*is not called for"),
        (lambda d: edit(d, num_hidden_layers=4), "layers.3.*is in none of the files"),
        (lambda d: change(d, lambda t: t.pop(ENCODER)), "transcoder_enc.weight is missing"),
        (lambda d: change(d, lambda t: t.pop("model.layers.2.mlp.up_proj.weight")), "in none of"),
        (lambda d: change(d, lambda t: t.clear()), "in none of"),
        (lambda d: os.truncate(d / "model.safetensors", 900), "not a whole safetensors file"),
    ],
)
def test_reading_without_the_model_checks_as_much(released, spoil, message):
    spoil(released)
    with pytest.raises(UserError, match=message) as caught:
        read(released)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("open_it", "values"),
    [
        (read, {"num_attention_heads": "many"}),
        (read, {"num_attention_heads": 0}),
        (read, {"hidden_act": "none of these"}),
        (load_paper_checkpoint, {"num_attention_heads": "many"}),
    ],
)
def test_values_that_transformers_refuses_are_one_line(released, open_it, values):
    edit(released, **values)
    with pytest.raises(UserError, match=r"config\.json: is no configuration of Qwen2") as caught:
        open_it(released)
    assert "\n" not in str(caught.value)


def test_the_fingerprint_is_that_of_the_loaded_model(released):
    expected = fingerprint(load_paper_checkpoint(released).model)
    assert read(released).info.provenance.fingerprint == expected
    shard(released)
    assert read(released).info.provenance.fingerprint == expected


def test_our_own_checkpoints_are_recognised(released):
    edit(released, transcoder_n_features=None)
    (released / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"use tca_fast\.load"):
        load_paper_checkpoint(released)

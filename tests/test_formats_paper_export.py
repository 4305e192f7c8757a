"""Export to the paper's format: a whole model, which comes back as it went."""

import json
from pathlib import Path

import pytest
import torch
from formats_cases import FEATURES, LAYERS, TOPK, WIDTH, contents, convert, described
from safetensors.torch import load_file, save_file
from tiny import batch, randomise, tiny_llama, tiny_qwen2
from transformers import AutoModelForCausalLM

import tca_fast
from tca_fast.adapter_config import Provenance
from tca_fast.bridging.streams import load_adapted, take_mlps
from tca_fast.errors import UserError
from tca_fast.fingerprint import fingerprint
from tca_fast.formats import conversion, paper_export
from tca_fast.formats.paper import load_paper_checkpoint

GOLDEN = Path(__file__).parent / "golden"
ADAPTERS = {
    f"model.layers.{layer}.mlp.{name}": (shape, "F32")
    for layer in range(LAYERS)
    for name, shape in {
        "transcoder_enc.weight": [FEATURES, WIDTH],
        "transcoder_enc.bias": [FEATURES],
        "transcoder_dec.weight": [WIDTH, FEATURES],
        "transcoder_dec.bias": [WIDTH],
    }.items()
}


def trained(root, backbone="target", dtype=torch.float32, tied=False, **config):
    """A pair on disk and adapters beside the hybrid, as a run leaves them."""
    models = {
        name: tiny_qwen2(seed, tie_word_embeddings=tied)
        for seed, name in enumerate(("base", "target"))
    }
    models["target"].config.max_position_embeddings = 32
    for name, model in models.items():
        model.save_pretrained(root / name)
    model = models[backbone]
    take_mlps(model, models["base"])
    adapted = tca_fast.attach(
        model, tca_fast.AdapterConfig(num_features=FEATURES, **config), dtype=dtype
    )
    randomise(adapted)
    names = Provenance(str(root / "base"), None, str(root / "target"), None, backbone)
    adapted.save_pretrained(root / "ours", names)
    return adapted


def logits(adapted):
    inputs = batch()
    inputs.pop("labels")
    with torch.no_grad():
        return adapted(**inputs).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("backbone", ["target", "base"])
def test_the_export_is_the_models_tensors_and_the_adapters(tmp_path, backbone, tied):
    adapted = trained(tmp_path, backbone, tied=tied)
    directory = convert(tmp_path / "ours", tmp_path / "paper", "paper")

    plain = load_file(tmp_path / backbone / "model.safetensors")
    base = load_file(tmp_path / "base" / "model.safetensors")
    written = load_file(directory / "model.safetensors")
    found = described(directory / "model.safetensors")
    assert {key: found[key] for key in found if "transcoder" in key} == ADAPTERS
    assert written.keys() - ADAPTERS.keys() == plain.keys()
    assert ("lm_head.weight" in written) is not tied
    for key, tensor in plain.items():
        assert torch.equal(written[key], base[key] if ".mlp." in key else tensor), key
    assert torch.equal(logits(load_paper_checkpoint(directory)), logits(adapted))


@pytest.mark.parametrize("backbone", ["target", "base"])
def test_config(tmp_path, backbone):
    trained(tmp_path, backbone, decoder_bias=False)
    directory = convert(tmp_path / "ours", tmp_path / "paper", "paper")
    config = json.loads((directory / "config.json").read_text())
    plain = json.loads((tmp_path / backbone / "config.json").read_text())
    assert config == plain | {
        "architectures": ["Qwen2ForCausalLMWithTranscoder"],
        "transcoder_n_features": FEATURES,
        "transcoder_dec_bias": False,
        "max_position_embeddings": 32,
    }
    files = set(contents(directory))
    assert files == {"config.json", "generation_config.json", "model.safetensors"}


@pytest.mark.parametrize("backbone", ["target", "base"])
def test_the_tokenizer_is_the_targets(tmp_path, backbone):
    trained(tmp_path, backbone)
    for model in ("base", "target"):
        (tmp_path / model / "tokenizer.json").write_text(model)
        (tmp_path / model / "generation_config.json").write_text(model)
    directory = convert(tmp_path / "ours", tmp_path / "paper", "paper")
    assert (directory / "tokenizer.json").read_text() == "target"
    assert (directory / "generation_config.json").read_text() == backbone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("decoder_bias", [True, False])
@pytest.mark.parametrize("backbone", ["target", "base"])
def test_there_and_back_is_bit_exact(tmp_path, dtype, decoder_bias, backbone):
    adapted = trained(tmp_path, backbone, dtype=dtype, decoder_bias=decoder_bias)
    convert(tmp_path / "ours", tmp_path / "paper", "paper")
    names = {name: str(tmp_path / name) for name in ("base", "target")} | {"backbone": backbone}
    back = contents(convert(tmp_path / "paper", tmp_path / "back", "tca_fast", **names))
    ours = contents(tmp_path / "ours")
    assert back == ours
    assert torch.equal(logits(load_adapted(tmp_path / "back")), logits(adapted))


@pytest.mark.parametrize("backbone", ["target", "base"])
def test_what_does_not_come_back_by_itself_is_said(tmp_path, backbone):
    trained(tmp_path, backbone)
    out = conversion.prepare(tmp_path / "ours", "paper")
    assert any(f"--base, --target and --backbone {backbone}" in note for note in out.export.notes)
    conversion.convert(out, tmp_path / "paper")

    def said(**given):
        notes = conversion.prepare(tmp_path / "paper", "tca_fast", **given).adapters.notes
        return [option for note in notes for option in note.split() if option.startswith("--")]

    assert said() == ["--base", "--target", "--backbone"]
    assert said(base="a", target="b") == ["--backbone"]
    assert said(base="a", target="b", backbone=backbone) == []


def test_shards_hold_the_same_model(tmp_path, monkeypatch):
    trained(tmp_path)
    whole = convert(tmp_path / "ours", tmp_path / "whole", "paper")
    monkeypatch.setattr(paper_export, "_SHARD_BYTES", 20_000)
    sharded = convert(tmp_path / "ours", tmp_path / "sharded", "paper")

    expected = load_file(whole / "model.safetensors")
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    total = sum(tensor.nbytes for tensor in expected.values())
    assert index["metadata"]["total_size"] == total
    assert len(shards) >= total / 20_000 and shards[0] == (
        f"model-00001-of-{len(shards):05d}.safetensors"
    )
    found = {}
    for shard in shards:
        tensors = load_file(sharded / shard)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 20_000
        assert {index["weight_map"][key] for key in tensors} == {shard}
        found |= tensors
    assert len(shards) <= 2 * total / 20_000 + 1  # or two neighbours would fit into one
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert torch.equal(logits(load_paper_checkpoint(sharded)), logits(load_paper_checkpoint(whole)))
    prepared = conversion.prepare(sharded, "tca_fast").adapters
    mark = fingerprint(load_paper_checkpoint(whole).model)
    assert prepared.info.provenance.fingerprint == mark


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize("role", ["base", "target"])
def test_a_models_own_directory_is_not_written_over(tmp_path, role, max_shard_size):
    trained(tmp_path)
    model = tmp_path / role
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(
        tmp_path / "sharded", max_shard_size=max_shard_size
    )
    before = contents(tmp_path)
    for directory in (model, tmp_path / "sharded"):
        with pytest.raises(UserError, match="holds a whole model .*give another directory"):
            convert(tmp_path / "ours", directory, "paper")
    assert contents(tmp_path) == before


def test_a_base_of_its_own_dtype_keeps_it(tmp_path):
    trained(tmp_path)
    path = tmp_path / "base" / "model.safetensors"
    tensors = {key: tensor.bfloat16() for key, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    directory = convert(tmp_path / "ours", tmp_path / "paper", "paper")
    written = load_file(directory / "model.safetensors")
    for key, tensor in written.items():
        of_base = ".mlp." in key and "transcoder" not in key
        assert tensor.dtype == (torch.bfloat16 if of_base else torch.float32)
        assert not of_base or torch.equal(tensor, tensors[key])


def test_the_golden_checkpoint_keeps_its_logits_through_import_and_export(tmp_path):
    """The reference's own checkpoint: in, out again, in again, and run."""
    pair = {name: str(GOLDEN / name) for name in ("base", "target")}
    ours = convert(GOLDEN / "adapter", tmp_path / "ours", "tca_fast", **pair)
    directory = convert(ours, tmp_path / "paper", "paper")
    again = convert(directory, tmp_path / "again", "tca_fast", **pair)
    assert contents(again) == contents(ours)

    inputs = load_file(GOLDEN / "inputs.safetensors")
    real = inputs["attention_mask"].bool()
    golden = load_file(GOLDEN / "outputs.safetensors")["logits_adapter"]
    for adapted in (
        load_paper_checkpoint(directory),
        load_adapted(ours),
        load_adapted(again),
    ):
        with torch.no_grad():
            found = adapted(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        torch.testing.assert_close(found[real], golden[real], rtol=1e-5, atol=1e-5)


def test_imported_adapters_load_onto_the_model_they_came_with(tmp_path):
    adapted = trained(tmp_path)
    directory = convert(tmp_path / "ours", tmp_path / "paper", "paper")
    convert(directory, tmp_path / "back", "tca_fast")
    model = AutoModelForCausalLM.from_pretrained(directory)
    with adapted.disabled():
        assert torch.equal(logits(model), logits(adapted))
    assert torch.equal(logits(tca_fast.load(model, tmp_path / "back")), logits(adapted))


def change(path, action):
    tensors = load_file(path)
    action(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


GATE_OF_LAST = "model.layers.2.mlp.gate_proj.weight"  # one that the fingerprint sees
GATE = "model.layers.1.mlp.gate_proj.weight"
QUERY = "model.layers.2.self_attn.q_proj.weight"
ENCODER = "model.layers.0.mlp.transcoder_enc.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda d: change(d / "base/model.safetensors", lambda t: t[GATE_OF_LAST].mul_(2)),
            "is not the model the adapters were trained beside",
        ),
        (
            lambda d: change(d / "base/model.safetensors", lambda t: t.pop(GATE)),
            "gate_proj.weight is missing",
        ),
        (
            lambda d: change(d / "base/model.safetensors", lambda t: t.update({GATE: t[GATE][1:]})),
            r"gate_proj.weight is \[39, 24\] in .* and \[40, 24\] in",
        ),
        (
            lambda d: change(
                d / "base/model.safetensors", lambda t: t.update({ENCODER: torch.ones(1)})
            ),
            "has adapters already",
        ),
        (
            lambda d: change(d / "target/model.safetensors", lambda t: t.pop(QUERY)),
            "q_proj.weight is in none of the files",
        ),
        (lambda d: edit(d / "target", num_hidden_layers=4), "num_hidden_layers is 4, .* have 3"),
        (lambda d: edit(d / "base", hidden_size=32), "hidden_size is 32"),
        (
            lambda d: edit(d / "target", num_attention_heads="many"),
            "target/config.json: is no configuration of Qwen2",
        ),
        (lambda d: edit(d / "target", model_type="llama"), "model_type is not 'qwen2'"),
        (lambda d: (d / "base/config.json").unlink(), "not readable as JSON"),
        (lambda d: (d / "base/model.safetensors").unlink(), "neither model.safetensors nor"),
    ],
)
def test_models_that_do_not_fit_are_one_line(tmp_path, spoil, message):
    trained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        conversion.prepare(tmp_path / "ours", "paper")
    assert "\n" not in str(caught.value)


def test_models_must_be_named_and_there(tmp_path):
    adapted = trained(tmp_path)
    adapted.save_pretrained(tmp_path / "unnamed", Provenance())
    with pytest.raises(UserError, match="--base: the adapters do not say which model it was"):
        conversion.prepare(tmp_path / "unnamed", "paper")
    with pytest.raises(UserError, match="--target: nowhere/at all is neither a directory"):
        conversion.prepare(tmp_path / "ours", "paper", target="nowhere/at all")


def test_topk_is_refused(tmp_path):
    trained(tmp_path, **TOPK)
    with pytest.raises(UserError, match="'topk' has no counterpart in the paper's .*use spars"):
        conversion.prepare(tmp_path / "ours", "paper")


def test_another_architecture_is_refused(tmp_path):
    trained(tmp_path)
    tiny_llama().save_pretrained(tmp_path / "llama")
    with pytest.raises(UserError, match="the paper's checkpoints are Qwen2"):
        conversion.prepare(tmp_path / "ours", "paper", target=str(tmp_path / "llama"))

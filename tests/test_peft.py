"""The adapters as a PEFT method: the same numbers, the same files, errors that say what to do."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import PROVENANCE, contents, make_adapted, make_model
from tiny import SHAPE, batch, randomise
from zoo import ZOO, make

import tca_fast
from tca_fast import activations, sparsity
from tca_fast.adapter_config import PEFT_TYPE_IN_FILES, Provenance, mark_hybrid
from tca_fast.errors import UserError

pytest.importorskip("peft", reason="pip install 'peft>=0.21'")
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model

from tca_fast.integrations.peft import (
    TranscoderAdapterConfig,
    TranscoderAdapterLayer,
    from_pretrained,
)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save(directory, seed=1, provenance=PROVENANCE, **options):
    make_adapted(seed, **options).save_pretrained(directory, provenance)
    return directory


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """PEFT asks the hub for the model that a checkpoint names whenever it saves."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def saved(tmp_path):
    return save(tmp_path / "ours")


def logits(model, **inputs):
    with torch.no_grad():
        return model(**(inputs or batch())).logits


def peft_layers(model):
    return [module for module in model.modules() if isinstance(module, TranscoderAdapterLayer)]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="relu"),
        pytest.param({"activation": "topk", "k": 5}, id="topk"),
        pytest.param({"decoder_bias": False}, id="no decoder bias"),
        pytest.param({"kind": "llama"}, id="another family"),
        pytest.param({"dtype": torch.bfloat16}, id="bfloat16 is not cast to float32"),
    ],
)
def test_peft_computes_what_load_computes_and_writes_the_same_bytes(tmp_path, options):
    ours = save(tmp_path / "ours", **options)
    kind = options.get("kind", "qwen2")
    expected = logits(tca_fast.load(make_model(kind=kind), ours))

    model = PeftModel.from_pretrained(make_model(kind=kind), ours)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "theirs")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "theirs" / name).read_bytes() == (ours / name).read_bytes(), name

    again = tca_fast.load(make_model(kind=kind), tmp_path / "theirs")
    assert torch.equal(logits(again), expected)
    again.save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(ours)


@pytest.mark.parametrize("family", ZOO)
def test_every_architecture_computes_what_load_computes(family, tmp_path):
    adapted = tca_fast.attach(make(family), tca_fast.AdapterConfig(num_features=20))
    randomise(adapted)
    expected = logits(adapted.model)
    adapted.save_pretrained(tmp_path / "ours", Provenance(backbone="base"))

    model = PeftModel.from_pretrained(make(family), tmp_path / "ours")
    assert torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(make(family)))
    model.save_pretrained(tmp_path / "theirs")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "theirs" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()


@pytest.mark.parametrize("family", ["OLMo", "GPT-2"])  # norms without weights, other names
def test_fresh_adapters_are_saved_as_ours_are(family, tmp_path):
    ours = tca_fast.attach(make(family), tca_fast.AdapterConfig(num_features=20))
    ours.save_pretrained(tmp_path / "ours", Provenance(backbone="base"))
    model = get_peft_model(make(family), TranscoderAdapterConfig(num_features=20))
    assert torch.equal(logits(model), logits(make(family)))
    model.save_pretrained(tmp_path / "theirs")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "theirs" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()


def test_fresh_adapters_equal_those_of_attach_and_change_nothing():
    plain = logits(make_model())
    ours = tca_fast.attach(make_model(), tca_fast.AdapterConfig(num_features=20), seed=7)
    model = get_peft_model(make_model(), TranscoderAdapterConfig(num_features=20, seed=7))
    assert torch.equal(logits(model), plain)
    theirs = [layer.adapter["default"] for layer in peft_layers(model)]
    for mine, other in zip(ours.layers, theirs, strict=True):
        assert all(
            torch.equal(a, b) for a, b in zip(mine.parameters(), other.parameters(), strict=True)
        )
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == SHAPE["num_hidden_layers"] * 4
    assert all(".adapter.default." in name for name in trainable)


def test_a_checkpoint_that_peft_made_knows_its_model(tmp_path):
    base = make_model()
    base.name_or_path = "org/base"
    config = TranscoderAdapterConfig(num_features=20)
    get_peft_model(base, config).save_pretrained(tmp_path)
    loaded = tca_fast.load(make_model(), tmp_path)
    assert loaded.provenance.base == "org/base" and loaded.provenance.backbone == "base"
    with pytest.raises(UserError, match="fingerprint.*load org/base"):
        tca_fast.load(make_model(seed=9), tmp_path)
    # The same config may serve another model afterwards.
    get_peft_model(make_model(seed=9), config)


def test_either_side_records_a_named_model_alike(tmp_path):
    for name, model in (("plain", make_model()), ("hybrid", make_model())):
        model.name_or_path = f"org/{name}"
        if name == "hybrid":
            mark_hybrid(model, make_model(seed=9))
        ours = tca_fast.attach(model, tca_fast.AdapterConfig(num_features=20))
        ours.save_pretrained(tmp_path / "ours")
        tca_fast.detach(model)
        config = TranscoderAdapterConfig(num_features=20)
        get_peft_model(model, config).save_pretrained(tmp_path / "theirs")
        ours, theirs = ((tmp_path / side / CONFIG).read_bytes() for side in ("ours", "theirs"))
        assert ours == theirs
        assert json.loads(ours)["backbone"] == {"plain": "base", "hybrid": "target"}[name]


def test_adapters_on_a_plain_model_come_back_without_a_target(tmp_path):
    from transformers import AutoModelForCausalLM

    make_model().save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    model = get_peft_model(model, TranscoderAdapterConfig(num_features=20))
    for layer in peft_layers(model):
        torch.nn.init.normal_(layer.adapter["default"].W_dec)
    model.save_pretrained(tmp_path / "adapter")
    for load in (
        from_pretrained,
        tca_fast.load_adapted,
        AutoPeftModelForCausalLM.from_pretrained,
        AutoModelForCausalLM.from_pretrained,
    ):
        assert torch.equal(logits(load(tmp_path / "adapter")), logits(model))


def test_adapters_cast_in_memory_are_saved_as_they_are(saved, tmp_path):
    model = PeftModel.from_pretrained(make_model(), saved)
    for layer in peft_layers(model):
        layer.adapter.to(torch.bfloat16)
    model.save_pretrained(tmp_path / "cast")
    loaded = tca_fast.load(make_model(), tmp_path / "cast")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(loaded), logits(model))


class TestSwitching:
    @pytest.fixture
    def model(self, saved, tmp_path):
        other = save(tmp_path / "other", seed=2, num_features=12)
        model = PeftModel.from_pretrained(make_model(), saved, adapter_name="one")
        model.load_adapter(other, adapter_name="two")
        return model, saved, other

    def test_each_name_gives_its_own_adapter(self, model):
        model, one, two = model
        for name, directory in (("one", one), ("two", two), ("one", one)):
            model.set_adapter(name)
            assert torch.equal(logits(model), logits(tca_fast.load(make_model(), directory)))

    def test_disabled_is_the_bare_model_bit_for_bit(self, model):
        model = model[0]
        before = logits(model)
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(make_model()))
        assert torch.equal(logits(model), before)

    def test_two_active_adapters_add_up(self, model):
        model, one, two = model
        x = torch.randn(1, 5, SHAPE["hidden_size"], generator=torch.Generator().manual_seed(0))
        layer = peft_layers(model)[0]
        outputs = []
        for names in ("one", "two", ["one", "two"]):
            model.base_model.set_adapter(names)
            outputs.append(layer(x).detach())
        bare = layer.base_layer(x).detach()
        torch.testing.assert_close(outputs[2], outputs[0] + outputs[1] - bare)

    @pytest.mark.parametrize("record", [activations.record, sparsity.record])
    def test_a_recording_is_of_one_active_adapter(self, model, record):
        model = model[0]
        model.base_model.set_adapter(["one", "two"])
        with record(), pytest.raises(UserError, match="2 adapters are active.*set_adapter"):
            logits(model)
        model.set_adapter("two")
        with activations.record() as recording:
            logits(model)
        assert [sorted(step.layers) for step in recording.steps] == [[0, 1, 2]]
        assert recording.layer(1).num_features == 12

    def test_an_adapter_for_every_row_is_refused(self, model):
        model, prompt = model[0], batch()["input_ids"]
        for run in (model, model.generate):
            with pytest.raises(UserError, match=r"adapter_names: \['two'.*set_adapter") as caught:
                run(input_ids=prompt, adapter_names=["two", "__base__"])
            assert "\n" not in str(caught.value)
        assert torch.equal(model(input_ids=prompt, adapter_names=None).logits, model(prompt).logits)

    def test_each_is_saved_under_its_name(self, model, tmp_path):
        model, one, two = model
        model.save_pretrained(tmp_path / "both")
        for name, directory in (("one", one), ("two", two)):
            for file in (CONFIG, WEIGHTS):
                written = tmp_path / "both" / name / file
                assert written.read_bytes() == (directory / file).read_bytes()

    def test_deleting_and_unloading_give_the_model_back(self, model):
        model = model[0]
        model.set_adapter("two")
        model.delete_adapter("one")
        assert list(peft_layers(model)[0].adapter) == ["two"]
        bare = model.unload()
        assert not peft_layers(bare) and torch.equal(logits(bare), logits(make_model()))

    @pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
    def test_merging_is_refused_with_the_reason(self, model, merge):
        with pytest.raises(UserError, match="cannot be merged.*not linear"):
            getattr(model[0], merge)()
        assert peft_layers(model[0])


def test_generate_is_that_of_our_own_attachment(saved):
    prompt = batch()["input_ids"][:1]
    options = {"max_new_tokens": 12, "do_sample": False}
    ours = tca_fast.load(make_model(), saved).generate(prompt, **options)
    theirs = PeftModel.from_pretrained(make_model(), saved).generate(input_ids=prompt, **options)
    assert torch.equal(ours, theirs)


def test_low_cpu_mem_usage_loads_the_same_bits(saved):
    usual = PeftModel.from_pretrained(make_model(), saved)
    frugal = PeftModel.from_pretrained(make_model(), saved, low_cpu_mem_usage=True)
    assert torch.equal(logits(frugal), logits(usual))


def test_the_trainer_trains_the_adapters_alone_and_saves_what_both_sides_read(tmp_path):
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    model = get_peft_model(make_model(), TranscoderAdapterConfig(num_features=20))
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    example = {name: rows[0] for name, rows in batch().items()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=[example] * 8)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)

    written = tmp_path / "run" / "checkpoint-4"
    expected = logits(model.eval())
    assert torch.equal(logits(PeftModel.from_pretrained(make_model(), written)), expected)
    assert torch.equal(logits(tca_fast.load(make_model(), written)), expected)


def make_pair(root, backbone="target"):
    """Two models on disk and adapters between them; returns the checkpoint."""
    for role, seed in (("base", 3), ("target", 4)):
        make_model(seed).save_pretrained(root / role)
    from tca_fast.bridging.streams import build_streams

    streams = build_streams(
        make_model(3), make_model(4), tca_fast.AdapterConfig(num_features=20), backbone=backbone
    )
    names = Provenance(str(root / "base"), None, str(root / "target"), None, backbone)
    streams.adapted.save_pretrained(root / "adapter", names)
    return root / "adapter"


@pytest.mark.parametrize("backbone", ["target", "base"])
def test_from_pretrained_puts_the_pair_together(tmp_path, backbone):
    directory = make_pair(tmp_path, backbone)
    model = from_pretrained(directory)
    assert torch.equal(logits(model), logits(tca_fast.load_adapted(directory)))


class TestMistakes:
    def test_without_this_package_the_file_says_what_to_install(self, saved):
        script = (
            "import sys; from peft import PeftModel, PeftConfig\n"
            "from transformers import LlamaConfig, LlamaForCausalLM\n"
            "assert not any(name.startswith('tca_fast') for name in sys.modules)\n"
            "model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, "
            "intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))\n"
            "for read in (PeftConfig.from_pretrained, lambda d: PeftModel.from_pretrained(model, d)"
            ", model.load_adapter):\n"
            "    try: read(sys.argv[1])\n"
            "    except KeyError as error: print(error)\n"
        )
        result = subprocess.run(
            [sys.executable, "-c", script, str(saved)], capture_output=True, text=True, check=True
        )
        lines = result.stdout.splitlines()
        assert len(lines) == 3
        assert all("install tca_fast, then import tca_fast.integrations.peft" in x for x in lines)

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            pytest.param({"seed": 9}, "fingerprint.*fingerprint is None", id="other weights"),
            pytest.param({"hidden_size": 32}, "hidden_size: .*24.*32", id="other width"),
            pytest.param({"num_hidden_layers": 2}, "num_layers: .*3.*2", id="missing layer"),
        ],
    )
    def test_another_model_is_refused_and_unchanged(self, saved, model, message):
        from tiny import tiny_qwen2

        other = tiny_qwen2(**model)
        with pytest.raises(UserError, match=message) as caught:
            PeftModel.from_pretrained(other, saved)
        assert "\n" not in str(caught.value)
        assert not peft_layers(other)

    def test_a_model_meant_to_differ_is_accepted(self, saved):
        config = PeftConfig.from_pretrained(saved)
        config.fingerprint = None
        model = PeftModel.from_pretrained(make_model(seed=9), saved, config=config)
        ours = tca_fast.load(make_model(seed=9), saved, check_model=False)
        assert torch.equal(logits(model), logits(ours))

    @pytest.mark.parametrize("loader", ["AutoPeft", "AutoModel"])
    def test_the_plain_target_is_not_taken_for_the_hybrid(self, tmp_path, loader):
        from transformers import AutoModelForCausalLM

        directory = make_pair(tmp_path)
        auto = {"AutoPeft": AutoPeftModelForCausalLM, "AutoModel": AutoModelForCausalLM}[loader]
        with pytest.raises(UserError, match="MLP weights.*load the hybrid.*from_pretrained put"):
            auto.from_pretrained(directory)

    def test_the_hub_classes_load_a_checkpoint_whose_model_is_whole(self, tmp_path):
        from transformers import AutoModelForCausalLM

        directory = make_pair(tmp_path, "base")
        expected = logits(tca_fast.load_adapted(directory))
        for auto in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
            assert torch.equal(logits(auto.from_pretrained(directory)), expected)

    def test_half_an_adapter_is_refused(self, saved):
        tensors = load_file(saved / WEIGHTS)
        tensors.pop("base_model.model.model.layers.1.mlp.adapter.W_dec")
        save_file(tensors, saved / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(UserError, match=r"layers\.1\.mlp\.adapter\.default\.W_dec is missing"):
            PeftModel.from_pretrained(make_model(), saved)

    def test_shards_are_not_saved(self, tmp_path):
        model = get_peft_model(make_model(), TranscoderAdapterConfig(num_features=20))
        shards = {name: tensor[:0] for name, tensor in model.state_dict().items()}
        with pytest.raises(UserError, match=r"\[0.*instead of \[20.*ZeRO-3"):
            model.save_pretrained(tmp_path, state_dict=shards)
        assert not (tmp_path / WEIGHTS).exists()

    def test_some_modules_only_is_refused(self):
        with pytest.raises(UserError, match="target_modules: 'q_proj'; leave it out"):
            TranscoderAdapterConfig(target_modules="q_proj")

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"activation": "topk"}, "topk.*needs k"),
            ({"base": "m", "backbone": "both"}, "backbone 'both' is neither 'base' nor 'target'"),
            ({"dtype": "bf16"}, "dtype is 'bf16'; known are .*bfloat16"),
        ],
    )
    def test_a_value_that_does_not_fit_is_one_line(self, values, message):
        with pytest.raises(UserError, match=message) as caught:
            TranscoderAdapterConfig(**values)
        assert "\n" not in str(caught.value)

    def test_a_newer_format_is_refused(self, saved):
        config = json.loads((saved / CONFIG).read_text())
        (saved / CONFIG).write_text(json.dumps({**config, "format_version": 2}))
        with pytest.raises(UserError, match="format_version 2 is newer.*upgrade tca_fast"):
            PeftModel.from_pretrained(make_model(), saved)

    @pytest.mark.parametrize("inner", [False, True], ids=["PeftModel", "the model inside"])
    def test_our_own_attachment_is_refused_beside_adapters_of_peft(self, saved, inner):
        model = PeftModel.from_pretrained(make_model(), saved)
        before = logits(model)
        given = model.get_base_model() if inner else model
        for put in (tca_fast.attach, lambda given: tca_fast.load(given, saved)):
            with pytest.raises(UserError, match=r"PEFT adapters.*unload\(\)") as caught:
                put(given)
            assert "\n" not in str(caught.value)
        assert torch.equal(logits(model), before)
        assert torch.equal(logits(tca_fast.load(model.unload(), saved)), before)

    def test_a_model_with_our_own_attachment_is_refused(self, saved):
        with pytest.raises(UserError, match="already attached; call tca_fast.detach"):
            PeftModel.from_pretrained(make_adapted().model, saved)


def test_every_key_of_the_file_has_its_field(saved):
    # PEFT drops unknown keys with a warning, so a key without a field would be lost.
    keys = set(json.loads((saved / CONFIG).read_text()))
    assert keys <= set(TranscoderAdapterConfig.__dataclass_fields__)
    assert json.loads((saved / CONFIG).read_text())["peft_type"] == PEFT_TYPE_IN_FILES

"""Adapter-only checkpoints: exact round trips, and errors that say what to do."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zoo
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import randomise, tiny_llama, tiny_qwen2
from torch.utils._python_dispatch import TorchDispatchMode

import tca_fast
from tca_fast import checkpoint, durable
from tca_fast.adapter_config import Provenance, read_adapter_config
from tca_fast.errors import UserError
from tca_fast.fingerprint import fingerprint

FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md")
PROVENANCE = Provenance("org/base", "v1", "org/target", None, "target")


def make_model(seed=0, kind="qwen2"):
    return {"qwen2": tiny_qwen2, "llama": tiny_llama}[kind](seed)


def make_adapted(seed=1, dtype=torch.float32, kind="qwen2", **config):
    config = tca_fast.AdapterConfig(**{"num_features": 20} | config)
    adapted = tca_fast.attach(make_model(kind=kind), config, dtype=dtype)
    randomise(adapted, seed)
    return adapted


@pytest.fixture
def saved(tmp_path):
    directory = tmp_path / "adapter"
    make_adapted().save_pretrained(directory, PROVENANCE)
    return directory


def contents(directory):
    return {path.name: path.read_bytes() for path in sorted(Path(directory).iterdir())}


@pytest.mark.parametrize(
    ("kind", "dtype", "config"),
    [
        pytest.param("qwen2", torch.float32, {}, id="the usual case"),
        pytest.param("llama", torch.float32, {}, id="another family"),
        pytest.param("qwen2", torch.bfloat16, {}, id="stored in bfloat16"),
        pytest.param("qwen2", torch.float32, {"decoder_bias": False}, id="no decoder bias"),
        pytest.param("qwen2", torch.float32, {"activation": "topk", "k": 5}, id="topk"),
    ],
)
def test_save_load_save_gives_identical_files_and_bits(tmp_path, kind, dtype, config):
    adapted = make_adapted(dtype=dtype, kind=kind, **config)
    adapted.save_pretrained(tmp_path / "first", PROVENANCE)
    loaded = tca_fast.load(make_model(kind=kind), tmp_path / "first")

    assert loaded.config == adapted.config
    for ours, theirs in zip(loaded.parameters(), adapted.parameters(), strict=True):
        assert ours.dtype == theirs.dtype == dtype
        assert torch.equal(ours, theirs)
        assert ours.requires_grad

    loaded.save_pretrained(tmp_path / "second", read_adapter_config(tmp_path / "first").provenance)
    assert contents(tmp_path / "second") == contents(tmp_path / "first")
    assert set(contents(tmp_path / "first")) == set(FILES)

    tokens = torch.randint(0, 32, (2, 7))
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, adapted(tokens).logits)


def test_the_files_are_what_peft_and_transformers_expect(saved):
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config["peft_type"].split()[0] == "TRANSCODER_ADAPTER"
    assert config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == "org/target"  # the backbone
    assert config["target_modules"] == r"model\.layers\.\d+\.mlp"
    assert (config["base"], config["base_revision"]) == ("org/base", "v1")
    with safe_open(saved / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        keys = set(file.keys())
    assert "base_model.model.model.layers.2.mlp.adapter.W_enc" in keys
    assert len(keys) == 3 * 4
    card = (saved / "README.md").read_text()
    assert card.startswith("---\nbase_model: org/target\n") and "org/base" in card


def test_a_model_in_the_papers_format_is_not_recorded_as_a_base(tmp_path):
    # It is a hybrid, and its files do not say of which models.
    (tmp_path / "config.json").write_text(json.dumps({"transcoder_n_features": 4}))
    adapted = make_adapted()
    adapted.model.name_or_path = str(tmp_path)
    adapted.save_pretrained(tmp_path / "a")
    found = read_adapter_config(tmp_path / "a").provenance
    assert found == Provenance(fingerprint=fingerprint(make_model()))


def test_the_card_of_adapters_on_a_plain_model_names_it(tmp_path):
    adapted = make_adapted()
    adapted.model.name_or_path = "org/plain"
    adapted.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/plain"
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nbase_model: org/plain\n")
    assert "attach to org/plain." in card and "hybrid" not in card


def test_a_save_leaves_other_files_alone(saved):
    (saved / "training_state.json").write_text("kept")
    make_adapted(seed=2).save_pretrained(saved, PROVENANCE)
    assert (saved / "training_state.json").read_text() == "kept"
    assert set(contents(saved)) == {*FILES, "training_state.json"}


def test_files_have_the_permissions_of_ordinary_new_files(saved, tmp_path):
    (tmp_path / "ordinary").touch()
    expected = (tmp_path / "ordinary").stat().st_mode
    assert {file.stat().st_mode for file in saved.iterdir() if file.is_file()} == {expected}


def test_tensors_of_another_wrapper_class_load_by_layer(saved):
    path = saved / "adapter_model.safetensors"
    tensors = load_file(path)
    renamed = {
        key.replace("base_model.model.model.", "base_model.model.model.language_model."): tensor
        for key, tensor in tensors.items()
    }
    save_file(renamed, path, metadata={"format": "pt"})
    loaded = tca_fast.load(make_model(), saved)
    assert torch.equal(
        loaded.layers[1].W_dec, tensors["base_model.model.model.layers.1.mlp.adapter.W_dec"]
    )


class TestFailedSave:
    def test_the_file_size_limit_leaves_the_previous_checkpoint_whole(self, saved):
        # A real failed write, in a process of its own; the limit holds for the whole process.
        before = contents(saved)
        script = (
            "import resource, sys\n"
            "sys.path.insert(0, sys.argv[1])\n"
            "from test_checkpoint import make_adapted, PROVENANCE\n"
            "from tca_fast.errors import UserError\n"
            "adapted = make_adapted(seed=2)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
            "try:\n"
            "    adapted.save_pretrained(sys.argv[2], PROVENANCE)\n"
            "except UserError as error:\n"
            "    sys.stdout.write(str(error))\n"
        )
        command = [sys.executable, "-c", script, str(Path(__file__).parent), str(saved)]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "adapter_model.safetensors: cannot be written (File too large)" in result.stdout
        assert contents(saved) == before

    @pytest.mark.parametrize("step", ["tensors", "config", "flush", "rename"])
    def test_a_full_disk_at_any_step_leaves_the_previous_checkpoint_whole(
        self, saved, monkeypatch, step
    ):
        def full(*args, **kwargs):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        before = contents(saved)
        target = {
            "tensors": (checkpoint, "_write_tensors"),
            "config": (checkpoint, "_write_text"),
            "flush": (durable, "_flush"),
            "rename": (Path, "replace"),
        }[step]
        monkeypatch.setattr(*target, full)
        with pytest.raises(UserError, match="No space left on device.*free some space") as caught:
            make_adapted(seed=2).save_pretrained(saved, PROVENANCE)
        assert str(saved) in str(caught.value) and "\n" not in str(caught.value)
        monkeypatch.undo()
        assert contents(saved) == before

    def test_a_new_directory_does_not_outlive_its_failed_save(self, tmp_path, monkeypatch):
        def full(*args):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(checkpoint, "_write_text", full)
        with pytest.raises(UserError):
            make_adapted().save_pretrained(tmp_path / "a" / "b")
        assert list(tmp_path.iterdir()) == []

    def test_a_file_in_the_place_of_the_directory(self, tmp_path):
        (tmp_path / "taken").write_text("x")
        with pytest.raises(UserError, match="taken: cannot be written.*give a directory"):
            make_adapted().save_pretrained(tmp_path / "taken")

    def test_a_backbone_there_is_not_is_refused_before_anything_is_written(self, tmp_path):
        with pytest.raises(UserError, match="backbone 'both' is neither 'base' nor 'target'"):
            make_adapted().save_pretrained(tmp_path, Provenance("org/base", backbone="both"))
        assert not list(tmp_path.iterdir())

    def test_a_write_that_does_not_read_back(self, saved, monkeypatch):
        before = contents(saved)

        def lossy(tensors, path, metadata):
            save_file(dict(list(tensors.items())[1:]), path, metadata=metadata)

        monkeypatch.setattr("safetensors.torch.save_file", lossy)
        with pytest.raises(UserError, match="W_enc reads back otherwise than written"):
            make_adapted(seed=2).save_pretrained(saved, PROVENANCE)
        assert contents(saved) == before


def edit_config(directory, **changes):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory, edit):
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


W_ENC = "base_model.model.model.layers.1.mlp.adapter.W_enc"


class TestRefusedLoad:
    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda d: edit_config(d, activation="swish"), "activation: 'swish'"),
            (lambda d: edit_config(d, k=3), "k=3 has no meaning"),
            (lambda d: edit_config(d, format_version=2), "format_version 2 is newer than 1"),
            (lambda d: edit_config(d, peft_type="LORA"), "peft_type is 'LORA'"),
            (lambda d: edit_config(d, format_version=None), "format_version is None, which does"),
            (lambda d: edit_config(d, dtype="int8"), "json: dtype is 'int8'"),
            (lambda d: edit_config(d, backbone="both"), "json: backbone 'both' is neither 'base'"),
            (lambda d: edit_config(d, num_layers=0), "num_layers is 0, which does not fit"),
            (lambda d: edit_config(d, fingerprint={"mlp": 1, "rest": "a"}), "fingerprint lacks"),
            (lambda d: edit_config(d, num_layers="3"), "num_layers is '3'"),
            (lambda d: edit_config(d, num_layers=4), "num_layers.*trained with 4.*has 3"),
            (lambda d: edit_config(d, hidden_size=8), "hidden_size.*trained with 8.*has 24"),
            (
                lambda d: edit_config(d, num_features=21),
                r"is \[20, 24\] float32.*calls for \[21, 24\]",
            ),
            (lambda d: (d / "adapter_config.json").write_text("{"), "not readable as JSON"),
            (lambda d: (d / "adapter_config.json").write_bytes(b"\xff"), "not readable as JSON"),
            (lambda d: (d / "adapter_model.safetensors").unlink(), "safetensors: missing beside"),
            (
                lambda d: os.truncate(d / "adapter_model.safetensors", 5000),
                "not a whole safetensors file",
            ),
            (
                lambda d: (d / "adapter_model.safetensors").write_bytes(b"PK\x03\x04" * 100),
                "not a whole safetensors file",
            ),
            (lambda d: edit_tensors(d, lambda t: t.pop(W_ENC)), "lacks layer 1 W_enc"),
            (
                lambda d: edit_tensors(d, lambda t: t.update(foreign=torch.ones(1))),
                "unknown tensors foreign",
            ),
            (
                lambda d: edit_tensors(d, lambda t: t.update({W_ENC: t[W_ENC].half()})),
                r"W_enc is \[20, 24\] float16.*calls for \[20, 24\] float32",
            ),
        ],
    )
    def test_what_is_wrong_is_named_and_the_model_stays_bare(self, saved, spoil, message):
        spoil(saved)
        model = make_model()
        modules = [type(module) for module in model.modules()]
        with pytest.raises(UserError, match=message) as caught:
            tca_fast.load(model, saved)
        assert "\n" not in str(caught.value)
        assert [type(module) for module in model.modules()] == modules

    def test_a_missing_directory(self, tmp_path):
        with pytest.raises(UserError, match="nowhere does not exist"):
            tca_fast.load(make_model(), tmp_path / "nowhere")

    def test_what_is_no_directory(self, tmp_path):
        (tmp_path / "adapter_model.safetensors").write_bytes(b"")
        with pytest.raises(UserError, match=f"is a file; give its directory, {tmp_path}"):
            tca_fast.load(make_model(), tmp_path / "adapter_model.safetensors")
        with pytest.raises(UserError, match="directory: NoneType is no path"):
            tca_fast.load(make_model(), None)

    def test_a_folder_without_adapter_says_what_was_expected(self, tmp_path):
        (tmp_path / "notes.txt").write_text("")
        with pytest.raises(UserError, match="expected adapter_config.json.*found notes.txt"):
            tca_fast.load(make_model(), tmp_path)

    def test_a_checkpoint_of_the_paper_says_how_to_import_it(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"transcoder_n_features": 4}))
        with pytest.raises(UserError, match="load_paper_checkpoint"):
            tca_fast.load(make_model(), tmp_path)

    def test_a_hub_id_that_cannot_be_fetched(self, monkeypatch):
        def offline(*args, **kwargs):
            raise ConnectionError("no\nnetwork")

        monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
        with pytest.raises(UserError, match="org/adapter is neither.*ConnectionError: no network"):
            tca_fast.load(make_model(), "org/adapter")


def test_a_hub_id_is_loaded_from_its_snapshot(saved, monkeypatch):
    asked = {}

    def snapshot(repo, revision, allow_patterns):
        asked.update(repo=repo, revision=revision)
        return str(saved)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    tca_fast.load(make_model(), "org/adapter", revision="v2")
    assert asked == {"repo": "org/adapter", "revision": "v2"}


class _LargestCopy(TorchDispatchMode):
    """How many values the largest tensor had that was brought to another dtype or device."""

    num_values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if function is torch.ops.aten._to_copy.default:
            self.num_values = max(self.num_values, result.numel())
        return result


class TestFingerprint:
    def test_the_dtype_a_model_was_loaded_in_does_not_matter(self):
        # Models are released in bfloat16; float32 and float16 then hold the same values, except
        # for those that float16 cannot hold.
        released = make_model().to(torch.bfloat16)
        with torch.no_grad():
            released.model.layers[0].mlp.up_proj.weight[0, 0] = 3e-6
        mark = fingerprint(released)
        assert fingerprint(released.to(torch.float16)) == mark
        assert fingerprint(make_model().to(torch.bfloat16).float()) == fingerprint(make_model())

    def test_a_release_in_float32_may_be_loaded_in_bfloat16(self):
        # Values just below 2⁻¹⁴, from where on they are taken as zero, round up to it.
        released = make_model()
        with torch.no_grad():
            released.model.layers[0].mlp.up_proj.weight[0, 0] = 2.0**-14 * (1 - 2.0**-12)
        mark = fingerprint(released)
        assert fingerprint(released.to(torch.bfloat16)) == mark

    @pytest.mark.parametrize("family", ["Mixtral", "Qwen3-MoE", "gpt-oss"])
    def test_of_many_experts_few_rows_are_read(self, family):
        model = zoo.make(family)
        mlp = model.model.layers[0].mlp
        with torch.no_grad():
            for _, weight in mlp.experts.named_parameters():
                weight.data = torch.randn(256, *weight.shape[1:])
        before = fingerprint(model)
        with _LargestCopy() as largest:
            assert fingerprint(model) == before
        widest = max(parameter.shape[-1] for parameter in model.parameters())
        assert largest.num_values <= 64 * widest
        with torch.no_grad():
            mlp.experts.down_proj[0, 0] += 1
        assert fingerprint(model).mlp != before.mlp

    def test_attached_adapters_do_not_matter(self):
        assert fingerprint(make_adapted().model) == fingerprint(make_model())

    def test_other_mlps_are_told_from_another_backbone(self, saved):
        other_mlps, other_rest = make_model(), make_model()
        with torch.no_grad():
            other_mlps.model.layers[2].mlp.down_proj.weight += 0.1
            other_rest.model.layers[0].self_attn.q_proj.weight += 0.1
        with pytest.raises(UserError, match="MLP weights.*hybrid, which is org/target with") as one:
            tca_fast.load(other_mlps, saved)
        with pytest.raises(UserError, match="attention and norm weights") as two:
            tca_fast.load(other_rest, saved)
        assert "attention" not in str(one.value) and "MLP weights" not in str(two.value)
        assert len(tca_fast.load(other_mlps, saved, check_model=False).layers) == 3

    def test_a_recorded_fingerprint_is_kept(self, tmp_path):
        # A trainer that partitions the weights takes it beforehand.
        mark = fingerprint(make_model(seed=9))
        provenance = Provenance(fingerprint=mark)
        make_adapted().save_pretrained(tmp_path, provenance)
        assert read_adapter_config(tmp_path).provenance.fingerprint == mark

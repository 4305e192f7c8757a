"""`verify`: the reference's own numbers, folders of other sizes, and that a wrong number shows."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import typer
from golden_oracle import write_folder
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tca_fast.bridging.golden import verify
from tca_fast.cli.verify import verify as verify_command
from tca_fast.errors import UserError
from tca_fast.training.schedule import learning_rate

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices this small only lose time to threads waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checks():
    return verify(GOLDEN, learning_rate=learning_rate)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small golden folder from an independent float64 computation."""
    directory = tmp_path_factory.mktemp("golden")
    write_folder(directory, num_hidden_layers=2, other_cutoffs=[(0,), (1, 2)])
    return directory


@pytest.fixture
def copied(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "golden"))


def misses(checks):
    return {check.name for check in checks if check.ok is False}


class TestReference:
    def test_every_quantity_agrees(self, checks):
        assert misses(checks) == set()

    def test_nothing_but_the_known_exceptions_is_left_unchecked(self, checks):
        unchecked = {check.name: check.note for check in checks if check.ok is None}
        assert all(unchecked.values())
        blocks = {re.split(r"[.:]", name)[0] for name in unchecked}
        assert blocks == {
            "_about",
            "bf16_informational",
            "config_after_assembly",
            "fresh_init_zero_decoder",
            "relp",
        }
        assert not any("unknown" in note for note in unchecked.values())

    def test_every_stored_number_is_accounted_for(self, checks):
        def leaves(tree, path):
            if isinstance(tree, dict):
                return [leaf for key in tree for leaf in leaves(tree[key], [*path, key])]
            return [".".join(path)]

        names = {re.sub(r"(\[\d+\])$|, \w+( backbone)?$", "", check.name) for check in checks}
        settings = {
            "_about.k",
            "_about.l1_weight",
            "_about.lambda_adapt",
            "_about.lambda_bridge",
            "_about.lambda_nmse",
            "relp.prompt",
            "schedule_lr_example.total",
            "schedule_lr_example.warmup",
        }
        stored = set(leaves(json.loads((GOLDEN / "values.json").read_text()), []))
        assert stored - names == settings
        for file in ("grads", "outputs", "relp"):
            for key in load_file(GOLDEN / f"{file}.safetensors"):
                name = f"{file}.safetensors{{}}{key}"
                assert {name.format(": "), name.format(".")} & names, key


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(
            {
                "decoder_bias": False,
                "k": 1,
                "other_cutoffs": [(0,), (1, 3), (3,)],
                "batch": (3, 9),
                "weights": (0.7, 0.02, 0.5, 1.5),
            },
            id="no decoder bias, other weights and batch",
        ),
        pytest.param(
            {
                "seed": 3,
                "tie_word_embeddings": True,
                "num_hidden_layers": 2,
                "k": 2,
                "num_features": 33,
                "hidden_size": 24,
            },
            id="tied head, end cutoff, other sizes",
        ),
    ],
)
def test_folders_of_other_sizes_agree(tmp_path, settings):
    write_folder(tmp_path, **settings)
    checks = verify(tmp_path)
    assert misses(checks) == set()
    compared = {check.name for check in checks if check.ok}
    assert sum("grads.safetensors: total/" in name for name in compared) > 0
    assert "base_backbone.kl" in compared and "target_backbone.nmse" in compared


def test_each_wrong_number_is_a_miss_and_nothing_else_is(copied):
    values = json.loads((copied / "values.json").read_text())
    values["target_backbone"]["kl"] *= 1.001
    values["target_backbone"]["nmse_per_hidden_state"][1] *= 1.001
    values["target_backbone"]["l0_per_layer"][0] += 0.05
    values["base_backbone"]["a2r_lm_1"] *= 1.001
    values["cutoffs_1_2"]["grad_norm_total"] *= 1.001
    values["logged_total"] *= 1 + 3e-5
    del values["prompt_masked_2"]["lm"]
    values["new_block"] = {"x": 1.0}
    (copied / "values.json").write_text(json.dumps(values))
    grads = load_file(copied / "grads.safetensors")
    grads["kl/model.layers.0.mlp.transcoder_enc.weight"] *= 1.001
    grads["r2a/model.layers.0.mlp.transcoder_enc.bias"][0] += 1e-4
    del grads["l1/model.layers.1.mlp.transcoder_dec.weight"]
    grads["kl/foreign"] = torch.ones(2)
    save_file(grads, copied / "grads.safetensors")
    outputs = load_file(copied / "outputs.safetensors")
    outputs["features"][1] *= 1.001
    outputs["logits_ref"][1, -1] += 1.0  # padding is not compared
    del outputs["resid_ref"]
    save_file(outputs, copied / "outputs.safetensors")

    checks = verify(copied)
    assert misses(checks) == {
        "target_backbone.kl",
        "target_backbone.nmse_per_hidden_state[1]",
        "target_backbone.l0_per_layer[0]",
        "base_backbone.a2r_lm_1",
        "cutoffs_1_2.grad_norm_total",
        "logged_total",
        "prompt_masked_2.lm",
        "grads.safetensors: kl/model.layers.0.mlp.transcoder_enc.weight",
        "grads.safetensors: r2a/model.layers.0.mlp.transcoder_enc.bias",
        "grads.safetensors: l1/model.layers.1.mlp.transcoder_dec.weight",
        "outputs.safetensors: features[1]",
        "outputs.safetensors: resid_ref",
    }
    unknown = {check.name for check in checks if check.note == "unknown to this release"}
    assert unknown == {"new_block.x", "grads.safetensors.kl/foreign"}


def test_a_backbone_of_other_weights_is_a_miss(copied):
    path = copied / "target" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.self_attn.q_proj.weight"] *= 1.01
    save_file(tensors, path, metadata={"format": "pt"})
    missed = misses(verify(copied))
    assert {"adapter/: backbone tensors", "target_backbone.kl", "target_backbone.lm"} <= missed


def test_a_pair_of_different_rope_is_a_miss_that_says_why(copied):
    path = copied / "base" / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"]["rope_theta"] = 500.0
    path.write_text(json.dumps(config))
    checks = verify(copied)
    wrong = {check.name: check for check in checks if check.ok is False}
    assert wrong.keys() == {"pair: rope_parameters"}  # here only the base's file was changed
    assert "contract §2.4" in wrong["pair: rope_parameters"].note
    refused = next(check for check in checks if check.name == "base_backbone")
    assert refused.ok is None and "rope_parameters" in refused.note


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: shutil.rmtree(d), "does not exist; give a golden folder"),
        (lambda d: (d / "grads.safetensors").unlink(), "lacks grads.safetensors"),
        (lambda d: (d / "values.json").write_text("{"), "values.json: not readable as JSON"),
        (lambda d: (d / "values.json").write_text("{}"), "no block '_about'"),
        (lambda d: edit_about(d, k=3), r"_about.k is 3; it must be one cutoff in 0\.\.2"),
        (lambda d: edit_about(d, l1_weight="x"), "_about.l1_weight is 'x'"),
        (
            lambda d: (d / "outputs.safetensors").write_bytes(b"\x00" * 100),
            "outputs.safetensors: not a whole safetensors file",
        ),
        (
            lambda d: save_file({"input_ids": torch.ones(1, 2)}, d / "inputs.safetensors"),
            "all three are needed",
        ),
    ],
)
def test_an_invalid_folder_is_one_line_that_says_why(copied, spoil, message):
    spoil(copied)
    with pytest.raises(UserError, match=message) as caught:
        verify(copied)
    assert "\n" not in str(caught.value)


def edit_about(directory, **changes):
    path = directory / "values.json"
    values = json.loads(path.read_text())
    values["_about"] |= changes
    path.write_text(json.dumps(values))


def test_an_unknown_step_names_the_known_ones(folder):
    with pytest.raises(UserError, match="step: 'fast' is unknown; choose one of plain"):
        verify(folder, step="fast")


class TestCommand:
    def run(self, *args):
        app = typer.Typer()
        app.command()(verify_command)
        return CliRunner().invoke(app, [str(arg) for arg in args])

    def test_a_good_folder_exits_0_and_prints_both_values(self, folder):
        result = self.run(folder)
        assert result.exit_code == 0
        kl = json.loads((folder / "values.json").read_text())["target_backbone"]["kl"]
        line = next(line for line in result.output.splitlines() if "target_backbone.kl" in line)
        assert line.count(f"{kl:.6f}"[:7]) == 2 and "ok" in line
        assert "0 missed" in result.output and "not checked" in result.output

    def test_a_miss_exits_1_and_is_all_that_is_shown_when_asked(self, copied):
        values = json.loads((copied / "values.json").read_text())
        values["target_backbone"]["kl"] *= 1.001
        (copied / "values.json").write_text(json.dumps(values))
        result = self.run(copied, "--only-failures")
        assert result.exit_code == 1
        assert result.output.count("MISS") == 1 and "1 missed" in result.output
        assert "target_backbone.lm" not in result.output

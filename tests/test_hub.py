"""Adapters to and from a hub, here one on the loopback device; nothing leaves this machine."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_server import TOKEN, Hub
from test_checkpoint import PROVENANCE, contents, make_adapted, make_model
from typer.testing import CliRunner

import tca_fast
from tca_fast.adapter_config import Provenance, read_adapter_config
from tca_fast.cli import app
from tca_fast.errors import UserError
from tca_fast.hub.card import MISSING, with_figures
from tca_fast.training.origin import commit

LOG = [
    {"step": 1, "split": "train", "kl": 9.0, "l0": 9.0},
    {"step": 2, "split": "validation", "kl": 0.0225, "nmse": 0.081, "l0": 14.625, "lm": 1.5},
    {"step": 3, "split": "train", "kl": 7.0, "l0": 7.0},
]
CONFIG = {
    "data": {"train": "/secret/folder/train.jsonl", "validation": None},
    "objective": {"l1_weight": 0.01},
    "optimizer": {"learning_rate": 0.003},
    "run": {"train_batch_size": 8, "seed": 42},
}
ORIGIN = {
    "tca_fast": "0.1.0",
    "commit": "0123abc-dirty",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "data": {"train": {"sha256": "feed", "sequences": 22}},
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with Hub() as server:
        constants = huggingface_hub.constants
        template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture
def run(tmp_path):
    """A run's output directory with an adapter in it."""
    directory = tmp_path / "run"
    make_adapted().save_pretrained(directory / "adapter", PROVENANCE)
    (directory / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LOG))
    (directory / "config.yaml").write_text(json.dumps(CONFIG))
    (directory / "origin.json").write_text(json.dumps(ORIGIN))
    return directory


def rows(card: str) -> dict[str, str]:
    cells = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| ")]
    return {cell[0]: cell[1] for cell in cells if len(cell) == 2}


def test_what_is_pushed_is_pulled_and_loaded_bit_for_bit(hub, run, tmp_path):
    before = contents(run / "adapter")
    address = tca_fast.push(run, "org/adapter")
    assert address == f"{hub.address}/org/adapter/commit/{hub.sha('org/adapter')}"
    assert contents(run / "adapter") == before
    assert set(hub.repos["org/adapter"]) == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }

    pulled = tca_fast.pull("org/adapter", tmp_path / "pulled")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (pulled / name).read_bytes() == before[name]
    assert set(contents(pulled)) == set(hub.repos["org/adapter"])
    ours, tokens = tca_fast.load(make_model(), run / "adapter"), torch.arange(8)[None]
    for source in (pulled, "org/adapter"):
        with torch.no_grad():
            again = tca_fast.load(make_model(), source)
            assert torch.equal(again(tokens).logits, ours(tokens).logits)


def test_the_card_has_the_figures_of_the_last_validation(hub, run):
    tca_fast.push(run, "org/adapter", private=True)
    card = hub.repos["org/adapter"]["README.md"].decode()
    assert card.startswith("---\nbase_model: org/target\n")
    assert "On the validation sequences, after step 2." in card
    table = rows(card)
    assert table["KL(target ‖ adapter), nats per token"] == "0.0225"
    assert table["L0, active features per token and layer"] == "14.62"
    assert table["base (gives the MLPs)"] == "org/base, revision v1"
    assert table["training data"] == "`train.jsonl`, 22 sequences, SHA-256 beginning feed"
    assert table["validation data"] == "none"
    assert table["commit"] == "0123abc-dirty"
    assert table["LM loss of the target"] == MISSING
    assert "secret" not in card
    assert hub.private == {"org/adapter"}


def test_figures_that_nobody_recorded_are_said_to_be_missing(hub, tmp_path):
    make_adapted().save_pretrained(tmp_path / "bare", PROVENANCE)
    tca_fast.push(tmp_path / "bare", "org/bare")
    card = hub.repos["org/bare"]["README.md"].decode()
    assert "There is no log of the run" in card
    table = rows(card)
    assert all(table[name] == MISSING for name in ("commit", "training data", "L1 weight"))
    assert all(text == MISSING for name, text in table.items() if name.startswith(("KL", "NMSE")))


def test_without_validation_the_card_says_which_step_the_figures_are_of(run):
    (run / "log.jsonl").write_text(json.dumps(LOG[0]) + "\n" + '{"step": 2, "spl')
    card = with_figures("# Card", run)
    assert "On the training batch of step 1; the run had no validation." in card
    assert rows(card)["NMSE of the residual stream, mean of the layers' inputs"] == MISSING


def test_figures_replace_those_of_an_earlier_push(run):
    once = with_figures("# Card\n\nMy own words.\n", run)
    assert with_figures(once, run) == once and once.count("## Figures") == 1
    assert "My own words." in once


@pytest.mark.parametrize("renamed", [None, "org/renamed"])
def test_adapters_that_are_pushed_on_keep_the_figures_of_their_run(hub, run, tmp_path, renamed):
    tca_fast.push(run, "org/first")
    pulled = tca_fast.pull("org/first", tmp_path / "pulled")
    tca_fast.push(pulled, "org/second", target=renamed)
    first, second = (hub.repos[name]["README.md"].decode() for name in ("org/first", "org/second"))
    figures = first[first.index("## Figures") :]
    assert "On the validation sequences, after step 2." in figures
    assert second.endswith(figures) and second.count("## Figures") == 1
    assert (f"| {renamed}, revision default |" in second) == (renamed is not None)


def test_a_real_run_records_what_the_card_needs(tmp_path):
    from tiny_pair import make_pair

    from tca_fast.config import load_config
    from tca_fast.training.run import train

    config = load_config(make_pair(tmp_path), ["run.max_steps=2", "run.eval_steps=2"])
    train(config, show_progress=False)
    run = Path(config.run.output_dir)
    table = rows(with_figures("", run))
    recorded = {name: text for name, text in table.items() if MISSING in text}
    assert not {name for name in recorded if name != "commit"}
    assert (table["commit"] == MISSING) == (commit() is None)
    last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    assert last["split"] == "validation"
    assert table["KL(target ‖ adapter), nats per token"] == f"{last['kl']:.4g}"
    assert ", 22 sequences," in table["training data"]


def test_models_in_directories_are_named_for_others_or_refused(hub, tmp_path):
    names = Provenance(str(tmp_path / "base"), None, str(tmp_path / "target"), None, "target")
    make_adapted().save_pretrained(tmp_path / "local", names)
    with pytest.raises(UserError, match="base: .*directory of this machine.*--base"):
        tca_fast.push(tmp_path / "local", "org/local")
    assert not hub.repos
    tca_fast.push(tmp_path / "local", "org/local", base="org/base", target="org/target")
    pulled = tca_fast.pull("org/local", tmp_path / "pulled")
    origin = read_adapter_config(pulled).provenance
    assert (origin.base, origin.target) == ("org/base", "org/target")
    for name, data in contents(pulled).items():
        assert str(tmp_path).encode() not in data, name


def test_a_revision_does_not_follow_a_model_to_another_name(hub, tmp_path):
    names = Provenance("org/base", "v1", "org/target", "v2", "target")
    make_adapted().save_pretrained(tmp_path / "ours", names)
    tca_fast.push(tmp_path / "ours", "org/ours", target="org/renamed")
    pulled = tca_fast.pull("org/ours", tmp_path / "pulled")
    origin = read_adapter_config(pulled).provenance
    assert (origin.base, origin.base_revision) == ("org/base", "v1")
    assert (origin.target, origin.target_revision) == ("org/renamed", None)
    assert "revision v2" not in (pulled / "README.md").read_text()


class TestMistakes:
    def one_line(self, caught):
        assert "\n" not in str(caught.value)

    def test_no_token(self, hub, run, monkeypatch):
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
        with pytest.raises(UserError, match="token: none found; run `hf auth login`") as caught:
            tca_fast.push(run, "org/adapter")
        self.one_line(caught)
        assert not hub.requests

    def test_a_token_that_is_not_accepted(self, hub, run, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "hf_other")
        with pytest.raises(UserError, match="token is not accepted") as caught:
            tca_fast.push(run, "org/adapter")
        self.one_line(caught)

    def test_somebody_elses_name(self, hub, run):
        with pytest.raises(UserError, match="repo: strangers/x: the token may not write") as caught:
            tca_fast.push(run, "strangers/x")
        self.one_line(caught)

    def test_a_repository_that_exists(self, hub, run):
        tca_fast.push(run, "org/adapter")
        with pytest.raises(UserError, match="org/adapter: exists already.*overwrite") as caught:
            tca_fast.push(run, "org/adapter")
        self.one_line(caught)
        assert hub.commits == {"org/adapter": 1}
        tca_fast.push(run, "org/adapter", overwrite=True)
        assert hub.commits == {"org/adapter": 2}

    def test_no_such_repository(self, hub, tmp_path):
        with pytest.raises(UserError, match="repo: org/none is not on the hub") as caught:
            tca_fast.pull("org/none", tmp_path / "pulled")
        self.one_line(caught)
        assert not (tmp_path / "pulled").exists()

    def test_no_such_revision(self, hub, run, tmp_path):
        tca_fast.push(run, "org/adapter")
        with pytest.raises(UserError, match="revision: not in org/adapter") as caught:
            tca_fast.pull("org/adapter", tmp_path / "pulled", revision="v9")
        self.one_line(caught)

    @pytest.mark.parametrize("direction", ["push", "pull"])
    def test_no_network(self, hub, run, tmp_path, monkeypatch, direction):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(UserError, match="cannot be reached.*check the network") as caught:
            if direction == "push":
                tca_fast.push(run, "org/adapter")
            else:
                tca_fast.pull("org/adapter", tmp_path / "pulled")
        self.one_line(caught)

    def test_a_name_that_is_none(self, hub, run):
        with pytest.raises(UserError, match="repo: 'a/b/c' is no name") as caught:
            tca_fast.push(run, "a/b/c")
        self.one_line(caught)

    def test_a_name_without_an_owner(self, hub, run):
        with pytest.raises(UserError, match="repo: 'mine' names no owner; give owner/name"):
            tca_fast.push(run, "mine")
        assert not hub.repos and not hub.requests

    def test_a_file_in_the_place_of_its_directory(self, hub, run):
        weights = run / "adapter" / "adapter_model.safetensors"
        with pytest.raises(UserError, match="is a file; give its directory, .*adapter$"):
            tca_fast.push(weights, "org/adapter")

    def test_pickled_weights_are_not_read(self, hub, run, tmp_path):
        tca_fast.push(run, "org/adapter")
        files = hub.repos["org/adapter"]
        files["adapter_model.bin"] = files.pop("adapter_model.safetensors")
        with pytest.raises(UserError, match="no adapter_model.safetensors.*only safetensors"):
            tca_fast.pull("org/adapter", tmp_path / "pulled")
        assert not any("adapter_model.bin" in request for request in hub.requests)

    def test_half_an_adapter_is_neither_pushed_nor_kept(self, hub, run, tmp_path):
        tca_fast.push(run, "org/adapter")
        weights = run / "adapter" / "adapter_model.safetensors"
        for data in (weights.read_bytes()[:-100], b""):
            weights.write_bytes(data)
            with pytest.raises(UserError, match="adapter_model.safetensors"):
                tca_fast.push(run, "org/other")
            hub.repos["org/adapter"]["adapter_model.safetensors"] = data
            hub.commits["org/adapter"] += 1
            with pytest.raises(UserError, match="adapter_model.safetensors"):
                tca_fast.pull("org/adapter", tmp_path / "pulled")
        assert not (tmp_path / "pulled").exists() and "org/other" not in hub.repos


def test_the_commands(hub, run, tmp_path):
    runner = CliRunner()
    pushed = runner.invoke(app, ["push", str(run), "org/adapter", "--private"])
    assert pushed.exit_code == 0, pushed.output
    assert f"{hub.address}/org/adapter/commit/" in pushed.output
    pulled = runner.invoke(app, ["pull", "org/adapter", str(tmp_path / "pulled")])
    assert pulled.exit_code == 0, pulled.output
    assert read_adapter_config(tmp_path / "pulled").provenance.base == "org/base"

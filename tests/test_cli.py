"""The command line as a user meets it: one line per mistake, status 2, no traceback."""

import json
import subprocess
import sys

import pytest
import torch
from tiny import tiny_qwen2
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tca_fast import cli


def line(prompt="a b c", response="<think>\nd e</think> f"):
    turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": response}]
    return json.dumps({"conversations": turns, "domain": "math"}) + "\n"


@pytest.fixture(scope="module", name="pair")
def _pair(tmp_path_factory):
    """A tiny random pair with a tokenizer, and data, on disk."""
    root = tmp_path_factory.mktemp("pair")
    words = ["<s>", "</s>", "<unk>", "<｜User｜>", "<｜Assistant｜>", *"abcdefgh"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_word_tokenizer(words),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    for name, seed in (("base", 1), ("target", 2)):
        tiny_qwen2(seed=seed).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    (root / "train.jsonl").write_text(line() * 6)
    return root


def _word_tokenizer(words):
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


@pytest.fixture(name="config")
def _config(pair, tmp_path):
    """A complete configuration; the first element of every train command line below."""
    path = tmp_path / "config.yaml"
    path.write_text(
        f"pair: {{base: {pair}/base, target: {pair}/target}}\n"
        "adapter: {num_features: 16}\n"
        f"data: {{train: {pair}/train.jsonl}}\n"
        f"run: {{output_dir: {tmp_path}/run, train_batch_size: 2, "
        "per_device_train_batch_size: 2, save_steps: 2, device: cpu}\n"
    )
    return path


def run(monkeypatch, *arguments):
    """Exit status of `tca-fast ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["tca-fast", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as end:
        return end.code or 0
    return 0


def assert_one_line(capsys, *expected):
    printed = capsys.readouterr().err.strip().splitlines()
    errors = [text for text in printed if text.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in "".join(printed)
    for text in expected:
        assert text in errors[0]


def test_train_and_load(config, tmp_path, monkeypatch):
    """The whole way: train from the command line, then use what was written."""
    import tca_fast

    assert run(monkeypatch, "train", config) == 0
    log = [json.loads(text) for text in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert any("kl" in record for record in log)
    adapted = tca_fast.load_adapted(tmp_path / "run" / "adapter")
    assert adapted.layers[0].W_dec.any()
    prompt = torch.tensor([[3, 4, 5]])
    text = adapted.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4)
    assert text.shape[1] > 3


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["objective.l1_weigth=1"], ["objective.l1_weigth", "did you mean 'l1_weight'"]),
        (["optimizer.learning_rate=fast"], ["optimizer.learning_rate", "'fast'"]),
        (["data.train=nowhere.jsonl"], ["data.train", "nowhere.jsonl", "does not exist"]),
        (["pair.base=nowhere"], ["pair.base", "nowhere"]),
        (["run.device=cuda"], ["run.device", "cuda", "run.device=cpu"]),
        (["data.truncate=false", "data.max_length=4"], ["data.max_length", "4", "truncate"]),
        (["run.train_batch_size=3"], ["run.train_batch_size: 3", "multiple of 2"]),
        (["objective.cutoffs=[9]"], ["objective.cutoffs", "9", "0..3"]),
        (["run.resume_from_checkpoint=latest"], ["run.resume_from_checkpoint"]),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, list) else None,
)
def test_mistakes_in_training(config, tmp_path, monkeypatch, capsys, overrides, expected):
    if torch.cuda.is_available() and overrides == ["run.device=cuda"]:
        pytest.skip("needs a machine without CUDA")
    assert run(monkeypatch, "train", config, *overrides) == 2
    assert_one_line(capsys, *expected)
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty"),
        (b"\n\n", "empty"),
        (line().encode() + b"{not json\n", "line 2"),
        (line().encode() + b'{"conversations": []}\n', "line 2"),
        (b'{"conversations": "\xff\xfe"}\n', "UTF-8"),
    ],
    ids=["empty", "blank", "malformed", "no turns", "not UTF-8"],
)
def test_mistakes_in_data(config, tmp_path, monkeypatch, capsys, content, expected):
    data = tmp_path / "data.jsonl"
    data.write_bytes(content)
    assert run(monkeypatch, "train", config, f"data.train={data}") == 2
    assert_one_line(capsys, "data.train", str(data), expected)


def test_a_pair_that_does_not_fit(config, tmp_path, monkeypatch, capsys):
    tiny_qwen2(num_hidden_layers=2).save_pretrained(tmp_path / "short")
    assert run(monkeypatch, "train", config, f"pair.base={tmp_path}/short") == 2
    assert_one_line(capsys, "num_hidden_layers is 2 in the base and 3 in the target")


@pytest.mark.parametrize("damage", ["truncated", "foreign"])
def test_damaged_weights(config, pair, tmp_path, monkeypatch, capsys, damage):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (pair / "base").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = broken / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(
        content[: len(content) // 2] if damage == "truncated" else b"PK\x03\x04" * 9
    )
    assert run(monkeypatch, "train", config, f"pair.base={broken}") == 2
    assert_one_line(capsys, "pair.base", str(broken))


def test_a_missing_config_and_a_missing_folder(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "train", tmp_path / "none.yaml") == 2
    assert_one_line(capsys, "none.yaml", "does not exist")
    assert run(monkeypatch, "verify", tmp_path / "none") == 2
    assert_one_line(capsys, "none")


def test_the_installed_program_prints_one_line_too(tmp_path):
    program = [sys.executable, "-m", "tca_fast", "train", str(tmp_path / "none.yaml")]
    result = subprocess.run(program, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: config: ") and result.stderr.count("\n") == 1

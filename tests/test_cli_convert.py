"""`tca-fast convert`: what is printed, what is written, and one line per mistake."""

import os
from pathlib import Path

import pytest
from formats_cases import TOPK, contents, saved
from test_cli import assert_one_line, run


@pytest.fixture
def ours(tmp_path):
    saved(tmp_path / "ours")
    return tmp_path / "ours"


def test_a_dry_run_says_what_becomes_what_and_writes_nothing(ours, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "convert", ours, tmp_path / "out", "--to", "saelens", "--dry-run") == 0
    printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    source = "adapter_model.safetensors: base_model.model.model.layers.0.mlp.adapter"
    place = "layer_0/sae_weights.safetensors"
    assert f"W_enc {source}.W_enc [7, 24] {place}: W_enc [24, 7] transposed" in printed
    assert f"W_dec {source}.W_dec [7, 24] {place}: W_dec [7, 24] as is" in printed
    assert "tca_fast to saelens: layers 0 to 2, relu, float32; layer 0 is shown" in printed
    assert any(line.startswith("note: decoding to a difference has no") for line in printed)
    assert printed[-1].startswith("nothing was written")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dry", [["--dry-run"], []])
@pytest.mark.parametrize(
    ("out", "expected"),
    [
        ("ours", "is what is being read"),
        ("ours/README.md", "is a file; give a directory"),
        ("ours/README.md/new", "README.md: is a file; give a directory"),
        ("closed/new", "closed: cannot be written"),
        ("older", "adapter_config.json of earlier files would stay"),
    ],
)
def test_a_dry_run_refuses_what_the_conversion_refuses(
    ours, tmp_path, monkeypatch, capsys, out, expected, dry
):
    saved(tmp_path / "older")
    (tmp_path / "closed").mkdir()
    # The tests may run as root, who may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode, **_: Path(path).name != "closed")
    before = contents(tmp_path)
    assert run(monkeypatch, "convert", ours, tmp_path / out, "--to", "saelens", *dry) == 2
    assert_one_line(capsys, expected)
    assert contents(tmp_path) == before


def test_a_bias_that_is_not_there_is_said_to_be_zeros(tmp_path, monkeypatch, capsys):
    saved(tmp_path / "ours", decoder_bias=False, **TOPK)
    out = tmp_path / "out"
    assert run(monkeypatch, "convert", tmp_path / "ours", out, "--to", "sparsify") == 0
    printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "b_dec layers.0.mlp/sae.safetensors: b_dec [24] zeros" in printed
    assert "tca_fast to sparsify: layers 0 to 2, topk k=2, float32; layer 0 is shown" in printed
    assert printed[-1] == f"written and read back: {out}"
    assert len(contents(out)) == 2 * 3 + 1


def test_there_and_back(ours, tmp_path, monkeypatch):
    assert run(monkeypatch, "convert", ours, tmp_path / "set", "--to", "circuit-tracer") == 0
    assert run(monkeypatch, "convert", tmp_path / "set", tmp_path / "back", "--to", "tca_fast") == 0
    back = contents(tmp_path / "back")
    assert back == {name: contents(ours)[name] for name in back} and back


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--to", "gguf"], "'gguf' is unknown"),
        (["--to", "saelens", "--backbone", "head"], "--backbone: 'head' is neither base nor"),
        (["--to", "sparsify"], "has no counterpart in sparsify"),
        (["--to", "paper", "--base", "nowhere/at all"], "--base: nowhere/at all is neither"),
    ],
)
def test_mistakes_are_one_line(ours, tmp_path, monkeypatch, capsys, arguments, expected):
    assert run(monkeypatch, "convert", ours, tmp_path / "out", *arguments) == 2
    assert_one_line(capsys, expected)
    assert not (tmp_path / "out").exists()

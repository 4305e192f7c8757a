"""The page of a run, while it goes on and afterwards."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch
from tiny import batch, randomise, tiny_qwen2

from tca_fast import cli, sparsity
from tca_fast.attachment import attach
from tca_fast.config import AdapterConfig, load_config
from tca_fast.errors import UserError
from tca_fast.training.history import read_history
from tca_fast.training.report import l0_histogram, render
from tca_fast.training.run import train


@pytest.fixture(scope="module")
def run(pair):
    settings = [f"run.output_dir={pair}/shown", "run.max_steps=8", "run.eval_steps=4"]
    train(load_config(pair / "run.yaml", settings), show_progress=False)
    return pair / "shown"


class Page(HTMLParser):
    """Every address that the page would load, and whether its tags close."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            is_inside = str(value).startswith(("#", "url(#"))
            if name in ("src", "href", "xlink:href", "data") and not is_inside:
                self.loads.append(value)

    def handle_data(self, data):
        self.text += data


def test_the_page_shows_what_was_logged_and_loads_nothing(run):
    text = render(read_history(run))
    page = Page(text)
    assert page.loads == [] and "@import" not in text and "<script" not in text
    for expected in (
        "8 steps done",
        "Loss as optimised",
        "Terms of the loss",
        "NMSE by residual state",
        "L0 by layer",
        "Histogram of L0",
        "Dead features",
        "Throughput",
        "Learning rate",
        "Where the time goes",
        "rank 0",
        "num_features: 48",
    ):
        assert expected in page.text, expected
    ids = re.findall(r' id="([^"]+)"', text)
    clips = [one for one in ids if not one.startswith(("figure", "axes", "text", "patch", "line"))]
    assert len(set(re.findall(r"url\(#([^)]+)\)", text))) <= len(set(clips))


def test_a_run_that_is_being_written_is_shown(run, tmp_path, monkeypatch):
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "log.jsonl").write_text("".join(lines[:3]) + lines[3][:40])
    assert [row["step"] for row in read_history(tmp_path).records] == [1, 2, 3]
    monkeypatch.setattr("sys.argv", ["tca-fast", "report", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    page = (tmp_path / "training.html").read_text(encoding="utf-8")
    assert "3 steps done" in page and "min left" in page or " s left" in page


def test_broken_and_missing_logs_are_named(tmp_path):
    with pytest.raises(UserError, match="give the run.output_dir of a run"):
        read_history(tmp_path)
    (tmp_path / "log.jsonl").write_text('{"step": 1, "sp')
    with pytest.raises(UserError, match="holds no step yet"):
        read_history(tmp_path)
    (tmp_path / "log.jsonl").write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 2 of"):
        read_history(tmp_path)


def test_text_of_the_run_is_escaped(run, tmp_path):
    (tmp_path / "log.jsonl").write_text((run / "log.jsonl").read_text())
    (tmp_path / "config.yaml").write_text("run_name: <script>alert(1)</script>\n")
    text = render(read_history(tmp_path))
    assert "<script>" not in text and "&lt;script&gt;" in text


def test_the_histogram_counts_tokens_and_layers():
    """Against a count of each L0 by itself, padding left out."""
    adapted = attach(tiny_qwen2(), AdapterConfig(num_features=20))
    randomise(adapted)
    inputs = batch()
    mask = inputs["attention_mask"].bool()
    with torch.no_grad(), sparsity.record(mask) as recorder:
        adapted.model(inputs["input_ids"], attention_mask=inputs["attention_mask"])
    counts = recorder.l0_by_token().reshape(3, *mask.shape)[:, mask].flatten().tolist()
    expected = [sum(count >= 2**power for count in counts) for power in range(5)]
    assert recorder.l0_at_least(5).tolist() == expected
    shares = l0_histogram([value / len(counts) for value in expected])
    by_hand = {"0": 0, "1": 0, "2-3": 0, "4-7": 0, "8-15": 0, "16-31": 0}
    for count in counts:
        names = ["0", "1", "2-3", "2-3", *["4-7"] * 4, *["8-15"] * 8, *["16-31"] * 16]
        by_hand[names[count]] += 1
    for name, share in shares:
        assert share * len(counts) == pytest.approx(by_hand[name])
    assert sum(share for _, share in shares) == pytest.approx(1.0)


def test_the_log_has_the_histogram(run):
    for line in (run / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        shares = [record[f"l0_at_least/bits_{power}"] for power in range(6)]
        # Each is rounded to float32 once per micro-batch.
        one = 1 + 2**-20
        assert all(0 <= low <= high * one for high, low in zip(shares, shares[1:], strict=False))
        assert shares[0] <= one
        # Σ over powers of two bounds the mean from below, twice it from above.
        weights = [2**power - (2**power // 2) for power in range(6)]
        least = sum(weight * share for weight, share in zip(weights, shares, strict=True))
        assert least <= record["l0"] * (1 + 1e-6) and record["l0"] <= 2 * least

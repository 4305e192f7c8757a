"""`tca-fast evaluate`: the figures of a run against those made by hand, and what is refused."""

import json
import re
import shutil
import weakref
from html.parser import HTMLParser

import pytest
import strict_json
import torch
from tiny_pair import VOCABULARY, conversation_line
from transformers import AutoModelForCausalLM

import tca_fast
from tca_fast import cli
from tca_fast.config import load_config
from tca_fast.durable import Replacement
from tca_fast.errors import UserError
from tca_fast.evaluation.faithfulness import measure_faithfulness
from tca_fast.held_out import measure
from tca_fast.held_out.measure import measure_adapter, measure_models
from tca_fast.held_out.text import read_text
from tca_fast.held_out.trained import find_trained
from tca_fast.training.run import train

STEPS = ["run.max_steps=8", "run.save_steps=4", "run.eval_steps=0"]
FIGURES = ("kl", "lm_loss", "agreement", "nmse_per_state", "l0_per_layer", "num_counted_tokens")


@pytest.fixture(scope="module")
def run(pair):
    train(load_config(pair / "run.yaml", [*STEPS, f"run.output_dir={pair}/run"]))
    return pair / "run"


@pytest.fixture
def evaluate(monkeypatch, capsys):
    """The command: its exit status, and what it printed."""

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["tca-fast", "evaluate", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code or 0, capsys.readouterr()

    return call


def batch_by_hand(file, max_length=48):
    """The deepseek format, one id per character, padded on the right."""
    rows = []
    for line in file.read_text().splitlines():
        prompt, response = (turn["value"] for turn in json.loads(line)["conversations"])
        if response.startswith("<think> "):
            response = "<think>\n" + response[len("<think> ") :]
        text = f"<\uff5cUser\uff5c>{prompt}<\uff5cAssistant\uff5c>{response}"
        ids = [VOCABULARY["<bos>"], *(VOCABULARY[character] for character in text)]
        rows.append(torch.tensor(ids[:max_length]))
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad(rows, batch_first=True, padding_value=VOCABULARY["<eos>"])
    mask = pad([torch.ones_like(row) for row in rows], batch_first=True)
    return ids, mask, ids.masked_fill(mask == 0, -100)


def by_hand(pair, run, file="val.jsonl"):
    """Every model loaded whole and by itself, and measured."""
    names = {role: str(pair / role) for role in ("base", "target")}
    base, target = (AutoModelForCausalLM.from_pretrained(name) for name in names.values())
    adapted = tca_fast.load_adapted(run / "adapter", **names)
    batches = [batch_by_hand(pair / file)]
    found = {"base": measure_faithfulness(base, target, batches)}
    with adapted.disabled():
        found["hybrid"] = measure_faithfulness(adapted, target, batches)
    found["adapter"] = measure_faithfulness(adapted, target, batches)
    return found


def written(directory):
    return json.loads((directory / "faithfulness.json").read_text())


def nested(value):
    return tuple(value) if isinstance(value, list) else value


def assert_figures(models, expected):
    for name, found in expected.items():
        of_model = [nested(models[name][figure]) for figure in FIGURES]
        assert of_model == [
            *(found.kl, found.lm_loss, found.agreement, found.nmse, found.l0, found.num_counted)
        ], name


def test_figures_are_those_of_measuring_by_hand(pair, run, evaluate, tmp_path):
    status, printed = evaluate(run, "--out", tmp_path)
    expected = by_hand(pair, run)
    models = written(tmp_path)["models"]
    assert status == 0 and list(models) == ["base", "hybrid", "adapter", "target"]
    assert_figures(models, expected)
    assert expected["base"].kl > expected["hybrid"].kl > expected["adapter"].kl > 0
    adapter = expected["adapter"]
    row = next(line for line in printed.out.splitlines() if "adapter " in line).split()
    l0 = sum(adapter.l0) / 3
    assert row == [
        *("adapter", f"{adapter.kl:.4f}", f"{adapter.lm_loss:.4f}", f"{sum(adapter.nmse) / 4:.4f}"),
        *(f"{100 * adapter.agreement:.1f}", f"{l0:.1f}", f"{100 * l0 / 48:.2f}"),
        str(adapter.num_counted),
    ]
    assert "note:" not in printed.err


def test_the_target_is_itself(run, evaluate, tmp_path):
    evaluate(run, "--out", tmp_path)
    target = written(tmp_path)["models"]["target"]
    assert target["kl"] == 0 and target["agreement"] == 1 and target["l0"] is None
    assert target["nmse_per_state"] == [0, 0, 0, 0] and target["lm_loss"] > 0


class Loads(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "data") and not value.startswith("#"):
                self.found.append(value)

    def handle_data(self, data):
        self.text += data


def test_the_files_say_what_was_measured(pair, run, evaluate):
    status, printed = evaluate(run)
    assert status == 0 and f"wrote {run}/faithfulness.html" in printed.out
    content = written(run)
    assert strict_json.parse((run / "faithfulness.json").read_text())["models"].keys()
    origin = json.loads((run / "origin.json").read_text())
    assert content["data"]["sha256"] == origin["data"]["validation"]["sha256"]
    saved = json.loads((run / "adapter" / "adapter_config.json").read_text())
    for field in ("fingerprint", "base", "target", "backbone", "num_features"):
        assert content["adapter"][field] == saved[field]
    assert content["environment"]["torch"] == torch.__version__
    page = (run / "faithfulness.html").read_text()
    shown = Loads(page)
    assert shown.found == [] and "<script" not in page and "@import" not in page
    assert page.count("<svg") == 2
    for model in content["models"].values():
        assert f"{model['lm_loss']:.4f}" in shown.text


def test_long_sequences_are_measured_a_few_at_a_time(pair, run):
    """Four hundred of 10,000 tokens would need logits of terabytes."""
    config = load_config(run / "config.yaml")
    text, size = read_text(config, 5), len(VOCABULARY)
    (whole,) = text.batches(size)
    few = text.batches(size, 100)
    assert len(few) > 1 and all(batch.input_ids.numel() <= 100 for batch in few)
    real = torch.cat([batch.input_ids[batch.attention_mask.bool()] for batch in few])
    assert torch.equal(real, whole.input_ids[whole.attention_mask.bool()])
    assert [len(batch.input_ids) for batch in text.batches(size, 1)] == [1] * 5
    told = []
    together, alone = (
        measure_models(config, run / "adapter", text, budget, lambda *call: told.append(call))
        for budget in (8192, 1)
    )
    assert sum(count for _, count in told) == 2 * 4 * 5
    for name, expected in together.items():
        found = alone[name]
        assert found.num_counted == expected.num_counted and found.l0 == pytest.approx(expected.l0)
        assert found.kl == pytest.approx(expected.kl, rel=1e-4, abs=1e-12)
        assert found.nmse == pytest.approx(expected.nmse, rel=1e-4)
    assert measure_adapter(config, run / "adapter", 5) == together["adapter"]


def test_two_models_are_in_memory_and_then_one_and_a_half(run, monkeypatch):
    """The hybrid is the target's tensors beside the base's MLPs; the rest of the base goes."""
    load, models, seen = measure.load_models, [], []

    def watched(*arguments):
        loaded = load(*arguments)
        models.append(weakref.ref(loaded.base))
        shared = {weight.data_ptr() for weight in loaded.target.parameters()}
        shared |= {weight.data_ptr() for weight in loaded.base.parameters()}
        own = [
            name
            for name, weight in loaded.adapted.model.named_parameters()
            if weight.data_ptr() not in shared
        ]
        assert own and all(".adapter." in name for name in own)
        return loaded

    def measured(model, target, batches):
        seen.append(models[0]() is not None)
        return measure_faithfulness(model, target, batches)

    monkeypatch.setattr(measure, "load_models", watched)
    monkeypatch.setattr(measure, "measure_faithfulness", measured)
    config = load_config(run / "config.yaml")
    measure_models(config, run / "adapter", read_text(config, 2), 8192, lambda *call: None)
    assert seen == [True, False, False, False]


def test_adapters_in_the_base_have_no_hybrid(pair, evaluate, tmp_path):
    settings = [*STEPS, f"run.output_dir={tmp_path}/run", "pair.backbone=base"]
    train(load_config(pair / "run.yaml", settings))
    assert evaluate(tmp_path / "run")[0] == 0
    models = written(tmp_path / "run")["models"]
    assert list(models) == ["base", "adapter", "target"]
    expected = by_hand(pair, tmp_path / "run")
    assert expected.pop("hybrid") == expected["base"]
    assert_figures(models, expected)


def test_another_file_and_fewer_sequences(pair, run, evaluate, tmp_path):
    lines = (pair / "val.jsonl").read_text().splitlines(keepends=True)
    (pair / "other.jsonl").write_text("".join(lines[1:4]))
    status, printed = evaluate(
        *(run, "--data", pair / "other.jsonl", "--num-samples", 2, "--out", tmp_path)
    )
    (pair / "two.jsonl").write_text("".join(lines[1:3]))
    assert status == 0 and "note:" not in printed.err
    assert_figures(written(tmp_path)["models"], by_hand(pair, run, "two.jsonl"))
    assert written(tmp_path)["data"]["sequences"] == 2


def test_a_changed_file_is_told_and_so_is_one_that_was_trained_on(pair, run, evaluate, tmp_path):
    file = pair / "val.jsonl"
    before = file.read_text()
    file.write_text(before + conversation_line("1+1?", "2") + "\n")
    try:
        status, printed = evaluate(run, "--out", tmp_path)
    finally:
        file.write_text(before)
    assert status == 0 and "val.jsonl has changed since the run" in printed.err
    (note,) = written(tmp_path)["notes"]
    assert note in printed.err and note in Loads((tmp_path / "faithfulness.html").read_text()).text
    status, printed = evaluate(run, "--data", pair / "train.jsonl", "--out", tmp_path)
    assert status == 0 and "these figures are not of held-out text" in printed.err
    assert "has changed" not in printed.err


@pytest.mark.parametrize("place", ["adapter", "checkpoints/step_000008/adapter"])
def test_adapters_inside_a_run_are_measured_as_the_run(run, evaluate, tmp_path, place):
    evaluate(run, "--out", tmp_path / "run")
    assert evaluate(run / place, "--out", tmp_path / "inside")[0] == 0
    ours, theirs = written(tmp_path / "run"), written(tmp_path / "inside")
    assert ours["models"] == theirs["models"] and ours["data"] == theirs["data"]


def test_adapters_by_themselves(pair, run, evaluate, tmp_path):
    shutil.copytree(run / "adapter", tmp_path / "mine")
    status, printed = evaluate(tmp_path / "mine")
    assert status == 2 and "has no run that would name it" in printed.err
    data = ["--data", pair / "val.jsonl", "data.max_length=48"]
    status, printed = evaluate(tmp_path / "mine", *data)
    assert status == 0 and "the format 'deepseek' is assumed" in printed.err
    assert_figures(written(tmp_path / "mine")["models"], by_hand(pair, run))
    status, printed = evaluate(tmp_path / "mine", *data, "data.format=deepseek")
    assert status == 0 and "note:" not in printed.err
    path = tmp_path / "mine" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target": None}))
    status, printed = evaluate(tmp_path / "mine", *data)
    assert status == 2 and "add pair.target=" in printed.err
    assert evaluate(tmp_path / "mine", *data, f"pair.target={pair}/target")[0] == 0


def test_a_run_that_is_not_done(run, evaluate, tmp_path):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("adapter"))
    status, printed = evaluate(tmp_path / "run")
    assert status == 2 and "still trains or was stopped" in printed.err
    assert f"{tmp_path}/run/checkpoints/step_000008/adapter" in printed.err
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert "there is no checkpoint either" in evaluate(tmp_path / "run")[1].err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        pytest.param(["{root}/nowhere"], "nowhere does not exist", id="nothing"),
        pytest.param(["{root}/base"], "neither a run .* nor adapters", id="a model"),
        pytest.param(["{run}", "--data", "no.jsonl"], "--data: no.jsonl does not exist", id="file"),
        pytest.param(["{run}", "data.validation=null"], "--data", id="no validation file"),
        pytest.param(
            ["{run}", "pair.target={root}/gone"], "pair.target: .*/gone' cannot be", id="model"
        ),
        pytest.param(["{run}", "pair.base={root}/target"], "fingerprint", id="another model"),
        pytest.param(["{run}", "pair.backbone=base"], "fingerprint", id="another backbone"),
        pytest.param(["{run}", "objective.l1_weight=1"], "changes nothing", id="no effect"),
        pytest.param(["{run}", "data.form=chat"], "did you mean 'format'", id="unknown key"),
    ],
)
def test_what_cannot_be_measured_is_one_line(pair, run, evaluate, tmp_path, arguments, complaint):
    given = [text.format(root=pair, run=run) for text in arguments]
    status, printed = evaluate(*given, "--out", tmp_path / "out")
    assert status == 2 and not (tmp_path / "out").exists()
    (line,) = [line for line in printed.err.splitlines() if line.startswith("error:")]
    assert re.search(complaint, line), line


def test_ids_that_the_models_do_not_know_are_refused(run):
    text = read_text(load_config(run / "config.yaml"), 5)
    with pytest.raises(UserError, match="its embedding has 20 rows"):
        text.batches(20)


def test_too_little_memory_is_one_line(run, evaluate, monkeypatch, tmp_path):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(measure, "measure_faithfulness", full)
    status, printed = evaluate(run, "--out", tmp_path, "--batch-tokens", 77)
    assert status == 2 and "--batch-tokens: 77 need more memory" in printed.err


def test_figures_are_shown_where_they_cannot_be_written(run, evaluate, tmp_path):
    (tmp_path / "file").touch()
    status, printed = evaluate(run, "--out", tmp_path / "file", "--num-samples", 1)
    assert status == 2 and "give a directory, not a file" in printed.err
    assert "adapter " in printed.out and "wrote" not in printed.out


def test_a_damaged_record_of_the_data_is_refused(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "origin.json").write_text('{"data"')
    with pytest.raises(UserError, match=r"origin.json cannot be read"):
        find_trained(tmp_path / "run")


@pytest.mark.parametrize("where", ["measuring", "writing"])
def test_an_interruption_leaves_the_old_files_whole(run, evaluate, monkeypatch, tmp_path, where):
    evaluate(run, "--out", tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"faithfulness.json", "faithfulness.html"}
    calls = []

    def interrupted(whole):
        def call(*arguments):
            calls.append(arguments)
            result = whole(*arguments)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return result

        return call

    if where == "measuring":
        monkeypatch.setattr(measure, "measure_faithfulness", interrupted(measure_faithfulness))
    else:
        monkeypatch.setattr(Replacement, "write", interrupted(Replacement.write))
    status, printed = evaluate(run, "--out", tmp_path, "--num-samples", 3)
    assert status == 130 and "nothing was written" in printed.out and len(calls) == 2
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

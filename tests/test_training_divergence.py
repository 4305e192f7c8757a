"""A step whose loss or gradient norm is not finite: never applied, and how the run goes on."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_pair import VOCABULARY, make_pair, records

from tca_fast.config import load_config
from tca_fast.errors import UserError
from tca_fast.training import run as running
from tca_fast.training.engine import LocalEngine
from tca_fast.training.run import train

BAD_STEP = 8
GOOD = f"step_{BAD_STEP - 1:06d}"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """A pair whose training file has blank lines, so that lines are not sequences counted on."""
    root = tmp_path_factory.mktemp("pair")
    make_pair(root)
    data = root / "train.jsonl"
    data.write_text(data.read_text(encoding="utf-8").replace("\n", "\n\n"), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def unbroken(pair) -> Path:
    start(pair, pair / "out")
    return pair / "out"


def start(pair, output, *overrides):
    settings = [
        f"run.output_dir={output}",
        "run.max_steps=12",
        f"run.save_steps={BAD_STEP - 1}",
        *overrides,
    ]
    return train(load_config(pair / "run.yaml", settings), show_progress=False)


class Poisoned(LocalEngine):
    """Spoils the second micro-batch of one step and remembers what every step trained on."""

    spoiled = "loss"

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.applied = 0
        self.inputs = {}
        Poisoned.latest = self

    def forward(self, input_ids, *inputs, **options):
        output = super().forward(input_ids, *inputs, **options)
        if not torch.is_grad_enabled():
            return output
        seen = self.inputs.setdefault(self.applied + 1, [])
        seen.append(input_ids)
        if self.applied + 1 == BAD_STEP and len(seen) == 2:
            if self.spoiled == "loss":
                metrics = {**output.metrics, "loss": output.metrics["loss"] * math.inf}
                return output._replace(metrics=metrics)
            return output._replace(loss=output.loss * math.nan)
        return output

    def apply(self, learning_rate, loss):
        self.applied += 1
        return super().apply(learning_rate, loss)


def poison(pair, output, monkeypatch, spoiled, *overrides):
    """Run into a spoiled step; the message and the engine as it was left."""
    with monkeypatch.context() as patch:
        patch.setattr(running, "LocalEngine", Poisoned)
        patch.setattr(Poisoned, "spoiled", spoiled)
        with pytest.raises(UserError) as caught:
            start(pair, output, *overrides)
    return str(caught.value), Poisoned.latest


@pytest.mark.parametrize(
    ("spoiled", "what"), [("loss", "the loss is inf"), ("gradient", "the gradient norm is nan")]
)
def test_a_step_that_is_not_finite_is_never_applied(
    pair, unbroken, tmp_path, monkeypatch, spoiled, what
):
    output = tmp_path / "run"
    message, engine = poison(pair, output, monkeypatch, spoiled)
    assert engine.applied == BAD_STEP + 1, "the step behind it was queued before the host knew"
    checkpoint = output / "checkpoints" / GOOD
    assert what in message and f"at step {BAD_STEP}, " in message and "\n" not in message
    assert f"run.resume_from_checkpoint={checkpoint}, " in message
    assert records(output) == records(unbroken)[: BAD_STEP - 1]
    assert not (output / "adapter").exists()

    saved = load_file(checkpoint / "adapter" / "adapter_model.safetensors")
    for name, parameter in engine.parameters.items():
        assert torch.equal(parameter, saved[name]), name
    moments = load_file(checkpoint / "optimizer" / "part_00000.safetensors")
    assert moments["step"] == BAD_STEP - 1
    for name, parameter in engine.parameters.items():
        state = engine.optimizer.state[parameter]
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"} and state["step"] == BAD_STEP - 1
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[key].flatten(), moments[f"{name}/{key}/0"]), name

    start(pair, output, f"run.resume_from_checkpoint={checkpoint}")
    for split in ("train", "validation"):
        assert records(output, split) == records(unbroken, split)
    weights = [path / "adapter" / "adapter_model.safetensors" for path in (output, unbroken)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_the_message_names_the_lines_of_the_batch(pair, tmp_path, monkeypatch):
    message, engine = poison(pair, tmp_path / "run", monkeypatch, "loss")
    path = pair / "train.jsonl"
    found = re.search(rf"on line\(s\) ([\d, ]+) of {path}, so", message)
    text = path.read_text(encoding="utf-8").splitlines()
    prompts = [
        json.loads(text[int(number) - 1])["conversations"][0]["value"]
        for number in found[1].split(", ")
    ]
    characters = {index: token for token, index in VOCABULARY.items()}
    trained = [
        "".join(characters[token] for token in row)
        for input_ids in engine.inputs[BAD_STEP]
        for row in input_ids.tolist()
    ]
    assert len(prompts) == len(trained) == 4
    for prompt in prompts:
        assert sum(f"{prompt}<" in sequence for sequence in trained) == 1


@pytest.mark.parametrize("saving", ["run.save_steps=1", "run.eval_steps=1"])
def test_a_checkpoint_or_validation_waits_for_the_verdict(pair, tmp_path, monkeypatch, saving):
    message, engine = poison(pair, tmp_path / "run", monkeypatch, "gradient", saving)
    assert f"at step {BAD_STEP}, " in message and engine.applied == BAD_STEP
    output = tmp_path / "run"
    newest = max(path.name for path in (output / "checkpoints").iterdir())
    assert newest == GOOD and newest in message
    assert all(record["step"] < BAD_STEP for record in records(output, "validation"))


@pytest.mark.parametrize("last", [BAD_STEP, BAD_STEP + 1])
def test_a_bad_last_step_leaves_no_adapter(pair, tmp_path, monkeypatch, last):
    settings = [f"run.max_steps={last}", "run.save_steps=0", "run.eval_steps=0"]
    message, engine = poison(pair, tmp_path / "run", monkeypatch, "loss", *settings)
    assert engine.applied == last
    assert "no checkpoint was saved; lower the rate or mend those lines" in message
    assert not (tmp_path / "run" / "adapter").exists()
    assert len(records(tmp_path / "run")) == BAD_STEP - 1


def test_a_loss_that_is_not_finite_stops_the_run(pair, tmp_path):
    with pytest.raises(
        UserError, match=r"learning_rate: 1e\+30: the loss is .* at step \d+"
    ) as caught:
        start(pair, tmp_path / "run", "optimizer.learning_rate=1.0e+30", "run.save_steps=1")
    failed = int(str(caught.value).split("at step ")[1].split(",")[0])
    assert records(tmp_path / "run")[-1]["step"] == failed - 1
    assert not (tmp_path / "run" / "adapter").exists()

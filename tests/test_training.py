"""The loop, its state on disk and its logs, in one process."""

import errno
import fcntl
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_pair import character_tokenizer, records

from tca_fast.bridging.objective import sample_cutoffs
from tca_fast.bridging.plain import PlainObjective
from tca_fast.bridging.streams import load_streams
from tca_fast.config import load_config
from tca_fast.errors import UserError
from tca_fast.training import run as running
from tca_fast.training import trainer as training
from tca_fast.training.batches import collate
from tca_fast.training.claim import claimed
from tca_fast.training.data import Encoder, open_corpus
from tca_fast.training.run import train
from tca_fast.training.schedule import learning_rate, warmup_steps

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def unbroken(pair) -> Path:
    train(load_config(pair / "run.yaml"), show_progress=False)
    return pair / "out"


def configuration(pair, output, *overrides):
    return load_config(pair / "run.yaml", [f"run.output_dir={output}", *overrides])


def start(pair, output, *overrides):
    return train(configuration(pair, output, *overrides), show_progress=False)


# Schedule


def test_learning_rates_of_the_reference():
    """Recorded from the reference's own scheduler for the paper's run (contract §8)."""
    total, warmup = 49952, warmup_steps(49952, 0.05)
    assert warmup == 2497
    expected = {
        0: 0.0,
        1: 3.2038446135362434e-07,
        1000: 0.00032038446135362436,
        2497: 0.0008,
        10000: 0.0007516620613570572,
        25000: 0.00043238999811171674,
        40000: 8.371820372262064e-05,
        49951: 8.765279613243139e-13,
        49952: 0.0,
    }
    for step, value in expected.items():
        assert learning_rate(step, 8e-4, total, warmup) == pytest.approx(value, rel=1e-6, abs=1e-18)
    assert learning_rate(60000, 8e-4, total, warmup) == 0.0
    assert learning_rate(0, 8e-4, 10, 0) == 8e-4
    assert learning_rate(3, 8e-4, 10, 10) == pytest.approx(8e-4 * 3 / 10)


# The loop


def test_losses_are_those_of_a_plain_loop(pair, unbroken):
    """One forward per global batch and torch's AdamW, without micro-batches or engines.

    NMSE is a ratio and so depends on how a batch is cut; without it, token-weighted accumulation
    over unequal micro-batches must equal the undivided batch.
    """
    config = configuration(pair, pair / "whole", "objective.lambda_nmse=0", "run.max_steps=8")
    train(config, show_progress=False)
    streams = load_streams(config.pair, config.adapter, seed=config.run.seed)
    objective = PlainObjective(streams, config.objective)
    parameters = list(streams.adapted.parameters())
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    corpus = open_corpus(config.data.train, "data.train")
    encoder = Encoder(character_tokenizer(), config.data)
    plan = running.BatchPlan(len(corpus), 4, 4, config.run.seed)
    for step, record in enumerate(records(pair / "whole")):
        sequences = [encoder.encode(corpus.conversation(i)) for i in plan.sequences(step)]
        batch = collate(sequences, 1, True)
        cutoffs = sample_cutoffs(config.objective, 3, seed=config.run.seed, step=step)
        loss = objective(*batch[:3], cutoffs).loss
        assert record["loss"] == pytest.approx(loss.item(), rel=2e-5), step
        assert record["tokens_seen"] > 0
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-3), step
        rate = 0.003 * step if step < 1 else 0.003 * 0.5 * (1 + math.cos(math.pi * (step - 1) / 7))
        assert record["learning_rate"] == pytest.approx(rate)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()


def test_a_run_leaves_what_it_promises(pair, unbroken):
    log = records(unbroken)
    assert [record["step"] for record in log] == list(range(1, 21))
    assert log[-1]["loss"] < log[0]["loss"]
    assert log[0]["learning_rate"] == 0.0
    for name in ("kl", "lm", "nmse", "l0", "l1", "grad_norm", "dead_features", "l0/layer_2"):
        assert all(math.isfinite(record[name]) for record in log)
    validation = records(unbroken, "validation")
    assert [record["step"] for record in validation] == [10, 20]
    assert {"kl", "nmse", "l0"} <= validation[0].keys()
    assert load_config(unbroken / "config.yaml") == load_config(pair / "run.yaml")
    assert [path.name for path in sorted((unbroken / "checkpoints").iterdir())] == [
        "step_000008",
        "step_000016",
    ]
    weights = load_file(unbroken / "adapter" / "adapter_model.safetensors")
    assert len(weights) == 3 * 4 and all(tensor.any() for tensor in weights.values())


def test_ages_count_real_tokens_and_ignore_validation(pair, tmp_path):
    steps = ["run.max_steps=4", "run.save_steps=4"]
    start(pair, tmp_path / "watched", "run.eval_steps=1", *steps)
    start(pair, tmp_path / "unwatched", "run.eval_steps=0", *steps)
    ages = [
        load_file(tmp_path / name / "checkpoints/step_000004/feature_ages.safetensors")["tokens"]
        for name in ("watched", "unwatched")
    ]
    assert torch.equal(*ages)
    seen = records(tmp_path / "unwatched")[-1]["tokens_seen"]
    assert ages[0].dtype == torch.int64 and ages[0].max() <= seen
    assert records(tmp_path / "watched") == records(tmp_path / "unwatched")


def test_dead_features_are_those_that_never_fired(pair, tmp_path):
    """With a hopeless encoder bias nothing fires, so every feature's age is the tokens seen."""

    def silence(*args, **options):
        streams = load_streams(*args, **options)
        for layer in streams.adapted.layers:
            layer.b_enc.data.fill_(-1e6)
        return streams

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "load_streams", silence)
        start(pair, tmp_path / "run", "run.max_steps=3", "run.dead_after_tokens=200")
    log = records(tmp_path / "run")
    dead = [record["dead_features"] for record in log]
    assert dead == [3 * 48 if record["tokens_seen"] >= 200 else 0 for record in log]
    assert dead[0] == 0 and dead[-1] == 3 * 48


# Interrupting and resuming


def interrupt_after(step, monkeypatch):
    class Interrupted(training.Trainer):
        def _between_steps(self):
            super()._between_steps()
            if self.progress.step == step:
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(running, "Trainer", Interrupted)


@pytest.mark.parametrize(
    ("step", "workers"),
    [(9, 0), (6, 1)],  # within an epoch; at the end of one, tokenizing in a worker
)
def test_interrupted_runs_resume_bitwise(pair, unbroken, tmp_path, monkeypatch, step, workers):
    options = ["run.save_steps=0", f"data.num_workers={workers}"]
    with monkeypatch.context() as patch:
        interrupt_after(step, patch)
        result = start(pair, tmp_path / "run", *options)
    assert result.interrupted and result.step == step and result.adapter is None
    assert result.checkpoint == tmp_path / "run" / "checkpoints" / f"step_{step:06d}"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    # A killed job may leave half a line and lines of steps that were never saved.
    with (tmp_path / "run" / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": step + 1, "split": "train", "loss": 0}) + '\n{"step": 3, "sp')
    unfinished = tmp_path / "run" / "checkpoints" / ".step_000012.tmp"
    unfinished.mkdir()
    (unfinished / "feature_ages.safetensors").write_bytes(b"some of it")
    result = start(pair, tmp_path / "run", *options, "run.resume_from_checkpoint=latest")
    assert not unfinished.exists()
    assert not result.interrupted and result.step == 20
    for split in ("train", "validation"):
        assert records(tmp_path / "run", split) == records(unbroken, split)
    weights = [
        path / "adapter" / "adapter_model.safetensors" for path in (tmp_path / "run", unbroken)
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_only_the_newest_checkpoints_are_kept(pair, tmp_path):
    options = ["run.save_steps=3", "run.max_steps=13", "run.save_total_limit=3"]
    start(pair, tmp_path / "run", *options)
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step_000006", "step_000009", "step_000012"]


def test_a_run_that_will_save_nothing_says_so(pair, tmp_path, capsys):
    few = ["run.max_steps=9", "run.eval_steps=0"]
    start(pair, tmp_path / "run", "run.save_steps=10", *few)
    said = "no checkpoint comes before the end: 9 steps are left and run.save_steps is 10"
    assert said in capsys.readouterr().err
    # Nor is anybody sent to a checkpoint that is not there.
    with pytest.raises(UserError, match="already holds a run, adapter; choose another directory"):
        start(pair, tmp_path / "run", *few)
    start(pair, tmp_path / "again", "run.save_steps=9", *few)
    assert "no checkpoint" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.max_length=6", "data.loss_on_prompt=false"], "no token .* has a label"),
        (["pair.base=TARGET"], "without adapters the model is pair.target already"),
        ([], None),
    ],
)
def test_figures_that_are_perfect_for_another_reason_are_doubted(
    pair, tmp_path, capsys, overrides, message
):
    own = [override.replace("TARGET", str(pair / "target")) for override in overrides]
    start(pair, tmp_path / "out", "run.max_steps=2", *own)
    said = capsys.readouterr().err
    assert said.count("warning:") == (message is not None)
    assert message is None or re.search(message, said)


def test_an_older_checkpoint_sets_the_later_ones_aside(pair, unbroken, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(unbroken, output)
    older = f"run.resume_from_checkpoint={output}/checkpoints/step_000008"
    start(pair, output, older, "run.save_steps=9", "run.save_total_limit=1")
    assert records(output) == records(unbroken)
    kept = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert kept == ["step_000018", "superseded_step_000016"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.num_features=40", "adapter.num_features: .* made with 48, this run has 40"),
        ("pair.target=PAIR/base", "pair.target: .* made with '.*/target', this run has '.*/base'"),
        ("run.seed=7", "run.seed: .* made with 42, this run has 7"),
        ("run.train_batch_size=2", "run.train_batch_size: .* made with 4, this run has 2"),
        ("data.train=PAIR/val.jsonl", r"data.train: contents \(sha256\): .* made with"),
        ("run.resume_from_checkpoint=PAIR", "is not a checkpoint"),
        ("run.output_dir=PAIR/nothing", "'latest', but .* holds no checkpoint"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(pair, unbroken, override, message):
    overrides = ["run.resume_from_checkpoint=latest", override.replace("PAIR", str(pair))]
    before = sorted(unbroken.rglob("*"))
    with pytest.raises(UserError, match=message):
        start(pair, unbroken, *overrides)
    assert sorted(unbroken.rglob("*")) == before


def test_models_are_known_again_by_their_weights(pair, unbroken, tmp_path, capsys):
    """They may have moved since; what lies in their old place may be another."""
    output, elsewhere = tmp_path / "run", tmp_path / "base"
    shutil.copytree(unbroken, output)
    shutil.rmtree(output / "adapter")
    shutil.copytree(pair / "base", elsewhere)
    resumed = ["run.resume_from_checkpoint=latest", f"pair.base={elsewhere}", "run.save_steps=9"]
    start(pair, output, *resumed)
    assert records(output) == records(unbroken)
    assert f"pair.base is '{elsewhere}', was '{pair}/base'" in capsys.readouterr().err

    shutil.rmtree(output / "adapter")
    shutil.copy(pair / "target" / "model.safetensors", elsewhere)
    with pytest.raises(UserError, match=r"pair: weights of the models \(hash\): .* made with"):
        start(pair, output, *resumed)


def test_settings_that_differ_at_a_resume_are_named(pair, unbroken, tmp_path, capsys):
    """An override that was given at the start and forgotten afterwards."""
    output = tmp_path / "run"
    options = ["objective.l1_weight=0.5", "run.max_steps=12", "run.eval_steps=0"]
    start(pair, output, *options)
    capsys.readouterr()
    resume = "run.resume_from_checkpoint=latest"
    start(pair, output, resume, *options[1:])
    (line,) = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("settings other")
    ]
    assert line.endswith("checkpoint's: objective.l1_weight is 0.01, was 0.5")
    start(pair, output, resume, *options)
    assert "settings other" not in capsys.readouterr().err


# What a user can get wrong


def test_mistakes_are_reported_before_anything_is_written(pair, tmp_path, unbroken):
    strict = ["data.truncate=false", "data.max_length=30"]
    cases = [
        (["data.train=nowhere.jsonl"], "data.train: nowhere.jsonl does not exist"),
        (["data.validation=nowhere.jsonl"], "data.validation: nowhere.jsonl does not exist"),
        (strict, r"data.train: line 1 has \d+ tokens, more than data.max_length=30"),
        (["run.train_batch_size=3"], "run.train_batch_size: 3 is not divisible"),
        (["data.format=chat"], "data.format: 'chat' needs a tokenizer with a chat template"),
        (["objective.cutoffs=[9]"], "objective.cutoffs: 9 is outside"),
        ([f"pair.target={tmp_path}"], "pair.target: .* has no tokenizer"),
    ]
    if not torch.cuda.is_available():
        cases.append((["run.device=cuda"], "run.device: 'cuda', but torch .* no CUDA device"))
    for overrides, message in cases:
        with pytest.raises(UserError, match=message):
            start(pair, tmp_path / "run", *overrides)
        assert not (tmp_path / "run").exists(), overrides


def test_what_is_cheap_to_check_is_checked_before_models_are_loaded(pair, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(running, "load_streams", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    for override, message in (
        (f"run.output_dir={tmp_path}/file", "run.output_dir: .*file cannot be written"),
        (f"run.output_dir={tmp_path}/file/run", "run.output_dir: .* cannot be written"),
        ("run.report_to=[wandb]", "run.report_to: 'wandb' needs the package"),
    ):
        with pytest.raises(UserError, match=message):
            start(pair, tmp_path / "run", override)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_directory_belongs_to_one_run_at_a_time(pair, tmp_path, monkeypatch):
    """A second run would remove the first one's unfinished checkpoint and rewrite its log."""
    monkeypatch.setattr(running, "claimed", partial(claimed, seconds=0.3))
    output = tmp_path / "deep" / "run"
    # The lock of another process, or of another open file in this one.
    with claimed(output), pytest.raises(UserError, match="another run is writing to .*deep/run"):
        start(pair, output)
    assert not (tmp_path / "deep").exists()

    @contextmanager
    def claimed_when_the_other_is_done(directory):
        (directory / "adapter").mkdir(parents=True)
        yield ""

    monkeypatch.setattr(running, "claimed", claimed_when_the_other_is_done)
    with pytest.raises(UserError, match="already holds a run"):
        start(pair, tmp_path / "done")
    monkeypatch.undo()
    start(pair, output, "run.max_steps=1", "run.eval_steps=0")
    assert (output / "adapter").is_dir()


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with claimed(tmp_path) as warning:
        assert "knows no locks" in warning


def test_a_device_without_memory_is_told_in_one_line(pair, tmp_path, monkeypatch):
    def forward(self, *inputs, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 3 GiB")

    monkeypatch.setattr(PlainObjective, "forward", forward)
    with pytest.raises(UserError, match="run: cpu has no more memory .*Tried to allocate 3 GiB"):
        start(pair, tmp_path, "objective.step=plain")


def test_a_finished_run_is_not_overwritten(pair, unbroken):
    before = (unbroken / "log.jsonl").read_bytes()
    with pytest.raises(UserError, match="run.output_dir: .* already holds a run"):
        start(pair, unbroken)
    assert (unbroken / "log.jsonl").read_bytes() == before


def test_skipped_lines_are_counted(pair, tmp_path, capsys):
    data = tmp_path / "d.jsonl"
    data.write_text((pair / "train.jsonl").read_text() + "broken\n")
    options = [f"data.train={data}", "data.bad_lines=skip", "run.max_steps=1", "run.save_steps=0"]
    start(pair, tmp_path / "run", *options)
    assert "data.train: 1 malformed line(s)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["miniature", "r1_distill_1p5b", "r1_distill_7b", "qwq_32b"])
def test_shipped_configurations_load(name):
    config = load_config(Path(__file__).parent.parent / "configs" / f"{name}.yaml")
    assert config.run.output_dir == f"runs/{name}"
    if name != "miniature":
        # Of the paper's data, all of it as long as it may be; at most a twentieth is lost.
        run = config.run
        at_once = (run.train_batch_tokens or 0) / config.data.max_length or run.train_batch_size
        assert run.save_steps < 49_952 / at_once / 20


# The command


def test_ctrl_c_on_the_command_saves_and_says_how_to_go_on(pair, unbroken, tmp_path):
    output = tmp_path / "run"
    command = [sys.executable, "-m", "tca_fast", "train", str(pair / "run.yaml")]
    overrides = [f"run.output_dir={output}", "run.save_steps=0", "run.num_epochs=1000"]
    overrides.append("run.max_steps=4000")
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    process = subprocess.Popen(
        [*command, *overrides], stderr=subprocess.PIPE, text=True, env=environment
    )
    log = output / "log.jsonl"
    for _ in range(600):
        if log.exists() and len(log.read_bytes().splitlines()) >= 3:
            break
        if process.poll() is not None:
            break
        signal.sigtimedwait([], 0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "run.resume_from_checkpoint=latest" in said and "Traceback" not in said
    (checkpoint,) = (output / "checkpoints").iterdir()
    assert int(checkpoint.name.removeprefix("step_")) == records(output)[-1]["step"]


def test_the_launcher_entry_reports_mistakes_in_one_line(pair, capsys):
    from tca_fast.train import main

    assert main([str(pair / "run.yaml")]) == 2
    assert main([str(pair / "nowhere.yaml"), "--local_rank=0", "--deepspeed", "x.json"]) == 2
    assert (
        main([str(pair / "run.yaml"), "run.sed=3", "--deepspeed", "--deepspeed_config", "x"]) == 2
    )
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("error: ") for line in lines)
    assert "--deepspeed: missing" in lines[0] and "nowhere.yaml" in lines[1]
    assert "did you mean 'seed'?" in lines[2]

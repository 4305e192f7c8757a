"""Runs with a token budget: the losses of padded rows, and resuming in the middle of an epoch."""

import importlib.util
import os
import signal

import pytest
import torch
from tiny_pair import character_tokenizer, packed_overrides, records

from tca_fast.bridging.objective import sample_cutoffs
from tca_fast.bridging.plain import PlainObjective
from tca_fast.bridging.streams import load_streams
from tca_fast.config import load_config
from tca_fast.errors import UserError
from tca_fast.training import run as running
from tca_fast.training import trainer as training
from tca_fast.training.batches import collate
from tca_fast.training.data import Encoder, open_corpus
from tca_fast.training.plans import PackedPlan
from tca_fast.training.run import train

pytestmark = pytest.mark.usefixtures("one_thread")


def configuration(pair, output, *overrides):
    packed = packed_overrides(pair / "cache")
    return load_config(pair / "run.yaml", [*packed, f"run.output_dir={output}", *overrides])


def start(pair, output, *overrides):
    return train(configuration(pair, output, *overrides), show_progress=False)


@pytest.fixture(scope="module")
def unbroken(pair):
    start(pair, pair / "packed")
    return pair / "packed"


def test_losses_are_those_of_the_same_sequences_padded(pair, unbroken):
    """The plain step on padded rows and torch's AdamW, on the groups that the budget made."""
    config = configuration(pair, pair / "unused")
    streams = load_streams(config.pair, config.adapter, seed=config.run.seed)
    objective = PlainObjective(streams, config.objective)
    parameters = list(streams.adapted.parameters())
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    corpus = open_corpus(config.data.train, "data.train")
    encoder = Encoder(character_tokenizer(), config.data)
    encoded = [encoder.encode(corpus.conversation(i)) for i in range(len(corpus))]
    plan = PackedPlan([len(one.ids) for one in encoded], 160, 2, config.run.seed)
    log = records(unbroken)
    assert len(log) == 20 and {len(row) for step in range(20) for row in plan.groups(step)} > {2}
    for step, record in enumerate(log):
        batches = [collate([encoded[i] for i in row], 1, True) for row in plan.groups(step)]
        assert record["sequences_seen"] - (step and log[step - 1]["sequences_seen"]) == sum(
            map(len, plan.groups(step))
        )
        counts = {
            "label_tokens": torch.tensor(sum(batch.label_tokens for batch in batches)),
            "real_tokens": torch.tensor(sum(batch.real_tokens for batch in batches)),
        }
        cutoffs = sample_cutoffs(config.objective, 3, seed=config.run.seed, step=step)
        losses = []
        for batch in batches:
            loss = objective(*batch[:3], cutoffs, **counts).loss
            loss.backward()
            losses.append(loss.item())
        assert record["loss"] == pytest.approx(sum(losses), rel=2e-5), step
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-3), step
        optimizer.param_groups[0]["lr"] = record["learning_rate"]
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("step", [3, 8])
def test_interrupted_runs_resume_bitwise(pair, unbroken, tmp_path, monkeypatch, step):
    class Interrupted(training.Trainer):
        def _between_steps(self):
            super()._between_steps()
            if self.progress.step == step:
                os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(running, "Trainer", Interrupted)
        assert start(pair, tmp_path / "run", "run.save_steps=0").step == step
    # The cache of token ids is no part of the run: without it they are computed again.
    elsewhere = f"data.cache_dir={tmp_path}/cache"
    start(pair, tmp_path / "run", "run.resume_from_checkpoint=latest", elsewhere)
    for split in ("train", "validation"):
        assert records(tmp_path / "run", split) == records(unbroken, split)


def test_validation_does_not_depend_on_packing(pair, unbroken, tmp_path):
    """The untrained adapters of step 1 on the same sequences, packed and padded."""
    options = ["run.eval_steps=1", "run.max_steps=1", "optimizer.warmup_ratio=1"]
    start(pair, tmp_path / "packed", *options)
    padded = load_config(
        pair / "run.yaml", ["data.max_length=70", f"run.output_dir={tmp_path}/padded", *options]
    )
    train(padded, show_progress=False)
    # NMSE is a ratio and so depends on how a batch is cut; a first step has learning rate 0.
    ours, theirs = (records(tmp_path / name, "validation") for name in ("packed", "padded"))
    for name in ("kl", "lm", "l1", "l0", "bridge"):
        assert ours[0][name] == pytest.approx(theirs[0][name], rel=1e-5), name


REFUSED = {
    "run.train_batch_size=2": "run: train_batch_size=2 and per_device.* leave one kind out",
    "run.per_device_train_batch_tokens=null": "train_batch_tokens and .* need each other",
    "run.train_batch_tokens=200": "train_batch_tokens=200 is not a whole number of rows",
    "run.per_device_train_batch_tokens=64": "64 is less than the longest sequence, 70 tokens",
    "pair.attn_implementation=flex_attention": "has no backward on a CPU; set pair.attn_impl",
}
if importlib.util.find_spec("flash_attn") is None:
    REFUSED["pair.attn_implementation=flash_attention_2"] = "pair.base: .* cannot be loaded"


@pytest.mark.parametrize("override", REFUSED)
def test_budgets_and_attention_that_cannot_be_are_refused(pair, tmp_path, override):
    with pytest.raises(UserError, match=REFUSED[override]) as caught:
        start(pair, tmp_path / "run", override)
    assert "\n" not in str(caught.value)


def test_another_budget_does_not_resume(pair, unbroken):
    resume = "run.resume_from_checkpoint=latest"
    with pytest.raises(UserError, match="run.train_batch_tokens: .* 320, this run has 160"):
        start(pair, unbroken, resume, "run.train_batch_tokens=160")

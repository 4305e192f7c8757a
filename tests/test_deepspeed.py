"""Two CPU ranks under every ZeRO stage against one process, at equal global batch."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forked_ranks import free_port
from safetensors.torch import load_file
from tiny_pair import make_pair, packed_overrides, records

from tca_fast.config import load_config
from tca_fast.training.run import train

LAUNCHER = Path(sys.executable).with_name("deepspeed")
STAGES = [0, 1, 2, 3, "2_offload"]
CONFIGS = Path(__file__).parent.parent / "configs"

pytestmark = pytest.mark.skipif(
    not LAUNCHER.exists(), reason="needs DeepSpeed: pip install 'tca_fast[deepspeed]'"
)


def launch(*arguments) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        # Without a compiler or ninja on the path DeepSpeed must get along, too.
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    command = [LAUNCHER, "--num_accelerators", "2", "--master_port", free_port(), *arguments]
    return subprocess.run(
        [str(part) for part in command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    """The pair, and `out/` of a run in one process."""
    root = tmp_path_factory.mktemp("pair")
    config = make_pair(root)
    train(load_config(config), show_progress=False)
    return root


@pytest.fixture(scope="module")
def plain(single) -> list[dict]:
    """Log of the same run in one process by the plain step."""
    output = single / "plain"
    settings = ["objective.step=plain", f"run.output_dir={output}", "run.eval_steps=0"]
    train(load_config(single / "run.yaml", settings), show_progress=False)
    return records(output)


@pytest.fixture(scope="module")
def stages(single) -> Path:
    done = launch(Path(__file__).with_name("deepspeed_stages.py"), single / "run.yaml")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return single


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_train_like_one(stages, stage):
    alone, together = records(stages / "out"), records(stages / f"unbroken{stage}")
    assert len(alone) == len(together) == 20
    for ours, theirs in zip(together, alone, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["kl"] == pytest.approx(theirs["kl"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        for name in ("tokens_seen", "sequences_seen", "learning_rate", "dead_features"):
            assert ours[name] == theirs[name], name
    # The last batch of an epoch has one micro-batch, so one rank only stood in.
    assert [r["sequences_seen"] for r in alone[4:7]] == [20, 22, 26]
    validation = records(stages / "out", "validation")
    for ours, theirs in zip(
        records(stages / f"unbroken{stage}", "validation"), validation, strict=True
    ):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


@pytest.fixture(scope="module")
def packed(single) -> list[dict]:
    """Log of a run of packed rows in one process."""
    settings = [*packed_overrides(single / "cache_alone"), f"run.output_dir={single}/packed1"]
    train(load_config(single / "run.yaml", settings), show_progress=False)
    return records(single / "packed1")


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_train_packed_rows_like_one(stages, packed, stage):
    """Both tokenized the same file at the same time."""
    alone, together = packed, records(stages / f"packed{stage}")
    assert len(alone) == len(together) == 20
    for ours, theirs in zip(together, alone, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        for name in ("tokens_seen", "sequences_seen", "learning_rate", "dead_features"):
            assert ours[name] == theirs[name], name


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_with_checkpointing_train_like_the_plain_step(stages, plain, stage):
    together = records(stages / f"checkpointed{stage}")
    assert len(plain) == len(together) == 20
    for ours, theirs in zip(together, plain, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_interrupted_ranks_resume_bitwise(stages, stage):
    assert records(stages / f"stage{stage}") == records(stages / f"unbroken{stage}")
    weights = [
        load_file(stages / f"{run}{stage}/adapter/adapter_model.safetensors")
        for run in ("stage", "unbroken")
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all((weights[0][name] == tensor).all() for name, tensor in weights[1].items())
    assert all(tensor.any() for tensor in weights[1].values())


@pytest.mark.parametrize("stage", STAGES)
def test_adapters_name_the_weights_they_were_trained_beside(stages, stage):
    marks = [
        json.loads((stages / f"{run}/adapter/adapter_config.json").read_text())["fingerprint"]
        for run in ("out", f"unbroken{stage}")
    ]
    assert marks[0] == marks[1] and marks[0]["mlp"] != marks[0]["rest"]


@pytest.mark.parametrize("stage", STAGES)
def test_checkpoints_hold_the_adapters_alone(stages, stage):
    """Every element once in float32, and nothing of the frozen models; nothing is pickled."""
    checkpoint = stages / f"stage{stage}" / "checkpoints" / "step_000009"
    weights = load_file(checkpoint / "adapter" / "adapter_model.safetensors")
    parts = sorted((checkpoint / "optimizer").iterdir())
    assert [part.name for part in parts] == [
        f"part_0000{rank}.safetensors" for rank in range(1 if stage == 0 else 2)
    ]
    seen = dict.fromkeys(weights, 0)
    for part in parts:
        moments = load_file(part)
        assert moments.pop("step") == 9
        for key, moment in moments.items():
            seen[key.split("/")[0]] += moment.numel()
    assert seen == {name: 2 * tensor.numel() for name, tensor in weights.items()}
    assert {path.suffix for path in checkpoint.rglob("*.*")} == {".safetensors", ".json", ".md"}


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_go_on_where_one_process_stopped(stages, stage):
    assert_same_curve(stages / f"widened{stage}", stages / "out")


@pytest.mark.parametrize("stage", STAGES)
def test_one_process_goes_on_where_two_ranks_stopped(stages, stage, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(stages / f"stage{stage}", run)
    shutil.rmtree(run / "adapter")
    options = [f"run.output_dir={run}", "run.resume_from_checkpoint=latest", "run.save_steps=0"]
    train(load_config(stages / "run.yaml", options), show_progress=False)
    assert_same_curve(run, stages / "out")


def assert_same_curve(ours: Path, theirs: Path) -> None:
    for one, other in zip(records(ours), records(theirs), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        for name in ("tokens_seen", "learning_rate", "dead_features"):
            assert one[name] == other[name], name


def test_launcher_command_trains_under_zero2(single):
    done = launch(
        *("--module", "tca_fast.train", single / "run.yaml", "--deepspeed", CONFIGS / "zero2.json"),
        *(f"run.output_dir={single}/command", "run.max_steps=20"),
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "adapters in" in done.stderr
    for ours, theirs in zip(records(single / "command"), records(single / "out"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


def test_bfloat16_keeps_float32_masters_over_a_resume(stages):
    resumed, unbroken = stages / "bfloat16", stages / "bfloat16_unbroken"
    assert records(resumed) == records(unbroken) and len(records(resumed)) == 12
    for run in (resumed, unbroken):
        weights = load_file(run / "adapter" / "adapter_model.safetensors")
        for name, tensor in weights.items():
            assert tensor.dtype == torch.float32, name
            # Written from the working copy it would be a bfloat16 number everywhere.
            assert (tensor != tensor.bfloat16().float()).any(), name
    # Three significant digits of bfloat16, over a dozen steps that lower the loss by a fifth.
    for ours, theirs in zip(records(resumed)[:3], records(stages / "out")[:3], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-2)

"""Run under the DeepSpeed launcher: every ZeRO stage in turn, interrupted and resumed.

Each also goes on from a checkpoint that one process has written in `out/`.

    deepspeed --num_accelerators 2 tests/deepspeed_stages.py CONFIG.yaml

One launch for all stages, because starting two ranks costs more than training the tiny pair.
"""

import errno
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
from tiny_pair import packed_overrides

import tca_fast.training.run as running
from tca_fast.bridging import head
from tca_fast.config import load_config
from tca_fast.training.run import train
from tca_fast.training.trainer import Trainer

STAGES = (0, 1, 2, 3, "2_offload")
INTERRUPT_AFTER = 9


class InterruptedTrainer(Trainer):
    """Only rank 1 gets a Ctrl-C; both have to stop."""

    def _between_steps(self) -> None:
        super()._between_steps()
        if self.progress.step == INTERRUPT_AFTER and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGINT)


def settings(root: Path, stage: int | str) -> Path:
    path = root / f"zero{stage}_rank{os.environ['RANK']}.json"
    zero = {"stage": int(str(stage)[0])}
    if stage == "2_offload":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if stage == 3:
        # Tiny parameters would all fall below the threshold and never be partitioned; so do the
        # biases here, which stay whole between steps.
        zero["stage3_param_persistence_threshold"] = 100
    path.write_text(json.dumps({"train_batch_size": "auto", "zero_optimization": zero}))
    return path


def main() -> None:
    config = Path(sys.argv[-1])
    for stage in STAGES:
        if stage == 3 and os.environ["RANK"] == "0":
            # As if its micro-batches were longer than those of rank 1, which have one chunk.
            head._LEAST_CHUNK_BYTES = 0
        output = config.parent / f"stage{stage}"
        run = [f"run.output_dir={output}", "run.save_steps=0"]
        deepspeed = settings(config.parent, stage)
        running.Trainer = InterruptedTrainer
        result = train(load_config(config, run), deepspeed, show_progress=False)
        running.Trainer = Trainer
        assert result.interrupted and result.step == INTERRUPT_AFTER, result
        run.append("run.resume_from_checkpoint=latest")
        result = train(load_config(config, run), deepspeed, show_progress=False)
        assert not result.interrupted and result.step == result.total_steps, result
        unbroken = [f"run.output_dir={config.parent}/unbroken{stage}", "run.save_steps=0"]
        train(load_config(config, unbroken), deepspeed, show_progress=False)
        resume_from_one_process(config, stage, deepspeed)
        checkpointed = [f"run.output_dir={config.parent}/checkpointed{stage}", "run.save_steps=0"]
        checkpointed += ["objective.gradient_checkpointing=true", "run.eval_steps=0"]
        train(load_config(config, checkpointed), deepspeed, show_progress=False)
    for stage in (2, 3):
        packed = packed_overrides(config.parent / f"cache{stage}")
        packed.append(f"run.output_dir={config.parent}/packed{stage}")
        train(load_config(config, packed), settings(config.parent, stage), show_progress=False)
    train_in_bfloat16(config)
    fill_disk(config)


def train_in_bfloat16(config: Path) -> None:
    """The adapters in bfloat16 with float32 masters, and a resume that must not show."""
    deepspeed = settings(config.parent, 2)
    run = ["pair.dtype=bfloat16", "run.save_steps=8", "run.max_steps=12", "run.eval_steps=0"]
    run.append(f"run.output_dir={config.parent}/bfloat16")
    train(load_config(config, run), deepspeed, show_progress=False)
    torch.distributed.barrier()
    if os.environ["RANK"] == "0":
        shutil.copytree(config.parent / "bfloat16", config.parent / "bfloat16_unbroken")
        shutil.rmtree(config.parent / "bfloat16" / "adapter")
    torch.distributed.barrier()
    run.append("run.resume_from_checkpoint=latest")
    train(load_config(config, run), deepspeed, show_progress=False)


def resume_from_one_process(config: Path, stage: int | str, deepspeed: Path) -> None:
    """Two ranks take over after step 8 of `out/`."""
    output = config.parent / f"widened{stage}"
    if os.environ["RANK"] == "0":
        shutil.copytree(config.parent / "out", output)
        shutil.rmtree(output / "adapter")
    torch.distributed.barrier()
    checkpoint = output / "checkpoints" / "step_000008"
    run = [f"run.output_dir={output}", f"run.resume_from_checkpoint={checkpoint}"]
    result = train(load_config(config, run), deepspeed, show_progress=False)
    assert result.step == result.total_steps, result


def fill_disk(config: Path) -> None:
    """The disk of rank 1 is full at the second checkpoint; both ranks go on to the third."""
    output = config.parent / "full"
    fsync = os.fsync

    def full(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if os.environ["RANK"] == "1" and "step_000004" in path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    os.fsync = full
    run = [f"run.output_dir={output}", "run.save_steps=2", "run.max_steps=7"]
    result = train(load_config(config, run), settings(config.parent, 2), show_progress=False)
    os.fsync = fsync
    assert result.step == 7, result
    torch.distributed.barrier()
    names = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert names == ["step_000002", "step_000006"], names


if __name__ == "__main__":
    main()

"""Run under the DeepSpeed launcher: every ZeRO stage in turn, interrupted and resumed.

    deepspeed --num_accelerators 2 tests/deepspeed_stages.py CONFIG.yaml

One launch for all stages, because starting two ranks costs more than training the tiny pair.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

import tca_fast.training.run as running
from tca_fast.config import load_config
from tca_fast.errors import UserError
from tca_fast.training.run import train
from tca_fast.training.trainer import Trainer

STAGES = (0, 1, 2, 3)
INTERRUPT_AFTER = 9


class InterruptedTrainer(Trainer):
    """Only rank 1 gets a Ctrl-C; both have to stop."""

    def _between_steps(self) -> None:
        super()._between_steps()
        if self.progress.step == INTERRUPT_AFTER and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGINT)


def settings(root: Path, stage: int) -> Path:
    path = root / f"zero{stage}_rank{os.environ['RANK']}.json"
    zero = {"stage": stage}
    if stage == 3:
        # Tiny parameters would all fall below the threshold and never be partitioned.
        zero["stage3_param_persistence_threshold"] = 0
    path.write_text(json.dumps({"train_batch_size": "auto", "zero_optimization": zero}))
    return path


def main() -> None:
    config = Path(sys.argv[-1])
    for stage in STAGES:
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
        checkpointed = [f"run.output_dir={config.parent}/checkpointed{stage}", "run.save_steps=0"]
        checkpointed += ["objective.gradient_checkpointing=true", "run.eval_steps=0"]
        train(load_config(config, checkpointed), deepspeed, show_progress=False)
    fill_disk(config)


def fill_disk(config: Path) -> None:
    """The disk of rank 1 is full at the second checkpoint: both ranks have to hear of it."""
    output = config.parent / "full"
    save = torch.save

    def fail(state, path, **options):
        if os.environ["RANK"] == "1" and "step_000004" in str(path):
            raise RuntimeError("PytorchStreamWriter failed writing file")
        save(state, path, **options)

    torch.save = fail
    run = [f"run.output_dir={output}", "run.save_steps=2", "run.max_steps=5"]
    try:
        train(load_config(config, run), settings(config.parent, 2), show_progress=False)
    except UserError as error:
        assert "step 4 could not be saved" in str(error), error
    else:
        raise AssertionError("a shard that could not be written went unnoticed")
    finally:
        torch.save = save
    torch.distributed.barrier()
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step_000002"]


if __name__ == "__main__":
    main()

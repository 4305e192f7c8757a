"""Run under the DeepSpeed launcher: rank 1 stops for a while between two steps.

deepspeed --num_accelerators 2 tests/deepspeed_hang.py CONFIG.yaml
"""

import json
import os
import sys
import time
from pathlib import Path

import tca_fast.training.run as running
from tca_fast.config import load_config
from tca_fast.training.run import train
from tca_fast.training.trainer import Trainer

HANGS_AFTER, SECONDS, NOTICED = 3, 7.0, 2.0


class HangingTrainer(Trainer):
    def _fetched(self, batches):
        return super()._fetched(self._slow(batches))

    def _slow(self, batches):
        for batch in batches:
            if self.progress.step == HANGS_AFTER and os.environ["RANK"] == "1":
                time.sleep(SECONDS)
            yield batch


def main() -> None:
    path = Path(sys.argv[-1])
    zero = path.with_name(f"zero_{os.environ['RANK']}.json")
    zero.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    running.Trainer = HangingTrainer
    settings = ["run.max_steps=6", "run.save_steps=0", f"run.hang_seconds={NOTICED}"]
    train(load_config(path, settings), zero, show_progress=False)


if __name__ == "__main__":
    main()

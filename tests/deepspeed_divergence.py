"""Run under the DeepSpeed launcher: one rank meets something that is not finite, at every stage.

    deepspeed --num_accelerators 2 tests/deepspeed_divergence.py CONFIG.yaml

Writes `divergence_rankN.json`: for every stage and kind, what rank N was told and whether the
parameters were still those of the checkpoint before.
"""

import json
import math
import os
import sys
from pathlib import Path

import torch
from deepspeed_stages import settings
from safetensors.torch import load_file

from tca_fast.config import load_config
from tca_fast.errors import UserError
from tca_fast.training import deepspeed_engine
from tca_fast.training.run import train

STAGES = (0, 1, 2, 3)
BAD_STEP = 3
RANK = os.environ["RANK"]


class PoisonedEngine(deepspeed_engine.DeepSpeedEngine):
    """Rank 1 spoils its share of one step; leaves whether parameters are those of `saved`."""

    spoiled: str
    saved: Path

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.applied = 0

    def forward(self, *inputs, **options):
        output = super().forward(*inputs, **options)
        if RANK == "1" and self.applied + 1 == BAD_STEP:
            if self.spoiled == "gradient":
                return output._replace(loss=output.loss * math.nan)
            metrics = {**output.metrics, "loss": output.metrics["loss"] * math.nan}
            return output._replace(metrics=metrics)
        return output

    def apply(self, learning_rate, loss):
        norm = super().apply(learning_rate, loss)
        self.applied += 1
        return norm

    def close(self) -> None:
        saved = load_file(self.saved)
        with self.gathered():
            # ZeRO-3 gathers on rank 0; the others may hold parts.
            equal = [
                torch.equal(parameter, tensor)
                for name, parameter in self.parameters.items()
                for key, tensor in saved.items()
                if name.endswith(key.removeprefix("base_model.model."))
            ]
        PoisonedEngine.unchanged = len(equal) == len(saved) and all(equal)
        super().close()


def main() -> None:
    config = Path(sys.argv[-1])
    deepspeed_engine.DeepSpeedEngine = PoisonedEngine
    told = {}
    for stage in STAGES:
        for spoiled in ("loss", "gradient"):
            output = config.parent / f"{spoiled}{stage}"
            checkpoint = output / "checkpoints" / f"step_{BAD_STEP - 1:06d}"
            PoisonedEngine.spoiled = spoiled
            PoisonedEngine.saved = checkpoint / "adapter" / "adapter_model.safetensors"
            run = [f"run.output_dir={output}", f"run.save_steps={BAD_STEP - 1}"]
            try:
                train(load_config(config, run), settings(config.parent, stage), show_progress=False)
            except UserError as error:
                told[f"{spoiled}{stage}"] = str(error), PoisonedEngine.unchanged
    (config.parent / f"divergence_rank{RANK}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()

"""Entry of the DeepSpeed launcher.

    deepspeed --num_accelerators 2 --module tca_fast.train CONFIG.yaml \\
        --deepspeed configs/zero2.json [block.key=value …]

Both spellings of the option are understood: Hugging Face's `--deepspeed FILE`, and DeepSpeed's
`--deepspeed --deepspeed_config FILE`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from tca_fast.config import load_config
from tca_fast.errors import UserError

if TYPE_CHECKING:
    from tca_fast.training.trainer import TrainResult

INTERRUPTED = 130
SECONDS_FOR_RANK_0 = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as one rank; returns the exit status, as of `tca-fast train`."""
    options = _parse(arguments)
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        deepspeed = options.deepspeed_config or options.deepspeed
        if not deepspeed:
            raise UserError("--deepspeed: missing; give a file such as configs/zero2.json")
        changes = list(options.overrides)
        if options.resume is not None:
            changes.append(f"run.resume_from_checkpoint={options.resume}")
        config = load_config(options.config, changes)

        from tca_fast.training.run import train

        result = train(config, deepspeed)
        if is_main:
            report(
                result,
                "deepspeed --num_accelerators N --module tca_fast.train "
                f"{options.config} --deepspeed {deepspeed}",
            )
        return INTERRUPTED if result.interrupted else 0
    except UserError as error:
        if not is_main:
            # Nearly always rank 0 meets the same error, says so, and the launcher ends the others
            # within this wait; what only this rank met has to be said here.
            time.sleep(SECONDS_FOR_RANK_0)
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", markup=False, style="red")
        return 2
    except KeyboardInterrupt:
        if is_main:
            Console(stderr=True).print("stopped; nothing was saved since the last checkpoint")
        return INTERRUPTED


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tca_fast.train", description=__doc__.splitlines()[0])
    parser.add_argument("config", help="YAML file, such as configs/miniature.yaml")
    parser.add_argument("overrides", nargs="*", help="block.key=value, winning over the file")
    parser.add_argument("--deepspeed", nargs="?", const="", help="DeepSpeed JSON file")
    parser.add_argument("--deepspeed_config", help="DeepSpeed JSON file")
    parser.add_argument("--resume", help="checkpoint directory, or 'latest'")
    parser.add_argument("--local_rank", type=int, help="given by the launcher, also in LOCAL_RANK")
    return parser.parse_intermixed_args(arguments)


def report(result: TrainResult, command: str) -> None:
    """Say where the adapters are, or how to go on."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    if result.interrupted:
        console.print(
            f"stopped after step {result.step} of {result.total_steps}, saved {result.checkpoint}; "
            f"go on with: {command} [same overrides] run.resume_from_checkpoint=latest",
            markup=False,
        )
    else:
        console.print(f"trained {result.step} steps; adapters in {result.adapter}", markup=False)


if __name__ == "__main__":
    sys.exit(main())

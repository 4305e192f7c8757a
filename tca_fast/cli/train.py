"""`tca-fast train CONFIG.yaml [block.key=value …]`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train(
    config: Annotated[Path, typer.Argument(help="YAML file, such as configs/miniature.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="block.key=value, winning over the file.")
    ] = None,
    deepspeed: Annotated[
        Path | None,
        typer.Option(help="DeepSpeed JSON file; use the deepspeed launcher for several ranks."),
    ] = None,
    resume: Annotated[
        str | None, typer.Option(help="Checkpoint directory, or 'latest' in run.output_dir.")
    ] = None,
) -> None:
    """Train adapters; status 0 when done, 2 on a mistake, 130 after Ctrl-C and a checkpoint."""
    from tca_fast.config import load_config
    from tca_fast.train import INTERRUPTED, report
    from tca_fast.training.run import train as run_training

    changes = list(overrides or [])
    if resume is not None:
        changes.append(f"run.resume_from_checkpoint={resume}")
    result = run_training(load_config(config, changes), deepspeed)
    report(result, f"tca-fast train {config}")
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)

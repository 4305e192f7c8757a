"""`tca-fast report RUN`: a run's progress as one page, also while it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def report(
    run: Annotated[Path, typer.Argument(help="run.output_dir of a training run.")],
    out: Annotated[
        Path | None, typer.Option(help="Directory of the page; by default that of the run.")
    ] = None,
) -> None:
    """Write training.html: losses, NMSE and L0 by layer, dead features, speed and rates."""
    from tca_fast.training.history import read_history
    from tca_fast.training.report import write_training_page

    page = write_training_page(read_history(run), out or run)
    Console().print(f"wrote {page}", soft_wrap=True, highlight=False)

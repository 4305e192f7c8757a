"""The command line: `tca-fast COMMAND`, one file per command."""

from __future__ import annotations

import sys

import typer
from rich.console import Console

from tca_fast.cli.bench import bench
from tca_fast.cli.convert import convert
from tca_fast.cli.demo import demo
from tca_fast.cli.env import env
from tca_fast.cli.evaluate import evaluate
from tca_fast.cli.hub import pull, push
from tca_fast.cli.plan import plan
from tca_fast.cli.report import report
from tca_fast.cli.sweep import sweep
from tca_fast.cli.train import train
from tca_fast.cli.verify import verify
from tca_fast.errors import UserError

app = typer.Typer(
    name="tca-fast",
    help="Train, run and study transcoder adapters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command(help="Train adapters on the miniature pair and show how well they do.")(demo)
app.command(help="Train adapters from a YAML configuration.")(train)
app.command(help="Progress of a training run as one page, also while it goes on.")(report)
app.command(help="How faithful trained adapters are, on held-out text.")(evaluate)
app.command(help="Faithfulness against sparsity over L1 weights.")(sweep)
app.command(help="Memory, time and GPU-hours of a run before it starts.")(plan)
app.command(help="Recompute every quantity of a golden folder and compare.")(verify)
app.command(help="Versions, devices, and which backend serves each operator.")(env)
app.command(help="Adapters from one file format to another.")(convert)
app.command(help="Publish adapters on the hub, with a model card of their run.")(push)
app.command(help="Fetch adapters from the hub into a directory.")(pull)
app.add_typer(bench, name="bench")


def main() -> None:
    """Run a command; a `UserError` becomes one line on stderr and exit status 2."""
    try:
        app()
    except UserError as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", markup=False, style="red")
        sys.exit(2)

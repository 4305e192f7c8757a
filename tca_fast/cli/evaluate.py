"""`tca-fast evaluate RUN`: how faithful trained adapters are, on held-out text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tca_fast.evaluation.faithfulness import Faithfulness
    from tca_fast.evaluation.faithfulness_report import FaithfulnessReport
    from tca_fast.evaluation.report import ModelName
    from tca_fast.held_out.text import HeldOutText
    from tca_fast.held_out.trained import Trained

_COLUMNS = (
    "model",
    "KL",
    "LM loss",
    "NMSE",
    "same next\ntoken, %",
    "L0",
    "% of F",
    "tokens",
)


def evaluate(
    run: Annotated[
        Path, typer.Argument(help="run.output_dir of a training run, or a directory of adapters.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="pair.…, data.… and run.device for those of the run."
        ),
    ] = None,
    num_samples: Annotated[
        int, typer.Option(min=1, help="Held-out sequences, the first of the file.")
    ] = 400,
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of one forward, padding included.")
    ] = 8192,
    data: Annotated[
        str | None, typer.Option(help="JSONL file instead of the run's data.validation.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory of the figures; by default RUN.")
    ] = None,
) -> None:
    """Measure base, hybrid, adapter model and target; write faithfulness.json and .html."""
    from transformers.utils import logging

    from tca_fast.bridging.streams import check_models
    from tca_fast.evaluation.faithfulness_report import write_faithfulness
    from tca_fast.held_out.text import read_text
    from tca_fast.held_out.trained import doubts, find_trained

    console = Console(highlight=False)
    logging.disable_progress_bar()
    try:
        trained = find_trained(run, data, overrides or [])
        # Before the tokenizer, which a model that is not there lacks too.
        check_models(trained.config.pair)
        field = "data.validation" if data is None else "--data"
        text = read_text(trained.config, num_samples, field)
        notes = doubts(trained, text)
        for note in notes:
            told = Console(stderr=True, soft_wrap=True)
            told.print(f"note: {note}", markup=False, style="yellow")
        found = _measure(trained, text, batch_tokens)
        report = _report(run, trained, text, found, notes, batch_tokens)
        # First, because the disk may be full.
        _show(console, report)
        paths = write_faithfulness(report, out or run)
    except KeyboardInterrupt:
        console.print("Interrupted; nothing was written.")
        raise typer.Exit(130) from None
    for path in paths.values():
        console.print(f"wrote {path}", soft_wrap=True, markup=False)


def _measure(
    trained: Trained, text: HeldOutText, batch_tokens: int
) -> dict[ModelName, Faithfulness]:
    from tqdm import tqdm

    from tca_fast.held_out.measure import measure_models, measured_models

    total = len(measured_models(trained.config)) * len(text.sequences)
    interval = 0.2 if sys.stderr.isatty() else 30.0
    with tqdm(total=total, unit="seq", file=sys.stderr, mininterval=interval) as bar:

        def progress(name: ModelName, num_sequences: int) -> None:
            bar.set_description(f"evaluate {name}", refresh=False)
            bar.update(num_sequences)

        return measure_models(trained.config, trained.adapter, text, batch_tokens, progress)


def _report(
    run: Path,
    trained: Trained,
    text: HeldOutText,
    found: Mapping[ModelName, Faithfulness],
    notes: list[str],
    batch_tokens: int,
) -> FaithfulnessReport:
    from tca_fast.bridging.streams import resolve_dtype
    from tca_fast.cli.env import environment
    from tca_fast.evaluation.faithfulness_report import FaithfulnessReport
    from tca_fast.training.origin import commit
    from tca_fast.training.run import resolve_device

    config = trained.config
    device = resolve_device(config.run.device).type
    adapter = trained.describe()
    return FaithfulnessReport(
        title=f"Faithfulness of {run.resolve().name}",
        faithfulness=found,
        num_features=adapter["num_features"],
        data=text.describe(),
        adapter=adapter,
        settings={
            "pair": config.pair.model_dump(mode="json"),
            "device": device,
            "dtype": resolve_dtype(config.pair.dtype, device),
            "batch_tokens": batch_tokens,
        },
        environment={**environment(device), "commit": commit() or "unknown"},
        notes=notes,
    )


def _show(console: Console, report: FaithfulnessReport) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in _COLUMNS:
        justify: Any = "left" if heading == "model" else "right"
        table.add_column(heading, justify=justify)
    for name, found in report.faithfulness.items():
        l0 = found.mean_l0
        table.add_row(
            name,
            f"{found.kl:.4f}",
            f"{found.lm_loss:.4f}",
            f"{found.mean_nmse:.4f}",
            f"{100 * found.agreement:.1f}",
            "–" if l0 is None else f"{l0:.1f}",
            "–" if l0 is None else f"{100 * l0 / report.num_features:.2f}",
            f"{found.num_counted:,}",
            style="bold" if name == "adapter" else None,
        )
    console.print(table)

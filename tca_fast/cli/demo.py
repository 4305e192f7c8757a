"""`tca-fast demo`: train adapters on the miniature pair and show how well they do."""

from __future__ import annotations

import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from tca_fast.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tca_fast.adapted_model import AdaptedModel
    from tca_fast.config import TrainConfig
    from tca_fast.evaluation.reasoning import Problem
    from tca_fast.evaluation.report import ModelResult, RunReport

# Longer than any worked solution of the miniature; a model that never stops is cut here.
MAX_NEW_TOKENS = 120
EVALUATION_BATCH = 128
NUM_SAMPLES = 4
_COLUMNS = (
    "model",
    "KL",
    "NMSE",
    "agree %",
    "L0",
    "% of F",
    "right %",
    "length",
    "waits",
)


class _Models(NamedTuple):
    base: PreTrainedModel
    adapted: AdaptedModel
    target: PreTrainedModel


class _HeldOut(NamedTuple):
    """Validation data: batches for faithfulness, problems for reasoning, and what they are."""

    batches: list[tuple[Any, Any, Any]]
    problems: list[Problem]
    prompts: list[str]
    domains: list[str]
    tokenizer: PreTrainedTokenizerBase


def demo(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings that win over the recipe's."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Directory of the run and its report; a free runs/demo* by default."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the adapters, the data order and the cutoffs.")
    ] = None,
    l1_weight: Annotated[
        float | None, typer.Option(help="Weight of the sparsity penalty; higher is sparser.")
    ] = None,
    num_problems: Annotated[
        int, typer.Option(min=1, help="Held-out problems that every model answers.")
    ] = 500,
    skip_training: Annotated[
        bool, typer.Option("--skip-training", help="Evaluate the adapters that --out holds.")
    ] = False,
) -> None:
    """Train adapters on the miniature pair and show how well they do."""
    if skip_training and out is None:
        raise UserError("--out: missing; --skip-training needs the directory of a trained demo")
    out = out or _free_directory(Path("runs"), "demo")
    recipe = out / "config.yaml" if skip_training else recipe_path()
    settings = list(overrides or [])
    settings += [] if seed is None else [f"run.seed={seed}"]
    settings += [] if l1_weight is None else [f"objective.l1_weight={l1_weight}"]
    config = miniature_config(recipe, out, settings)
    console = Console()
    seconds: dict[str, float] = {}
    with _timed(seconds, "total"):
        if not skip_training:
            with _timed(seconds, "training"):
                _train(console, config, settings)
        try:
            with _timed(seconds, "evaluation"):
                held_out = _held_out(config, num_problems)
                results = _evaluate(_load_models(config, out / "adapter"), held_out)
        except KeyboardInterrupt:
            console.print(
                f"Interrupted. The trained adapters are in {out / 'adapter'}; evaluate them with:\n"
                f"{shlex.join(['tca-fast', 'demo', '--out', str(out), '--skip-training'])}",
                soft_wrap=True,
                highlight=False,
                markup=False,
            )
            raise typer.Exit(130) from None
    report = _report(config, results, held_out, out, seconds)
    show_table(console, report)
    from tca_fast.evaluation.report import write_report

    page = write_report(report, out)["report.html"]
    console.print(f"The report with charts and samples: {page}", soft_wrap=True, highlight=False)


def _free_directory(parent: Path, name: str) -> Path:
    """`parent/name`, or `parent/name-2` and so on where a run is already there."""
    path, number = parent / name, 1
    while path.exists():
        number += 1
        path = parent / f"{name}-{number}"
    return path


def recipe_path() -> Path:
    """The miniature's configuration."""
    from tca_fast import miniature

    return Path(str(miniature.__file__)).with_name("recipe.yaml")


def miniature_config(recipe: Path, out: Path, settings: Sequence[str]) -> TrainConfig:
    """A recipe on the models and data of the installed package.

    Raises:
        UserError: they were not installed, and what `load_config` raises.
    """
    from tca_fast import miniature
    from tca_fast.config import load_config

    try:
        paths = {
            "pair.base": miniature.base_path(),
            "pair.target": miniature.target_path(),
            "data.train": miniature.train_data(),
            "data.validation": miniature.val_data(),
            "run.output_dir": out,
        }
    except FileNotFoundError as error:
        raise UserError(f"miniature: {error}") from None
    located = [f"{key}={json.dumps(str(path))}" for key, path in paths.items()]
    return load_config(recipe, [*located, *settings])


def _train(console: Console, config: TrainConfig, settings: Sequence[str]) -> None:
    from tca_fast.training.run import train

    result = train(config)
    if result.interrupted:
        resume = "run.resume_from_checkpoint="
        kept = [setting for setting in settings if not setting.startswith(resume)]
        command = ["tca-fast", "demo", "--out", config.run.output_dir, *kept, f"{resume}latest"]
        console.print(
            f"Interrupted after step {result.step} of {result.total_steps}; go on with:\n"
            f"{shlex.join(command)}",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )
        raise typer.Exit(130)


def _load_models(config: TrainConfig, adapter: Path) -> _Models:
    """The pair, and the adapters as a user would load them from disk."""
    from transformers.utils import logging

    from tca_fast.bridging.streams import load_adapted, load_model
    from tca_fast.training.run import resolve_device

    logging.disable_progress_bar()
    pair, device = config.pair, str(resolve_device(config.run.device))
    base = load_model("pair.base", pair.base, pair.base_revision, pair, device)
    target = load_model("pair.target", pair.target, pair.target_revision, pair, device)
    adapted = load_adapted(
        adapter, base=pair.base, target=pair.target, dtype=pair.dtype, device=device
    )
    return _Models(base.eval(), adapted, target.eval())


def _tokenizer(config: TrainConfig) -> PreTrainedTokenizerBase:
    from tca_fast.bridging.streams import load_tokenizer

    tokenizer = load_tokenizer(config.pair.target, config.pair.target_revision)
    if tokenizer is None:
        raise UserError(f"pair.target: {config.pair.target} has no tokenizer; reinstall tca_fast")
    return tokenizer


def _held_out(config: TrainConfig, num_problems: int) -> _HeldOut:
    from tca_fast.evaluation.reasoning import Problem
    from tca_fast.miniature.task import extract_answer
    from tca_fast.training.batches import collate, pad_token_id
    from tca_fast.training.data import Encoder, open_corpus

    tokenizer = _tokenizer(config)
    encoder = Encoder(tokenizer, config.data, "data.validation")
    corpus = open_corpus(str(config.data.validation), "data.validation", config.data.bad_lines)
    conversations = [corpus.conversation(i) for i in range(min(num_problems, len(corpus)))]
    encoded = [encoder.encode(conversation) for conversation in conversations]
    batches = [
        collate(encoded[start : start + EVALUATION_BATCH], pad_token_id(tokenizer), True)[:3]
        for start in range(0, len(encoded), EVALUATION_BATCH)
    ]
    problems = [
        Problem(one.ids[: one.prompt_length].tolist(), extract_answer(conversation.response) or "")
        for one, conversation in zip(encoded, conversations, strict=True)
    ]
    prompts = [conversation.prompt for conversation in conversations]
    domains = [conversation.domain for conversation in conversations]
    return _HeldOut(batches, problems, prompts, domains, tokenizer)


def _evaluate(models: _Models, held_out: _HeldOut) -> tuple[ModelResult, ...]:
    """Measure base, hybrid, adapter and target on the same data and problems."""
    from tqdm import tqdm

    # Every sequence is read once by each model, and its problem answered once.
    total = 4 * 2 * len(held_out.problems)
    interval = 0.2 if sys.stderr.isatty() else 30.0
    with tqdm(total=total, unit="seq", file=sys.stderr, mininterval=interval) as bar:

        def measure(name: str, model: PreTrainedModel) -> ModelResult:
            bar.set_description(f"evaluate {name}")
            return _measure(name, model, models.target, held_out, bar.update)

        base = measure("base", models.base)
        with models.adapted.disabled():
            hybrid = measure("hybrid", models.adapted.model)
        adapter = measure("adapter", models.adapted.model)
        return base, hybrid, adapter, measure("target", models.target)


def _measure(
    name: Any,
    model: PreTrainedModel,
    target: PreTrainedModel,
    held_out: _HeldOut,
    progress: Callable[[int], Any],
) -> ModelResult:
    from tca_fast.evaluation.faithfulness import measure_faithfulness
    from tca_fast.evaluation.reasoning import measure_reasoning
    from tca_fast.evaluation.report import ModelResult
    from tca_fast.miniature.task import count_waits, is_correct

    def counted() -> Iterator[tuple[Any, Any, Any]]:
        for batch in held_out.batches:
            yield batch
            progress(len(batch[0]))

    return ModelResult(
        name,
        measure_faithfulness(model, target, counted()),
        measure_reasoning(
            model,
            held_out.tokenizer,
            held_out.problems,
            check=is_correct,
            count_waits=count_waits,
            max_new_tokens=MAX_NEW_TOKENS,
            batch_size=EVALUATION_BATCH,
            progress=progress,
        ),
    )


def _report(
    config: TrainConfig,
    results: tuple[ModelResult, ...],
    held_out: _HeldOut,
    out: Path,
    seconds: dict[str, float],
) -> RunReport:
    from tca_fast.cli.env import environment
    from tca_fast.evaluation.report import RunReport
    from tca_fast.training.run import resolve_device

    adapter = results[2].reasoning.responses
    return RunReport(
        title="Transcoder adapters on the miniature pair",
        models=results,
        num_features=config.adapter.num_features,
        prompts=held_out.prompts,
        answers=[problem.answer for problem in held_out.problems],
        samples=choose_samples(held_out.domains, [response.correct for response in adapter]),
        samples_note="The first problem of each domain, and the first the adapter model fails.",
        history=_history(out / "log.jsonl"),
        config=config.model_dump(mode="json"),
        environment=environment(resolve_device(config.run.device).type),
        seconds=seconds,
    )


def choose_samples(domains: Sequence[str], correct: Sequence[bool]) -> list[int]:
    """Indices of the problems shown: the first of each domain, and the first failure.

    Chosen by position and not by looks, so that the page shows neither the best nor the worst.
    """
    chosen = [domains.index(domain) for domain in dict.fromkeys(domains)][: NUM_SAMPLES - 1]
    failures = [index for index, right in enumerate(correct) if not right and index not in chosen]
    return [*chosen, *failures[:1]]


def _history(path: Path) -> list[dict[str, Any]]:
    """The run's log without the per-layer figures; empty where there is none."""
    if not path.exists():
        return []
    kept = ("step", "split", "loss", "kl", "nmse", "l0", "l1", "bridge")
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: record[key] for key in kept if key in record} for record in records]


def show_table(console: Console, report: RunReport) -> None:
    """Print the four models and the share of the accuracy gain recovered."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0))
    for heading in _COLUMNS:
        justify: Any = "left" if heading == "model" else "right"
        table.add_column(heading, justify=justify, no_wrap=True)
    for model in report.models:
        faithfulness, reasoning = model.faithfulness, model.reasoning
        l0 = faithfulness.mean_l0
        table.add_row(
            model.name,
            f"{faithfulness.kl:.4f}",
            f"{faithfulness.mean_nmse:.4f}",
            f"{100 * faithfulness.agreement:.1f}",
            "–" if l0 is None else f"{l0:.1f}",
            "–" if l0 is None else f"{100 * l0 / report.num_features:.2f}",
            f"{100 * reasoning.accuracy:.1f} ± {100 * reasoning.accuracy_se:.1f}",
            f"{reasoning.mean_length:.1f}",
            f"{reasoning.waits_per_response:.2f}",
            style="bold" if model.name == "adapter" else None,
        )
    console.print(table)
    if math.isfinite(report.accuracy_recovered):
        recovered = (
            f"{100 * report.accuracy_recovered:.1f} ± {100 * report.accuracy_recovered_se():.1f} %"
        )
    else:
        recovered = "undefined, the target is no better than the base"
    console.print(
        f"Accuracy recovered, (adapter - base) / (target - base): {recovered}\n"
        f"Response length over the target's: {report.length_ratio:.2f}\n"
        f"Time: {report.seconds['total']:.0f} s",
        highlight=False,
    )


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = time.perf_counter() - started

"""`tca-fast plan CONFIG.yaml --gpus 8 --gpu h100-80gb`: what a run needs, before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from tca_fast.errors import UserError

if TYPE_CHECKING:
    from tca_fast.config import TrainConfig
    from tca_fast.planning.plan import Planner, Workload
    from tca_fast.planning.shapes import ModelShape

_SCALES = (1, 8, 16, 64, 256, 1024)
_RESULTS = "benchmarks/results/*.json"


def plan(
    config: Annotated[Path, typer.Argument(help="YAML file, such as configs/r1_distill_7b.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="block.key=value, winning over the file.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of a node.")] = 8,
    gpu: Annotated[str, typer.Option(help="Kind of GPU, such as h100-80gb.")] = "h100-80gb",
    nodes: Annotated[int, typer.Option(min=1, help="Nodes.")] = 1,
    sequences: Annotated[
        int | None, typer.Option(min=1, help="Sequences of the data, where they are not local.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=2, help="Mean tokens of a sequence; default data.max_length.")
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(help="name=number,… of config.json, where the models are not at hand."),
    ] = None,
    results: Annotated[
        list[Path] | None, typer.Option(help="Results of benchmarks.step with measured rates.")
    ] = None,
    network: Annotated[
        float | None, typer.Option(min=0.1, help="GB/s from one GPU to another node.")
    ] = None,
) -> None:
    """Print memory by part, the stage that fits, time and GPU-hours; status 1 if nothing fits."""
    from dataclasses import replace

    from tca_fast.config import load_config
    from tca_fast.planning.devices import find_device, step_rate
    from tca_fast.planning.plan import Planner

    loaded = load_config(config, overrides or [])
    device = replace(find_device(gpu), per_node=gpus)
    if network is not None:
        device = replace(device, network_bandwidth=network * 1e9)
    files = list(results) if results else sorted(Path().glob(_RESULTS))
    for path in results or []:
        if not path.exists():
            raise UserError(f"--results: {path} does not exist; give a file of benchmarks.step")
    planner = Planner(
        loaded,
        _shape(loaded, shape),
        device,
        step_rate(device, files),
        _workload(loaded, sequences, tokens),
    )
    console = Console(highlight=False)
    _show_heading(console, planner, gpus * nodes, nodes)
    _show_memory(console, planner, gpus * nodes)
    if not _show_choice(console, planner, gpus * nodes):
        raise typer.Exit(1)
    _show_scaling(console, planner, gpus * nodes)


def _shape(config: TrainConfig, given: str | None) -> ModelShape:
    from tca_fast.planning.shapes import ModelShape, read_shape

    if given is None:
        return read_shape(config.pair.target, "pair.target", config.pair.target_revision)
    numbers = {}
    for setting in given.split(","):
        name, _, value = setting.partition("=")
        try:
            numbers[name.strip()] = int(value)
        except ValueError:
            raise UserError(
                f"--shape: {setting!r} is not name=number; write for example "
                "hidden_size=3584,intermediate_size=18944,num_hidden_layers=28,…"
            ) from None
    return ModelShape.from_config(numbers, "--shape", "--shape")


def _workload(config: TrainConfig, sequences: int | None, tokens: int | None) -> Workload:
    from tca_fast.planning.plan import KNOWN_DATA, Workload

    source = config.data.train
    if sequences is None:
        sequences = KNOWN_DATA.get(source)
    if sequences is None and Path(source).is_file():
        with Path(source).open("rb") as lines:
            sequences = sum(1 for line in lines if line.strip())
    if sequences is None:
        raise UserError(
            f"data.train: {source!r} is not on this machine, so its sequences cannot be counted; "
            "give --sequences"
        )
    if tokens is not None and tokens > config.data.max_length:
        raise UserError(
            f"--tokens: {tokens} exceeds data.max_length={config.data.max_length}; lower it"
        )
    most = config.data.max_length
    return Workload(sequences, tokens or most, tokens is None, config.run.num_epochs)


def _show_heading(console: Console, planner: Planner, num_ranks: int, nodes: int) -> None:
    shape, workload = planner.shape, planner.workload
    rows, asked = planner.rows_per_step(num_ranks), planner.config.run.rows_per_step
    where = f"{num_ranks} x {planner.device.name}" + (f" on {nodes} nodes" if nodes > 1 else "")
    console.print(
        f"{where}; {shape.num_hidden_layers} layers of width {shape.hidden_size}, "
        f"{shape.parameters / 1e9:.2f} G parameters a model (shapes from {shape.source})"
    )
    bound = " at most; times take all for that long, --tokens gives the mean"
    console.print(
        f"{workload.sequences:,} sequences of {workload.tokens:,} tokens"
        f"{bound if workload.is_bound else ''}"
    )
    if rows != asked:
        row = planner.row_tokens
        field, unit, size = ("tokens", "tokens", row) if row else ("size", "sequences", 1)
        console.print(
            f"{num_ranks} GPUs take {rows * size} {unit} a step; set "
            f"run.train_batch_{field}={rows * size} (now {asked * size})"
        )
    console.print(f"rates: {planner.rate.source}")


def _show_memory(console: Console, planner: Planner, num_ranks: int) -> None:
    from tca_fast.planning.devices import GIB

    stages = planner.stages(num_ranks)
    variants = [(stage, kept) for stage in stages for kept in (False, True)]
    plans = [planner.memory(stage, num_ranks, checkpointing=kept) for stage, kept in variants]
    table = Table(box=box.SIMPLE_HEAD, title="GiB per GPU at the fullest moment of a step")
    table.add_column("")
    for stage, kept in variants:
        name = "one process" if stage is None else f"ZeRO-{stage}"
        table.add_column(name + ("\ncheckpointing" if kept else "\n"), justify="right")
    for part in plans[0].parts:
        if any(one.parts[part] for one in plans):
            table.add_row(part, *(f"{one.parts[part] / GIB:.1f}" for one in plans))
    table.add_section()
    total = [f"{one.peak / GIB:.1f}" for one in plans]
    table.add_row("together", *total, style="bold")
    verdicts = ["fits" if planner.fits(one) else "does not fit" for one in plans]
    table.add_row(f"of {planner.available / GIB:.1f} that can be used", *verdicts)
    budgets = [
        planner.rows * planner.most_tokens(stage, num_ranks, checkpointing=kept)
        for stage, kept in variants
    ]
    table.add_row("largest token budget of a GPU", *(f"{budget:,}" for budget in budgets))
    console.print(table)


def _show_choice(console: Console, planner: Planner, num_ranks: int) -> bool:
    """Say what to take; returns whether anything fits."""
    try:
        stage, checkpointing = planner.cheapest(num_ranks)
    except LookupError:
        console.print(
            "nothing fits: lower data.max_length or run.per_device_train_batch_size, or take GPUs "
            "with more memory",
            style="red",
        )
        return False
    name = "one process" if stage is None else f"ZeRO-{stage} (configs/zero{stage}.json)"
    setting = f"objective.gradient_checkpointing={str(checkpointing).lower()}"
    console.print(f"cheapest that fits: {name} with {setting}")
    return True


def _show_scaling(console: Console, planner: Planner, num_ranks: int) -> None:
    table = Table(box=box.SIMPLE_HEAD, title="Time for all data")
    headings = (
        "GPUs",
        "stage",
        "recomputes",
        "batch",
        "s/step",
        "of it sending",
        "days",
        "GPU-hours",
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    for stage, checkpointing, scale in planner.scales(_ranks(num_ranks)):
        table.add_row(
            f"{scale.num_ranks:,}",
            "-" if stage is None else str(stage),
            "yes" if checkpointing else "no",
            f"{scale.batch_size:,}",
            f"{scale.step.total:.2f}",
            f"{100 * (1 - scale.efficiency):.0f} %",
            f"{scale.days:.2f}",
            f"{scale.gpu_hours:,.0f}",
            style="bold" if scale.num_ranks == num_ranks else None,
        )
    console.print(table)


def _ranks(num_ranks: int) -> Sequence[int]:
    return sorted({*_SCALES, num_ranks})

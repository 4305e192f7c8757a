"""`tca-fast convert IN OUT --to FORMAT`: adapters from one format to another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from tca_fast.formats.adapter_set import Placement
    from tca_fast.formats.conversion import Conversion

# A report is also read in a pipe or a CI log, where a table cut to 80 columns loses its names.
_WIDTH = 200
_TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec")


def convert(
    source: Annotated[
        Path,
        typer.Argument(metavar="IN", help="Adapters in any format.", show_default=False),
    ],
    destination: Annotated[
        Path, typer.Argument(metavar="OUT", help="Directory to write.", show_default=False)
    ],
    to: Annotated[
        str,
        typer.Option(help="tca_fast, paper, circuit-tracer, saelens or sparsify."),
    ],
    base: Annotated[
        str | None, typer.Option(help="Model that gave the MLPs: directory or hub id.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Fine-tuned model: directory or hub id.")
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(help="Which of them the adapters stand in, where IN does not say: target."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be written, and write nothing.")
    ] = False,
) -> None:
    """Print which tensor becomes which and what is lost, then write and read back.

    Raises:
        UserError: IN is in no format that is read, the other format cannot hold it, or OUT is no
            place for it.
    """
    from tca_fast.formats import conversion

    plan = conversion.prepare(source, to, base=base, target=target, backbone=backbone)
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    console.print(_table(plan))
    for note in (*plan.adapters.notes, *plan.export.notes):
        console.print(Text(f"note: {note}"), soft_wrap=True)
    conversion.check_destination(plan, destination)
    if dry_run:
        console.print(Text(f"nothing was written; without --dry-run it goes to {destination}"))
        return
    conversion.convert(plan, destination)
    console.print(Text(f"written and read back: {destination}"), style="green")


def _table(plan: Conversion) -> Table:
    """One row per tensor of layer 0; the other layers are placed alike."""
    info = plan.adapters.info
    table = Table(
        box=box.SIMPLE,
        title=f"{plan.source} to {plan.destination}: layers 0 to {info.num_layers - 1}, "
        f"{info.adapter.activation}{'' if info.adapter.k is None else f' k={info.adapter.k}'}, "
        f"{info.dtype}; layer 0 is shown",
        title_justify="left",
    )
    for heading in ("ours", "read from", "shape", "written to", "shape", "as"):
        table.add_column(heading, overflow="fold")
    read = {placement.name: placement for placement in plan.adapters.placements(0)}
    written = {placement.name: placement for placement in plan.export.placements(0)}
    shapes = plan.adapters.shapes()
    for name in _TENSORS:
        if name not in read and name not in written:
            continue
        here, there = read.get(name), written.get(name)
        shape = shapes.get(name, (info.hidden_size,))
        orientation = "as is"
        if here is None:
            orientation = "zeros"
        elif there and here.transposed != there.transposed:
            orientation = "transposed"
        table.add_row(
            name,
            f"{here.file}: {here.key}" if here else "",
            str(_stored(shape, here)) if here else "",
            f"{there.file}: {there.key}" if there else "",
            str(_stored(shape, there)) if there else "",
            orientation,
        )
    return table


def _stored(shape: tuple[int, ...], placement: Placement) -> list[int]:
    return list(reversed(shape)) if placement.transposed else list(shape)

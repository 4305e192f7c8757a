"""`tca-fast push DIR REPO` and `tca-fast pull REPO DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Repo = Annotated[str, typer.Argument(help="owner/name on the hub.", show_default=False)]


def push(
    directory: Annotated[
        Path, typer.Argument(help="A run's output directory, or an adapter.", show_default=False)
    ],
    repo: Repo,
    base: Annotated[str | None, typer.Option(help="Name of the base model for others.")] = None,
    target: Annotated[str | None, typer.Option(help="Name of the target for others.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make it private.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Add a commit to a repository that exists.")
    ] = False,
) -> None:
    """Publish adapters; prints the address of the commit."""
    from tca_fast.hub import transfer

    address = transfer.push(
        directory, repo, base=base, target=target, private=private, overwrite=overwrite
    )
    typer.echo(address)


def pull(
    repo: Repo,
    directory: Annotated[Path, typer.Argument(help="Where to put them.", show_default=False)],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
) -> None:
    """Fetch adapters; prints the directory."""
    from tca_fast.hub import transfer

    typer.echo(transfer.pull(repo, directory, revision=revision))

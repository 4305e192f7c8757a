"""The checkpoints of a run: which there are, which are whole, and which may go.

A directory called `step_*` has been renamed to that name after everything in it was flushed and
read back. What a disk does to it afterwards is found out by its manifest before it is used.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from tca_fast.errors import UserError
from tca_fast.training.manifest import MANIFEST_NAME, what_is_wrong

if TYPE_CHECKING:
    from tca_fast.training.engine import Engine

LATEST = "latest"
_STEP_NAME = re.compile(r"step_(\d{6,})")


def checkpoints(output_dir: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    directory = output_dir / "checkpoints"
    if not directory.is_dir():
        return []
    finished = [path for path in directory.iterdir() if _STEP_NAME.fullmatch(path.name)]
    return sorted(finished, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Optimizer steps done when a checkpoint was written, by its name."""
    return int(checkpoint.name.removeprefix("step_"))


def candidates(name: str, output_dir: Path) -> list[Path]:
    """The checkpoints that `run.resume_from_checkpoint` may mean, best first.

    Raises:
        UserError: there is none.
    """
    if name == LATEST:
        found = checkpoints(output_dir)[::-1]
        if not found:
            raise UserError(
                f"run.resume_from_checkpoint: 'latest', but {output_dir / 'checkpoints'} holds no "
                "checkpoint; leave the field out to start afresh"
            )
        return found
    path = Path(name)
    if not (path / MANIFEST_NAME).is_file():
        raise UserError(
            f"run.resume_from_checkpoint: {name} is not a checkpoint (no {MANIFEST_NAME} in it); "
            "give a directory such as checkpoints/step_000100, or 'latest'"
        )
    return [path]


def newest_whole(name: str, output_dir: Path, engine: Engine) -> tuple[Path, dict[Path, str]]:
    """The checkpoint to resume from; called on every rank, which share the reading.

    Args:
        name: a directory, or "latest" for the newest whole one in `output_dir`.
        output_dir: of the run.
        engine: of this rank.

    Returns:
        The checkpoint, and why each newer one was skipped.

    Raises:
        UserError: on every rank, when none is whole.
    """
    # What rank 0 sees counts, so that all ranks look at the same checkpoints in the same order.
    names = engine.gather_text(json.dumps([str(path) for path in candidates(name, output_dir)]))[0]
    skipped: dict[Path, str] = {}
    for path in map(Path, json.loads(names)):
        reports = engine.gather_text(what_is_wrong(path, engine.rank, engine.num_ranks))
        reason = next((report for report in reports if report), "")
        if not reason:
            return path, skipped
        skipped[path] = reason
    first = next(iter(skipped.values()))
    raise UserError(
        f"run.resume_from_checkpoint: {name!r}, but of {len(skipped)} checkpoint(s) none is whole "
        f"({first}); copy one back from elsewhere, or start afresh in another output_dir"
    )


def clear_unfinished(output_dir: Path) -> None:
    """Remove what a killed job left of checkpoints that it was writing or removing."""
    directory = output_dir / "checkpoints"
    for path in (*directory.glob(".step_*.tmp"), *directory.glob(".leaving_*.tmp")):
        shutil.rmtree(path)


def set_aside(checkpoint: Path, label: str) -> Path:
    """Rename a checkpoint to `{label}_step_N`, which nothing resumes from or counts.

    Returns:
        Where it is now.
    """
    name, number = f"{label}_{checkpoint.name}", 1
    while checkpoint.with_name(name).exists():
        number += 1
        name = f"{label}_{checkpoint.name}_{number}"
    return checkpoint.rename(checkpoint.with_name(name))


def set_aside_later(output_dir: Path, step: int) -> None:
    """Set checkpoints of steps after `step` aside, which are about to be trained again.

    Their weights belong to another continuation than the one that starts now: they must not be
    taken for its "latest", nor push its own out of `run.save_total_limit`.
    """
    for path in checkpoints(output_dir):
        if step_of(path) > step:
            set_aside(path, "superseded")


def move_into_place(temporary: Path, final: Path) -> None:
    """Rename a finished checkpoint; one of the same step gives way, but not before."""
    old = set_aside(final, "superseded") if final.exists() else None
    temporary.rename(final)
    flush(final.parent)
    if old is not None:
        _remove(old)


def remove_old(output_dir: Path, limit: int) -> None:
    """Remove the oldest checkpoints of a run beyond `limit`."""
    for path in checkpoints(output_dir)[:-limit]:
        _remove(path)


def _remove(path: Path) -> None:
    """Remove a checkpoint, which loses its name before its first file."""
    leaving = path.with_name(f".leaving_{path.name}.tmp")
    if leaving.exists():
        shutil.rmtree(leaving)
    path.rename(leaving)
    shutil.rmtree(leaving)


def flush_tree(directory: Path) -> None:
    """Flush every file and directory below `directory` to the disk."""
    for root, _, names in os.walk(directory):
        for path in (*(Path(root) / name for name in names), Path(root)):
            flush(path)


def flush(path: Path) -> None:
    """Flush one file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

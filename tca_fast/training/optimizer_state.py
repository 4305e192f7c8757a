"""AdamW's moments on disk, in a form that any engine and any number of ranks can load.

    optimizer/part_00000.safetensors    step: float32 [], optimizer steps done
                                        {parameter}/{moment}/{offset}: float32 [n]

Every rank writes the stretches of the flattened parameters whose moments it keeps, so nothing is
gathered and all ranks write at once. `parameter` is the name in the adapter file, `moment` is
exp_avg or exp_avg_sq, and `offset` the place of the stretch's first element. Together the parts
hold every element of every parameter exactly once; reading takes from them what a rank keeps now.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tca_fast.durable import Replacement
from tca_fast.errors import UserError
from tca_fast.formats.tensor_files import Entry, Header, read_headers, write_tensors

MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = "step"


class Fragment(NamedTuple):
    """A stretch of one flattened parameter that this rank's optimizer updates.

    Attributes:
        parameter: name in the adapter file.
        offset: of the first element in the flattened parameter.
        weights: float32 `[n]`, a view of the master weights.
        holder: the tensor that the optimizer was given, which contains them.
        start: of the first element in the flattened `holder`.
    """

    parameter: str
    offset: int
    weights: Tensor
    holder: Tensor
    start: int

    def moment(self, optimizer: torch.optim.Optimizer, name: str) -> Tensor:
        """View `[n]` of a moment; the optimizer must have state for the holder."""
        state = optimizer.state[self.holder][name].view(-1)
        return state[self.start : self.start + self.weights.numel()]


def part_name(rank: int) -> str:
    """Path of a rank's part inside a checkpoint."""
    return f"optimizer/part_{rank:05d}.safetensors"


def is_part(name: str) -> bool:
    """Whether a path inside a checkpoint is a part."""
    return name.startswith("optimizer/part_")


def write_part(
    directory: Path, rank: int, optimizer: torch.optim.Optimizer, fragments: Sequence[Fragment]
) -> None:
    """Write the moments of some fragments, one tensor in memory at a time.

    Raises:
        UserError: the file cannot be written or reads back otherwise.
    """
    entries, step = [], torch.zeros(())
    for fragment in fragments:
        state = optimizer.state.get(fragment.holder)
        if not state:
            continue
        step = state[STEP]
        for name in MOMENTS:
            entries.append(
                Entry(
                    f"{fragment.parameter}/{name}/{fragment.offset}",
                    Header((fragment.weights.numel(),), "F32"),
                    partial(fragment.moment, optimizer, name),
                )
            )
    entries.append(Entry(STEP, Header((), "F32"), lambda: step))
    path = directory / part_name(rank)
    with Replacement(path.parent) as files:
        files.write(path.name, lambda temporary: write_tensors(temporary, entries))
        files.commit()


def read_parts(
    paths: Sequence[Path],
    sizes: Mapping[str, int],
    optimizer: torch.optim.Optimizer,
    fragments: Sequence[Fragment],
) -> None:
    """Fill the optimizer's state for `fragments`.

    Args:
        paths: every part of a checkpoint, of whatever number of ranks.
        sizes: elements of every trained parameter.
        optimizer: its state is replaced.
        fragments: of this rank.

    Raises:
        UserError: a part is unreadable, or the parts do not hold every element exactly once.
    """
    pieces = _index(paths, sizes)
    with contextlib.ExitStack() as stack:
        files = {path: stack.enter_context(_opened(path)) for path in paths}
        steps = {float(file.get_tensor(STEP)) for file in files.values()}
        if len(steps) != 1:
            raise UserError(f"{paths[0].parent}: the parts are of different steps {sorted(steps)}")
        (step,) = steps
        optimizer.state.clear()
        if step == 0:
            return
        for fragment in fragments:
            if fragment.holder not in optimizer.state:
                optimizer.state[fragment.holder] = _fresh_state(fragment.holder, step)
            for name in MOMENTS:
                target = fragment.moment(optimizer, name)
                for piece in pieces.get((fragment.parameter, name), []):
                    _copy_overlap(target, fragment.offset, piece, files[piece.path])


class _Piece(NamedTuple):
    offset: int
    numel: int
    path: Path
    key: str


def _index(paths: Sequence[Path], sizes: Mapping[str, int]) -> dict[tuple[str, str], list[_Piece]]:
    """Where the stretches of every moment are, after checking that nothing lacks or overlaps."""
    pieces: dict[tuple[str, str], list[_Piece]] = {}
    for path in paths:
        headers = read_headers(path)
        if headers.pop(STEP, None) != Header((), "F32"):
            raise UserError(f"{path}: does not say its step; resume from another checkpoint")
        for key, header in headers.items():
            parameter, _, rest = key.partition("/")
            moment, _, offset = rest.partition("/")
            if (
                parameter not in sizes
                or moment not in MOMENTS
                or not offset.isdecimal()
                or header.code != "F32"
                or len(header.shape) != 1
            ):
                raise UserError(
                    f"{path}: {key} {list(header.shape)} {header.dtype} is no moment of these "
                    "adapters; resume from a checkpoint of this run"
                )
            piece = _Piece(int(offset), header.shape[0], path, key)
            pieces.setdefault((parameter, moment), []).append(piece)
    if not pieces:
        return pieces
    for parameter, size in sizes.items():
        for moment in MOMENTS:
            end = 0
            for piece in sorted(pieces.get((parameter, moment), [])):
                if piece.offset != end:
                    break
                end += piece.numel
            else:
                if end == size:
                    continue
            raise UserError(
                f"{paths[0].parent}: {moment} of {parameter} is not there once and whole; resume "
                "from another checkpoint"
            )
    return pieces


def _fresh_state(holder: Tensor, step: float) -> dict[str, Tensor]:
    state = {name: torch.zeros_like(holder, requires_grad=False) for name in MOMENTS}
    return {STEP: torch.tensor(step, dtype=torch.float32, device=holder.device), **state}


def _copy_overlap(target: Tensor, offset: int, piece: _Piece, file: Any) -> None:
    """Copy what a piece has of `target`, whose first element is element `offset`."""
    start = max(offset, piece.offset)
    end = min(offset + target.numel(), piece.offset + piece.numel)
    if start < end:
        found = file.get_slice(piece.key)[start - piece.offset : end - piece.offset]
        target[start - offset : end - offset].copy_(found)


def _opened(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: not a whole safetensors file ({error}); resume from another checkpoint"
        ) from None

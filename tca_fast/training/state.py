"""What a run is on disk, and how it goes on from there.

    output_dir/
      config.yaml                 the configuration as run
      log.jsonl                   one line per logged step or validation
      adapter/                    the trained adapters, once training is done
      checkpoints/step_000123/    a resumable state after 123 optimizer steps
        training_state.json       position, counts, seed and the configuration it belongs to
        feature_ages.safetensors  int64 [L, F], real tokens since each feature last fired
        adapter/                  the adapters, loadable on their own
        optimizer.safetensors     AdamW moments, or deepspeed/ with DeepSpeed's own shards

A checkpoint is written under a temporary name, flushed, read back and renamed, so a directory
called `step_*` is always whole. Data order and cutoffs are functions of (seed, step), so no
generator needs saving.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tca_fast.checkpoint import Provenance
from tca_fast.config import TrainConfig
from tca_fast.durable import Replacement
from tca_fast.errors import UserError
from tca_fast.sparsity import FeatureAges

if TYPE_CHECKING:
    from tca_fast.attachment import AdaptedModel
    from tca_fast.training.engine import Engine

STATE_NAME = "training_state.json"
AGES_NAME = "feature_ages.safetensors"
ADAPTER_NAME = "adapter"
FORMAT_VERSION = 1

_STEP_NAME = re.compile(r"step_(\d{6,})")
# Fields that change what the remaining steps compute; the others (paths, logging, learning rate,
# more epochs) are the user's to change between runs.
_FIXED_BLOCKS = ("pair", "adapter")
_FIXED_FIELDS = (
    "data.format",
    "data.max_length",
    "data.truncate",
    "data.loss_on_prompt",
    "data.append_eos",
    "run.seed",
    "run.train_batch_size",
)


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: optimizer steps done.
        total_steps: steps of the run, the length of the schedule.
        data_digest: of the training file; sequences are found by their place in it.
        tokens_seen: real tokens trained on.
        sequences_seen: sequences trained on.
        run_id: name of the run for loggers, kept over resumes.
        engine: "local", or "deepspeed stage=2 ranks=2".
    """

    step: int
    total_steps: int
    data_digest: str
    tokens_seen: int
    sequences_seen: int
    run_id: str
    engine: str


def checkpoints(output_dir: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    directory = output_dir / "checkpoints"
    if not directory.is_dir():
        return []
    whole = [path for path in directory.iterdir() if _STEP_NAME.fullmatch(path.name)]
    return sorted(whole, key=lambda path: int(path.name.removeprefix("step_")))


def find_checkpoint(name: str, output_dir: Path) -> Path:
    """The checkpoint that `run.resume_from_checkpoint` means.

    Raises:
        UserError: there is none.
    """
    if name == "latest":
        whole = checkpoints(output_dir)
        if not whole:
            raise UserError(
                f"run.resume_from_checkpoint: 'latest', but {output_dir / 'checkpoints'} holds no "
                "checkpoint; leave the field out to start afresh"
            )
        return whole[-1]
    path = Path(name)
    if not (path / STATE_NAME).is_file():
        raise UserError(
            f"run.resume_from_checkpoint: {name} is not a checkpoint (no {STATE_NAME} in it); give "
            "a directory such as checkpoints/step_000100, or 'latest'"
        )
    return path


def clear_unfinished(output_dir: Path) -> None:
    """Remove what a killed job left of a checkpoint it was writing."""
    for path in (output_dir / "checkpoints").glob(".step_*.tmp"):
        shutil.rmtree(path)


def set_aside_later(output_dir: Path, step: int) -> None:
    """Rename checkpoints of steps after `step`, which are about to be trained again.

    Their weights belong to another continuation than the one that starts now: they must not be
    taken for its "latest", nor push its own out of `run.save_total_limit`.
    """
    for path in checkpoints(output_dir):
        if int(path.name.removeprefix("step_")) > step:
            name, number = f"superseded_{path.name}", 1
            while path.with_name(name).exists():
                number += 1
                name = f"superseded_{path.name}_{number}"
            path.rename(path.with_name(name))


def save_checkpoint(
    output_dir: Path,
    config: TrainConfig,
    engine: Engine,
    adapted: AdaptedModel,
    provenance: Provenance,
    ages: FeatureAges,
    progress: Progress,
) -> Path:
    """Write `checkpoints/step_N`, whole or not at all; called on every rank.

    Older checkpoints beyond `run.save_total_limit` are removed afterwards.

    Raises:
        UserError: on every rank, when it cannot be written (full disk, no permission). Nothing of
            it is left then, and earlier checkpoints are untouched.
    """
    directory = output_dir / "checkpoints"
    final = directory / f"step_{progress.step:06d}"
    temporary = directory / f".{final.name}.tmp"
    with _saving(engine, temporary, progress.step):
        if engine.rank == 0:
            _clear(temporary)
            with Replacement(temporary) as files:
                files.write(AGES_NAME, lambda path: _write_tensors(path, {"tokens": ages.tokens}))
                files.commit()
    with _saving(engine, temporary, progress.step):
        engine.save_state(temporary)
    with _saving(engine, temporary, progress.step), engine.gathered():
        if engine.rank == 0:
            adapted.save_pretrained(temporary / ADAPTER_NAME, provenance)
            _write_state(temporary, config, progress)
            flush_tree(temporary)
            _replace_directory(temporary, final)
            for old in checkpoints(output_dir)[: -config.run.save_total_limit]:
                shutil.rmtree(old)
    return final


def save_adapter(
    directory: Path, engine: Engine, adapted: AdaptedModel, provenance: Provenance
) -> None:
    """Write the adapters alone; called on every rank.

    Raises:
        UserError: on every rank, when they cannot be written.
    """
    with together(engine), engine.gathered():
        if engine.rank == 0:
            adapted.save_pretrained(directory, provenance)


@contextlib.contextmanager
def together(engine: Engine) -> Iterator[None]:
    """Turn a failure on any rank into the same UserError on all of them."""
    complaint = ""
    try:
        yield
    except (UserError, OSError) as error:
        complaint = str(error) or type(error).__name__
    for text in engine.gather_text(complaint):
        if text:
            raise UserError(text)


@contextlib.contextmanager
def _saving(engine: Engine, temporary: Path, step: int) -> Iterator[None]:
    """Leave nothing of a checkpoint behind that could not be written whole."""
    try:
        with together(engine):
            yield
    except UserError as error:
        if engine.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"checkpoint: step {step} could not be saved ({error}); earlier checkpoints are whole: "
            "make room, then resume with run.resume_from_checkpoint=latest"
        ) from None


def _write_state(temporary: Path, config: TrainConfig, progress: Progress) -> None:
    record = {
        "format_version": FORMAT_VERSION,
        **asdict(progress),
        "config": config.model_dump(mode="json"),
    }
    with Replacement(temporary) as files:
        files.write(STATE_NAME, lambda path: _write_json(path, record))
        files.commit()


def _write_json(path: Path, record: dict[str, Any]) -> None:
    text = json.dumps(record, indent=2) + "\n"
    path.write_text(text, encoding="utf-8")
    if json.loads(path.read_text(encoding="utf-8")) != record:
        raise UserError(f"{path}: reads back otherwise than written; check the disk")


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file and compare what it reads back."""
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    written = load_file(path)
    if written.keys() != tensors.keys() or any(
        written[name].shape != tensor.shape or written[name].dtype != tensor.dtype
        for name, tensor in tensors.items()
    ):
        raise UserError(f"{path}: reads back otherwise than written; check the disk")


def write_tensor_file(directory: Path, name: str, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors as `directory/name` in safetensors, read back before they replace the old.

    Raises:
        UserError: the file cannot be written or reads back otherwise.
    """
    with Replacement(directory) as files:
        files.write(name, lambda path: _write_tensors(path, tensors))
        files.commit()


def read_tensor_file(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file of a checkpoint.

    Raises:
        UserError: missing, truncated or foreign.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: not a whole safetensors file ({error}); resume from another checkpoint"
        ) from None


def flush_tree(directory: Path) -> None:
    """Flush every file and directory below `directory` to the disk."""
    for root, _, names in os.walk(directory):
        for path in (*(Path(root) / name for name in names), Path(root)):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _replace_directory(temporary: Path, final: Path) -> None:
    """Rename into place; a checkpoint of the same step (a step trained again) gives way."""
    if final.exists():
        stale = final.with_name(f".{final.name}.old.tmp")
        _clear(stale)
        final.rename(stale)
        temporary.rename(final)
        shutil.rmtree(stale)
    else:
        temporary.rename(final)
    descriptor = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _clear(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)


def read_progress(checkpoint: Path, config: TrainConfig, data_digest: str, engine: str) -> Progress:
    """Read where a checkpoint stands, after checking that it belongs to this run.

    Raises:
        UserError: unreadable, of a newer format, or of another pair, adapter shape, data or
            engine; the message names the field and both values.
    """
    path = checkpoint / STATE_NAME
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        saved = record["config"]
        if record["format_version"] > FORMAT_VERSION:
            raise UserError(
                f"{path}: format_version {record['format_version']} is newer than "
                f"{FORMAT_VERSION}; upgrade tca_fast"
            )
        progress = Progress(**{name: record[name] for name in Progress.__dataclass_fields__})
        for field, theirs, ours in _fixed_fields(saved, config.model_dump(mode="json")):
            if theirs != ours:
                raise _mismatch(checkpoint, field, theirs, ours)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path}: not a readable training state ({error}); resume from another checkpoint"
        ) from None
    for field, theirs, ours in (
        ("data.train: contents (sha256)", progress.data_digest, data_digest),
        ("engine", progress.engine, engine),
    ):
        if theirs != ours:
            raise _mismatch(checkpoint, field, theirs, ours)
    return progress


def _fixed_fields(saved: dict[str, Any], current: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for block in _FIXED_BLOCKS:
        for key in current[block]:
            yield f"{block}.{key}", saved[block].get(key), current[block][key]
    for field in _FIXED_FIELDS:
        block, key = field.split(".")
        yield field, saved[block].get(key), current[block][key]


def _mismatch(checkpoint: Path, field: str, saved: object, current: object) -> UserError:
    return UserError(
        f"{field}: {checkpoint} was made with {saved!r}, this run has {current!r}; use the same "
        "value, or start afresh in another output_dir"
    )


def load_ages(checkpoint: Path, ages: FeatureAges) -> None:
    """Read the dead-feature counters of a checkpoint into `ages`.

    Raises:
        UserError: missing or of another shape.
    """
    path = checkpoint / AGES_NAME
    tokens = read_tensor_file(path).get("tokens")
    if tokens is None or tokens.shape != ages.tokens.shape:
        raise UserError(f"{path}: does not hold the counters of this run; use another checkpoint")
    ages.tokens.copy_(tokens)

"""What a run is on disk, and how it goes on from there.

    output_dir/
      config.yaml                 the configuration as run
      log.jsonl                   one line per logged step or validation
      .lock                       held by the run that writes here, see `claim`
      adapter/                    the trained adapters, once training is done
      checkpoints/step_000123/    a resumable state after 123 optimizer steps
        manifest.json             size and SHA-256 digest of every file below
        training_state.json       position, counts, seed and the configuration it belongs to
        feature_ages.safetensors  int64 [L, F], real tokens since each feature last fired
        adapter/                  the adapters in float32, loadable on their own
        optimizer/part_*          AdamW moments, one part from every rank

A checkpoint is written under a temporary name beside the earlier ones, flushed, read back from the
disk, and only then renamed. Any engine with any number of ranks resumes from it. Data order and
cutoffs are functions of (seed, step), so no generator needs saving. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tca_fast.adapter_config import Provenance
from tca_fast.config import TrainConfig
from tca_fast.durable import Replacement
from tca_fast.errors import UserError
from tca_fast.formats.tensor_files import Entry, Header, read_headers, read_tensor, write_tensors
from tca_fast.sparsity import FeatureAges
from tca_fast.training.checkpoints import flush_tree, move_into_place, remove_old
from tca_fast.training.manifest import file_record, write_manifest
from tca_fast.training.optimizer_state import part_name

if TYPE_CHECKING:
    from tca_fast.adapted_model import AdaptedModel
    from tca_fast.training.engine import Engine

STATE_NAME = "training_state.json"
AGES_NAME = "feature_ages.safetensors"
ADAPTER_NAME = "adapter"
FORMAT_VERSION = 3

# Fields that change what the remaining steps compute; the others (paths, logging, learning rate,
# more epochs) are the user's to change between runs.
_FIXED_BLOCKS = ("pair", "adapter")
# Names, which may change where the models are the same.
_MODEL_FIELDS = ("pair.base", "pair.base_revision", "pair.target", "pair.target_revision")
_FIXED_FIELDS = (
    "data.format",
    "data.max_length",
    "data.truncate",
    "data.loss_on_prompt",
    "data.append_eos",
    "run.seed",
    "run.train_batch_size",
    "run.train_batch_tokens",
    "run.per_device_train_batch_tokens",
)


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: optimizer steps done.
        total_steps: steps of the run, the length of the schedule.
        data_digest: of the training file; sequences are found by their place in it.
        models_digest: of both models, see `identity.models_digest`.
        tokens_seen: real tokens trained on.
        sequences_seen: sequences trained on.
        run_id: name of the run for loggers, kept over resumes.
        engine: "local", or "deepspeed stage=2 ranks=2".
    """

    step: int
    total_steps: int
    data_digest: str
    models_digest: str
    tokens_seen: int
    sequences_seen: int
    run_id: str
    engine: str


class NotSaved(UserError):
    """A checkpoint could not be written; nothing of it is left and earlier ones are untouched."""


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
        NotSaved: on every rank, when it cannot be written (full disk, no permission). Nothing of
            it is left then, and earlier checkpoints are untouched.
    """
    directory = output_dir / "checkpoints"
    final = directory / f"step_{progress.step:06d}"
    temporary = directory / f".{final.name}.tmp"
    with _saving(engine, temporary, progress.step):
        if engine.rank == 0:
            if temporary.exists():
                shutil.rmtree(temporary)
            _write_ages(temporary, ages)
            _write_state(temporary, config, progress)
    with _saving(engine, temporary, progress.step), engine.gathered():
        if engine.rank == 0:
            adapted.save_pretrained(temporary / ADAPTER_NAME, provenance)
    records = {}
    with _saving(engine, temporary, progress.step):
        engine.save_state(temporary)
        records = _records(temporary, engine.rank)
    of_all_ranks = engine.gather_text(json.dumps(records))
    with _saving(engine, temporary, progress.step):
        if engine.rank == 0:
            texts = map(json.loads, of_all_ranks)
            write_manifest(temporary, {name: r for text in texts for name, r in text.items()})
            flush_tree(temporary)
            move_into_place(temporary, final)
            remove_old(output_dir, config.run.save_total_limit)
    return final


def _records(temporary: Path, rank: int) -> dict[str, dict[str, Any]]:
    """Records of the files that this rank has written; the others may still be at theirs."""
    own = temporary / part_name(rank)
    paths = [own] if own.exists() else []
    if rank == 0:
        files = (path for path in sorted(temporary.rglob("*")) if path.is_file())
        paths += [path for path in files if path.parent != own.parent]
    return {path.relative_to(temporary).as_posix(): file_record(path) for path in paths}


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
        raise NotSaved(
            f"checkpoint: step {step} could not be saved ({error}); earlier checkpoints are "
            "untouched: make room, then resume with run.resume_from_checkpoint=latest"
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


def _write_ages(temporary: Path, ages: FeatureAges) -> None:
    entry = Entry("tokens", Header(tuple(ages.tokens.shape), "I64"), lambda: ages.tokens)
    with Replacement(temporary) as files:
        files.write(AGES_NAME, lambda path: write_tensors(path, [entry]))
        files.commit()


def read_progress(
    checkpoint: Path, config: TrainConfig, data_digest: str, models_digest: str
) -> Progress:
    """Read where a checkpoint stands, after checking that it belongs to this run.

    The names of the models may differ where their weights do not.

    Raises:
        UserError: unreadable, of another format, or of another pair, adapter shape or data; the
            message names the field and both values.
    """
    path = checkpoint / STATE_NAME
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        saved = record["config"]
        if record["format_version"] != FORMAT_VERSION:
            raise UserError(
                f"{path}: format_version is {record['format_version']!r}, this tca_fast reads "
                f"{FORMAT_VERSION}; resume with the version that wrote it"
            )
        progress = _progress(record)
        for field, theirs, ours in _fixed_fields(saved, config.model_dump(mode="json")):
            moved = field in _MODEL_FIELDS and progress.models_digest == models_digest
            if theirs != ours and not moved:
                raise _mismatch(checkpoint, field, theirs, ours)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}: not a readable training state ({error}); resume from another checkpoint"
        ) from None
    if progress.models_digest != models_digest:
        field = "pair: weights of the models (hash)"
        raise _mismatch(checkpoint, field, progress.models_digest, models_digest)
    if progress.data_digest != data_digest:
        field = "data.train: contents (sha256)"
        raise _mismatch(checkpoint, field, progress.data_digest, data_digest)
    return progress


def _progress(record: dict[str, Any]) -> Progress:
    values = {field.name: record[field.name] for field in fields(Progress)}
    for field in fields(Progress):
        value = values[field.name]
        fits = isinstance(value, str) if field.type == "str" else type(value) is int and value >= 0
        if not fits:
            raise ValueError(f"{field.name} is {value!r}")
    return Progress(**values)


def _fixed_fields(saved: dict[str, Any], current: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for block in _FIXED_BLOCKS:
        for key in current[block]:
            yield f"{block}.{key}", saved[block].get(key), current[block][key]
    for field in _FIXED_FIELDS:
        block, key = field.split(".")
        yield field, saved[block].get(key), current[block][key]


def changed_settings(checkpoint: Path, config: TrainConfig) -> list[str]:
    """The settings in which a run goes on otherwise than a checkpoint was made, as text.

    They may change, but an override that was given once and forgotten would change them unnoticed.

    Args:
        checkpoint: that `read_progress` has accepted.
        config: of the run now.
    """
    saved = json.loads((checkpoint / STATE_NAME).read_text(encoding="utf-8"))["config"]
    changes = []
    for block, settings in config.model_dump(mode="json").items():
        before = saved.get(block)
        for key, now in settings.items():
            # What another version did not know has no value to compare.
            known = isinstance(before, dict) and key in before
            if known and before[key] != now and key != "resume_from_checkpoint":
                changes.append(f"{block}.{key} is {now!r}, was {before[key]!r}")
    return changes


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
    if read_headers(path) != {"tokens": Header(tuple(ages.tokens.shape), "I64")}:
        raise UserError(f"{path}: does not hold the counters of this run; use another checkpoint")
    ages.tokens.copy_(read_tensor(path, "tokens"))

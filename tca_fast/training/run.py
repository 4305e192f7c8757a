"""Everything a training run needs, put together in the order in which mistakes are cheapest."""

from __future__ import annotations

import contextlib
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from tca_fast.bridging.inputs import check_packing
from tca_fast.bridging.objective import sample_cutoffs
from tca_fast.bridging.steps import STEPS
from tca_fast.bridging.streams import load_streams, load_tokenizer
from tca_fast.config import TrainConfig, dump_config
from tca_fast.durable import Replacement
from tca_fast.errors import UserError, one_line
from tca_fast.sparsity import FeatureAges
from tca_fast.training.batches import StepBatch, check_lengths, encode_cached, make_step_batch
from tca_fast.training.checkpoints import (
    candidates,
    checkpoints,
    clear_unfinished,
    newest_whole,
    set_aside,
    set_aside_later,
)
from tca_fast.training.claim import claimed
from tca_fast.training.data import Corpus, Encoded, Encoder, open_corpus
from tca_fast.training.engine import Engine, LocalEngine
from tca_fast.training.forecast import warn_if_too_large
from tca_fast.training.identity import models_digest, provenance
from tca_fast.training.logs import RunLog, check_loggers, print_line
from tca_fast.training.origin import ORIGIN_NAME, write_origin
from tca_fast.training.pipeline import ahead, step_batches
from tca_fast.training.plans import BatchPlan, PackedPlan, Plan, deal
from tca_fast.training.state import (
    Progress,
    changed_settings,
    load_ages,
    read_progress,
    together,
)
from tca_fast.training.tokens import cache_directory, open_tokens
from tca_fast.training.trainer import Trainer, TrainResult

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tca_fast.training.deepspeed_engine import DeepSpeedGroup

CONFIG_NAME = "config.yaml"


def train(
    config: TrainConfig, deepspeed: str | Path | None = None, *, show_progress: bool = True
) -> TrainResult:
    """Train adapters as configured, or go on with a run.

    Args:
        config: the run.
        deepspeed: DeepSpeed JSON file; None trains in this process alone.
        show_progress: whether rank 0 draws a progress bar on stderr.

    Returns:
        How it ended; a run stopped by Ctrl-C or SIGTERM has saved a checkpoint and says so.

    Raises:
        UserError: any mistake in configuration, data, models or checkpoint, and a full disk.
    """
    device = resolve_device(config.run.device)
    _check_beginning(config)
    group = None
    if deepspeed is not None:
        from tca_fast.training.deepspeed_engine import DeepSpeedGroup

        group = DeepSpeedGroup(Path(deepspeed), config, device)
        device = group.device
        if group.stage == 3 and config.objective.auxk_weight:
            raise UserError(
                f"objective.auxk_weight: {config.objective.auxk_weight} reads weights that ZeRO-3 "
                "holds in parts; set it to 0, or use ZeRO-2"
            )
    with _ready_to_write(config, group):
        try:
            return _train(config, device, group, show_progress)
        except torch.OutOfMemoryError as error:
            who = f"rank {group.rank}" if group else "run"
            raise UserError(
                f"{who}: {device} has no more memory ({one_line(error)}); "
                "objective.gradient_checkpointing=true, fewer sequences or tokens per forward, or "
                "a higher ZeRO stage need less, `tca-fast plan` says how much"
            ) from None


@contextlib.contextmanager
def _ready_to_write(config: TrainConfig, group: DeepSpeedGroup | None) -> Iterator[None]:
    """Rank 0 holds the directory and has its loggers, or all ranks say why not."""
    complaint = ""
    with contextlib.ExitStack() as held:
        if group is None or group.rank == 0:
            try:
                check_loggers(config.run.report_to)
                if warning := held.enter_context(claimed(Path(config.run.output_dir))):
                    print_line(warning)
                # Again, because the run that was waited for may have left something.
                _check_beginning(config)
            except UserError as error:
                complaint = str(error)
        if group is not None:
            complaint = group.from_rank_0(complaint)
        if complaint:
            raise UserError(complaint)
        yield


def _train(
    config: TrainConfig, device: torch.device, group: DeepSpeedGroup | None, show_progress: bool
) -> TrainResult:
    partition = None
    data = _read_data(config, group.num_ranks if group else 1, show_progress)
    warn_if_too_large(
        config,
        device,
        stage=group.stage if group else None,
        num_ranks=group.num_ranks if group else 1,
        is_main=group is None or group.rank == 0,
    )
    if group and group.stage == 3:
        from tca_fast.training.partitioned_loading import Partition

        partition = Partition(group)
    streams = load_streams(
        config.pair, config.adapter, seed=config.run.seed, device=str(device), place=partition
    )
    if partition:
        partition.finish()
    # Cutoffs that do not fit the model are a mistake to report before the first step.
    sample_cutoffs(config.objective, streams.num_layers, seed=config.run.seed, step=0)
    for encoder in data.encoders.values():
        encoder.vocab_size = streams.reference.get_input_embeddings().num_embeddings
    objective = STEPS[config.objective.step](streams, config.objective)
    engine: Engine
    if group:
        from tca_fast.training.deepspeed_engine import DeepSpeedEngine

        engine = DeepSpeedEngine(objective, config, group)
    else:
        engine = LocalEngine(objective, config.optimizer, device)
    if config.run.is_packed:
        check_packing(streams.reference)
    ages = FeatureAges(streams.num_layers, config.adapter.num_features).to(device)
    progress, notes = _begin(config, engine, data, models_digest(streams, engine), ages)
    with together(engine):
        log = _open_log(config, progress, engine, show_progress)
    try:
        for note in notes:
            log.note(note)
        _note_data(data, log)
        validation = _validation_batch(config, data, engine)
        trainer = Trainer(
            config,
            engine,
            streams,
            provenance(config.pair, streams, engine),
            data.plan,
            data.corpora["train"],
            progress,
            ages,
            validation,
            log,
        )
        with contextlib.closing(ahead(_training_batches(data, engine, progress))) as batches:
            return trainer.run(batches)
    except RuntimeError as error:
        if not engine.is_lost_contact(error):
            raise
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"rank {engine.rank}: another rank is gone ({reason}); see what that one said last, "
            "then go on with run.resume_from_checkpoint=latest"
        ) from None
    finally:
        log.close()
        engine.close()


class _Data(NamedTuple):
    """Files by split, how each is encoded, what is encoded already, and the steps of training."""

    corpora: dict[str, Corpus]
    encoders: dict[str, Encoder]
    cache: Mapping[int, Encoded] | None
    plan: Plan
    num_workers: int


def _read_data(config: TrainConfig, num_ranks: int, show_progress: bool) -> _Data:
    sources = {"train": config.data.train, "validation": config.data.validation}
    corpora = {
        name: open_corpus(source, f"data.{name}", config.data.bad_lines)
        for name, source in sources.items()
        if source is not None
    }
    train = corpora["train"]
    padded = (
        None if config.run.is_packed else BatchPlan.from_config(config.run, len(train), num_ranks)
    )
    tokenizer = target_tokenizer(config)
    encoders = {name: Encoder(tokenizer, config.data, f"data.{name}") for name in corpora}
    if padded is None:
        directory = cache_directory(config.data.cache_dir)
        tokens = open_tokens(train, encoders["train"], directory, show_progress=show_progress)
        packed = PackedPlan.from_config(config.run, tokens.lengths, num_ranks)
        return _Data(corpora, encoders, tokens, packed, num_workers=0)
    # Ids that are needed once only are not worth the memory.
    again = config.run.num_epochs > 1 or not config.data.truncate
    cache: dict[int, Encoded] | None = {} if again else None
    for name, corpus in corpora.items():
        check_lengths(corpus, encoders[name], cache if name == "train" else None)
    return _Data(corpora, encoders, cache, padded, config.data.num_workers)


def _training_batches(data: _Data, engine: Engine, progress: Progress) -> Iterator[StepBatch]:
    """This rank's share of every step that is left."""
    return step_batches(
        data.corpora["train"],
        data.encoders["train"],
        data.plan,
        range(progress.step, progress.total_steps),
        engine.rank,
        engine.num_ranks,
        data.cache,
        num_workers=data.num_workers,
    )


def resolve_device(name: str) -> torch.device:
    """The device that `run.device` means.

    Raises:
        UserError: CUDA is asked for where there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"run.device: 'cuda', but torch {torch.__version__} finds no CUDA device here; set "
            "run.device=cpu or auto, or install a CUDA build of torch"
        )
    return torch.device(name)


def target_tokenizer(config: TrainConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that a run reads its data with, the target's.

    Raises:
        UserError: the target has none.
    """
    pair = config.pair
    tokenizer = load_tokenizer(pair.target, pair.target_revision)
    if tokenizer is None:
        raise UserError(
            f"pair.target: {pair.target!r} has no tokenizer that can be loaded; give a local model "
            "directory with tokenizer files, or a hub id"
        )
    return tokenizer


def _begin(
    config: TrainConfig, engine: Engine, data: _Data, models: str, ages: FeatureAges
) -> tuple[Progress, list[str]]:
    """Where the run stands, at its beginning or where a checkpoint left off; what to tell of it."""
    run, output_dir = config.run, Path(config.run.output_dir)
    digest = data.corpora["train"].digest
    total_steps = data.plan.total_steps(run.num_epochs, run.max_steps)
    notes: list[str] = []
    skipped: dict[Path, str] = {}
    if run.resume_from_checkpoint is None:
        run_id = engine.gather_text(uuid.uuid4().hex[:12])[0]
        progress = Progress(0, total_steps, digest, models, 0, 0, run_id, engine.name)
    else:
        checkpoint, skipped = newest_whole(run.resume_from_checkpoint, output_dir, engine)
        with together(engine):
            progress = read_progress(checkpoint, config, digest, models)
            changes = changed_settings(checkpoint, config)
            load_ages(checkpoint, ages)
        with together(engine):
            engine.load_state(checkpoint)
        notes.append(f"resumed from {checkpoint} after {progress.step} steps")
        if progress.engine != engine.name:
            notes.append(
                f"it was made by {progress.engine!r}, this run has {engine.name!r}: losses go on "
                "as they would have there up to rounding, not bitwise"
            )
            progress.engine = engine.name
        if changes:
            notes.append(f"settings other than the checkpoint's: {'; '.join(changes)}")
    progress.total_steps = total_steps
    if run.save_steps and total_steps // run.save_steps == progress.step // run.save_steps:
        notes.append(
            f"no checkpoint comes before the end: {total_steps - progress.step} steps are left and "
            f"run.save_steps is {run.save_steps}"
        )
    with together(engine):
        if engine.rank == 0:
            clear_unfinished(output_dir)
            for path, reason in skipped.items():
                moved = set_aside(path, "damaged")
                notes.append(f"skipped {path.name}, now {moved.name}: {reason}")
            set_aside_later(output_dir, progress.step)
            with Replacement(output_dir) as files:
                files.write(CONFIG_NAME, lambda path: dump_config(config, path))
                files.write(ORIGIN_NAME, lambda path: write_origin(path, data.corpora))
                files.commit()
    with together(engine):
        _wait_to_see(output_dir / CONFIG_NAME, engine.rank)
    return progress, notes


def _wait_to_see(path: Path, rank: int, seconds: float = 10.0) -> None:
    """Refuse an output directory that nodes do not share; their file systems may lag a little."""
    end = time.monotonic() + seconds
    while not path.is_file():
        if time.monotonic() > end:
            raise UserError(
                f"run.output_dir: rank {rank} on {socket.gethostname()} does not see {path}, which "
                "rank 0 has written; choose a directory on a file system that all nodes share"
            )
        time.sleep(0.1)


def _check_beginning(config: TrainConfig) -> None:
    """Refuse to start afresh on top of a run, or to go on where there is none."""
    run, output_dir = config.run, Path(config.run.output_dir)
    if run.resume_from_checkpoint is None:
        _refuse_used(output_dir)
    else:
        candidates(run.resume_from_checkpoint, output_dir)


def _refuse_used(output_dir: Path) -> None:
    saved = checkpoints(output_dir)
    used = [*saved[-1:], *output_dir.glob("adapter")]
    if used:
        go_on = "continue it with run.resume_from_checkpoint=latest, or " if saved else ""
        raise UserError(
            f"run.output_dir: {output_dir} already holds a run, {used[0].name}; "
            f"{go_on}choose another directory"
        )


def _open_log(
    config: TrainConfig, progress: Progress, engine: Engine, show_progress: bool
) -> RunLog:
    return RunLog(
        config,
        Path(config.run.output_dir),
        run_id=progress.run_id,
        resume_step=progress.step,
        total_steps=progress.total_steps,
        is_main=engine.rank == 0,
        show_progress=show_progress,
    )


def _note_data(data: _Data, log: RunLog) -> None:
    """What was passed over, and how well packed rows are filled."""
    for name, corpus in data.corpora.items():
        if corpus.num_skipped:
            log.note(
                f"data.{name}: {corpus.num_skipped} malformed line(s) of {corpus.path} skipped, "
                f"{len(corpus)} used; first: {corpus.first_skipped}"
            )
    if isinstance(data.plan, PackedPlan):
        train = data.corpora["train"]
        log.note(
            f"data.train: {len(train)} sequences of {sum(data.plan.lengths)} tokens, "
            f"{data.plan.steps_per_epoch} steps per epoch; {data.plan.empty_share:.2%} of the "
            "token budget is empty"
        )


def _validation_batch(config: TrainConfig, data: _Data, engine: Engine) -> StepBatch | None:
    """This rank's share of the first `eval_samples` validation sequences."""
    if "validation" not in data.corpora or not config.run.eval_steps:
        return None
    corpus = data.corpora["validation"]
    indices = list(range(min(config.run.eval_samples, len(corpus))))
    encoder = data.encoders["validation"]
    cache: dict[int, Encoded] = {}
    lengths = [len(encode_cached(corpus, encoder, index, cache).ids) for index in indices]
    dealt = deal(data.plan.cut(indices, lengths), engine.rank, engine.num_ranks)
    return make_step_batch(corpus, encoder, dealt, cache, data.plan.collate)

"""The training loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tca_fast.adapter_config import Provenance
from tca_fast.bridging.objective import l1_scale_at, sample_cutoffs
from tca_fast.bridging.streams import Streams
from tca_fast.config import TrainConfig
from tca_fast.errors import UserError
from tca_fast.sparsity import FeatureAges
from tca_fast.training.batches import MicroBatch, StepBatch, to_device
from tca_fast.training.checkpoints import step_of
from tca_fast.training.data import Corpus
from tca_fast.training.engine import Engine
from tca_fast.training.heartbeat import Heartbeat, Watch
from tca_fast.training.interrupt import StopRequest
from tca_fast.training.logs import RunLog, print_line
from tca_fast.training.metrics import QueuedStep, StepMetrics, to_host
from tca_fast.training.phases import Phases
from tca_fast.training.plans import Plan
from tca_fast.training.schedule import learning_rate, warmup_steps
from tca_fast.training.state import NotSaved, Progress, save_adapter, save_checkpoint


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        step, total_steps: optimizer steps done and planned.
        interrupted: it was stopped by a signal after saving `checkpoint`.
        checkpoint: the newest checkpoint this call wrote, if any.
        adapter: directory of the trained adapters, once all steps are done.
    """

    step: int
    total_steps: int
    interrupted: bool
    checkpoint: Path | None
    adapter: Path | None


class _Totals(NamedTuple):
    """Counts of one optimizer step, summed over ranks before its first forward."""

    label_tokens: int
    real_tokens: int
    truncated: int
    sequences: int
    errors: int
    stops: int


class _Accumulated(NamedTuple):
    """What the micro-batches of a step add up to, over all ranks, on the device.

    Attributes:
        names: of `values`, metrics of the objective.
        values: float64 [len(names)].
        fired: bool [L, F].
    """

    names: tuple[str, ...]
    values: Tensor
    fired: Tensor

    @property
    def loss(self) -> Tensor:
        """0-d."""
        return self.values[self.names.index("loss")]


class Trainer:
    """Runs the optimizer steps of one rank and everything that happens between them.

    Args:
        config: the run.
        engine: forward, backward and optimizer of this rank.
        streams: the models inside the engine's objective.
        provenance: of the adapters, for their saved directories.
        plan: which sequences make which step.
        corpus: the training file.
        progress: where the run stands; updated in place.
        ages: tokens since each feature fired; updated in place.
        validation: this rank's share of the validation sequences, or None.
        log: where figures go.
    """

    def __init__(
        self,
        config: TrainConfig,
        engine: Engine,
        streams: Streams,
        provenance: Provenance,
        plan: Plan,
        corpus: Corpus,
        progress: Progress,
        ages: FeatureAges,
        validation: StepBatch | None,
        log: RunLog,
    ) -> None:
        self.config, self.engine, self.streams = config, engine, streams
        self.provenance = provenance
        self.progress, self.ages = progress, ages
        self.validation, self.log = validation, log
        self.output_dir = Path(config.run.output_dir)
        self.num_warmup = warmup_steps(progress.total_steps, config.optimizer.warmup_ratio)
        self.metrics = StepMetrics(config, plan, corpus, progress.total_steps, log)
        self.saved: Path | None = None
        self.heartbeat = Heartbeat(self.output_dir, engine.rank)
        self.phases = Phases(engine.device, self._tell)

    def run(self, batches: Iterator[StepBatch]) -> TrainResult:
        """Train on `batches`, one per remaining optimizer step, then save the adapters.

        Raises:
            UserError: a sequence that is too long, a loss that is not finite, a full disk.
        """
        with StopRequest() as stop, self.heartbeat, self._watch():
            try:
                for batch in self._fetched(batches):
                    totals = self._totals(batch, stop.requested)
                    if totals.stops:
                        break
                    self._step(batch, totals)
                    self._between_steps()
            finally:
                # However the loop ends, what it trained is logged.
                self.metrics.settle()
            # Asked of every rank together, so that none leaves while the others go on.
            interrupted = self.progress.step < self.progress.total_steps
            if interrupted and not self._is_saved():
                self._save()
            adapter = None if interrupted else self.output_dir / "adapter"
            if adapter is not None:
                self.phases.enter("saving")
                save_adapter(adapter, self.engine, self.streams.adapted, self.provenance)
            self.phases.enter("end")
        done = self.progress
        return TrainResult(done.step, done.total_steps, interrupted, self.saved, adapter)

    def _tell(self, phase: str) -> None:
        self.heartbeat.beat(self.progress.step, phase)

    def _watch(self) -> Watch:
        engine = self.engine
        seconds = self.config.run.hang_seconds
        return Watch(self.output_dir, engine.rank, engine.num_ranks, seconds, print_line)

    def _fetched(self, batches: Iterator[StepBatch]) -> Iterator[StepBatch]:
        """The batches; the time until each is there counts as "data"."""
        self.phases.enter("data")
        for batch in batches:
            self.phases.enter("waiting")
            yield batch
            self.phases.enter("data")

    def _totals(self, batch: StepBatch, stop: bool) -> _Totals:
        own = _Totals(
            batch.label_tokens,
            batch.real_tokens,
            batch.truncated,
            sum(micro_batch.num_sequences for micro_batch in batch.micro_batches),
            bool(batch.error),
            stop,
        )
        totals = _Totals(*self.engine.sum_counts(own))
        if totals.errors:
            raise UserError(next(text for text in self.engine.gather_text(batch.error) if text))
        return totals

    def _step(self, batch: StepBatch, totals: _Totals) -> None:
        """Queue one optimizer step, and log the one before it.

        All micro-batches forward and backward, then the update; nothing is read off the device in
        between, and this step's metrics not before the next one is queued.

        Raises:
            UserError: the loss or gradient norm of the step before, or of this one where the
                engine waits for it, was not finite.
        """
        config, progress = self.config, self.progress
        self.phases.enter("forward")
        cutoffs = sample_cutoffs(
            config.objective, self.streams.num_layers, seed=config.run.seed, step=progress.step
        )
        sums = self._accumulate(batch.micro_batches, cutoffs, totals[:2], backward=True)
        peak = config.optimizer.learning_rate
        rate = learning_rate(progress.step, peak, progress.total_steps, self.num_warmup)
        self.phases.enter("optimizer")
        try:
            norm = self.engine.apply(rate, sums.loss)
        except FloatingPointError as error:
            self.metrics.settle()
            raise self.metrics.diverged(progress.step + 1, str(error)) from None
        self.ages.update(sums.fired, totals.real_tokens)
        progress.step += 1
        progress.tokens_seen += totals.real_tokens
        progress.sequences_seen += totals.sequences
        queued = QueuedStep(
            progress.step,
            sums.names,
            to_host(sums.values),
            to_host(norm),
            to_host(self.ages.num_dead(config.run.dead_after_tokens)),
            learning_rate=rate,
            label_tokens=totals.label_tokens,
            real_tokens=totals.real_tokens,
            sequences=totals.sequences,
            truncated=totals.truncated,
            tokens_seen=progress.tokens_seen,
            sequences_seen=progress.sequences_seen,
            ended=self.phases.enter("logging"),
            marks=self.phases.take(),
        )
        self.metrics.queue(queued)

    def _accumulate(
        self,
        micro_batches: Sequence[MicroBatch],
        cutoffs: Sequence[int],
        counts: Sequence[int],
        backward: bool,
    ) -> _Accumulated:
        """Sum of the objective's shares over micro-batches and ranks."""
        device = self.engine.device
        label_tokens, real_tokens = to_device(torch.tensor(counts, dtype=torch.int64), device)
        values, fired = None, torch.zeros_like(self.ages.tokens, dtype=torch.bool)
        names: tuple[str, ...] = ()
        for position, on_host in enumerate(micro_batches, start=1):
            micro_batch = on_host.to(device)
            output: Any = self.engine.forward(
                micro_batch.input_ids,
                micro_batch.attention_mask,
                micro_batch.labels,
                cutoffs,
                label_tokens=label_tokens,
                real_tokens=real_tokens,
                packing=micro_batch.packing,
                **self._sparsity_options(),
            )
            if backward:
                is_last = position == len(micro_batches)
                self.phases.enter("backward")
                self.engine.backward(output.loss * micro_batch.weight, is_last)
                if not is_last:
                    self.phases.enter("forward")
            names = tuple(output.metrics)
            share = torch.stack([value.double() for value in output.metrics.values()])
            share = share * micro_batch.weight
            values = share if values is None else values + share
            if micro_batch.weight:
                fired |= output.fired
        assert values is not None, "every rank has a micro-batch in every step"
        totals = self.engine.sum_over_ranks(values)
        return _Accumulated(names, totals, self.engine.any_over_ranks(fired))

    def _sparsity_options(self) -> dict[str, Any]:
        """What the objective is told of this step beside the batch."""
        objective = self.config.objective
        options: dict[str, Any] = {"l1_scale": l1_scale_at(self.progress.step, objective)}
        if objective.auxk_weight:
            options["dead"] = self.ages.dead(self.config.run.dead_after_tokens)
        return options

    def _between_steps(self) -> None:
        step, run = self.progress.step, self.config.run
        is_end = step == self.progress.total_steps
        if run.eval_steps and self.validation and (step % run.eval_steps == 0 or is_end):
            self._validate(self.validation)
        if run.save_steps and step % run.save_steps == 0:
            self._try_to_save()

    def _validate(self, batch: StepBatch) -> None:
        """Log the objective and its terms on the validation sequences; nothing else changes.

        Bridging is measured at the configured cutoffs, or in the middle when they are drawn, so
        that validations can be compared. Feature ages stay as they are.
        """
        self.metrics.settle()
        self.phases.enter("validation")
        objective, num_layers = self.config.objective, self.streams.num_layers
        cutoffs = [num_layers // 2] if objective.cutoffs == "uniform" else list(objective.cutoffs)
        if objective.num_cutoffs == 0 or objective.lambda_bridge == 0:
            cutoffs = []
        counts = self.engine.sum_counts([batch.label_tokens, batch.real_tokens])
        with torch.no_grad():
            sums = self._accumulate(batch.micro_batches, cutoffs, counts, backward=False)
        figures = dict(zip(sums.names, sums.values.tolist(), strict=True))
        self.log.log("validation", self.progress.step, figures)

    def _try_to_save(self) -> None:
        """Save, or say why not and go on.

        Stopping would lose every step since the last checkpoint for certain; going on loses them
        only if the disk stays full until the run is stopped. The next checkpoint tries again.
        """
        try:
            self._save()
        except NotSaved as error:
            self.log.note(f"warning: {error}. Training goes on")

    def _is_saved(self) -> bool:
        return self.saved is not None and step_of(self.saved) == self.progress.step

    def _save(self) -> None:
        # Not before the step is known to be finite.
        self.metrics.settle()
        self.phases.enter("saving")
        self.saved = save_checkpoint(
            self.output_dir,
            self.config,
            self.engine,
            self.streams.adapted,
            self.provenance,
            self.ages,
            self.progress,
        )

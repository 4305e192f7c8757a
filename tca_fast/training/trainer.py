"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tca_fast.bridging.objective import sample_cutoffs
from tca_fast.bridging.streams import Streams
from tca_fast.checkpoint import Provenance
from tca_fast.config import TrainConfig
from tca_fast.errors import UserError
from tca_fast.sparsity import FeatureAges
from tca_fast.training.batches import BatchPlan, MicroBatch, StepBatch
from tca_fast.training.engine import Engine
from tca_fast.training.interrupt import StopRequest
from tca_fast.training.logs import RunLog
from tca_fast.training.schedule import learning_rate, warmup_steps
from tca_fast.training.state import Progress, save_adapter, save_checkpoint


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
    """Figures of one optimizer step, summed over ranks before its first forward."""

    label_tokens: int
    real_tokens: int
    truncated: int
    sequences: int
    errors: int
    stops: int


class _Accumulated(NamedTuple):
    """What the micro-batches of a step add up to, over all ranks."""

    figures: dict[str, float]
    fired: Tensor


@dataclass
class _Speed:
    """Real tokens and the seconds spent on their steps; validation and saving do not count."""

    seconds: float = 0.0
    tokens: int = 0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)


class Trainer:
    """Runs the optimizer steps of one rank and everything that happens between them.

    Args:
        config: the run.
        engine: forward, backward and optimizer of this rank.
        streams: the models inside the engine's objective.
        provenance: of the adapters, for their saved directories.
        plan: which sequences make which step.
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
        plan: BatchPlan,
        progress: Progress,
        ages: FeatureAges,
        validation: StepBatch | None,
        log: RunLog,
    ) -> None:
        self.config, self.engine, self.streams = config, engine, streams
        self.provenance, self.plan = provenance, plan
        self.progress, self.ages = progress, ages
        self.validation, self.log = validation, log
        self.output_dir = Path(config.run.output_dir)
        self.num_warmup = warmup_steps(progress.total_steps, config.optimizer.warmup_ratio)
        self.saved: Path | None = None
        self._since_log = _Speed()
        self._since_start = _Speed()

    def run(self, batches: Iterator[StepBatch]) -> TrainResult:
        """Train on `batches`, one per remaining optimizer step, then save the adapters.

        Raises:
            UserError: a sequence that is too long, a loss that is not finite, a full disk.
        """
        with StopRequest() as stop:
            for batch in batches:
                totals = self._totals(batch, stop.requested)
                if totals.stops:
                    break
                self._step(batch, totals)
                self._between_steps()
            # Asked of every rank together, so that none leaves while the others go on.
            interrupted = self.progress.step < self.progress.total_steps
            if interrupted:
                self._save()
        adapter = None if interrupted else self.output_dir / "adapter"
        if adapter is not None:
            save_adapter(adapter, self.engine, self.streams.adapted, self.provenance)
        done = self.progress
        return TrainResult(done.step, done.total_steps, interrupted, self.saved, adapter)

    def _totals(self, batch: StepBatch, stop: bool) -> _Totals:
        own = _Totals(
            batch.label_tokens,
            batch.real_tokens,
            batch.truncated,
            sum(len(micro.input_ids) for micro in batch.micro_batches if micro.weight),
            bool(batch.error),
            stop,
        )
        counts = torch.tensor(own, dtype=torch.int64, device=self.engine.device)
        totals = _Totals(*self.engine.sum_over_ranks(counts).tolist())
        if totals.errors:
            raise UserError(next(text for text in self.engine.gather_text(batch.error) if text))
        return totals

    def _step(self, batch: StepBatch, totals: _Totals) -> None:
        """One optimizer step: all micro-batches forward and backward, then the update."""
        config, step = self.config, self.progress.step
        started = time.perf_counter()
        cutoffs = sample_cutoffs(
            config.objective, self.streams.num_layers, seed=config.run.seed, step=step
        )
        sums = self._accumulate(batch.micro_batches, cutoffs, totals[:2], backward=True)
        if not math.isfinite(sums.figures["loss"]):
            raise self._diverged(f"the loss is {sums.figures['loss']}")
        rate = learning_rate(
            step, config.optimizer.learning_rate, self.progress.total_steps, self.num_warmup
        )
        try:
            norm = self.engine.apply(rate)
        except FloatingPointError as error:
            raise self._diverged(str(error)) from None
        self.ages.update(sums.fired, totals.real_tokens)
        self.progress.step += 1
        self.progress.tokens_seen += totals.real_tokens
        self.progress.sequences_seen += totals.sequences
        for speed in (self._since_log, self._since_start):
            speed.seconds += time.perf_counter() - started
            speed.tokens += totals.real_tokens
        self._log_step(sums.figures, totals, rate, norm)

    def _accumulate(
        self,
        micro_batches: Sequence[MicroBatch],
        cutoffs: Sequence[int],
        counts: Sequence[int],
        backward: bool,
    ) -> _Accumulated:
        """Sum of the objective's shares over micro-batches and ranks.

        The device is waited for once, at the end.
        """
        device = self.engine.device
        label_tokens, real_tokens = torch.tensor(counts, dtype=torch.int64, device=device)
        values, fired = None, torch.zeros_like(self.ages.tokens, dtype=torch.bool)
        names: list[str] = []
        for position, micro_batch in enumerate(micro_batches, start=1):
            output: Any = self.engine.forward(
                micro_batch.input_ids.to(device),
                micro_batch.attention_mask.to(device),
                micro_batch.labels.to(device),
                cutoffs,
                label_tokens=label_tokens,
                real_tokens=real_tokens,
            )
            if backward:
                is_last = position == len(micro_batches)
                self.engine.backward(output.loss * micro_batch.weight, is_last)
            names = list(output.metrics)
            share = torch.stack([value.double() for value in output.metrics.values()])
            share = share * micro_batch.weight
            values = share if values is None else values + share
            if micro_batch.weight:
                fired |= output.fired
        assert values is not None, "every rank has a micro-batch in every step"
        totals = self.engine.sum_over_ranks(values).tolist()
        return _Accumulated(
            dict(zip(names, totals, strict=True)), self.engine.any_over_ranks(fired)
        )

    def _diverged(self, what: str) -> UserError:
        step = self.progress.step + 1
        return UserError(
            f"optimizer.learning_rate: {self.config.optimizer.learning_rate}: {what} at step "
            f"{step}, so training stopped without saving that step; lower the rate or mend the "
            "data, then resume from the last checkpoint"
        )

    def _log_step(
        self, figures: dict[str, float], totals: _Totals, rate: float, norm: float
    ) -> None:
        step, run = self.progress.step, self.config.run
        self.log.progress(figures, self._since_start.tokens_per_second)
        if step % run.logging_steps and step != self.progress.total_steps:
            return
        dead = self.ages.num_dead(run.dead_after_tokens)
        record = {
            **figures,
            "learning_rate": rate,
            "grad_norm": norm,
            "dead_features": int(dead.sum()),
            **{f"dead_features/layer_{i}": count for i, count in enumerate(dead.tolist())},
            "truncated": totals.truncated / totals.sequences,
            "epoch": step / self.plan.steps_per_epoch,
            "tokens_seen": self.progress.tokens_seen,
            "sequences_seen": self.progress.sequences_seen,
            "tokens_per_second": self._since_log.tokens_per_second,
        }
        self.log.log("train", step, record)
        self._since_log = _Speed()

    def _between_steps(self) -> None:
        step, run = self.progress.step, self.config.run
        is_end = step == self.progress.total_steps
        if run.eval_steps and self.validation and (step % run.eval_steps == 0 or is_end):
            self._validate(self.validation)
        if run.save_steps and step % run.save_steps == 0:
            self._save()

    def _validate(self, batch: StepBatch) -> None:
        """Log the objective and its terms on the validation sequences; nothing else changes.

        Bridging is measured at the configured cutoffs, or in the middle when they are drawn, so
        that validations can be compared. Feature ages stay as they are.
        """
        objective, num_layers = self.config.objective, self.streams.num_layers
        cutoffs = [num_layers // 2] if objective.cutoffs == "uniform" else list(objective.cutoffs)
        if objective.num_cutoffs == 0 or objective.lambda_bridge == 0:
            cutoffs = []
        own = torch.tensor([batch.label_tokens, batch.real_tokens], device=self.engine.device)
        counts = self.engine.sum_over_ranks(own).tolist()
        with torch.no_grad():
            sums = self._accumulate(batch.micro_batches, cutoffs, counts, backward=False)
        self.log.log("validation", self.progress.step, sums.figures)

    def _save(self) -> None:
        self.saved = save_checkpoint(
            self.output_dir,
            self.config,
            self.engine,
            self.streams.adapted,
            self.provenance,
            self.ages,
            self.progress,
        )

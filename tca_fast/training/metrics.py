"""Metrics of optimizer steps: on the device when a step is queued, on the host a step later.

Reading a number off a device waits for everything queued before it, and the device then idles
until the next step arrives. So the metrics of a step are copied behind its work and read when the
step after it has been queued: the device always has a step to run while the host reads, logs and
fetches the next batch.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tca_fast.config import TrainConfig
from tca_fast.errors import UserError
from tca_fast.training.checkpoints import checkpoints
from tca_fast.training.data import Corpus
from tca_fast.training.logs import RunLog
from tca_fast.training.plans import Plan


class Moment:
    """A point in the work of a device: now on the CPU, an event in the queue of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(torch.cuda.current_stream(device))
        self._time = time.perf_counter()

    def wait(self) -> None:
        """Return once the device has come as far; work queued later is not waited for."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: Moment) -> float:
        """Seconds of the device between two moments; both must have been reached."""
        if self._event is not None and earlier._event is not None:
            return earlier._event.elapsed_time(self._event) / 1000
        return self._time - earlier._time


def to_host(tensor: Tensor) -> Tensor:
    """The tensor in host memory; off a GPU not before a later `Moment` has been reached."""
    if not tensor.is_cuda:
        return tensor
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)


@dataclass(frozen=True)
class QueuedStep:
    """An optimizer step that the device may still be busy with.

    Attributes:
        step: optimizer steps done when it is.
        names: of `values`.
        values: float64 [len(names)], from `to_host`: the objective's metrics over all ranks.
        grad_norm: 0-d, from `to_host`: global norm before clipping.
        dead_features: int64 [L], from `to_host`: features that have not fired for long.
        learning_rate: that it used.
        real_tokens, sequences, truncated: of its global batch.
        tokens_seen, sequences_seen: of the run so far, with this step.
        began, ended: around its work; `ended` comes after the copies.
    """

    step: int
    names: tuple[str, ...]
    values: Tensor
    grad_norm: Tensor
    dead_features: Tensor
    learning_rate: float
    real_tokens: int
    sequences: int
    truncated: int
    tokens_seen: int
    sequences_seen: int
    began: Moment
    ended: Moment


@dataclass
class _Speed:
    """Real tokens and the seconds of their steps; validation and saving do not count."""

    seconds: float = 0.0
    tokens: int = 0

    def add(self, tokens: int, seconds: float) -> None:
        self.tokens += tokens
        self.seconds += seconds

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)


class StepMetrics:
    """Logs every step when the next one has been queued, or when asked to settle.

    Args:
        config: the run.
        plan: which sequences made which step.
        corpus: the lines that these sequences are.
        total_steps: of the run.
        log: where the metrics go.
    """

    def __init__(
        self, config: TrainConfig, plan: Plan, corpus: Corpus, total_steps: int, log: RunLog
    ) -> None:
        self.config, self.plan, self.corpus = config, plan, corpus
        self.total_steps, self.log = total_steps, log
        self._queued: QueuedStep | None = None
        self._since_log = _Speed()
        self._since_start = _Speed()

    def queue(self, step: QueuedStep) -> None:
        """Keep a step for later and log the one before it.

        Raises:
            UserError: the loss or gradient norm of the step before was not finite.
        """
        before, self._queued = self._queued, step
        if before is not None:
            self._read(before)

    def settle(self) -> None:
        """Wait for the step that is still queued, if any, and log it.

        Raises:
            UserError: its loss or gradient norm was not finite.
        """
        step, self._queued = self._queued, None
        if step is not None:
            self._read(step)

    def diverged(self, step: int, what: str) -> UserError:
        """The error that stops a run at `step`: what was not finite, on which lines, how to go on.

        Args:
            step: optimizer steps done, had this one been applied.
            what: such as "the loss is nan".
        """
        indices = self.plan.sequences(step - 1)
        lines = ", ".join(str(self.corpus.line_numbers[index]) for index in sorted(indices))
        saved = checkpoints(Path(self.config.run.output_dir))
        if saved:
            remedy = (
                f"lower the rate and go on with run.resume_from_checkpoint={saved[-1]}, or mend "
                "those lines and start afresh"
            )
        else:
            remedy = "no checkpoint was saved; lower the rate or mend those lines, and start afresh"
        return UserError(
            f"optimizer.learning_rate: {self.config.optimizer.learning_rate}: {what} at step "
            f"{step}, on line(s) {lines} of {self.corpus.path}, so training stopped without saving "
            f"that step; {remedy}"
        )

    def _read(self, step: QueuedStep) -> None:
        step.ended.wait()
        figures = dict(zip(step.names, step.values.tolist(), strict=True))
        grad_norm = float(step.grad_norm)
        for what, value in (("loss", figures["loss"]), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                # The step queued behind it was not applied either and has nothing to say.
                self._queued = None
                raise self.diverged(step.step, f"the {what} is {value}")
        for speed in (self._since_log, self._since_start):
            speed.add(step.real_tokens, step.ended.seconds_since(step.began))
        self.log.progress(figures, self._since_start.tokens_per_second)
        if step.step % self.config.run.logging_steps == 0 or step.step == self.total_steps:
            self.log.log("train", step.step, self._record(step, figures, grad_norm))
            self._since_log = _Speed()

    def _record(
        self, step: QueuedStep, figures: dict[str, float], grad_norm: float
    ) -> dict[str, float]:
        dead = step.dead_features.tolist()
        return {
            **figures,
            "learning_rate": step.learning_rate,
            "grad_norm": grad_norm,
            "dead_features": sum(dead),
            **{f"dead_features/layer_{i}": count for i, count in enumerate(dead)},
            "truncated": step.truncated / step.sequences,
            "epoch": step.step / self.plan.steps_per_epoch,
            "tokens_seen": step.tokens_seen,
            "sequences_seen": step.sequences_seen,
            "tokens_per_second": self._since_log.tokens_per_second,
        }

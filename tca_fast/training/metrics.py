"""Metrics of optimizer steps: on the device when a step is queued, on the host a step later.

Reading a number off a device waits for everything queued before it, and the device then idles
until the next step arrives. So the metrics of a step are copied behind its work and read when the
step after it has been queued: the device always has a step to run while the host reads, logs and
fetches the next batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tca_fast.config import TrainConfig
from tca_fast.errors import UserError
from tca_fast.training.checkpoints import checkpoints
from tca_fast.training.data import Corpus
from tca_fast.training.logs import RunLog
from tca_fast.training.phases import Mark, Moment, peak_memory, seconds_by_phase
from tca_fast.training.plans import Plan


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
        label_tokens, real_tokens, sequences, truncated: of its global batch.
        tokens_seen, sequences_seen: of the run so far, with this step.
        ended: after its work and the copies.
        marks: phases since the step before it ended, the last of them at `ended`.
    """

    step: int
    names: tuple[str, ...]
    values: Tensor
    grad_norm: Tensor
    dead_features: Tensor
    learning_rate: float
    label_tokens: int
    real_tokens: int
    sequences: int
    truncated: int
    tokens_seen: int
    sequences_seen: int
    ended: Moment
    marks: tuple[Mark, ...] = ()


# What a run does beside training.
_ASIDE = ("validation", "saving")


@dataclass
class _Speed:
    """Real tokens, and the seconds of every phase of their steps."""

    tokens: int = 0
    steps: int = 0
    phases: dict[str, float] = field(default_factory=dict)

    def add(self, step: QueuedStep) -> None:
        self.tokens += step.real_tokens
        self.steps += 1
        for phase, seconds in seconds_by_phase(step.marks).items():
            self.phases[phase] = self.phases.get(phase, 0.0) + seconds

    @property
    def tokens_per_second(self) -> float:
        """With the time that data took; validation and saving do not count."""
        seconds = sum(took for phase, took in self.phases.items() if phase not in _ASIDE)
        return self.tokens / max(seconds, 1e-9)

    def seconds_left(self, steps: int) -> float:
        """For so many steps more, with everything between them."""
        return steps * sum(self.phases.values()) / max(self.steps, 1)

    def shares(self) -> dict[str, float]:
        """Share of the time that each phase took; together 1."""
        total = max(sum(self.phases.values()), 1e-9)
        return {f"time/{phase}": seconds / total for phase, seconds in self.phases.items()}


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
        if step.step == 1:
            self._doubt(step, figures)
        for speed in (self._since_log, self._since_start):
            speed.add(step)
        self.log.progress(self._shown(step, figures), self._since_start.tokens_per_second)
        if step.step % self.config.run.logging_steps == 0 or step.step == self.total_steps:
            self.log.log("train", step.step, self._record(step, figures, grad_norm))
            self._since_log = _Speed()

    def _doubt(self, step: QueuedStep, figures: dict[str, float]) -> None:
        """Say what makes the figures look perfect while nothing is learned."""
        if not step.label_tokens:
            self.log.note(
                "warning: no token of the first step has a label, so KL and LM are 0; with "
                f"data.loss_on_prompt={str(self.config.data.loss_on_prompt).lower()} and "
                f"data.max_length={self.config.data.max_length} nothing of the answers is left"
            )
        elif figures.get("kl") == figures.get("nmse") == 0:
            self.log.note(
                "warning: without adapters the model is pair.target already (KL and NMSE are 0), "
                "so there is nothing to learn; pair.base has the same MLPs"
            )

    def _shown(self, step: QueuedStep, figures: dict[str, float]) -> dict[str, float]:
        """The figures with what a progress bar says beside them."""
        shares = self._since_start.shares()
        return {
            **figures,
            "dead": float(step.dead_features.sum()),
            "GiB": peak_memory(step.ended.device) / 2**30,
            **{
                f"{phase} %": 100 * shares.get(f"time/{phase}", 0.0)
                for phase in ("data", "backward")
            },
        }

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
            "memory/peak_bytes": peak_memory(step.ended.device),
            "seconds_left": self._since_start.seconds_left(self.total_steps - step.step),
            **self._since_log.shares(),
        }

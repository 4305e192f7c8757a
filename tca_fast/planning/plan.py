"""A run planned: memory of every stage, the one to take, tokens that fit, time and GPU-hours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tca_fast.config import ObjectiveConfig, TrainConfig
from tca_fast.errors import UserError
from tca_fast.planning.communication import step_traffic
from tca_fast.planning.devices import GIB, Device, Rate
from tca_fast.planning.memory import FLOAT32, MemoryPlan, Placement, adapter_parameters, plan_memory
from tca_fast.planning.passes import layer_passes, layer_work, step_flops
from tca_fast.planning.shapes import ModelShape

# Context, libraries and blocks that the allocator cannot use again: an assumption.
RESERVED_BYTES, RESERVED_SHARE = GIB, 0.05
# Bytes that AdamW moves for every parameter: gradient, parameter and two moments in float32.
_ADAM_BYTES = 28
_MOST_TOKENS = 2**20
# Sequences of data sets that a plan may be made for without them (the paper's training split).
KNOWN_DATA = {
    "hf://nathu0/transcoder-adapters-openthoughts3-stratified-55k/data/train.jsonl": 49_952,
}


@dataclass(frozen=True)
class Workload:
    """What is to be trained.

    Attributes:
        sequences: in one pass over the data.
        tokens: of one sequence; `is_bound` says that it is the most a sequence may have.
        is_bound: the mean is not known.
        epochs: passes over the data.
    """

    sequences: int
    tokens: int
    is_bound: bool
    epochs: int = 1


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step.

    Attributes:
        arithmetic: products of all layers and heads.
        optimizer: AdamW at the bandwidth that is assumed.
        communication: between ranks.
    """

    arithmetic: float
    optimizer: float
    communication: float

    @property
    def total(self) -> float:
        """One after the other."""
        return self.arithmetic + self.optimizer + self.communication


@dataclass(frozen=True)
class Scale:
    """A number of devices, each with one micro-batch in every step.

    Attributes:
        num_ranks, batch_size: devices, sequences of a step.
        step: its time.
        days: for all data.
        efficiency: share of a step that is not communication.
    """

    num_ranks: int
    batch_size: int
    step: StepTime
    days: float

    @property
    def gpu_hours(self) -> float:
        """Devices times hours."""
        return self.num_ranks * self.days * 24

    @property
    def efficiency(self) -> float:
        """Share of a step that is not communication."""
        return 1 - self.step.communication / self.step.total


class Planner:
    """The arithmetic of one run on one kind of device.

    Args:
        config: the run; its global batch is rounded up to whole micro-batches. A packed row counts
            as so many sequences of the workload's length as it holds.
        shape: of the pair.
        device: that every rank has.
        rate: of a step on it.
        workload: the data.
    """

    def __init__(
        self, config: TrainConfig, shape: ModelShape, device: Device, rate: Rate, workload: Workload
    ) -> None:
        if config.objective.step != "shared":
            raise UserError(
                f"objective.step: {config.objective.step!r} is not planned; set step=shared"
            )
        self.config, self.shape, self.device = config, shape, device
        self.rate, self.workload = rate, workload
        self.itemsize = FLOAT32 if config.pair.dtype == "float32" else 2
        self.rows = config.run.rows_per_forward
        self.row_tokens = config.run.per_device_train_batch_tokens
        self.available = int(device.memory_bytes * (1 - RESERVED_SHARE)) - RESERVED_BYTES

    def stages(self, num_ranks: int) -> list[int | None]:
        """Engines that can run on so many ranks: one process, or stages of ZeRO.

        DeepSpeed has no stage 0 in bfloat16 that sums gradients in float32.
        """
        if num_ranks == 1:
            return [None]
        return [1, 2, 3] if self.itemsize < FLOAT32 else [0, 1, 2, 3]

    def micro_batches(self, num_ranks: int) -> int:
        """Forwards of a rank in one optimizer step."""
        return math.ceil(self.config.run.rows_per_step / (self.rows * num_ranks))

    def rows_per_step(self, num_ranks: int) -> int:
        """Padded sequences, or packed rows, of one optimizer step."""
        return self.micro_batches(num_ranks) * self.rows * num_ranks

    def batch_size(self, num_ranks: int) -> int:
        """Sequences of one optimizer step; a packed row holds as many as fit."""
        fitting = (self.row_tokens or self.workload.tokens) / self.workload.tokens
        return max(1, int(self.rows_per_step(num_ranks) * fitting))

    def memory(
        self,
        stage: int | None,
        num_ranks: int,
        *,
        tokens: int | None = None,
        checkpointing: bool | None = None,
    ) -> MemoryPlan:
        """Memory of a rank.

        Args:
            stage: of ZeRO, or None.
            num_ranks: that share the state.
            tokens: of one row; by default the most that it may have.
            checkpointing: by default as configured.
        """
        config = self.config
        return plan_memory(
            self.shape,
            config.adapter,
            self._objective(checkpointing),
            tokens=self.rows * (tokens or self.row_tokens or config.data.max_length),
            sequences=self.rows,
            placement=Placement(stage, num_ranks, self.itemsize, "cuda", config.pair.backbone),
            has_mask=self.rows > 1
            or (config.run.is_packed and "flash" not in config.pair.attn_implementation),
            micro_batches=self.micro_batches(num_ranks),
        )

    def fits(self, plan: MemoryPlan) -> bool:
        """Whether a rank's memory is enough, with what is reserved for the rest."""
        return plan.peak <= self.available

    def cheapest(self, num_ranks: int) -> tuple[int | None, bool]:
        """The stage, and whether to recompute activations, with the shortest step that fits.

        Of equals the one that recomputes nothing, then the lowest stage.

        Raises:
            LookupError: none fits.
        """
        found = [
            (self.step_time(stage, num_ranks, checkpointing=kept).total, kept, stage)
            for kept in (False, True)
            for stage in self.stages(num_ranks)
            if self.fits(self.memory(stage, num_ranks, checkpointing=kept))
        ]
        if not found:
            raise LookupError(num_ranks)
        _, checkpointing, stage = min(found, key=lambda one: one[0])
        return stage, checkpointing

    def most_tokens(self, stage: int | None, num_ranks: int, *, checkpointing: bool) -> int:
        """The longest row that fits, in tokens; 0 where not even one does."""
        low, high = 0, _MOST_TOKENS
        while low < high:
            middle = (low + high + 1) // 2
            plan = self.memory(stage, num_ranks, tokens=middle, checkpointing=checkpointing)
            low, high = (middle, high) if self.fits(plan) else (low, middle - 1)
        return low

    def step_time(
        self, stage: int | None, num_ranks: int, *, checkpointing: bool | None = None
    ) -> StepTime:
        """Seconds of one optimizer step with sequences of the workload's length."""
        config, shape = self.config, self.shape
        passes = layer_passes(
            shape.num_hidden_layers,
            self._objective(checkpointing),
            shares_ends=config.pair.backbone == "target",
        )
        # A packed row is full, and attention stays within its sequences.
        tokens = self.rows * (self.row_tokens or self.workload.tokens)
        sequences = tokens / self.workload.tokens
        features = config.adapter.num_features
        work = layer_work(shape, features, tokens, sequences, is_dense=False)
        repeats = self.micro_batches(num_ranks)
        traffic = step_traffic(
            shape,
            config.adapter,
            passes,
            stage=stage or 0,
            num_ranks=num_ranks,
            itemsize=self.itemsize,
            micro_batches=repeats,
        )
        of_rank = adapter_parameters(shape, config.adapter) / (num_ranks if stage else 1)
        return StepTime(
            repeats * step_flops(passes, work) / self.rate.flops,
            of_rank * _ADAM_BYTES / self.device.memory_bandwidth,
            traffic.seconds(self.device, num_ranks),
        )

    def scale(
        self, stage: int | None, num_ranks: int, *, checkpointing: bool | None = None
    ) -> Scale:
        """Time for all data on so many ranks."""
        batch_size = self.batch_size(num_ranks)
        steps = math.ceil(self.workload.sequences / batch_size) * self.workload.epochs
        if self.config.run.max_steps is not None:
            steps = min(steps, self.config.run.max_steps)
        step = self.step_time(stage, num_ranks, checkpointing=checkpointing)
        return Scale(num_ranks, batch_size, step, steps * step.total / 86_400)

    def scales(self, num_ranks: Sequence[int]) -> list[tuple[int | None, bool, Scale]]:
        """What is `cheapest` and its time, for each number of ranks where something fits."""
        found = []
        for ranks in num_ranks:
            try:
                stage, checkpointing = self.cheapest(ranks)
            except LookupError:
                continue
            scale = self.scale(stage, ranks, checkpointing=checkpointing)
            found.append((stage, checkpointing, scale))
        return found

    def _objective(self, checkpointing: bool | None) -> ObjectiveConfig:
        objective = self.config.objective
        if checkpointing is None:
            return objective
        return objective.model_copy(update={"gradient_checkpointing": checkpointing})

"""Which sequences make which optimizer step.

The order depends on (seed, epoch) alone and a step on its number alone: not on the number of
ranks, and not on how often training was interrupted.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from tca_fast.config import RunConfig
from tca_fast.errors import UserError
from tca_fast.training.batches import MicroBatch, collate, pack_row
from tca_fast.training.data import Encoded

# Rows filled at least so far are as good as full: dealt to ranks together, none waits for long.
_FULL = 0.98
# Tokens of a sequence whose attention costs as much as all the rest, about: parameters / (layers *
# width) of a 7B model. It only orders the rows of a step, so other models need no other.
_ATTENTION_EQUALS_REST = 70_000


def seed_from(*parts: object) -> int:
    """A 63-bit generator seed that depends on every part, e.g. `seed_from("order", 42, epoch)`."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class Plan(ABC):
    """The micro-batches of every optimizer step.

    The last, smaller batch of an epoch is a step of its own (contract §3.12 #1 and #2 mended).
    """

    @property
    @abstractmethod
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the sequences."""

    @abstractmethod
    def groups(self, step: int) -> list[list[int]]:
        """Sequence indices of every micro-batch of a step, counted from 0 over all epochs."""

    @abstractmethod
    def cut(self, sequences: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
        """Any sequences, `lengths[i]` tokens each, cut into micro-batches as in training."""

    @abstractmethod
    def collate(
        self, sequences: Sequence[Encoded], pad_id: int, loss_on_prompt: bool
    ) -> MicroBatch:
        """The tensors of one micro-batch."""

    def total_steps(self, num_epochs: int, max_steps: int | None) -> int:
        """Optimizer steps of the run, which is also the length of the schedule."""
        total = self.steps_per_epoch * num_epochs
        return total if max_steps is None else min(total, max_steps)

    def sequences(self, step: int) -> list[int]:
        """Sequence indices of a step."""
        return [index for group in self.groups(step) for index in group]

    def micro_batches(self, step: int, rank: int, num_ranks: int) -> list[tuple[list[int], float]]:
        """Sequence indices and weight of each micro-batch that `rank` runs in `step`."""
        return deal(self.groups(step), rank, num_ranks)


def deal(groups: list[list[int]], rank: int, num_ranks: int) -> list[tuple[list[int], float]]:
    """Deal micro-batches to ranks like cards: micro-batch j goes to rank `j % num_ranks`.

    The set of micro-batches is the same at any number of ranks. Every rank gets as many: where
    the cards run out it repeats the last one with weight 0, because the collectives inside a
    forward and backward (ZeRO) need every rank.
    """
    cards = [(group, 1.0) for group in groups]
    cards += [(groups[-1], 0.0)] * (-len(cards) % num_ranks)
    return cards[rank::num_ranks]


@dataclass(frozen=True)
class BatchPlan(Plan):
    """Steps of a number of sequences, padded; `steps_per_epoch` is ceil(sequences / batch)."""

    num_sequences: int
    train_batch_size: int
    micro_batch_size: int
    seed: int

    @classmethod
    def from_config(cls, run: RunConfig, num_sequences: int, num_ranks: int) -> BatchPlan:
        """The plan of a training run.

        Raises:
            UserError: the batch does not divide into whole micro-batches on every rank.
        """
        check_share(run, num_ranks)
        size = run.per_device_train_batch_size
        return cls(num_sequences, run.train_batch_size, size, run.seed)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the sequences."""
        return math.ceil(self.num_sequences / self.train_batch_size)

    def order(self, epoch: int) -> torch.Tensor:
        """Permutation of the sequences in `epoch`, int64 `[num_sequences]`."""
        return _permutation(self.num_sequences, "order", self.seed, epoch)

    def groups(self, step: int) -> list[list[int]]:
        """Sequence indices of every micro-batch of a step, counted from 0 over all epochs."""
        epoch, index = divmod(step, self.steps_per_epoch)
        start = index * self.train_batch_size
        return self.cut(self.order(epoch)[start : start + self.train_batch_size].tolist())

    def cut(self, sequences: Sequence[int], lengths: Sequence[int] = ()) -> list[list[int]]:
        """`micro_batch_size` sequences each, the last one with what is left."""
        size = self.micro_batch_size
        return [list(sequences[start : start + size]) for start in range(0, len(sequences), size)]

    def collate(
        self, sequences: Sequence[Encoded], pad_id: int, loss_on_prompt: bool
    ) -> MicroBatch:
        """Padded on the right."""
        return collate(sequences, pad_id, loss_on_prompt)


class PackedPlan(Plan):
    """Steps of a number of tokens: sequences side by side in rows of limited length.

    Every epoch packs all its sequences anew. Rows come in random order; only those that could not
    be filled are put into steps with their like. Within a step the costliest row comes first, so
    that the rows which ranks run at the same time are alike and none waits long for another.

    Attributes:
        lengths: tokens of every sequence.
        row_tokens: tokens that fit into a row, which is one micro-batch.
        rows_per_step: rows of an optimizer step over all ranks.
    """

    def __init__(
        self, lengths: Sequence[int], row_tokens: int, rows_per_step: int, seed: int
    ) -> None:
        """No sequence may be longer than a row."""
        self.lengths, self.row_tokens = lengths, row_tokens
        self.rows_per_step, self.seed = rows_per_step, seed
        self._epoch = 0, self._steps(0)

    @classmethod
    def from_config(cls, run: RunConfig, lengths: Sequence[int], num_ranks: int) -> PackedPlan:
        """The plan of a training run with a token budget.

        Raises:
            UserError: the budget does not divide into whole rows on every rank, or a sequence
                does not fit into a row.
        """
        row_tokens, budget = run.per_device_train_batch_tokens, run.train_batch_tokens
        assert row_tokens is not None and budget is not None, "checked by RunConfig"
        check_share(run, num_ranks)
        if max(lengths) > row_tokens:
            raise UserError(
                f"run.per_device_train_batch_tokens: {row_tokens} is less than the longest "
                f"sequence, {max(lengths)} tokens; raise it, or lower data.max_length"
            )
        return cls(lengths, row_tokens, budget // row_tokens, run.seed)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass; rows are as many in every epoch, see `pack`."""
        return len(self._epoch[1])

    @property
    def empty_share(self) -> float:
        """Share of the token budget of an epoch's rows that no sequence fills."""
        num_rows = sum(map(len, self._epoch[1]))
        return 1 - sum(self.lengths) / (num_rows * self.row_tokens)

    def groups(self, step: int) -> list[list[int]]:
        """Sequence indices of every row of a step, counted from 0 over all epochs."""
        epoch, index = divmod(step, self.steps_per_epoch)
        known = self._epoch
        if known[0] != epoch:
            known = self._epoch = epoch, self._steps(epoch)
        return known[1][index]

    def cut(self, sequences: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
        """Any sequences packed into rows."""
        return [
            [sequences[place] for place in row]
            for row in pack(range(len(sequences)), lengths, self.row_tokens)
        ]

    def collate(
        self, sequences: Sequence[Encoded], pad_id: int, loss_on_prompt: bool
    ) -> MicroBatch:
        """One row without padding."""
        return pack_row(sequences, loss_on_prompt)

    def _steps(self, epoch: int) -> list[list[list[int]]]:
        order = _permutation(len(self.lengths), "order", self.seed, epoch).tolist()
        rows = pack(order, self.lengths, self.row_tokens)
        rows = [rows[place] for place in _permutation(len(rows), "rows", self.seed, epoch)]
        full = _FULL * self.row_tokens
        rows.sort(key=lambda row: -min(full, sum(self.lengths[index] for index in row)))
        size = self.rows_per_step
        steps = [rows[start : start + size] for start in range(0, len(rows), size)]
        for step in steps:
            step.sort(key=self._cost, reverse=True)
        # The last step may be smaller and stays last.
        whole = len(rows) // size
        return [
            *(steps[place] for place in _permutation(whole, "steps", self.seed, epoch)),
            *steps[whole:],
        ]

    def _cost(self, row: list[int]) -> float:
        """Of a row's forward and backward, in tokens of a short sequence."""
        lengths = (self.lengths[index] for index in row)
        return sum(length + length**2 / _ATTENTION_EQUALS_REST for length in lengths)


def pack(order: Iterable[int], lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Sequences in as few rows as best-fit decreasing finds.

    The longest sequence is placed first, always into the row where it leaves the least space.
    `order` decides only between sequences of one length, so the number of rows does not depend
    on it.

    Args:
        order: indices of the sequences to place.
        lengths: tokens of each, by index, at most `row_tokens`.
        row_tokens: tokens that fit into a row.
    """
    rows: list[list[int]] = []
    rows_by_space: dict[int, list[list[int]]] = {}
    spaces: list[int] = []  # the keys, ascending
    for index in sorted(order, key=lambda index: -lengths[index]):
        place = bisect_left(spaces, lengths[index])
        if place == len(spaces):
            row: list[int] = []
            space = row_tokens
            rows.append(row)
        else:
            space = spaces[place]
            row = rows_by_space[space].pop()
            if not rows_by_space[space]:
                del rows_by_space[space], spaces[place]
        row.append(index)
        space -= lengths[index]
        if space not in rows_by_space:
            rows_by_space[space] = []
            spaces.insert(bisect_left(spaces, space), space)
        rows_by_space[space].append(row)
    return rows


def _permutation(count: int, name: str, seed: int, epoch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed_from(name, seed, epoch))
    return torch.randperm(count, generator=generator)


def check_share(run: RunConfig, num_ranks: int) -> None:
    """Refuse a global batch that does not divide into whole micro-batches on every rank.

    Raises:
        UserError: it does not.
    """
    field, whole, part = "train_batch_size", run.train_batch_size, run.per_device_train_batch_size
    if run.train_batch_tokens is not None and run.per_device_train_batch_tokens is not None:
        field, whole = "train_batch_tokens", run.train_batch_tokens
        part = run.per_device_train_batch_tokens
    share = part * num_ranks
    if whole % share:
        raise UserError(
            f"run.{field}: {whole} is not divisible by run.per_device_{field}={part} times "
            f"{num_ranks} rank(s); make it a multiple of {share}"
        )

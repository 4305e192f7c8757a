"""Which sequences make which optimizer step, and how they become tensors.

The order depends on (seed, epoch) alone and a step on its number alone: not on the number of
ranks, and not on how often training was interrupted.
"""

from __future__ import annotations

import hashlib
import math
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from tca_fast.config import RunConfig
from tca_fast.errors import UserError
from tca_fast.training.data import Corpus, Encoded, Encoder


def seed_from(*parts: object) -> int:
    """A 63-bit generator seed that depends on every part, e.g. `seed_from("order", 42, epoch)`."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class MicroBatch(NamedTuple):
    """Sequences of one forward, padded on the right to the longest of them.

    Attributes:
        input_ids: int64 `[B, S]`.
        attention_mask: int64 `[B, S]`, 1 at real tokens.
        labels: int64 `[B, S]`, the ids, -100 at padding (and at prompt tokens when those do not
            count). Padded on the same side as `input_ids` whatever the tokenizer prefers.
        weight: 1.0, or 0.0 for a stand-in that only keeps a rank in step with the others.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    weight: float = 1.0

    def to(self, device: torch.device) -> MicroBatch:
        """The same on a device, without waiting for it."""
        return self._replace(
            input_ids=to_device(self.input_ids, device),
            attention_mask=to_device(self.attention_mask, device),
            labels=to_device(self.labels, device),
        )

    @property
    def label_tokens(self) -> int:
        """Positions t with `labels[t+1] != -100`; 0 for a stand-in."""
        return int((self.labels[:, 1:] != -100).sum()) if self.weight else 0

    @property
    def real_tokens(self) -> int:
        """Positions with `attention_mask` 1; 0 for a stand-in."""
        return int(self.attention_mask.sum()) if self.weight else 0


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on a device, without waiting for what the device is doing.

    Only a copy from pinned memory waits for nothing; its source stays alive until it is done.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class StepBatch(NamedTuple):
    """One rank's share of one optimizer step.

    Attributes:
        micro_batches: as many on every rank.
        label_tokens, real_tokens: this rank's counts; summed over ranks they are the step's.
        truncated: sequences cut to `max_length`.
        error: message of a `UserError` met while making it; the micro-batches are then empty.
    """

    micro_batches: list[MicroBatch]
    label_tokens: int = 0
    real_tokens: int = 0
    truncated: int = 0
    error: str = ""


def collate(sequences: Sequence[Encoded], pad_id: int, loss_on_prompt: bool) -> MicroBatch:
    """Pad sequences on the right into one micro-batch (contract §4.3, §3.12 #3 mended)."""
    longest = max(len(sequence.ids) for sequence in sequences)
    shape = (len(sequences), longest)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, -100, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        length = len(sequence.ids)
        start = 0 if loss_on_prompt else sequence.prompt_length
        input_ids[row, :length] = sequence.ids
        attention_mask[row, :length] = 1
        labels[row, start:length] = sequence.ids[start:]
    return MicroBatch(input_ids, attention_mask, labels)


@dataclass(frozen=True)
class BatchPlan:
    """The sequences of every optimizer step.

    The last, smaller batch of an epoch is a step of its own, so `steps_per_epoch` is
    `ceil(num_sequences / train_batch_size)` (contract §3.12 #1 and #2 mended).
    """

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
        share = run.per_device_train_batch_size * num_ranks
        if run.train_batch_size % share:
            raise UserError(
                f"run.train_batch_size: {run.train_batch_size} is not divisible by "
                f"run.per_device_train_batch_size={run.per_device_train_batch_size} times "
                f"{num_ranks} rank(s); make it a multiple of {share}"
            )
        return cls(num_sequences, run.train_batch_size, run.per_device_train_batch_size, run.seed)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the sequences."""
        return math.ceil(self.num_sequences / self.train_batch_size)

    def total_steps(self, num_epochs: int, max_steps: int | None) -> int:
        """Optimizer steps of the run, which is also the length of the schedule."""
        total = self.steps_per_epoch * num_epochs
        return total if max_steps is None else min(total, max_steps)

    def order(self, epoch: int) -> torch.Tensor:
        """Permutation of the sequences in `epoch`, int64 `[num_sequences]`."""
        generator = torch.Generator().manual_seed(seed_from("order", self.seed, epoch))
        return torch.randperm(self.num_sequences, generator=generator)

    def sequences(self, step: int) -> list[int]:
        """Sequence indices of optimizer step `step`, counted from 0 over all epochs."""
        epoch, index = divmod(step, self.steps_per_epoch)
        start = index * self.train_batch_size
        return self.order(epoch)[start : start + self.train_batch_size].tolist()

    def micro_batches(self, step: int, rank: int, num_ranks: int) -> list[tuple[list[int], float]]:
        """Sequence indices and weight of each micro-batch that `rank` runs in `step`."""
        return deal(self.sequences(step), self.micro_batch_size, rank, num_ranks)


def deal(
    sequences: list[int], micro_batch_size: int, rank: int, num_ranks: int
) -> list[tuple[list[int], float]]:
    """Deal micro-batches to ranks like cards: micro-batch j goes to rank `j % num_ranks`.

    The set of micro-batches is the same at any number of ranks. Every rank gets as many: where
    the cards run out it repeats the first one with weight 0, because the collectives inside a
    forward and backward (ZeRO) need every rank.
    """
    cards = [
        (sequences[start : start + micro_batch_size], 1.0)
        for start in range(0, len(sequences), micro_batch_size)
    ]
    cards += [(cards[0][0], 0.0)] * (-len(cards) % num_ranks)
    return cards[rank::num_ranks]


class _Steps(Dataset[StepBatch]):
    """Map-style dataset whose item `step` is that optimizer step's share of one rank."""

    def __init__(
        self,
        corpus: Corpus,
        encoder: Encoder,
        plan: BatchPlan,
        rank: int,
        num_ranks: int,
        cache: dict[int, Encoded] | None,
    ) -> None:
        self.corpus, self.encoder, self.plan = corpus, encoder, plan
        self.rank, self.num_ranks = rank, num_ranks
        self.cache = cache

    def __getitem__(self, step: int) -> StepBatch:
        dealt = self.plan.micro_batches(step, self.rank, self.num_ranks)
        try:
            return make_step_batch(self.corpus, self.encoder, dealt, self.cache)
        except UserError as error:
            # Returned rather than raised: a DataLoader worker would wrap it in a traceback.
            return StepBatch([], error=str(error))


def make_step_batch(
    corpus: Corpus,
    encoder: Encoder,
    dealt: list[tuple[list[int], float]],
    cache: dict[int, Encoded] | None = None,
) -> StepBatch:
    """Encode and collate dealt micro-batches; `cache` keeps ids by sequence index.

    Raises:
        UserError: a sequence that cannot be encoded, or an id that the models do not know.
    """
    pad_id = pad_token_id(encoder.tokenizer, encoder.vocab_size)
    micro_batches: list[MicroBatch] = []
    truncated = 0
    for indices, weight in dealt:
        sequences = [encode_cached(corpus, encoder, index, cache) for index in indices]
        micro_batch = collate(sequences, pad_id, encoder.config.loss_on_prompt)
        largest = int(micro_batch.input_ids.max())
        if encoder.vocab_size is not None and largest >= encoder.vocab_size:
            raise UserError(
                f"pair.target: its tokenizer gives id {largest} near line "
                f"{sequences[0].line_number} of {corpus.path}, its embedding has "
                f"{encoder.vocab_size} rows; give the tokenizer that belongs to the model"
            )
        micro_batches.append(micro_batch._replace(weight=weight))
        if weight:
            truncated += sum(len(one.ids) < one.original_length for one in sequences)
    return StepBatch(
        micro_batches,
        sum(micro_batch.label_tokens for micro_batch in micro_batches),
        sum(micro_batch.real_tokens for micro_batch in micro_batches),
        truncated,
    )


def encode_cached(
    corpus: Corpus, encoder: Encoder, index: int, cache: dict[int, Encoded] | None
) -> Encoded:
    """Token ids of sequence `index`, from `cache` when they are there."""
    if cache is not None and index in cache:
        return cache[index]
    encoded = encoder.encode(corpus.conversation(index))
    if cache is not None:
        cache[index] = encoded
    return encoded


def check_lengths(corpus: Corpus, encoder: Encoder, cache: dict[int, Encoded] | None) -> None:
    """With `truncate` off, find a sequence that is too long before anything is trained.

    Raises:
        UserError: naming the line, its length and the limit.
    """
    if not encoder.config.truncate:
        for index in range(len(corpus)):
            encode_cached(corpus, encoder, index, cache)


def pad_token_id(tokenizer: Any, vocab_size: int | None = None) -> int:
    """The id that fills padding: pad, else end of sequence, else 0; masked in every use.

    An id outside the model's vocabulary, such as a pad token added for other purposes, is no use.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None and (vocab_size is None or token < vocab_size):
            return int(token)
    return 0


def step_batches(
    corpus: Corpus,
    encoder: Encoder,
    plan: BatchPlan,
    steps: range,
    rank: int = 0,
    num_ranks: int = 1,
    cache: dict[int, Encoded] | None = None,
) -> Iterator[StepBatch]:
    """This rank's share of each optimizer step in `steps`, in order.

    With `data.num_workers` > 0 worker processes tokenize ahead of the training loop; otherwise
    it happens here, and `cache` remembers it for the next epoch.
    """
    num_workers = encoder.config.num_workers
    if num_workers:
        # The workers are the parallelism; without this the tokenizers library warns at every fork.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    dataset = _Steps(corpus, encoder, plan, rank, num_ranks, None if num_workers else cache)
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=steps,  # a range is a sequence of step numbers
        num_workers=num_workers,
        collate_fn=_as_is,
        generator=torch.Generator(),  # else it would draw from the global one
        worker_init_fn=_ignore_signals if num_workers else None,
    )
    return iter(loader)


def _as_is(batch: Any) -> Any:
    return batch


def _ignore_signals(worker: int) -> None:
    """Ctrl-C reaches the whole process group; the loop decides when the workers end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

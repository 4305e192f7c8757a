"""How sequences become the tensors of a micro-batch: padded rows, or one packed row."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch

from tca_fast.bridging.inputs import Packing
from tca_fast.errors import UserError
from tca_fast.losses import IGNORED_LABEL
from tca_fast.training.data import Corpus, Encoded, Encoder


class MicroBatch(NamedTuple):
    """Sequences of one forward, padded on the right to the longest of them, or packed.

    Attributes:
        input_ids: int64 `[B, S]`.
        attention_mask: int64 `[B, S]`, 1 at real tokens.
        labels: int64 `[B, S]`, the ids, -100 at padding (and at prompt tokens when those do not
            count). Padded on the same side as `input_ids` whatever the tokenizer prefers.
        weight: 1.0, or 0.0 for a stand-in that only keeps a rank in step with the others.
        packing: where the sequences of a packed row lie; B is 1 then.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    weight: float = 1.0
    packing: Packing | None = None

    def to(self, device: torch.device) -> MicroBatch:
        """The same on a device, without waiting for it."""
        return self._replace(
            input_ids=to_device(self.input_ids, device),
            attention_mask=to_device(self.attention_mask, device),
            labels=to_device(self.labels, device),
            packing=self.packing
            and self.packing._replace(
                position_ids=to_device(self.packing.position_ids, device),
                boundaries=to_device(self.packing.boundaries, device),
            ),
        )

    @property
    def num_sequences(self) -> int:
        """Sequences in it; 0 for a stand-in."""
        if not self.weight:
            return 0
        return len(self.input_ids) if self.packing is None else len(self.packing.boundaries) - 1

    @property
    def label_tokens(self) -> int:
        """Positions t with `labels[t+1] != -100`; 0 for a stand-in."""
        return int((self.labels[:, 1:] != IGNORED_LABEL).sum()) if self.weight else 0

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


#: From sequences, the padding id and whether prompt tokens count.
Collate = Callable[[Sequence[Encoded], int, bool], MicroBatch]


def collate(sequences: Sequence[Encoded], pad_id: int, loss_on_prompt: bool) -> MicroBatch:
    """Pad sequences on the right into one micro-batch (contract §4.3, §3.12 #3 mended)."""
    longest = max(len(sequence.ids) for sequence in sequences)
    shape = (len(sequences), longest)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED_LABEL, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        length = len(sequence.ids)
        start = 0 if loss_on_prompt else sequence.prompt_length
        input_ids[row, :length] = sequence.ids
        attention_mask[row, :length] = 1
        labels[row, start:length] = sequence.ids[start:]
    return MicroBatch(input_ids, attention_mask, labels)


def pack_row(sequences: Sequence[Encoded], loss_on_prompt: bool) -> MicroBatch:
    """Sequences side by side in one row, without padding."""
    input_ids = torch.cat([sequence.ids for sequence in sequences]).long().unsqueeze(0)
    packing = Packing.of([len(sequence.ids) for sequence in sequences])
    labels = packing.without_borders(input_ids)
    if not loss_on_prompt:
        for start, sequence in zip(packing.boundaries.tolist(), sequences, strict=False):
            labels[:, start : start + sequence.prompt_length] = IGNORED_LABEL
    return MicroBatch(input_ids, torch.ones_like(input_ids), labels, packing=packing)


def make_step_batch(
    corpus: Corpus,
    encoder: Encoder,
    dealt: list[tuple[list[int], float]],
    cache: Mapping[int, Encoded] | None = None,
    collate: Collate = collate,
) -> StepBatch:
    """Encode and collate dealt micro-batches; `cache` has or keeps ids by sequence index.

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
    corpus: Corpus, encoder: Encoder, index: int, cache: Mapping[int, Encoded] | None
) -> Encoded:
    """Token ids of sequence `index`, from `cache` when they are there, into it when they fit."""
    if cache is not None and index in cache:
        return cache[index]
    encoded = encoder.encode(corpus.conversation(index))
    if isinstance(cache, MutableMapping):
        cache[index] = encoded
    return encoded


def check_lengths(corpus: Corpus, encoder: Encoder, cache: Mapping[int, Encoded] | None) -> None:
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


def worker_options(num_workers: int) -> dict[str, Any]:
    """Of a DataLoader that hands on items as they are, and whose workers leave Ctrl-C to us."""
    if num_workers:
        # The workers are the parallelism; without this the tokenizers library warns at every fork.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return {
        "batch_size": None,
        "num_workers": num_workers,
        "collate_fn": _as_is,
        "generator": torch.Generator(),  # else it would draw from the global one
        "worker_init_fn": _ignore_signals if num_workers else None,
    }


def _as_is(batch: Any) -> Any:
    return batch


def _ignore_signals(worker: int) -> None:
    """Ctrl-C reaches the whole process group; the loop decides when the workers end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

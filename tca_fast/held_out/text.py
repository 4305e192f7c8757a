"""Held-out conversations as batches that a forward has room for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tca_fast.config import TrainConfig
from tca_fast.evaluation.faithfulness import Batch
from tca_fast.training.batches import make_step_batch
from tca_fast.training.data import Corpus, Encoded, Encoder, open_corpus
from tca_fast.training.run import target_tokenizer

# Of one forward, padding included: both models' logits are there at once.
BATCH_TOKENS = 8192


@dataclass(frozen=True)
class HeldOutText:
    """The first conversations of a file, as the run reads them.

    Attributes:
        corpus: the file.
        encoder: format and tokenizer of the run.
        sequences: token ids, in the file's order.
    """

    corpus: Corpus
    encoder: Encoder
    sequences: Sequence[Encoded]

    @property
    def num_truncated(self) -> int:
        """Sequences cut to `data.max_length`."""
        return sum(len(one.ids) < one.original_length for one in self.sequences)

    def describe(self) -> dict[str, Any]:
        """Which text this is, as plain data."""
        data = self.encoder.config
        return {
            "file": data.validation,
            "sha256": self.corpus.digest,
            "sequences": len(self.sequences),
            "truncated": self.num_truncated,
            "format": data.format,
            "max_length": data.max_length,
            "loss_on_prompt": data.loss_on_prompt,
            "append_eos": data.append_eos,
        }

    def batches(self, vocab_size: int, batch_tokens: int = BATCH_TOKENS) -> list[Batch]:
        """Sequences in their order, as many together as the budget allows, at least one.

        Args:
            vocab_size: rows of the models' embedding.
            batch_tokens: of a batch, padding included.

        Raises:
            UserError: the tokenizer gives an id that the models do not know.
        """
        self.encoder.vocab_size = vocab_size
        dealt = [(group, 1.0) for group in self._groups(batch_tokens)]
        cache = dict(enumerate(self.sequences))
        made = make_step_batch(self.corpus, self.encoder, dealt, cache)
        return [Batch(*micro_batch[:3]) for micro_batch in made.micro_batches]

    def _groups(self, batch_tokens: int) -> list[list[int]]:
        lengths = [len(sequence.ids) for sequence in self.sequences]
        groups: list[list[int]] = [[]]
        for index in range(len(lengths)):
            together = [*groups[-1], index]
            longest = max(lengths[one] for one in together)
            if len(together) * longest > batch_tokens and groups[-1]:
                groups.append([])
            groups[-1].append(index)
        return groups


def read_text(config: TrainConfig, num_samples: int, field: str = "data.validation") -> HeldOutText:
    """Read and tokenize the first conversations of `data.validation`.

    Args:
        config: of the run; it names a validation file.
        num_samples: conversations at most.
        field: what named the file, for messages.

    Raises:
        UserError: a file or tokenizer that cannot be read, or what `Encoder` refuses.
    """
    encoder = Encoder(target_tokenizer(config), config.data, field)
    corpus = open_corpus(str(config.data.validation), field, config.data.bad_lines)
    count = min(num_samples, len(corpus))
    return HeldOutText(
        corpus, encoder, [encoder.encode(corpus.conversation(index)) for index in range(count)]
    )

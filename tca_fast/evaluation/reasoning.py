"""Task accuracy by greedy generation: how often, how long-winded, how hesitant.

Shapes: B sequences still being written, S positions so far, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tca_fast.errors import UserError
from tca_fast.subject import evaluated

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tca_fast.adapted_model import AdaptedModel


class Problem(NamedTuple):
    """A prompt as the model reads it (all special tokens included) and its right answer."""

    prompt_ids: Sequence[int]
    answer: str


class Response(NamedTuple):
    """What a model wrote.

    Attributes:
        text: decoded without special tokens.
        num_tokens: tokens written, the end-of-sequence token not counted.
        truncated: whether the token limit came before the end of sequence.
        correct: the checker's verdict.
        num_waits: hesitations counted in `text`.
    """

    text: str
    num_tokens: int
    truncated: bool
    correct: bool
    num_waits: int


@dataclass(frozen=True, slots=True)
class Reasoning:
    """One model's responses to a set of problems, in their order, and the figures they give."""

    responses: tuple[Response, ...]

    @property
    def accuracy(self) -> float:
        """Share of problems answered right."""
        return sum(response.correct for response in self.responses) / len(self.responses)

    @property
    def accuracy_se(self) -> float:
        """Binomial standard error of the accuracy, sqrt(p(1 - p)/n)."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / len(self.responses))

    @property
    def mean_length(self) -> float:
        """Mean response length in tokens."""
        return sum(response.num_tokens for response in self.responses) / len(self.responses)

    @property
    def mean_length_se(self) -> float:
        """Standard error of the mean length, s/sqrt(n) with the sample deviation s; 0 for n = 1."""
        count = len(self.responses)
        if count < 2:
            return 0.0
        squares = sum((r.num_tokens - self.mean_length) ** 2 for r in self.responses)
        return math.sqrt(squares / (count - 1) / count)

    @property
    def waits_per_response(self) -> float:
        """Mean number of hesitations per response."""
        return sum(response.num_waits for response in self.responses) / len(self.responses)

    @property
    def truncated_share(self) -> float:
        """Share of responses cut at the token limit."""
        return sum(response.truncated for response in self.responses) / len(self.responses)


def measure_reasoning(
    model: PreTrainedModel | AdaptedModel,
    tokenizer: Any,
    problems: Sequence[Problem],
    *,
    check: Callable[[str, str], bool],
    count_waits: Callable[[str], int],
    max_new_tokens: int,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> Reasoning:
    """Answer every problem greedily and judge the responses.

    Args:
        model: a Hugging Face causal LM, with or without adapters; left in the train/eval mode it
            came in.
        tokenizer: decodes responses and names the end-of-sequence token.
        problems: prompts and answers, in any order; prompts of like length are batched together.
        check: `check(answer, response_text)`: is the response right?
        count_waits: hesitations in a response text.
        max_new_tokens: tokens after which a response is cut, at least 1.
        batch_size: responses written side by side, at least 1.
        progress: called with the number of responses that have just been finished.

    Raises:
        UserError: no problems, an empty prompt, no end-of-sequence token to stop at, or a batch
            size or limit below 1.
    """
    if batch_size < 1:
        raise UserError(f"batch_size: {batch_size} problems at once answer none; give 1 or more")
    if not problems:
        raise UserError("problems: none given; pass at least one problem to measure accuracy")
    by_length = sorted(range(len(problems)), key=lambda index: len(problems[index].prompt_ids))
    responses: dict[int, Response] = {}
    with evaluated(model) as bare:
        eos_ids = end_of_sequence_ids(bare, tokenizer)
        for start in range(0, len(by_length), batch_size):
            chosen = by_length[start : start + batch_size]
            prompts = [problems[index].prompt_ids for index in chosen]
            for position, ids in _generate(bare, prompts, eos_ids, max_new_tokens):
                index = chosen[position]
                ended = ids[-1] in eos_ids
                text = tokenizer.decode(ids, skip_special_tokens=True)
                responses[index] = Response(
                    text=text,
                    num_tokens=len(ids) - ended,
                    truncated=not ended,
                    correct=check(problems[index].answer, text),
                    num_waits=count_waits(text),
                )
                if progress is not None:
                    progress(1)
    return Reasoning(tuple(responses[index] for index in range(len(problems))))


def generate_greedily(
    model: PreTrainedModel | AdaptedModel,
    prompts: Sequence[Sequence[int]],
    *,
    eos_ids: Collection[int],
    max_new_tokens: int,
) -> list[list[int]]:
    """Continue every prompt with the most likely token until an end of sequence or the limit.

    One batch with left padding and a KV cache. `transformers`' own `generate` is not used because
    it takes sampling defaults from the model's files (temperature, repetition penalty) and keeps
    finished responses in the batch until the slowest is done.

    Args:
        prompts: token ids, at least one each.
        eos_ids: tokens that end a response; the one that did is part of the result.
        max_new_tokens: most tokens written per prompt.

    Returns:
        The new tokens of each prompt.

    Raises:
        UserError: an empty prompt, or a limit below 1.
    """
    with evaluated(model) as bare:
        written = dict(_generate(bare, prompts, eos_ids, max_new_tokens))
    return [written[index] for index in range(len(prompts))]


def end_of_sequence_ids(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """Tokens at which a response ends: the tokenizer's and those of the generation config.

    Raises:
        UserError: neither names one.
    """
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    found = frozenset(token for token in (*listed, tokenizer.eos_token_id) if token is not None)
    if not found:
        raise UserError(
            "eos_token_id: neither the tokenizer nor generation_config.json names an "
            "end-of-sequence token; set tokenizer.eos_token"
        )
    return found


@torch.inference_mode()
def _generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    eos_ids: Collection[int],
    max_new_tokens: int,
) -> Iterator[tuple[int, list[int]]]:
    """Yield (index of the prompt, new tokens) as responses are finished."""
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens: {max_new_tokens} leaves nothing to write; give 1 or more")
    device = model.device
    ids_BS, mask_BS = _left_pad(prompts, device)
    live = list(range(len(prompts)))
    written: list[list[int]] = [[] for _ in prompts]
    cache = None
    for _ in range(max_new_tokens):
        positions = (mask_BS.cumsum(-1) - 1).clamp(min=0)[:, -ids_BS.shape[1] :]
        output = model(
            input_ids=ids_BS,
            attention_mask=mask_BS,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        tokens_B = output.logits[:, -1].argmax(-1)
        going = []
        for row, token in enumerate(tokens_B.tolist()):
            written[live[row]].append(token)
            if token in eos_ids:
                yield live[row], written[live[row]]
            else:
                going.append(row)
        if not going:
            return
        if len(going) < len(live):
            rows = torch.tensor(going, device=device)
            cache.batch_select_indices(rows)
            tokens_B, mask_BS = tokens_B[rows], mask_BS[rows]
            live = [live[row] for row in going]
        ids_BS = tokens_B.unsqueeze(1)
        mask_BS = torch.cat([mask_BS, mask_BS.new_ones(len(live), 1)], dim=1)
    for index in live:
        yield index, written[index]


def _left_pad(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts as [B, S] ids and mask, padded on the left so that the next token is always at -1."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"problems: prompt {row} has no tokens; give at least one")
        ids[row, -len(prompt) :] = torch.tensor(prompt)
        mask[row, -len(prompt) :] = 1
    return ids.to(device), mask.to(device)

"""Score a model on the miniature's problems by greedy generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tca_fast.miniature.task import Problem, count_waits, is_correct


@dataclass(frozen=True, slots=True)
class Score:
    """Means over problems: share answered right, tokens per response (EOS not counted), waits per
    response.
    """

    accuracy: float
    mean_length: float
    waits: float
    accuracy_by_domain: dict[str, float]


@torch.no_grad()
def respond(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 90,
    batch_size: int = 64,
) -> list[tuple[str, int]]:
    """Greedy responses to user texts: (text, number of tokens), EOS left out of both, in the order
    of ``prompts``.

    Prompts are padded on the left and sorted by length inside; the model answers un-forced, right
    after ``<｜Assistant｜>``.
    """
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    encoded: list[list[int]] = [
        tokenizer(f"<｜User｜>{text}<｜Assistant｜>")["input_ids"] for text in prompts
    ]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    responses: list[tuple[str, int]] = [("", 0)] * len(encoded)
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        width = max(len(encoded[i]) for i in chunk)
        ids = torch.tensor(
            [[pad] * (width - len(encoded[i])) + encoded[i] for i in chunk], device=model.device
        )
        mask = torch.tensor(
            [[0] * (width - len(encoded[i])) + [1] * len(encoded[i]) for i in chunk],
            device=model.device,
        )
        made = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
        )
        for i, row in zip(chunk, made[:, width:].tolist(), strict=True):
            kept = row[: row.index(eos)] if eos in row else row
            responses[i] = (str(tokenizer.decode(kept)), len(kept))
    return responses


def score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem]
) -> Score:
    """Greedy accuracy, length and hesitation of ``model`` on ``problems``."""
    responses = respond(model, tokenizer, [p.prompt for p in problems])
    right = [is_correct(p.answer, text) for p, (text, _) in zip(problems, responses, strict=True)]
    by_domain: dict[str, list[bool]] = {}
    for problem, hit in zip(problems, right, strict=True):
        by_domain.setdefault(problem.domain, []).append(hit)
    count = len(problems)
    return Score(
        accuracy=sum(right) / count,
        mean_length=sum(length for _, length in responses) / count,
        waits=sum(count_waits(text) for text, _ in responses) / count,
        accuracy_by_domain={
            name: sum(hits) / len(hits) for name, hits in sorted(by_domain.items())
        },
    )

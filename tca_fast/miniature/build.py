"""Make the miniature once: tokenizer, data, a tiny base model and its reasoning-tuned sibling.

    python -m tca_fast.miniature.build --out DIR

1. *base*: random initial weights, trained on problems with direct answers and, in a smaller share,
   worked solutions, all in one prompt format; it holds the skill but answers directly.
2. *target*: all parameters of the base, tuned for a few steps with plain next-token loss on
   reasoning traces.

Both are rounded to bfloat16 before they are evaluated and written. Everything is seeded; the
figures depend on the machine's floating point only. Source: issue 2 item 9; the pair's shape
follows Qwen2.5-Math / R1-Distill (contract 2).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import platform
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import processors
from tqdm.auto import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from tca_fast.miniature.evaluate import Score, score
from tca_fast.miniature.task import Problem, Style, make_problem, make_problems

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜pad｜>"
SPECIAL = (BOS, EOS, PAD, "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "<unk>")
# How Qwen2's own pre-tokenizer, kept here, cuts the task's text once BPE has split off punctuation.
PIECES = r" ?[a-z]+|[0-9]|\s|[^\sa-z0-9]"


@dataclass(frozen=True, slots=True)
class Recipe:
    """Sizes, steps, rates and seeds of the build; the shipped assets are made with the defaults."""

    hidden_size: int = 96
    intermediate_size: int = 384
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    early_worked_share: float = 0.55
    late_worked_share: float = 0.1
    late_from: float = 0.85
    base_steps: int = 3200
    base_lr: float = 3e-3
    tune_steps: int = 900
    tune_lr: float = 2e-3
    batch_size: int = 32
    base_seed: int = 0
    tune_seed: int = 1
    train_size: int = 6000
    val_size: int = 400
    data_seed: int = 2


def bpe_tables(texts: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges under which every word of ``texts`` is one token.

    A word is built letter by letter from the left. Words after a space come first, so that no
    merge made for another word can fire inside them.
    """
    found = {piece for text in texts for piece in re.findall(PIECES, re.sub("</?think>", "", text))}
    pieces = sorted(piece.replace(" ", "Ġ").replace("\n", "Ċ") for piece in found)
    vocabulary = {piece: i for i, piece in enumerate((*SPECIAL, *pieces))}
    for letter in sorted({letter for piece in pieces for letter in piece}):
        vocabulary.setdefault(letter, len(vocabulary))
    merges: dict[tuple[str, str], None] = {}
    for word in sorted((p for p in pieces if len(p) > 1), key=lambda p: (p[0] != "Ġ", p)):
        for end in range(1, len(word)):
            merges[word[:end], word[end]] = None
            vocabulary.setdefault(word[: end + 1], len(vocabulary))
    return vocabulary, list(merges)


def build_tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE in Qwen2's own class, every word of the task a single token.

    ``AutoTokenizer`` of transformers 5 forces that class on every Qwen2 folder whatever the folder
    declares, hence no word-level model. ``decode(encode(text))`` is exactly ``text`` for all the
    task can write; BOS is put in front when special tokens are asked for, EOS never added.
    """
    problems = make_problems(4000, seed=0)
    texts = [
        t for p in problems for t in (p.prompt, p.response("reasoning"), p.response("careless"))
    ]
    vocabulary, merges = bpe_tables(texts)
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token="<unk>",
        additional_special_tokens=["<｜User｜>", "<｜Assistant｜>"],
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return tokenizer


def model_config(recipe: Recipe, tokenizer: Qwen2Tokenizer) -> Qwen2Config:
    """The configuration both models share."""
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_kv_heads,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        use_sliding_window=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def prompt_text(problem: Problem) -> str:
    """The prompt in the ``deepseek`` format, without BOS."""
    return f"<｜User｜>{problem.prompt}<｜Assistant｜>"


def make_batch(
    tokenizer: Qwen2Tokenizer, problems: list[Problem], styles: list[Style]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, both ``[B, T]`` int64, padded on the right.

    Labels are -100 on the prompt and on padding: prompts are random and hold nothing to learn.
    """
    prompts = [tokenizer(prompt_text(p))["input_ids"] for p in problems]
    responses = [
        tokenizer(p.response(style), add_special_tokens=False)["input_ids"]
        + [tokenizer.eos_token_id]
        for p, style in zip(problems, styles, strict=True)
    ]
    width = max(len(a) + len(b) for a, b in zip(prompts, responses, strict=True))
    ids = torch.full((len(problems), width), int(tokenizer.pad_token_id))
    labels = torch.full_like(ids, -100)
    for row, (a, b) in enumerate(zip(prompts, responses, strict=True)):
        ids[row, : len(a) + len(b)] = torch.tensor(a + b)
        labels[row, len(a) : len(a) + len(b)] = torch.tensor(b)
    return ids, labels


def train(
    model: Qwen2ForCausalLM,
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
    *,
    steps: int,
    lr: float,
    label: str,
) -> float:
    """Plain next-token training: AdamW, 4 % warm-up, cosine to zero, clip 1; returns the last loss
    (nats/token).

    Matrix products run in bfloat16 (more than twice as fast here, with eager attention),
    parameters stay fp32.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    warmup = max(1, steps // 25)
    model.train()
    loss = torch.tensor(math.nan)
    for step in (bar := tqdm(range(steps), desc=label)):
        scale = (
            (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * step / steps))
        )
        for group in optimizer.param_groups:
            group["lr"] = lr * scale
        ids, labels = next(batches)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return loss.item()


def batch_stream(
    tokenizer: Qwen2Tokenizer,
    recipe: Recipe,
    style: Callable[[random.Random, int], Style],
    *,
    seed: int,
    exclude: frozenset[str],
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless fresh batches without the prompts of ``exclude``; ``style`` gets a generator and the
    number of the batch and draws one response's style.
    """
    rng = random.Random(seed)
    for step in itertools.count():
        problems: list[Problem] = []
        while len(problems) < recipe.batch_size:
            problem = make_problem(rng)
            if problem.prompt not in exclude:
                problems.append(problem)
        yield make_batch(tokenizer, problems, [style(rng, step) for _ in problems])


def base_style(recipe: Recipe, rng: random.Random, step: int) -> Style:
    """Mostly worked solutions early, to learn the steps soon; a small share of them later."""
    early = step < recipe.late_from * recipe.base_steps
    share = recipe.early_worked_share if early else recipe.late_worked_share
    return "careless" if rng.random() < share else "direct"


def to_record(problem: Problem) -> str:
    """One JSON line in the OpenThoughts schema (contract 4.1), the reasoning trace as response."""
    return json.dumps(
        {
            "conversations": [
                {"from": "human", "value": problem.prompt},
                {"from": "gpt", "value": problem.response("reasoning")},
            ],
            "domain": problem.domain,
            "source": "miniature",
            "difficulty": problem.difficulty,
            "needs_truncation": False,
            "answer": problem.answer,
        }
    )


def round_and_save(
    model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, folder: Path
) -> Qwen2ForCausalLM:
    """Write ``model`` as bfloat16 with its tokenizer; returns it in fp32 holding exactly the
    written values.

    It is read back from the folder, because casting it up again would leave its rotary table
    rounded as well.
    """
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Qwen2ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def build(out: Path, recipe: Recipe) -> dict[str, object]:
    """Make everything under ``out`` (``base/ target/ train.jsonl val.jsonl provenance.json
    README.md``).

    Returns the provenance: recipe, scores of both models on the validation problems, versions,
    seconds.
    """
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    val = make_problems(recipe.val_size, recipe.data_seed)
    held_out = frozenset(p.prompt for p in val)
    data = make_problems(recipe.train_size, recipe.data_seed + 1, exclude=held_out)
    (out / "train.jsonl").write_text("".join(f"{to_record(p)}\n" for p in data), encoding="utf-8")
    (out / "val.jsonl").write_text("".join(f"{to_record(p)}\n" for p in val), encoding="utf-8")

    torch.manual_seed(recipe.base_seed)
    model = Qwen2ForCausalLM(model_config(recipe, tokenizer))
    model.set_attn_implementation("eager")
    scores: dict[str, Score] = {}
    stages: list[tuple[str, Callable[[random.Random, int], Style], int, int, float]] = [
        (
            "base",
            functools.partial(base_style, recipe),
            recipe.base_seed,
            recipe.base_steps,
            recipe.base_lr,
        ),
        (
            "target",
            lambda _rng, _step: "reasoning",
            recipe.tune_seed,
            recipe.tune_steps,
            recipe.tune_lr,
        ),
    ]
    for name, style, seed, steps, lr in stages:
        stream = batch_stream(tokenizer, recipe, style, seed=seed, exclude=held_out)
        train(model, stream, steps=steps, lr=lr, label=name)
        model = round_and_save(model, tokenizer, out / name)
        scores[name] = score(model, tokenizer, val)

    provenance: dict[str, object] = {
        "made_by": "python -m tca_fast.miniature.build",
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "scores_on_val": {name: asdict(value) for name, value in scores.items()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "seconds": round(time.monotonic() - started),
    }
    (out / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
    (out / "README.md").write_text(readme(scores), encoding="utf-8")
    return provenance


def readme(scores: dict[str, Score]) -> str:
    """A short page that says what lies in the folder."""
    rows = "\n".join(
        f"| {name} | {100 * s.accuracy:.1f} % | {s.mean_length:.1f} | {s.waits:.2f} |"
        for name, s in scores.items()
    )
    return f"""# The miniature

Made by `python -m tca_fast.miniature.build`; see `provenance.json` for seeds and steps, `task.py`
for the task.

`base/` answers directly, `target/` is its fine-tune on reasoning traces; bfloat16 Qwen2 with a
shared tokenizer. `train.jsonl` and `val.jsonl` share no prompt (OpenThoughts schema; add EOS to
the response when training).

On the prompts of `val.jsonl`, greedy decoding:

| model | accuracy | tokens per response | waits per response |
|---|---|---|---|
{rows}
"""


def main() -> None:
    """Command line: ``--out DIR`` and ``--threads N``."""
    parser = argparse.ArgumentParser(description="Make the miniature pair and its data.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(json.dumps(build(arguments.out, Recipe()), indent=2))


if __name__ == "__main__":
    main()

"""A tiny random pair on disk: character tokenizer, arithmetic in the OpenThoughts schema."""

import json
import random
from pathlib import Path

import torch
from tiny import tiny_qwen2
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tca_fast.config import DataConfig
from tca_fast.training.data import Corpus, Encoder, open_corpus

CHARACTERS = [*map(chr, range(32, 127)), "\n", "\uff5c"]
VOCABULARY = {token: i for i, token in enumerate(["<bos>", "<eos>", *CHARACTERS])}


def character_tokenizer(**options) -> PreTrainedTokenizerFast:
    """One token per character after a BOS; pads on the left by preference."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        **options,
    )


def conversation_line(prompt: str, response: str, **extra) -> str:
    turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": response}]
    return json.dumps({"conversations": turns, "domain": "math", **extra})


def data_settings(**changes) -> DataConfig:
    return DataConfig(train="unused.jsonl", **{"max_length": 1000, **changes})


def encoder(tokenizer=None, **changes) -> Encoder:
    return Encoder(tokenizer or character_tokenizer(), data_settings(**changes))


def write(path, *lines: bytes | str):
    path.write_bytes(
        b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines)
    )
    return str(path)


def corpus_of(tmp_path, count=9) -> Corpus:
    """Conversations that get longer from one to the next."""
    lines = [conversation_line(f"{i}?", "so " * i + "!") for i in range(count)]
    return open_corpus(write(tmp_path / "d.jsonl", *lines), "data.train")


def write_data(path: Path, num_sequences: int, seed: int) -> None:
    """Additions whose answers differ in length, so that micro-batches are padded."""
    draw = random.Random(seed)
    lines = []
    for _ in range(num_sequences):
        a, b = draw.randrange(100), draw.randrange(100)
        thinking = "so " * draw.randrange(1, 9)
        lines.append(conversation_line(f"{a}+{b}?", f"<think> {thinking}</think>{a + b}"))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_pair(root: Path, num_sequences: int = 22) -> Path:
    """Write models, tokenizer, data and run.yaml under `root`; returns the YAML file.

    22 sequences in batches of 4 leave a last batch of 2 in every epoch: one micro-batch of 2, so
    that the second of two ranks has none.
    """
    shape = {"vocab_size": len(VOCABULARY), "max_position_embeddings": 128, "bos_token_id": 0}
    shape |= {"eos_token_id": 1, "pad_token_id": 1}
    base, target = tiny_qwen2(seed=1, **shape), tiny_qwen2(seed=2, **shape)
    with torch.no_grad():
        for ours, theirs in zip(target.parameters(), base.parameters(), strict=True):
            ours.mul_(0.3).add_(theirs)
    for name, model in (("base", base), ("target", target)):
        model.save_pretrained(root / name)
        character_tokenizer().save_pretrained(root / name)
    write_data(root / "train.jsonl", num_sequences, seed=0)
    write_data(root / "val.jsonl", 5, seed=1)
    config = root / "run.yaml"
    config.write_text(
        f"""
pair: {{base: {root}/base, target: {root}/target}}
adapter: {{num_features: 48}}
objective: {{l1_weight: 0.01}}
data: {{train: {root}/train.jsonl, validation: {root}/val.jsonl, max_length: 48}}
optimizer: {{learning_rate: 0.003, warmup_ratio: 0.2}}
run:
  output_dir: {root}/out
  num_epochs: 4
  max_steps: 20
  train_batch_size: 4
  per_device_train_batch_size: 2
  eval_steps: 10
  save_steps: 8
""",
        encoding="utf-8",
    )
    return config


def packed_overrides(cache: Path) -> list[str]:
    """The same run with a token budget: two rows of 160 tokens per step."""
    return [
        "data.max_length=70",
        "run.train_batch_size=1",
        "run.per_device_train_batch_size=1",
        "run.train_batch_tokens=320",
        "run.per_device_train_batch_tokens=160",
        f"data.cache_dir={cache}",
    ]


OF_THE_MACHINE = ("tokens_per_second", "seconds_left", "time/", "memory/")


def records(output_dir: Path, split: str = "train") -> list[dict]:
    """The log without the figures that depend on clock and machine."""
    lines = (output_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()
    found = [record for record in map(json.loads, lines) if record["split"] == split]
    return [
        {k: v for k, v in record.items() if not k.startswith(OF_THE_MACHINE)} for record in found
    ]

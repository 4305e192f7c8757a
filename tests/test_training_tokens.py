"""Token ids on disk: what is computed once, what is noticed, and what is made anew."""

import multiprocessing
import random
from pathlib import Path

import pytest
import torch
from tiny_pair import character_tokenizer, corpus_of, write

from tca_fast.config import DataConfig
from tca_fast.errors import UserError
from tca_fast.training import tokens as caching
from tca_fast.training.data import Encoder
from tca_fast.training.tokens import cache_directory, open_tokens

COUNT = 21


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(caching, "SHARD_SEQUENCES", 8)
    monkeypatch.setattr(caching, "_CHUNK", 3)


@pytest.fixture
def corpus(tmp_path):
    return corpus_of(tmp_path, COUNT)


class Counted(Encoder):
    """An encoder that knows how often it was asked."""

    encoded = 0

    def encode(self, conversation):
        self.encoded += 1
        return super().encode(conversation)


def counted(**changes) -> Counted:
    config = DataConfig(train="unused.jsonl", **{"max_length": 80, **changes})
    return Counted(character_tokenizer(), config)


def opened(corpus, ours, directory):
    return open_tokens(corpus, ours, directory, show_progress=False)


def assert_complete(tokens, corpus, ours):
    assert len(tokens) == len(corpus) == len(tokens.lengths)
    for index in range(len(corpus)):
        expected = ours.encode(corpus.conversation(index))
        assert torch.equal(tokens[index].ids, expected.ids)
        assert tokens[index][1:] == expected[1:]
        assert tokens.lengths[index] == len(expected.ids)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ids_are_those_of_the_encoder(corpus, tmp_path, num_workers):
    ours = counted(num_workers=num_workers)
    assert_complete(opened(corpus, ours, tmp_path / "cache"), corpus, ours)


def test_a_file_is_tokenized_once(corpus, tmp_path):
    first, second = counted(), counted()
    opened(corpus, first, tmp_path / "cache")
    tokens = opened(corpus, second, tmp_path / "cache")
    assert (first.encoded, second.encoded) == (COUNT, 0)
    assert_complete(tokens, corpus, second)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "qwen"},
        {"max_length": 39},
        {"append_eos": True},
        {"bad_lines": "skip"},
    ],
    ids=str,
)
def test_other_settings_are_another_cache(corpus, tmp_path, change):
    opened(corpus, counted(), tmp_path / "cache")
    ours = counted(**change)
    assert_complete(opened(corpus, ours, tmp_path / "cache"), corpus, ours)
    assert ours.encoded == 2 * COUNT  # for the cache and for the comparison


def test_another_tokenizer_or_file_is_another_cache(corpus, tmp_path):
    opened(corpus, counted(), tmp_path / "cache")
    other = counted()
    other.tokenizer.add_tokens(["so"])
    opened(corpus, other, tmp_path / "cache")
    assert other.encoded == COUNT
    moved = corpus_of(tmp_path, COUNT - 1)
    again = counted()
    assert_complete(opened(moved, again, tmp_path / "cache"), moved, again)


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*/shard_*"))


def test_an_interrupted_tokenization_goes_on(corpus, tmp_path, capsys):
    class Stopped(Counted):
        def encode(self, conversation):
            if self.encoded == 12:
                raise KeyboardInterrupt
            return super().encode(conversation)

    stopped = Stopped(character_tokenizer(), counted().config)
    with pytest.raises(KeyboardInterrupt):
        opened(corpus, stopped, tmp_path / "cache")
    assert len(shards(tmp_path / "cache")) == 1
    ours = counted()
    tokens = opened(corpus, ours, tmp_path / "cache")
    assert ours.encoded == COUNT - 8
    assert "damaged" not in capsys.readouterr().err
    assert_complete(tokens, corpus, ours)


def flip(contents: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(contents))
    changed = bytes([contents[place] ^ 1 << draw.randrange(8)])
    return contents[:place] + changed + contents[place + 1 :]


DAMAGES = {
    "one bit": flip,
    "cut off": lambda contents, draw: contents[: draw.randrange(len(contents))],
    "emptied": lambda contents, draw: b"",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_noticed_said_and_mended(corpus, tmp_path, capsys, damage):
    """Anywhere in the file, header included."""
    draw = random.Random(damage)
    opened(corpus, counted(), tmp_path / "cache")
    damaged = shards(tmp_path / "cache")[1]
    whole = damaged.read_bytes()
    for _ in range(40 if damage == "one bit" else 5):
        damaged.write_bytes(DAMAGES[damage](whole, draw))
        ours = counted()
        tokens = opened(corpus, ours, tmp_path / "cache")
        assert ours.encoded == 8
        assert "data.train: 1 damaged file(s) of token ids in " in capsys.readouterr().err
        assert_complete(tokens, corpus, counted())


def test_shards_that_changed_places_are_noticed(corpus, tmp_path, capsys):
    opened(corpus, counted(), tmp_path / "cache")
    first, second, _ = shards(tmp_path / "cache")
    held = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(held)
    tokens = opened(corpus, counted(), tmp_path / "cache")
    assert "2 damaged file(s)" in capsys.readouterr().err
    assert_complete(tokens, corpus, counted())


def test_a_conversation_that_cannot_be_encoded_is_named(corpus, tmp_path):
    for num_workers in (0, 1):
        strict = counted(truncate=False, max_length=40, num_workers=num_workers)
        with pytest.raises(UserError, match="data.train: line .* tokens, more than data.max"):
            opened(corpus, strict, tmp_path / "cache")


def test_a_directory_that_cannot_be_written_is_named(corpus, tmp_path):
    write(tmp_path / "file", "x")
    with pytest.raises(UserError, match="data.cache_dir: .* cannot be written and locked"):
        opened(corpus, counted(), tmp_path / "file")


def compute(corpus, directory, results):
    ours = counted()
    open_tokens(corpus, ours, directory, show_progress=False)
    results.put(ours.encoded)


def test_of_several_processes_one_computes(corpus, tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    arguments = corpus, tmp_path / "cache", results
    processes = [context.Process(target=compute, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    assert sorted(results.get(timeout=60) for _ in processes) == [0, 0, COUNT]
    for process in processes:
        process.join()


def test_where_caches_live(monkeypatch, tmp_path):
    assert cache_directory(str(tmp_path)) == tmp_path
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory(None) == tmp_path / "tca_fast" / "tokens"

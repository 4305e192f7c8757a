"""Damaged data files by the thousand: one clear line, or exactly what a strict reader finds.

Every case is drawn from its number, so a failure names what to run again.
"""

import json
import random
from collections.abc import Callable
from typing import NamedTuple

import pydantic_core
import pytest
import torch
from fuzzing import mutate, number_of_cases, within_seconds
from safetensors import SafetensorError
from safetensors.torch import load_file
from strict_json import parse, text_of
from tiny_pair import VOCABULARY, character_tokenizer, corpus_of, encoder

from tca_fast.errors import UserError
from tca_fast.training import tokens as caching
from tca_fast.training.data import Corpus, open_corpus
from tca_fast.training.tokens import open_tokens

pytestmark = pytest.mark.usefixtures("one_thread")
SECONDS = 20
ROLES = {"user": ("human", "user"), "assistant": ("gpt", "assistant")}
TEXTS = [
    "1+1?",
    "<think> so</think>2",
    "<think> ",
    "a\nb\r\n\tc",
    "\x00\x7f\x1b[31m",
    "\u00e9\uff5c\u2028\u0085\ufeff",
    "\U0001f600 e\u0301 \u202eabc",
    '"quoted" \\ {"value": "x"}',
    "so " * 500,
    " ",
]
VALUES = [None, True, 0, -1, 0.5, 10**30, "", "x", "\ud800", [], ["x"], {}, {"value": "x"}]


@pytest.fixture(scope="module")
def num_cases(request) -> int:
    return number_of_cases(request.config)


# Lines


def record_of(draw: random.Random) -> dict:
    """A conversation that is as it should be."""
    turns = [
        {"from": draw.choice(ROLES[role]), "value": draw.choice(TEXTS)}
        for role in ("user", "assistant")
    ]
    record: dict = {"conversations": turns}
    if draw.random() < 0.5:
        record["domain"] = draw.choice(("math", "", "\u00e9", None))
    if draw.random() < 0.5:
        record["difficulty"] = draw.choice((3, None, 0.1, [{"a": [1, {}]}], "\ud800"))
    return record


def spelled(record: object, draw: random.Random) -> bytes:
    """JSON of a record, escaped or not where that is a choice, and with white space or not."""
    separators = draw.choice(((",", ":"), (", ", ": "), (" ,\t", "\r: ")))
    text = json.dumps(record, ensure_ascii=draw.random() < 0.5, separators=separators)
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(record, separators=separators).encode()


def inserted(line: bytes, what: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(line) + 1)
    return line[:place] + what + line[place:]


def with_member(line: bytes, member: bytes, draw: random.Random) -> bytes:
    """One more member in front of or behind the others of the record."""
    if draw.random() < 0.5:
        return line[:1] + member + b"," + line[1:]
    return line[:-1] + b"," + member + line[-1:]


def not_utf8(line: bytes, draw: random.Random) -> bytes:
    kinds = b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82"
    return inserted(line, draw.choice(kinds), draw)


def odd_bytes(line: bytes, draw: random.Random) -> bytes:
    kinds = b"\x00", b"\r", b"\x0b", b"\xef\xbb\xbf", "\u2028\u0085".encode(), b"\\", b"\\x41", b'"'
    return inserted(line, draw.choice(kinds), draw)


def at_the_ends(line: bytes, draw: random.Random) -> bytes:
    around = b"", b"\xef\xbb\xbf", b" \t", b"\r", b"\x00", b",", b"\xc2\xa0", b"\xef\xbb\xbf" * 2
    return draw.choice(around) + line + draw.choice(around)


def number(line: bytes, draw: random.Random) -> bytes:
    long = b"9" * draw.choice((400, 4301, 20_000))
    kinds = long, b"-" + long, b"1e999", b"-0", b"NaN", b"-Infinity", b"01", b"1.", b".5", b"+1"
    return with_member(line, b'"x": ' + draw.choice(kinds), draw)


def nesting(line: bytes, draw: random.Random) -> bytes:
    depth = draw.choice((98, 99, 100, 400, 900, 940, 980, 1000, 100_000))
    opening, closing = draw.choice(((b"[", b"]"), (b'{"a":', b"}")))
    kind = draw.randrange(3)
    if kind == 0:
        return opening * depth
    inner = b"1" if opening != b"[" or draw.random() < 0.5 else b""
    nested = opening * depth + inner + closing * (depth - draw.choice((0, 0, 1)))
    return nested if kind == 1 else with_member(line, b'"x": ' + nested, draw)


def surrogates(line: bytes, draw: random.Random) -> bytes:
    kinds = b"\\ud800", b"\\udfff", b"\\ud83d\\ude00", b"\\ude00\\ud83d", b"\\ud83dx", b"\\uD83"
    starts = [place + 1 for place in range(len(line)) if line[place : place + 1] == b'"']
    place = draw.choice(starts)
    return line[:place] + draw.choice(kinds) + line[place:]


def key_twice(line: bytes, draw: random.Random) -> bytes:
    name = draw.choice((b'"conversations"', b'"domain"', b'"domai\\u006e"', b'"value"', b'"x"'))
    value = draw.choice((b"[]", b"null", b'"math"', b'{"a": 1, "a": 1}'))
    return with_member(line, name + b": " + value, draw)


def very_long(line: bytes, draw: random.Random) -> bytes:
    filling = draw.choice((b"x", b" ", b"\\n", b"\\", b'"', b"{"))
    return inserted(line, filling * 200_000, draw)


def blank(line: bytes, draw: random.Random) -> bytes:
    return draw.choice((b"", b" ", b"\r", b"\t \x0b\x0c", b"\x00", b"\xc2\xa0", b"\xef\xbb\xbf"))


LINE_DAMAGES: list[Callable[[bytes, random.Random], bytes]] = [
    *[mutate] * 8,
    *(not_utf8, odd_bytes, at_the_ends, number, nesting, surrogates, key_twice, very_long, blank),
]


def change_record(record: dict, draw: random.Random) -> object:
    """Another value, key, role or number of turns somewhere in a record."""
    turns = record["conversations"]
    kind = draw.randrange(9)
    if kind == 0:
        del turns[draw.randrange(2) :]
    elif kind == 1:
        turns.insert(draw.randrange(3), draw.choice([*VALUES, {"from": "system", "value": "x"}]))
    elif kind == 2:
        turns.reverse()
    elif kind == 3:
        roles = ("system", "tool", "User", "gpt", "user", "", None, 1, ["user"], "x" * 10_000)
        draw.choice(turns)["from"] = draw.choice(roles)
    elif kind == 4:
        draw.choice(turns)["value"] = draw.choice([*VALUES, *TEXTS])
    elif kind == 5:
        record["domain"] = draw.choice(VALUES)
    elif kind == 6:
        return draw.choice([*VALUES, turns])
    else:
        parts = [(record, name) for name in record]
        parts += [(turn, name) for turn in turns for name in turn] + [(turns, 0), (turns, 1)]
        part, name = draw.choice(parts)
        action = draw.randrange(4)
        if action == 0 or (action == 1 and part is turns):
            part[name] = draw.choice(VALUES)
        elif action == 1:
            part[draw.choice((name + "s", name.upper(), " " + name))] = part.pop(name)
        elif action == 2:
            del part[name]
        else:
            record["extra"] = draw.choice(VALUES)
    return record


def file_of(draw: random.Random) -> bytes:
    """Some lines, among them one or a few that are damaged, and maybe damage to the whole."""
    lines = [spelled(record_of(draw), draw) for _ in range(draw.randrange(1, 6))]
    for place in draw.sample(range(len(lines)), min(len(lines), draw.choice((1, 1, 1, 2, 5)))):
        if draw.random() < 0.5:
            lines[place] = spelled(change_record(record_of(draw), draw), draw)
        else:
            lines[place] = draw.choice(LINE_DAMAGES)(lines[place], draw)
    content = draw.choice((b"\n", b"\n", b"\r\n", b"\n\n")).join(lines)
    content += draw.choice((b"\n", b"\r\n", b""))
    if draw.random() < 0.1:
        content = b"\xef\xbb\xbf" + content
    return mutate(content, draw) if draw.random() < 0.1 else content


# What is right


class Expected(NamedTuple):
    line_number: int
    texts: tuple[str, str, str] | None


def read(content: bytes) -> list[Expected]:
    """Prompt, response and domain of every line that is not blank, None where it is malformed."""
    return [
        Expected(number, conversation_of(line, number == 1))
        for number, line in enumerate(content.split(b"\n"), start=1)
        if line.strip(b" \t\r\x0b\x0c")
    ]


def conversation_of(line: bytes, is_first: bool) -> tuple[str, str, str] | None:
    try:
        text = line.decode("utf-8")
        record = parse(text[1:] if is_first and text[:1] == "\ufeff" else text)
        first, second = record["conversations"][:2]
        domain = record.get("domain")
        texts = []
        for role, turn in (("user", first), ("assistant", second)):
            if turn.get("from", role) not in ROLES[role] or turn["value"] == "":
                return None
            texts.append(text_of(turn["value"]))
        return texts[0], texts[1], "" if domain is None else text_of(domain)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def from_deep_below(levels: int, function, *arguments):
    """Called with so many frames on the stack, as a reader inside a training loop may be."""
    if levels:
        return from_deep_below(levels - 1, function, *arguments)
    return function(*arguments)


def complaint_of(path, mode: str) -> str:
    with pytest.raises(UserError) as caught:
        open_corpus(str(path), "data.train", mode)
    text = str(caught.value)
    assert text.isprintable() and len(text) < 600 + len(str(path)), text[:1000]
    return text


def assert_reads(corpus: Corpus, expected: list[Expected]) -> None:
    assert corpus.line_numbers == [one.line_number for one in expected]
    for index, one in enumerate(expected):
        found = from_deep_below(200, corpus.conversation, index)
        assert (*found[:3], found.line_number) == (*one.texts, one.line_number)


def test_no_damaged_line_is_misread_or_gives_a_traceback(tmp_path, num_cases):
    path = tmp_path / "d.jsonl"
    whole = refused = 0
    for case in range(num_cases):
        content = file_of(random.Random(f"data:{case}"))
        path.write_bytes(content)
        lines = read(content)
        good = [line for line in lines if line.texts]
        bad = [line.line_number for line in lines if not line.texts]
        with within_seconds(SECONDS, case):
            try:
                if bad:
                    said = complaint_of(path, "error")
                    assert said.startswith(f"data.train: {path} line {bad[0]}: ")
                    refused += 1
                elif good:
                    assert_reads(open_corpus(str(path), "data.train"), good)
                    whole += 1
                else:
                    assert "holds no conversation, it is empty" in complaint_of(path, "error")
                if good:
                    corpus = open_corpus(str(path), "data.train", "skip")
                    assert (len(corpus), corpus.num_skipped) == (len(good), len(bad))
                    assert not bad or f" line {bad[0]}: " in corpus.first_skipped
                    assert_reads(corpus, good)
                elif bad:
                    said = complaint_of(path, "skip")
                    assert f"none of its {len(bad)} lines is usable" in said
            except Exception as error:
                raise AssertionError(f"case {case}: {content[:2000]!r}") from error
    assert min(whole, refused) > num_cases // 10


def test_the_strict_reader_agrees_with_a_third(num_cases):
    """That of pydantic, in Rust; it knows no limits of ours and lets keys come twice."""
    valid = malformed = 0
    for case in range(num_cases):
        for line in file_of(random.Random(f"data:{case}")).split(b"\n"):
            try:
                third = pydantic_core.from_json(line, allow_inf_nan=False)
            except ValueError as error:
                third = error
            try:
                ours = parse(line.decode("utf-8"))
            except ValueError as error:
                if not any(word in str(error) for word in ("twice", "too deep")):
                    assert isinstance(third, ValueError), (case, line[:500])
                    malformed += 1
                continue
            if isinstance(third, ValueError):
                # It refuses half surrogate pairs and numbers of thousands of digits anywhere.
                assert b"\\u" in line or b"9" * 4301 in line, (case, line[:500], third)
            else:
                assert without_numbers(ours) == without_numbers(third), case
                valid += 1
    assert min(valid, malformed) > num_cases // 10


def without_numbers(value):
    if isinstance(value, dict):
        return {name: without_numbers(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return list(map(without_numbers, value))
    return value if value is None or type(value) in (str, bool) else "a number"


# Token ids

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


def expected_ids(prompt: str, response: str, style: str) -> tuple[list[int], int]:
    """Token ids and prompt length in a tokenizer of single characters."""
    if response.startswith("<think> ") and style != "chat":
        response = response.replace("<think> ", "<think>\n", 1)
    opening, ending = {
        "deepseek": (f"<\uff5cUser\uff5c>{prompt}<\uff5cAssistant\uff5c>", ""),
        "qwen": (f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n"),
        "chat": (f"[user]{prompt}[assistant]", ""),
    }[style]
    unknown = VOCABULARY[" "]
    ids = [VOCABULARY.get(character, unknown) for character in opening + response + ending]
    return [0, *ids], 1 + len(opening)


def test_no_odd_text_is_tokenized_otherwise_than_written(tmp_path, num_cases):
    encoders = {
        style: encoder(character_tokenizer(chat_template=TEMPLATE), format=style)
        for style in ("deepseek", "qwen", "chat")
    }
    path = tmp_path / "d.jsonl"
    encoded = 0
    for case in range(num_cases):
        draw = random.Random(f"tokens:{case}")
        path.write_bytes(file_of(draw))
        try:
            corpus = open_corpus(str(path), "data.train", "skip")
        except UserError:
            continue
        for index in range(len(corpus)):
            conversation = corpus.conversation(index)
            style = draw.choice(sorted(encoders))
            with within_seconds(SECONDS, case):
                found = encoders[style].encode(conversation)
            ids, prompt_length = expected_ids(conversation.prompt, conversation.response, style)
            assert found.ids.tolist() == ids[:1000], (case, conversation)
            assert found.original_length == len(ids), (case, conversation)
            if style == "chat":
                # The template's text is searched for the response without its outer white space.
                response = conversation.response
                prompt_length += len(response) - len(response.lstrip()) if response.strip() else 0
            if conversation.response.strip():
                assert found.prompt_length == min(prompt_length, 1000), (case, conversation)
            encoded += 1
    assert encoded > num_cases


def damage(path, whole: bytes, others: list[bytes], draw: random.Random) -> None:
    """Random bytes, a header that lies, or another file."""
    kind = draw.randrange(8)
    if kind == 0:
        path.unlink()
    elif kind == 1:
        path.write_bytes(draw.choice([b"", b"{}", bytes(len(whole)), whole * 2, *others]))
    elif kind == 2:
        types = b'"I32"', b'"U32"', b'"F32"', b'"I16"', b'"BF16"'
        path.write_bytes(whole.replace(types[0], draw.choice(types[1:]), draw.choice((1, 9))))
    elif kind == 3:
        header = 8 + int.from_bytes(whole[:8], "little")
        path.write_bytes(mutate(whole[:header], draw) + whole[header:])
    else:
        path.write_bytes(mutate(whole, draw))


def is_another(path, whole: bytes) -> bool:
    """Whether a shard holds other tensors than it did."""
    before = path.with_suffix(".before")
    before.write_bytes(whole)
    expected = load_file(before)
    try:
        found = load_file(path)
    except (OSError, SafetensorError):
        return True
    return found.keys() != expected.keys() or any(
        found[name].dtype != expected[name].dtype or not torch.equal(found[name], expected[name])
        for name in expected
    )


def test_no_damaged_token_file_is_used(tmp_path, num_cases, monkeypatch, capsys):
    monkeypatch.setattr(caching, "SHARD_SEQUENCES", 4)
    corpus, ours = corpus_of(tmp_path), encoder(max_length=80)
    expected = [ours.encode(corpus.conversation(index)) for index in range(len(corpus))]

    def opened():
        return open_tokens(corpus, ours, tmp_path / "cache", show_progress=False)

    opened()
    paths = sorted((tmp_path / "cache").glob("*/shard_*"))
    assert len(paths) == 3
    wholes = [path.read_bytes() for path in paths]
    noticed = 0
    capsys.readouterr()
    for case in range(num_cases // 3):
        draw = random.Random(f"shard:{case}")
        damaged = sorted(draw.sample(range(3), draw.choice((1, 1, 2, 3))))
        for place in damaged:
            damage(paths[place], wholes[place], wholes[:place] + wholes[place + 1 :], draw)
        present = [place for place in damaged if paths[place].exists()]
        num_others = sum(is_another(paths[place], wholes[place]) for place in present)
        with within_seconds(SECONDS, case):
            tokens = opened()
        for index, one in enumerate(expected):
            assert torch.equal(tokens[index].ids, one.ids), case
            assert tokens[index][1:] == one[1:], case
        said = capsys.readouterr().err
        if num_others:
            number = int(said.split("data.train: ")[1].split(" damaged")[0])
            assert num_others <= number <= len(present), (case, said)
            noticed += number
        for place in damaged:
            paths[place].write_bytes(wholes[place])
    assert noticed > num_cases // 6

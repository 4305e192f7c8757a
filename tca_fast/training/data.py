"""Conversations from JSONL files, and conversations as token ids (contract §4).

A file is scanned once, so that every malformed line is known before anything is trained; only
the offsets of the usable lines stay in memory. Tokenizing happens when a sequence is needed.
"""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tca_fast.config import DataConfig
from tca_fast.errors import UserError, one_line

BYTE_ORDER_MARK = "\ufeff"
# Python's own limit counts the frames of the caller too: a line could pass the scan and then fail
# when it is read from elsewhere.
MAX_NESTING = 100
# What data sets in the wild call the two sides.
_ROLES = {"user": ("human", "user"), "assistant": ("gpt", "assistant")}


class Conversation(NamedTuple):
    """One user turn and its answer, with the line of the file they came from."""

    prompt: str
    response: str
    domain: str
    line_number: int


class Encoded(NamedTuple):
    """One sequence of token ids.

    Attributes:
        ids: int32 `[S]`, not padded.
        prompt_length: leading ids that belong to the prompt.
        original_length: number of ids before truncation.
        line_number: line of the file, for messages.
    """

    ids: torch.Tensor
    prompt_length: int
    original_length: int
    line_number: int


class _BadLine(ValueError):
    """What is wrong with one line."""


@dataclass(frozen=True)
class Corpus:
    """The usable lines of one JSONL file.

    Attributes:
        path: the local file.
        field: the configuration field that named it, for messages.
        offsets: byte offset of every usable line.
        line_numbers: its number in the file, from 1.
        digest: of the file's bytes, so that a run is resumed on the data it began with.
        stamp: size and modification time at the scan; any later change is an error.
        num_skipped: malformed lines passed over because `data.bad_lines` is "skip".
        first_skipped: the complaint about the first of them.
    """

    path: Path
    field: str
    offsets: list[int]
    line_numbers: list[int]
    digest: str
    stamp: tuple[int, int]
    num_skipped: int = 0
    first_skipped: str = ""

    def __len__(self) -> int:
        return len(self.offsets)

    def conversation(self, index: int) -> Conversation:
        """Read conversation `index` (0-based among the usable lines) from the file.

        Raises:
            UserError: the file has changed since it was scanned.
        """
        number = self.line_numbers[index]
        try:
            with self.path.open("rb") as file:
                if _stamp(os.fstat(file.fileno())) != self.stamp:
                    raise _BadLine("it is another file than the one that was checked")
                file.seek(self.offsets[index])
                return _parse(file.readline(), number)
        except (OSError, _BadLine) as error:
            raise UserError(
                f"{self.field}: {self.path} changed during training ({error}); restore the file "
                "and resume"
            ) from None


def open_corpus(source: str, field: str, bad_lines: str = "error") -> Corpus:
    """Find and check a JSONL file in the OpenThoughts schema (contract §4.1).

    Args:
        source: a local path, or `hf://org/repo/path[@revision]` for a file of a hub dataset.
        field: configuration field named in messages, such as "data.train".
        bad_lines: "error" or "skip", see `DataConfig.bad_lines`. Blank lines are never counted.

    Raises:
        UserError: the file is missing or unreadable, a line is malformed (with its number), or no
            usable line is left.
    """
    path = _download(source, field) if source.startswith("hf://") else Path(source).expanduser()
    offsets: list[int] = []
    line_numbers: list[int] = []
    digest = hashlib.sha256()
    num_skipped, first_skipped = 0, ""
    for number, offset, line in _lines(path, field):
        digest.update(line)
        if not line.strip():
            continue
        try:
            _parse(line, number)
        except _BadLine as problem:
            complaint = f"{field}: {path} line {number}: {problem}"
            if bad_lines == "error":
                raise UserError(
                    f"{complaint}; mend the line, or set data.bad_lines=skip to pass over it"
                ) from None
            num_skipped += 1
            first_skipped = first_skipped or complaint
            continue
        offsets.append(offset)
        line_numbers.append(number)
    if not offsets:
        why = f"none of its {num_skipped} lines is usable" if num_skipped else "it is empty"
        detail = f" (first: {first_skipped})" if first_skipped else ""
        raise UserError(
            f"{field}: {path} holds no conversation, {why}{detail}; give a JSONL file with "
            "'conversations' in every line"
        )
    return Corpus(
        path,
        field,
        offsets,
        line_numbers,
        digest.hexdigest()[:16],
        _stamp(path.stat()),
        num_skipped,
        first_skipped,
    )


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _download(source: str, field: str) -> Path:
    organisation, _, rest = source.removeprefix("hf://").partition("/")
    repository, _, name = rest.partition("/")
    name, _, revision = name.partition("@")
    if not (organisation and repository and name):
        raise UserError(
            f"{field}: {source!r} is not of the form hf://organisation/repository/path; "
            "name a file inside the dataset, such as hf://org/repo/data/train.jsonl"
        )
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise UserError(
            f"{field}: {source} needs huggingface_hub; pip install huggingface_hub"
        ) from None
    try:
        local = hf_hub_download(
            f"{organisation}/{repository}", name, repo_type="dataset", revision=revision or None
        )
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise UserError(
            f"{field}: {source} cannot be fetched ({type(error).__name__}: {one_line(error)}); "
            "check the name and the connection, or give a local file"
        ) from None
    return Path(local)


def _lines(path: Path, field: str) -> Iterator[tuple[int, int, bytes]]:
    """Line number from 1, byte offset and bytes of every line."""
    try:
        with path.open("rb") as file:
            offset = 0
            for number, line in enumerate(file, start=1):
                yield number, offset, line
                offset += len(line)
    except FileNotFoundError:
        raise UserError(f"{field}: {path} does not exist; give the path of a JSONL file") from None
    except IsADirectoryError:
        raise UserError(f"{field}: {path} is a directory; give a JSONL file inside it") from None
    except OSError as error:
        raise UserError(
            f"{field}: {path} cannot be read ({error.strerror}); check the file and its permissions"
        ) from None


def _parse(line: bytes, number: int) -> Conversation:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _BadLine(f"not UTF-8 (byte {line[error.start]:#04x} at {error.start})") from None
    if number == 1:
        text = text.removeprefix(BYTE_ORDER_MARK)
    try:
        # As floats, because Python refuses long integers; no number is used.
        record = json.loads(
            text, parse_int=float, parse_constant=_refuse_constant, object_pairs_hook=_object
        )
    except json.JSONDecodeError as error:
        raise _BadLine(f"not valid JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise _BadLine(_TOO_DEEP) from None
    if not isinstance(record, dict):
        raise _BadLine(f"holds a JSON {type(record).__name__}, not an object")
    if _is_deeper(record, MAX_NESTING):
        raise _BadLine(_TOO_DEEP)
    turns = record.get("conversations")
    if not isinstance(turns, list) or len(turns) < 2:
        raise _BadLine(
            "'conversations' is not a list with a user and an assistant turn, as in "
            '{"conversations": [{"from": "user", "value": "…"}, '
            '{"from": "assistant", "value": "…"}]}'
        )
    domain = record.get("domain")
    if domain is None:
        domain = ""
    return Conversation(
        _turn_text(turns, 0, "user"),
        _turn_text(turns, 1, "assistant"),
        _text(domain, "'domain'"),
        number,
    )


_TOO_DEEP = f"nested deeper than {MAX_NESTING} levels"


def _refuse_constant(name: str) -> None:
    raise _BadLine(f"not valid JSON ({name} is no JSON number)")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise _BadLine(f"an object has the key {reprlib.repr(name)} twice")
    return record


def _is_deeper(record: dict[str, Any], levels: int) -> bool:
    """Whether lists and objects lie in one another more than `levels` deep."""
    inside: list[Any] = [record]
    for _ in range(levels):
        inside = [
            inner
            for one in inside
            for inner in (one.values() if isinstance(one, dict) else one)
            if isinstance(inner, dict | list)
        ]
        if not inside:
            return False
    return True


def _turn_text(turns: list[Any], index: int, role: str) -> str:
    turn, where = turns[index], f"the {role} turn (conversations[{index}])"
    value = turn.get("value") if isinstance(turn, dict) else None
    if not isinstance(value, str) or not value:
        raise _BadLine(f"{where} has no text under 'value'")
    # Without the key, the place alone says whose turn it is.
    if turn.get("from", role) not in _ROLES[role]:
        names = " or ".join(map(repr, _ROLES[role]))
        raise _BadLine(f"{where} is from {reprlib.repr(turn['from'])}, not {names}")
    return _text(value, where)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _BadLine(f"{where} is no text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        # An escape such as \ud800 is legal JSON but no text; tokenizers refuse it.
        raise _BadLine(f"{where} holds half of a surrogate pair") from None
    return value


_MARKS = {
    "deepseek": ("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"),
    "qwen": ("<|im_start|>", "<|im_end|>"),
}


class Encoder:
    """Turns conversations into token ids: format, tokenize, truncate (contract §4.2-4.3).

    Args:
        tokenizer: a Hugging Face tokenizer; its padding side and chat default do not matter.
        config: the data block.
        field: configuration field named in messages.

    Attributes:
        vocab_size: rows of the models' embedding once they are loaded, for a check of the ids.
    """

    def __init__(self, tokenizer: Any, config: DataConfig, field: str = "data.train") -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.field = field
        self.vocab_size: int | None = None
        if config.format == "chat" and not tokenizer.chat_template:
            raise UserError(
                "data.format: 'chat' needs a tokenizer with a chat template and the target's has "
                "none; use 'deepseek' or 'qwen'"
            )
        for mark in _MARKS.get(config.format, ()):
            spelled = tokenizer(mark, add_special_tokens=False, verbose=False)["input_ids"]
            if tokenizer.unk_token_id in spelled:
                raise UserError(
                    f"data.format: {config.format!r} writes {mark}, which the target's tokenizer "
                    "does not know; choose another ('chat' is the tokenizer's own)"
                )
        if config.append_eos and tokenizer.eos_token_id is None:
            raise UserError(
                "data.append_eos: true needs a tokenizer with an end-of-sequence token and the "
                "target's has none; set it to false"
            )

    def encode(self, conversation: Conversation) -> Encoded:
        """Token ids of one conversation.

        Raises:
            UserError: the sequence exceeds `max_length` and `truncate` is off, or the chat
                template drops part of the response.
        """
        text, boundary = self.render(conversation)
        # A chat template writes its own special tokens: adding the tokenizer's would double BOS.
        ids, prompt_length = self._tokenize(text, boundary, self.config.format != "chat")
        eos = self.tokenizer.eos_token_id
        # The last but one counts because the qwen format ends `<|im_end|>\n`.
        if self.config.append_eos and eos not in ids[-2:]:
            ids.append(eos)
        limit = self.config.max_length
        if len(ids) > limit and not self.config.truncate:
            raise UserError(
                f"{self.field}: line {conversation.line_number} has {len(ids)} tokens, more than "
                f"data.max_length={limit}; raise data.max_length or set data.truncate=true"
            )
        return Encoded(
            torch.tensor(ids[:limit], dtype=torch.int32),
            min(prompt_length, limit),
            len(ids),
            conversation.line_number,
        )

    def render(self, conversation: Conversation) -> tuple[str, int]:
        """The text to tokenize and the number of its characters that belong to the prompt."""
        if self.config.format == "chat":
            return self._render_chat(conversation)
        response = conversation.response
        if response.startswith("<think> "):
            response = "<think>\n" + response.removeprefix("<think> ")
        if self.config.format == "deepseek":
            user, assistant = _MARKS["deepseek"]
            prompt = f"{user}{conversation.prompt}{assistant}"
            return prompt + response, len(prompt)
        prompt = f"<|im_start|>user\n{conversation.prompt}<|im_end|>\n<|im_start|>assistant\n"
        return f"{prompt}{response}<|im_end|>\n", len(prompt)

    def _render_chat(self, conversation: Conversation) -> tuple[str, int]:
        user = {"role": "user", "content": conversation.prompt}
        assistant = {"role": "assistant", "content": conversation.response}
        apply = self.tokenizer.apply_chat_template
        text = apply([user, assistant], tokenize=False)
        response = conversation.response.strip()
        start = text.rfind(response)
        if start >= 0:
            return text, start
        # Some templates move white space inside the response; others (DeepSeek-R1's) drop its
        # thinking, which would silently train on something else.
        if "".join(response.split()) not in "".join(text.split()):
            raise UserError(
                f"data.format: 'chat': the tokenizer's template drops part of the response in line "
                f"{conversation.line_number} of {self.field}; use 'deepseek' or 'qwen'"
            )
        opening = apply([user], tokenize=False, add_generation_prompt=True)
        return text, _common_prefix(opening, text)

    def _tokenize(self, text: str, boundary: int, add_special: bool) -> tuple[list[int], int]:
        """Ids of the text, and how many of them belong to its first `boundary` characters.

        The tokenizer's own character offsets tell the two parts apart, so nothing is assumed about
        where it splits; a token astride the boundary counts as prompt. Tokenizers without offsets
        (slow ones) tokenize the prompt alone too, and the common prefix is the prompt.
        """
        options = {"add_special_tokens": add_special, "verbose": False}
        if not self.tokenizer.is_fast:
            ids = list(self.tokenizer(text, **options)["input_ids"])
            alone = list(self.tokenizer(text[:boundary], **options)["input_ids"])
            return ids, _common_prefix(alone, ids)
        encoding = self.tokenizer(text, return_offsets_mapping=True, **options)
        sequence_ids = encoding.sequence_ids(0)
        prompt_length = 0
        for position, (start, end) in enumerate(encoding["offset_mapping"]):
            if sequence_ids[position] is None:
                continue  # added by the tokenizer, with the empty span (0, 0)
            if start >= boundary and end > boundary:
                break
            prompt_length = position + 1
        return list(encoding["input_ids"]), prompt_length


def _common_prefix(left: Any, right: Any) -> int:
    """Length of the longest common prefix of two sequences."""
    length = 0
    for one, other in zip(left, right, strict=False):
        if one != other:
            break
        length += 1
    return length

"""Token ids of a whole file, kept on disk so that they are computed once.

A folder named after what the ids depend on (tokenizer, format, limits, the file's bytes) holds
shards of 1024 conversations. A shard is a safetensors file that is written whole or not at all and
carries the hash of its contents: an interrupted tokenization goes on where it stopped, and a
damaged shard is made anew. Memory holds the lengths; ids are mapped from the disk when needed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tca_fast.durable import Replacement
from tca_fast.errors import UserError
from tca_fast.training.batches import worker_options
from tca_fast.training.data import Corpus, Encoded, Encoder

SHARD_SEQUENCES = 1024
FORMAT_VERSION = 2
_COLUMNS = ("lengths", "prompt_lengths", "original_lengths")
_CHUNK = 16  # conversations that a worker hands over together


class Tokens(Mapping[int, Encoded]):
    """The encoded conversations of one file, by index.

    Attributes:
        lengths: tokens of each, after truncation.
    """

    def __init__(self, shards: Sequence[_Shard], line_numbers: Sequence[int]) -> None:
        """Use `open_tokens`."""
        self.lengths = [length for shard in shards for length in shard.lengths]
        self._shards = shards
        self._line_numbers = line_numbers

    def __getitem__(self, index: int) -> Encoded:
        """Conversation `index`; its ids lie in the file that is mapped."""
        shard, place = divmod(index, SHARD_SEQUENCES)
        return self._shards[shard].sequence(place, self._line_numbers[index])

    def __iter__(self) -> Iterator[int]:
        """All indices."""
        return iter(range(len(self)))

    def __len__(self) -> int:
        """Number of conversations."""
        return len(self.lengths)


def open_tokens(
    corpus: Corpus, encoder: Encoder, directory: Path, *, show_progress: bool = True
) -> Tokens:
    """The token ids of a corpus, computed now as far as they are not on the disk.

    Several processes may call it at once; one of them computes and the others wait.

    Args:
        corpus: the file.
        encoder: how a conversation becomes ids; its `data.num_workers` share the work.
        directory: of all token caches; this one gets a folder in it.
        show_progress: whether to draw a progress bar on stderr.

    Raises:
        UserError: a conversation that cannot be encoded, or a disk that cannot be written.
    """
    from tqdm import tqdm

    key = _key(corpus, encoder)
    folder = directory / hashlib.sha256(key.encode()).hexdigest()[:16]
    counts = [
        min(SHARD_SEQUENCES, len(corpus) - start)
        for start in range(0, len(corpus), SHARD_SEQUENCES)
    ]
    shards = _read_all(folder, counts, key)
    if None in shards:
        with _lock(folder):
            # Another process may have been at it.
            shards = _read_all(folder, counts, key)
            missing = [number for number, shard in enumerate(shards) if shard is None]
            damaged = [number for number in missing if (folder / _name(number)).exists()]
            if damaged:
                tqdm.write(
                    f"{corpus.field}: {len(damaged)} damaged file(s) of token ids in {folder} are "
                    f"made anew, first {_name(damaged[0])}",
                    file=sys.stderr,
                )
            if missing:
                _compute(folder, missing, counts, key, corpus, encoder, show_progress)
        for number in missing:
            shards[number] = _read(folder / _name(number), _label(key, number), counts[number])
    return Tokens([shard for shard in shards if shard is not None], corpus.line_numbers)


def cache_directory(configured: str | None) -> Path:
    """Where token caches live: `data.cache_dir`, else the user's cache directory."""
    if configured is not None:
        return Path(configured).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tca_fast" / "tokens"


class _Damaged(ValueError):
    """A shard that is not what was written."""


class _Shard(NamedTuple):
    ids: Tensor
    lengths: list[int]
    ends: list[int]
    prompt_lengths: list[int]
    original_lengths: list[int]

    def sequence(self, place: int, line_number: int) -> Encoded:
        end = self.ends[place]
        ids = self.ids[end - self.lengths[place] : end]
        return Encoded(ids, self.prompt_lengths[place], self.original_lengths[place], line_number)


def _name(number: int) -> str:
    return f"shard_{number:05d}.safetensors"


def _key(corpus: Corpus, encoder: Encoder) -> str:
    """Everything that the ids depend on."""
    import tokenizers

    config = encoder.config
    settings = ("format", "max_length", "truncate", "append_eos", "bad_lines")
    return json.dumps(
        {
            "version": FORMAT_VERSION,
            "data": corpus.digest,
            "tokenizer": _tokenizer_digest(encoder.tokenizer),
            "tokenizers": tokenizers.__version__,
            **{name: getattr(config, name) for name in settings},
        }
    )


def _tokenizer_digest(tokenizer: Any) -> str:
    """Of the files that the tokenizer would be saved as, so of its template and settings too."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        for path in sorted(Path(directory).rglob("*")):
            if path.is_file():
                digest.update(path.name.encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


def _read_all(folder: Path, counts: Sequence[int], key: str) -> list[_Shard | None]:
    """Every shard, or None where it is missing or damaged."""
    shards: list[_Shard | None] = []
    for number, count in enumerate(counts):
        try:
            shards.append(_read(folder / _name(number), _label(key, number), count))
        except _Damaged:
            shards.append(None)
    return shards


def _label(key: str, number: int) -> dict[str, str]:
    return {"key": key, "shard": str(number)}


def _read(path: Path, label: dict[str, str], count: int) -> _Shard:
    """Map a shard of `count` conversations after checking its hash.

    Raises:
        _Damaged: missing, truncated, changed, or another one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _Damaged(f"{path}: {error}") from None
    if metadata != {**label, "sha256": _digest(tensors)}:
        raise _Damaged(f"{path}: contents or label are not those that were written")
    columns = {name: tensors[name].tolist() for name in _COLUMNS}
    if len(columns["lengths"]) != count:
        raise _Damaged(f"{path}: holds {len(columns['lengths'])} conversations, not {count}")
    ends = tensors["lengths"].cumsum(0).tolist()
    return _Shard(tensors["ids"], ends=ends, **columns)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Held by one process at a time; given back by the system when that process ends."""
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((folder / ".lock").open("w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(
                f"data.cache_dir: {folder} cannot be written and locked ({error.strerror}); choose "
                "a directory that can"
            ) from None
        yield


class _Chunks(Dataset[tuple[dict[str, Tensor], str]]):
    """Items are the conversations of a range of indices, or the complaint about one of them."""

    def __init__(self, corpus: Corpus, encoder: Encoder) -> None:
        self.corpus, self.encoder = corpus, encoder

    def __getitem__(self, indices: range) -> tuple[dict[str, Tensor], str]:
        try:
            encoded = [self.encoder.encode(self.corpus.conversation(i)) for i in indices]
        except UserError as error:
            # Returned rather than raised: a DataLoader worker would wrap it in a traceback.
            return {}, str(error)
        rows = [(len(one.ids), one.prompt_length, one.original_length) for one in encoded]
        columns = torch.tensor(rows, dtype=torch.int32).T.contiguous()
        tensors = dict(zip(_COLUMNS, columns, strict=True))
        return {"ids": torch.cat([one.ids for one in encoded]), **tensors}, ""


def _compute(
    folder: Path,
    missing: Sequence[int],
    counts: Sequence[int],
    key: str,
    corpus: Corpus,
    encoder: Encoder,
    show_progress: bool,
) -> None:
    """Encode and write shards one after the other."""
    from tqdm import tqdm

    chunks_of = {
        number: [
            range(start, min(start + _CHUNK, first + counts[number]))
            for first in (number * SHARD_SEQUENCES,)
            for start in range(first, first + counts[number], _CHUNK)
        ]
        for number in missing
    }
    chunks = [chunk for number in missing for chunk in chunks_of[number]]
    options = worker_options(encoder.config.num_workers)
    encoded = iter(DataLoader(_Chunks(corpus, encoder), sampler=chunks, **options))
    total = sum(counts[number] for number in missing)
    with tqdm(
        total=total, desc="tokenize", unit="seq", file=sys.stderr, disable=not show_progress
    ) as bar:
        for number in missing:
            parts: list[dict[str, Tensor]] = []
            for chunk in chunks_of[number]:
                part, complaint = next(encoded)
                if complaint:
                    raise UserError(complaint)
                parts.append(part)
                bar.update(len(chunk))
            tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            _write(folder, _name(number), tensors, _label(key, number))


def _write(folder: Path, name: str, tensors: dict[str, Tensor], label: dict[str, str]) -> None:
    from safetensors.torch import save_file

    def write(path: Path) -> None:
        save_file(tensors, path, metadata={**label, "sha256": _digest(tensors)})
        try:
            _read(path, label, len(tensors["lengths"]))
        except _Damaged as error:
            raise UserError(f"{error}: reads back otherwise than written; check the disk") from None

    with Replacement(folder) as files:
        files.write(name, write)
        files.commit()

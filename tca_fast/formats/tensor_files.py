"""safetensors files that are read and written one tensor at a time.

`safetensors.torch.save_file` wants every tensor of a file in memory. Its format is a JSON header
and then the bytes of the tensors, so a file whose shapes are known beforehand can be written in
one pass with a single tensor in memory; the result is byte-equal to what `save_file` writes.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tca_fast.errors import UserError

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_CODES = {name: code for code, name in DTYPES.items()}
_CHUNK = 1 << 24


class Header(NamedTuple):
    """What a file says of a tensor.

    Attributes:
        shape: its sizes.
        code: its dtype as safetensors writes it, for example "F32".
    """

    shape: tuple[int, ...]
    code: str

    @property
    def dtype(self) -> str:
        """The dtype as torch calls it, or the code itself for what adapters cannot have."""
        return DTYPES.get(self.code, self.code)

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor in a file."""
        return math.prod(self.shape) * _item_size(self.code)


class Entry(NamedTuple):
    """A tensor to be written.

    Attributes:
        key: its name in the file.
        header: its shape and dtype.
        read: gives it when its turn comes.
    """

    key: str
    header: Header
    read: Callable[[], Tensor]


def header(shape: Iterable[int], dtype: str) -> Header:
    """Header of a tensor with torch's name of a dtype, for example "float32"."""
    return Header(tuple(shape), _CODES[dtype])


def read_headers(path: Path) -> dict[str, Header]:
    """Names, shapes and dtypes in a safetensors file, without reading any values.

    Raises:
        UserError: the file is missing, truncated or not safetensors.
    """
    with _opened(path) as file:
        slices = {key: file.get_slice(key) for key in sorted(file.keys())}
        return {
            key: Header(tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()
        }


def read_tensor(path: Path, key: str) -> Tensor:
    """One tensor of a safetensors file.

    Raises:
        UserError: the file is missing, truncated or not safetensors.
    """
    with _opened(path) as file:
        return file.get_tensor(key)


def write_tensors(path: Path, entries: Iterable[Entry]) -> None:
    """Write a safetensors file one tensor at a time, then read it back and compare.

    Args:
        path: the file, replaced if it exists.
        entries: in any order; the file has wide dtypes first, then names in order.

    Raises:
        UserError: an entry gives another tensor than its header says, or the file reads back
            otherwise than written.
    """
    ordered = sorted(entries, key=lambda entry: (-_item_size(entry.header.code), entry.key))
    checksum = 0
    with path.open("wb") as file:
        for part in _parts(ordered):
            file.write(part)
            checksum = zlib.crc32(part, checksum)
    expected = {entry.key: entry.header for entry in ordered}
    if read_headers(path) != expected or _checksum(path) != checksum:
        raise UserError(f"{path}: reads back otherwise than written; check the disk")


def _parts(ordered: list[Entry]) -> Iterator[Any]:
    """The bytes of the file: length of the header, header, tensors."""
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in ordered:
        start, end = end, end + entry.header.num_bytes
        fields[entry.key] = {
            "dtype": entry.header.code,
            "shape": list(entry.header.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for entry in ordered:
        tensor = entry.read().detach().cpu().contiguous()
        if tuple(tensor.shape) != entry.header.shape:
            raise UserError(
                f"{entry.key}: has shape {list(tensor.shape)}, its file said "
                f"{list(entry.header.shape)}; the file changed while it was read"
            )
        yield tensor.reshape(-1).view(torch.uint8).numpy().data


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def _item_size(code: str) -> int:
    bits = re.search(r"\d+", code)
    return int(bits[0]) // 8 if bits else 1


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise UserError(f"{path}: is missing; copy or download it again")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: not a whole safetensors file ({error}); copy or download it again"
        ) from None

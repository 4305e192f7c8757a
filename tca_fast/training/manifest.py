"""What a whole checkpoint consists of: every file with its size and SHA-256 digest.

The manifest is written last, after every other file has been flushed and read back from the disk.
A checkpoint whose files all have the sizes and digests of its manifest is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from tca_fast.durable import Replacement
from tca_fast.errors import UserError

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
_CHUNK = 1 << 22


def file_record(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 digest of a file as the disk has it.

    The file is flushed and dropped from the page cache first where the system allows that, so that
    what is read is not merely what was handed to the cache.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def write_manifest(directory: Path, records: dict[str, dict[str, Any]]) -> None:
    """Write `manifest.json`.

    Args:
        directory: of the checkpoint.
        records: `file_record` of every file, by its path inside `directory`.

    Raises:
        UserError: it cannot be written or reads back otherwise.
    """
    manifest = {"format_version": FORMAT_VERSION, "files": dict(sorted(records.items()))}
    text = json.dumps(manifest, indent=1) + "\n"

    def write(path: Path) -> None:
        path.write_text(text, encoding="utf-8")
        if path.read_text(encoding="utf-8") != text:
            raise UserError(f"{path}: reads back otherwise than written; check the disk")

    with Replacement(directory) as files:
        files.write(MANIFEST_NAME, write)
        files.commit()


def read_manifest(directory: Path) -> dict[str, dict[str, Any]]:
    """The file records of a checkpoint.

    Raises:
        UserError: missing, unreadable, of another format, or with paths outside the checkpoint.
    """
    path = directory / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version, records = manifest["format_version"], manifest["files"]
        if version != FORMAT_VERSION:
            raise ValueError(f"format_version is {version!r}, this tca_fast reads {FORMAT_VERSION}")
        for name, record in records.items():
            if not isinstance(record["bytes"], int) or not isinstance(record["sha256"], str):
                raise ValueError(f"the record of {name!r} does not fit")
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError(f"{name!r} is outside the checkpoint")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:120]
        raise UserError(f"{path}: not a readable manifest ({reason})") from None
    return records


def what_is_wrong(directory: Path, share: int = 0, num_shares: int = 1) -> str:
    """Why a checkpoint is not whole; empty where nothing is wrong.

    Args:
        directory: of the checkpoint.
        share: which of `num_shares` parts of the files to read; names and sizes are compared for
            all files in any case.
        num_shares: ranks that divide the reading among them.
    """
    try:
        records = read_manifest(directory)
        for name, record in records.items():
            size = (directory / name).stat().st_size
            if size != record["bytes"]:
                return f"{directory / name}: has {size} bytes, was written with {record['bytes']}"
        for name in sorted(records)[share::num_shares]:
            if file_record(directory / name)["sha256"] != records[name]["sha256"]:
                return f"{directory / name}: its contents are not those that were written"
    except UserError as error:
        return str(error)
    except (OSError, ValueError) as error:
        where = getattr(error, "filename", None) or directory
        return f"{where}: cannot be read ({getattr(error, 'strerror', None) or error})"
    return ""

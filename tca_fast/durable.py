"""Replace files whole or not at all.

New contents are written beside the old files, flushed to the disk, checked by whoever wrote them,
and only then renamed over the old ones. A full disk, a lost permission or a killed job leaves the
old files as they were.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType

from tca_fast.errors import UserError

_REMEDIES = {
    errno.ENOSPC: "free some space or choose another directory",
    errno.EDQUOT: "free some of the quota or choose another directory",
    errno.EFBIG: "raise the file-size limit or choose another file system",
    errno.EROFS: "choose a directory that can be written",
    errno.EACCES: "choose a directory that you may write",
    errno.EPERM: "choose a directory that you may write",
    errno.EEXIST: "give a directory, not a file",
    errno.ENOTDIR: "give a directory, not a file",
    errno.EISDIR: "remove the directory that has the name of the file",
}


class Replacement:
    """Several files of one directory, replaced together.

    Use as a context manager; whatever was not committed when the block ends is removed, and so
    is the directory if it was made for it.

        with Replacement(directory) as files:
            files.write("weights.safetensors", write_weights)
            files.commit()
    """

    def __init__(self, directory: str | Path) -> None:
        """Nothing is touched before the block is entered."""
        self.directory = Path(directory)
        self._pending: list[tuple[Path, Path]] = []
        self._made: list[Path] = []

    def __enter__(self) -> Replacement:
        """Make the directory if it is missing.

        Raises:
            UserError: it cannot be made.
        """
        missing = [path for path in (self.directory, *self.directory.parents) if not path.exists()]
        with self._errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        self._made = missing
        return self

    def write(self, name: str, write: Callable[[Path], None]) -> None:
        """Have `write` produce the new contents of one file at the path it is given.

        Raises:
            UserError: the file cannot be written; also what `write` raises itself.
        """
        path = self.directory / name
        temporary = self.directory / f".{name}.{os.getpid()}.tmp"
        self._pending.append((temporary, path))
        with self._errors(path):
            write(temporary)
            _open_to_readers(temporary)
            _flush(temporary)

    def commit(self) -> None:
        """Rename the new files over the old ones, in the order they were written.

        Raises:
            UserError: a file cannot be replaced.
        """
        for temporary, path in self._pending:
            with self._errors(path):
                temporary.replace(path)
        self._pending, self._made = [], []
        with self._errors(self.directory):
            _flush(self.directory)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Remove what was not committed."""
        with contextlib.suppress(OSError):
            for temporary, _ in self._pending:
                temporary.unlink(missing_ok=True)
            for made in self._made:
                made.rmdir()

    @contextlib.contextmanager
    def _errors(self, path: Path) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            number = _error_number(error)
            if number is None:
                raise
            remedy = _REMEDIES.get(number, "check the disk and the path")
            raise UserError(
                f"{path}: cannot be written ({os.strerror(number)}); {remedy}. "
                "Earlier files there are unchanged"
            ) from error


def replace_files(directory: str | Path, contents: Mapping[str, bytes]) -> dict[str, Path]:
    """Write files whole, read them back, and let them replace older ones together.

    Args:
        directory: made if missing.
        contents: by file name.

    Returns:
        The paths by file name.

    Raises:
        UserError: the directory or a file cannot be written, or reads back different.
    """
    with Replacement(directory) as files:
        for name, content in contents.items():
            files.write(name, partial(_write_and_compare, content))
        files.commit()
    return {name: Path(directory) / name for name in contents}


def _write_and_compare(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    if path.read_bytes() != content:
        raise UserError(f"{path}: reads back different from what was written; check the disk")


def _error_number(error: Exception) -> int | None:
    """The errno behind an error, also where safetensors wraps it into a text."""
    if isinstance(error, OSError):
        return error.errno
    wrapped = re.search(r"\(os error (\d+)\)", str(error))
    return int(wrapped[1]) if wrapped else None


def _open_to_readers(path: Path) -> None:
    """Permissions of an ordinary new file; safetensors makes files that only the owner reads."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

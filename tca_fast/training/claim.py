"""A run's directory belongs to one run at a time.

Two runs that write to one directory, such as a job and its restart, would remove each other's
unfinished checkpoints and share one log.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from tca_fast.errors import UserError

LOCK_NAME = ".lock"
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


@contextlib.contextmanager
def claimed(output_dir: Path, seconds: float = 15.0) -> Iterator[str]:
    """Hold a directory, which is made if it is missing; given back when the process ends.

    Args:
        output_dir: of the run. Left as it was where the run wrote nothing into it.
        seconds: to wait for a run that is ending; the workers of a killed one outlive it a little.

    Yields:
        A warning where the file system knows no locks, otherwise "".

    Raises:
        UserError: it cannot be written, or another run holds it.
    """
    path = output_dir / LOCK_NAME
    made = [one for one in (output_dir, *output_dir.parents) if not one.exists()]
    with contextlib.ExitStack() as stack:
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            stack.callback(_remove_empty, made)
            file = stack.enter_context(path.open("a"))
            warning = _lock(file, path, seconds)
            stack.callback(_remove_alone, path)
        except OSError as error:
            raise UserError(
                f"run.output_dir: {output_dir} cannot be written ({error.strerror}); choose a "
                "directory that can"
            ) from None
        yield warning


def _lock(file: IO[str], path: Path, seconds: float) -> str:
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return ""
        except BlockingIOError:
            if time.monotonic() > end:
                raise UserError(
                    f"run.output_dir: another run is writing to {path.parent}; wait until it has "
                    f"ended or choose another directory, and if there is none remove {path}"
                ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return (
                f"warning: the file system of {path.parent} knows no locks; take care that no "
                "other run writes there"
            )
        time.sleep(0.2)


def _remove_alone(path: Path) -> None:
    """Remove the lock while it is held, where the run wrote nothing beside it."""
    with contextlib.suppress(OSError):
        if list(path.parent.iterdir()) == [path]:
            path.unlink()


def _remove_empty(directories: Sequence[Path]) -> None:
    with contextlib.suppress(OSError):
        for directory in directories:
            directory.rmdir()

"""Which rank has stopped: one small file per rank, read by all the others.

A rank that hangs leaves the others waiting in a collective, where nothing says for whom. So every
rank notes the step and phase it enters in a file of its own, and a thread of every rank looks at
all of them. When nobody has moved for long, the ranks that stand furthest behind are the ones the
others wait for; the first rank that is not among them says so, in one line.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

DIRECTORY = "heartbeat"
# Bytes of a file: it is overwritten in place, always whole.
_SIZE = 256
_LOOKS = 4


class Beat(NamedTuple):
    """Where a rank was last seen.

    Attributes:
        rank: of the run.
        step: optimizer steps done.
        phase: that it entered last.
        turn: phases it has entered since it started. All ranks go through the same ones, so the
            lowest number is the rank that the others wait for.
        time: seconds since the epoch at which it entered.
        host, pid: its process.
    """

    rank: int
    step: int
    phase: str
    turn: int
    time: float
    host: str
    pid: int


def beat_path(output_dir: Path, rank: int) -> Path:
    """The file of a rank."""
    return output_dir / DIRECTORY / f"rank_{rank:05d}.json"


def read_beats(output_dir: Path, num_ranks: int | None = None) -> list[Beat]:
    """Last signs of the ranks, by rank; those of which there is none are left out.

    Args:
        output_dir: of the run.
        num_ranks: leaves out files of an earlier run with more ranks.
    """
    beats = []
    for path in sorted((output_dir / DIRECTORY).glob("rank_*.json")):
        try:
            beat = Beat(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            continue  # being written, or not ours
        if num_ranks is None or beat.rank < num_ranks:
            beats.append(beat)
    return sorted(beats)


class Heartbeat:
    """Writes the file of one rank. Nothing is flushed to the disk, and a failure stops nothing."""

    def __init__(self, output_dir: Path, rank: int) -> None:
        self._rank = rank
        self._host, self._pid = socket.gethostname(), os.getpid()
        path = beat_path(output_dir, rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        self._turn = 0
        self.beat(0, "start")

    def beat(self, step: int, phase: str) -> None:
        """Note that this rank enters a phase after `step` optimizer steps."""
        self._turn += 1
        beat = Beat(self._rank, step, phase, self._turn, time.time(), self._host, self._pid)
        line = json.dumps(beat._asdict()).ljust(_SIZE - 1) + "\n"
        try:
            os.pwrite(self._file, line.encode(), 0)
        except OSError:
            return  # a full disk is reported by whoever writes what matters

    def __enter__(self) -> Heartbeat:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the file; it stays as the last sign of this rank."""
        os.close(self._file)


class Watch:
    """A thread that says when ranks have stopped; use as a context manager.

    Args:
        output_dir: of the run.
        rank, num_ranks: of this process.
        seconds: without any change in a rank before it counts as stopped; 0 never looks.
        say: takes the line.
    """

    def __init__(
        self,
        output_dir: Path,
        rank: int,
        num_ranks: int,
        seconds: float,
        say: Callable[[str], None],
    ) -> None:
        self._output_dir, self._rank, self._num_ranks = output_dir, rank, num_ranks
        self._seconds, self._say = seconds, say
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Watch:
        """Start looking."""
        if self._seconds and self._num_ranks > 1:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop looking."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        # By this machine's clock, from when a change was seen: clocks of hosts differ.
        seen: dict[int, tuple[int, float]] = {}
        said: list[Beat] = []
        while not self._end.wait(self._seconds / _LOOKS):
            beats, now = read_beats(self._output_dir, self._num_ranks), time.monotonic()
            for beat in beats:
                if beat.rank not in seen or seen[beat.rank][0] != beat.turn:
                    seen[beat.rank] = beat.turn, now
            still = min((now - since for _, since in seen.values()), default=0.0)
            if still < self._seconds or beats == said:
                continue
            said = beats
            stopped = behind(beats)
            if self._rank == speaker(beats, stopped):
                self._say(describe(beats, stopped, still))


def behind(beats: Sequence[Beat]) -> list[Beat]:
    """The ranks that have come least far; all of them where they stand in one place."""
    least = min(beat.turn for beat in beats)
    return [beat for beat in beats if beat.turn == least]


def speaker(beats: Sequence[Beat], stopped: Sequence[Beat]) -> int:
    """The rank that tells: the first that is not behind, or the first."""
    silent = {beat.rank for beat in stopped}
    return min((beat.rank for beat in beats if beat.rank not in silent), default=beats[0].rank)


def describe(beats: Sequence[Beat], stopped: Sequence[Beat], seconds: float) -> str:
    """One line: who stopped, at which step and phase, and who waits."""
    first = stopped[0]
    where = f"after {first.step} step(s), in {first.phase}"
    if len(stopped) == len(beats):
        return (
            f"warning: no rank has moved for {seconds:.0f} s; all {len(beats)} are {where}, so "
            "none of them can be told apart; look at their stacks (py-spy dump --pid …)"
        )
    names = ", ".join(f"{beat.rank} (pid {beat.pid} on {beat.host})" for beat in stopped)
    waiting = len(beats) - len(stopped)
    return (
        f"warning: rank {names} stopped {where}; {waiting} other rank(s) have waited for it for "
        f"{seconds:.0f} s. Look at its stack (py-spy dump --pid {first.pid}), or stop the run and "
        "resume with run.resume_from_checkpoint=latest"
    )

"""What a stage has found, stored after every case, so that a second call does what the first left.

A file of one stage says where and with what it was measured, what became of every case, and what
is left. Its rows are those of the other results files, so `tca-fast bench compare` reads it.
"""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tca_fast.durable import Replacement
from tca_fast.errors import UserError
from tca_fast.results import FORMAT, read_results

# What a case gives: named figures, or rows of a results file under "rows".
Case = Callable[[], Mapping[str, Any]]
DONE, FAILED, ABSENT, RUNNING = "done", "failed", "absent", "running"
LEFT_OFF = "left off"  # the process ended in it, once
# What must not change between two calls that fill one file.
_SAME = ("stage", "device", "device_type", "commit")


class Absent(Exception):
    """A case that cannot be run here, with the reason."""


class DeviceLost(Exception):
    """The device reports an error that every later call of this process would report as well."""


class Clock:
    """Seconds that a stage may take."""

    def __init__(self, seconds: float) -> None:
        """Starts now."""
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds until the end, 0 after it."""
        return max(0.0, self._end - time.monotonic())

    def is_over(self) -> bool:
        """Whether no further case may begin."""
        return not self.left()


class Record:
    """The file of one stage.

    Attributes:
        facts: device, driver, versions, commit and more by name.
        cases: status, reason, seconds and findings of every case by name.
        left: names of the cases that were not begun.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Take over what an earlier call wrote to the file.

        A case that an earlier call was in when it ended is tried once more, since its time may have
        been over; the second time it has failed.

        Raises:
            UserError: the file is of another stage, device or commit.
        """
        self._path = path
        self.facts = dict(facts)
        self.cases: dict[str, dict[str, Any]] = {}
        self.left: list[str] = []
        if not path.exists():
            return
        content = json.loads(path.read_text(encoding="utf-8"))
        for field in _SAME:
            if content["facts"][field] != facts[field]:
                raise UserError(
                    f"{path}: {field} is {content['facts'][field]!r} there and {facts[field]!r} "
                    "now; give another folder, since one file holds figures of one"
                )
        self.cases = content["cases"]
        self.facts["clocks"] = [*content["facts"].get("clocks", []), *facts.get("clocks", [])]
        for name, case in list(self.cases.items()):
            if case["status"] != RUNNING:
                continue
            if case["ended"]:
                reason = "the process ended in it, twice; the log says more"
                self.cases[name] = {"status": FAILED, "reason": reason}
            else:
                case.update(status=LEFT_OFF, ended=1)

    def __contains__(self, name: str) -> bool:
        """Whether a case needs not be run again."""
        return name in self.cases and self.cases[name]["status"] != LEFT_OFF

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Rows of all cases."""
        return [row for case in self.cases.values() for row in case.get("rows", [])]

    def begin(self, name: str) -> None:
        """Note that a case is running."""
        ended = self.cases.get(name, {}).get("ended", 0)
        self.cases[name] = {"status": RUNNING, "ended": ended}
        self.write()

    def end(self, name: str, status: str, began: float, **findings: Any) -> None:
        """Note what became of a case.

        Args:
            name: of the case.
            status: DONE, FAILED or ABSENT.
            began: `time.monotonic()` when it began.
            findings: stored beside the status.
        """
        seconds = round(time.monotonic() - began, 2)
        self.cases[name] = {"status": status, "seconds": seconds, **findings}
        reason = f": {findings['reason']}" if "reason" in findings else ""
        print(f"{status:7} {seconds:7.1f} s  {name}{reason}", flush=True)
        self.write()

    def write(self) -> None:
        """Store everything whole or not at all, read back before anything is replaced."""
        content = {
            "format": FORMAT,
            "facts": self.facts,
            "left": self.left,
            "cases": self.cases,
            "rows": self.rows,
        }
        text = json.dumps(content, indent=1, default=str) + "\n"

        def write(temporary: Path) -> None:
            temporary.write_text(text, encoding="utf-8")
            read_results(temporary)

        with Replacement(self._path.parent) as files:
            files.write(self._path.name, write)
            files.commit()


def run_cases(cases: Mapping[str, Case], record: Record, clock: Clock) -> None:
    """Run the cases that are not in the record yet, until the time is over.

    A case that fails does not stop the others.

    Raises:
        DeviceLost: after a case that left the device unusable for this process.
    """
    record.left = [name for name in cases if name not in record]
    for name, case in cases.items():
        if name in record:
            continue
        if clock.is_over():
            print(f"time is over; left: {', '.join(record.left)}", flush=True)
            break
        record.left.remove(name)
        record.begin(name)
        run_case(name, case, record)
    record.write()


def run_case(name: str, case: Case, record: Record) -> None:
    """Run one case and note what became of it.

    Raises:
        DeviceLost: it left the device unusable for this process.
    """
    began = time.monotonic()
    try:
        record.end(name, DONE, began, **case())
    except Absent as absent:
        record.end(name, ABSENT, began, reason=str(absent))
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {_first_line(str(error))}"
        record.end(name, FAILED, began, reason=reason)
        if is_device_lost(error):
            raise DeviceLost(name) from error
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def is_device_lost(error: BaseException | str) -> bool:
    """Whether an error, or its text, says that this process can use the device no longer.

    Running out of memory is not that.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return False
    lost = ("CUDA error", "device-side assert", "illegal memory access", "unspecified launch")
    return any(words in str(error) for words in lost)


def status_of(records: Sequence[Record]) -> int:
    """Exit status: 0 all done or absent, 1 something failed, 75 nothing failed and some is left."""
    cases = [case for record in records for case in record.cases.values()]
    if any(case["status"] == FAILED for case in cases):
        return 1
    return 75 if any(record.left for record in records) else 0


def _first_line(text: str) -> str:
    return next((line for line in text.splitlines() if line.strip()), "")[:500]

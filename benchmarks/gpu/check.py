"""The stage that shows that everything is right: tests/device, then the sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from benchmarks.gpu.record import (
    ABSENT,
    DONE,
    FAILED,
    Absent,
    Case,
    Clock,
    DeviceLost,
    Record,
    is_device_lost,
    run_cases,
)

TESTS = Path("tests") / "device"
# No settings, plugins or fixtures but those of the tests themselves: the machine may lack them.
_PYTEST = ["-q", "--noconftest", "-p", "no:cacheprovider", "--tb=short", str(TESTS)]
_SANITIZED = ["-k", "under_the_sanitizer"]
_TOOLS = ("memcheck", "racecheck")
_SANITIZER_SECONDS = 180.0


def run(record: Record, clock: Clock, device: torch.device, out: Path) -> None:
    """Run the tests that are not in the record yet, then the sanitizer's tools; write JUnit."""
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    tests = _Recorded(record, clock)
    try:
        status = pytest.main(_PYTEST, plugins=[tests])
        if not tests.collected:
            raise RuntimeError(f"{TESTS}: pytest collected nothing (status {status})")
        if tests.lost:
            raise DeviceLost(tests.lost)
        left = record.left
        run_cases({f"sanitizer {tool}": _sanitizer(tool, clock, device) for tool in _TOOLS},
                  record, clock)  # fmt: skip
        record.left = [*left, *record.left]
        record.write()
    finally:
        write_junit(record, out / "check.xml")


class _Recorded:
    """Lets pytest run what the record does not have, while there is time."""

    def __init__(self, record: Record, clock: Clock) -> None:
        self.collected: list[str] = []
        self.lost: str | None = None
        self._record, self._clock = record, clock
        self._began = 0.0
        self._outcome: tuple[str, str] = (DONE, "")

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[Any]) -> None:
        """Leave out what is done."""
        self.collected = [item.nodeid for item in items]
        items[:] = [item for item in items if item.nodeid not in self._record]
        self._record.left = [item.nodeid for item in items]

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
        """Note beginning and end of a test; stop where time is over or the device is lost."""
        if self._clock.is_over():
            pytest.exit(f"time is over; left: {len(self._record.left)} tests", returncode=0)
        self._record.left.remove(item.nodeid)
        self._record.begin(item.nodeid)
        self._began, self._outcome = time.monotonic(), (DONE, "")
        result = yield
        status, reason = self._outcome
        self._record.end(item.nodeid, status, self._began, **({"reason": reason} if reason else {}))
        if status == FAILED and is_device_lost(reason):
            self.lost = item.nodeid
            item.session.shouldstop = "the device is lost"
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the worst of set-up, test and tear-down."""
        if report.failed:
            self._outcome = FAILED, str(report.longrepr)[-4000:]
        elif report.skipped and self._outcome[0] == DONE:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
            self._outcome = ABSENT, str(reason).removeprefix("Skipped: ")


def _sanitizer(tool: str, clock: Clock, device: torch.device) -> Case:
    """A small subset of the tests under one tool of NVIDIA's compute-sanitizer."""

    def case() -> dict[str, Any]:
        binary = shutil.which("compute-sanitizer")
        if binary is None:
            raise Absent("compute-sanitizer is not here")
        if device.type != "cuda":
            raise Absent("needs a CUDA device")
        command = [binary, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
        # Every tensor an allocation of its own, so that one byte beyond it is seen.
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        seconds = max(60.0, min(_SANITIZER_SECONDS, clock.left()))
        result = subprocess.run(
            [*command, sys.executable, "-m", "pytest", *_PYTEST, *_SANITIZED],
            capture_output=True,
            text=True,
            env=environment,
            timeout=seconds,
        )
        output = result.stdout + result.stderr
        print(output, flush=True)
        if result.returncode:
            raise AssertionError(f"{tool} ended with status {result.returncode}; the log says more")
        summary = [line for line in output.splitlines() if "ERROR SUMMARY" in line]
        return {"summary": summary[-1] if summary else "no summary"}

    return case


def write_junit(record: Record, path: Path) -> None:
    """All cases of a record as JUnit XML."""
    statuses = [case["status"] for case in record.cases.values()]
    suite = ElementTree.Element(
        "testsuite",
        name="check",
        tests=str(len(statuses)),
        failures=str(statuses.count(FAILED)),
        skipped=str(statuses.count(ABSENT)),
    )
    for name, value in record.facts.items():
        ElementTree.SubElement(suite, "property", name=name, value=str(value))
    for name, case in record.cases.items():
        entry = ElementTree.SubElement(
            suite, "testcase", name=name, time=str(case.get("seconds", 0))
        )
        kind = {FAILED: "failure", ABSENT: "skipped"}.get(case["status"])
        if kind:
            ElementTree.SubElement(entry, kind, message=case.get("reason", ""))
    ElementTree.indent(suite)
    path.write_bytes(ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True))

"""Options, and how interleaved rounds reach pytest-benchmark.

pytest-benchmark times one callable after another, each for all its rounds. Here all variants of a
case take turns, so that drift of the machine hits all of them alike; the rounds are measured first
and then played back to pytest-benchmark, one test for each variant, on a clock that advances by
what was measured. Its selection, statistics, grouping and JSON serve as usual.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks.cases import CASES
from benchmarks.measure import VARIANTS, Machine, Measured, measure
from benchmarks.results import find_machine, write_results
from benchmarks.tables import WIDTH, print_results
from tca_fast import ops

_ROWS = pytest.StashKey[list[dict[str, Any]]]()


class RecordedClock:
    """A clock that stands still except for the seconds it is told to play."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def now(self) -> float:
        """Seconds played so far."""
        return self._seconds

    def play(self, seconds: float) -> None:
        """Let time pass."""
        self._seconds += seconds


clock = RecordedClock()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the suites."""
    group = parser.getgroup("tca_fast benchmarks")
    group.addoption("--device", help="cpu or cuda; default: cuda where there is a device")
    group.addoption("--cases", choices=sorted(CASES), help="default: the set of the device")
    group.addoption("--only", default="", help="cases whose name contains this")
    group.addoption("--rounds", type=int, default=7, help="timed rounds of every variant")
    group.addoption("--backend", help="force one backend by name, such as reference")
    group.addoption("--out", type=Path, help="results file to write")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse what would make the times meaningless, or lose those of an earlier run."""
    if config.getoption("numprocesses", None):
        raise pytest.UsageError("-n: benchmarks run one after another; leave it out")
    if config.getoption("--rounds") < 1:
        raise pytest.UsageError(f"--rounds: {config.getoption('--rounds')}, expected 1 or more")
    if (out := config.getoption("--out")) and out.exists():
        raise pytest.UsageError(f"--out: {out} exists; give another name or remove it")
    _device(config)
    config.stash[_ROWS] = []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every operation of a suite at every case, with every variant."""
    chosen = metafunc.config.getoption("--cases") or _device(metafunc.config).type
    cases = [case for case in CASES[chosen] if metafunc.config.getoption("--only") in case.name]
    pairs = [(operation, case) for case in cases for operation in metafunc.module.SUITE]
    ids = [f"{operation.name}, {case.name}" for operation, case in pairs]
    metafunc.parametrize("measurement", pairs, ids=ids, indirect=True, scope="module")
    metafunc.parametrize("variant", VARIANTS)


@pytest.fixture(scope="session", name="machine")
def _machine(request: pytest.FixtureRequest) -> Machine:
    """The device under test, its copy bandwidth measured once."""
    return find_machine(_device(request.config), request.config.getoption("--backend"))


@pytest.fixture(scope="module", name="measurement")
def _measurement(request: pytest.FixtureRequest, machine: Machine) -> Iterator[dict[str, Measured]]:
    """The selected variants of one operation at one case, checked and timed against each other."""
    operation, case = request.param
    selected = [
        item.callspec.params["variant"]
        for item in request.session.items
        if isinstance(item, pytest.Function)
        and item.callspec.params["measurement"] == request.param
    ]
    with ops.backend(machine.backend) if machine.backend else nullcontext():
        measured = measure(operation, case, selected, machine, request.config.getoption("--rounds"))
    request.config.stash[_ROWS] += [one.row for one in measured.values()]
    yield measured


@pytest.fixture(name="play")
def _play(measurement: dict[str, Measured], variant: str, benchmark: Any) -> Any:
    """Hand the rounds of one variant to pytest-benchmark, with the row beside them."""

    def play() -> None:
        row, milliseconds = measurement[variant].row, measurement[variant].milliseconds
        if row.get("is_refused"):
            pytest.fail(f"{variant}: {row['absent']}")
        if "absent" in row:
            pytest.skip(row["absent"])
        seconds = iter([value * 1e-3 for value in milliseconds])
        benchmark.group = f"{row['operation']}, {row['case']}"
        benchmark.extra_info.update(row)
        benchmark.pedantic(
            clock.play, setup=lambda: ((next(seconds),), {}), rounds=len(milliseconds)
        )

    return play


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Store what was measured, if it is to be stored."""
    rows, out = session.config.stash[_ROWS], session.config.getoption("--out")
    if rows and out:
        write_results(out, rows)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """All rows, in tables wide enough for every column."""
    console = Console(width=WIDTH)
    with console.capture() as printed:
        print_results(console, config.stash[_ROWS])
    terminalreporter.write(printed.get())


def _device(config: pytest.Config) -> torch.device:
    name = config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise pytest.UsageError(f"--device: {name!r}, expected cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device: cuda, but torch sees no such device; give cpu")
    return torch.device(name)

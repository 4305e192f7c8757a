"""Which backend computes an operator on a CUDA device, as measured on devices of its family.

A family is a compute capability ("sm_90"). Its table, `measured/FAMILY.json`, is made by
`python -m benchmarks.gpu.table` from what `make gpu STAGE=tune` read off such a device, and names
that results file. Without a table plain PyTorch serves: a backend that was never measured on a
family runs there only where it is asked for by name, in the environment variable
TCA_FAST_CUDA_BACKEND or with `ops.backend`.

Shapes: T tokens, D model width, F features.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tca_fast.errors import UserError
from tca_fast.kernels import ASSUMED_DENSE_SHARE

FORMAT = "tca_fast measured backends 1"
VARIABLE = "TCA_FAST_CUDA_BACKEND"
TABLES = Path(__file__).parent / "measured"
REGIMES = ("sparse", "dense")


class Call(NamedTuple):
    """What a choice may depend on: known from the arguments of forward and backward alike.

    Attributes:
        operator: "encode", "decode" or "adapter"; a backward goes with its forward.
        tokens, width, features: T, D, F.
        density: share of all pairs expected to be active.
    """

    operator: str
    tokens: int
    width: int
    features: int
    density: float


@dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes:
        call: what was run.
        milliseconds: median by backend and regime; the layer forward and backward for "adapter".
    """

    call: Call
    milliseconds: dict[str, dict[str, float]]

    def fastest(self, backends: Sequence[str]) -> tuple[str, str] | None:
        """Backend and regime of the least time among some backends; None where none has one."""
        times = [
            (time, backend, regime)
            for backend, by_regime in self.milliseconds.items()
            for regime, time in by_regime.items()
            if backend in backends
        ]
        return min(times)[1:] if times else None


@dataclass(frozen=True)
class Table:
    """What was measured on one family.

    Attributes:
        family: such as "sm_90".
        device: the one that was measured.
        results: results file it was made from, relative to the repository.
        points: at least one for every operator.
    """

    family: str
    device: str
    results: str
    points: tuple[Point, ...]

    def choose(self, call: Call, backends: Sequence[str]) -> str:
        """The fastest of some backends at the nearest measured point; else "reference"."""
        found = [
            point
            for point in self.points
            if point.call.operator == call.operator and point.fastest(backends)
        ]
        if not found:
            return "reference"
        fastest = min(found, key=lambda point: _distance(point.call, call)).fastest(backends)
        assert fastest is not None
        return fastest[0]

    def dense_share(
        self, tokens: int, width: int, features: int, backends: Sequence[str]
    ) -> float | None:
        """Density of the layer above which dense products win, at the nearest measured shape.

        Half-way, on a logarithmic scale, between the highest measured density below which the
        sparse regime always won and the next one; 1 where it always won, 0 where it never did.
        None where the layer was not measured with any of these backends.
        """
        points = [
            point
            for point in self.points
            if point.call.operator == "adapter" and point.fastest(backends)
        ]
        if not points:
            return None

        def shape(call: Call) -> Call:
            return call._replace(density=1.0)

        wanted = Call("adapter", tokens, width, features, 1.0)
        nearest = shape(min(points, key=lambda p: _distance(shape(p.call), wanted)).call)
        below = 0.0
        for point in sorted(points, key=lambda point: point.call.density):
            if shape(point.call) != nearest:
                continue
            fastest = point.fastest(backends)
            if fastest is not None and fastest[1] == "dense":
                return math.sqrt(below * point.call.density)
            below = point.call.density
        return 1.0

    def backends_of(self, operator: str, backends: Sequence[str]) -> list[str]:
        """Those that some point of an operator chooses."""
        found = {
            fastest[0]
            for point in self.points
            if point.call.operator == operator and (fastest := point.fastest(backends))
        }
        return sorted(found)


def read_table(path: Path) -> Table:
    """Read and check one table.

    Raises:
        UserError: unreadable, of another format, or with a field missing or of a wrong kind.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format is {content['format']!r}, expected {FORMAT!r}")
        points = tuple(map(_point, content["points"]))
        if not points:
            raise ValueError("points is empty")
        return Table(content["family"], content["device"], content["results"], points)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"measured backends: {path} cannot be used ({type(error).__name__}: {reason}); make it "
            "again with `python -m benchmarks.gpu.table`, or remove it"
        ) from error


def table_content(table: Table) -> dict[str, Any]:
    """What `read_table` reads, as JSON."""
    return {
        "format": FORMAT,
        "family": table.family,
        "device": table.device,
        "results": table.results,
        "points": [
            {**point.call._asdict(), "milliseconds": point.milliseconds} for point in table.points
        ],
    }


@lru_cache
def family_table(family: str) -> Table | None:
    """The table of a family, None where nothing of it was measured.

    Raises:
        UserError: it is there but cannot be used, or is that of another family.
    """
    path = TABLES / f"{family}.json"
    if not path.exists():
        return None
    table = read_table(path)
    if table.family != family:
        raise UserError(f"measured backends: {path} is of {table.family}; name it after that")
    return table


def family(device: torch.device | int | None = None) -> str | None:
    """Family of a CUDA device, None where there is no such device."""
    if not torch.cuda.is_available():
        return None
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def named(backends: Sequence[str]) -> str | None:
    """The backend asked for in the environment, None where nothing is.

    Raises:
        UserError: no such backend here.
    """
    name = os.environ.get(VARIABLE)
    if name and name not in backends:
        raise UserError(f"{VARIABLE}: {name!r} is not here; choose one of {', '.join(backends)}")
    return name or None


def choose(call: Call, backends: tuple[str, ...], device: torch.device) -> str:
    """The backend of a call on a CUDA device.

    Args:
        call: its operator, shape and density.
        backends: those that are installed and serve CUDA devices.
        device: where the tensors are.

    Raises:
        UserError: the environment names a backend that is not here, or a table cannot be used.
    """
    return named(backends) or _chosen(call, backends, _family_of(device))


def reason(operator: str, backends: Sequence[str], of: str | None) -> tuple[str, str]:
    """What serves an operator on CUDA devices of a family (None is no device), and why."""
    if name := named(backends):
        return name, f"{VARIABLE} asks for it"
    if of is None:
        return "reference", "no CUDA device here, whose family would say what was measured"
    table = family_table(of)
    others = ", ".join(name for name in backends if name != "reference") or "nothing else is here"
    if table is None:
        return "reference", (
            f"nothing was measured on {of}, so plain PyTorch serves; by name only: {others} "
            f"({VARIABLE}=NAME)"
        )
    chosen = table.backends_of(operator, backends)
    if not chosen:
        return "reference", (
            f"the measurements of {of} ({table.results}) have none of it with {others}"
        )
    left = [name for name in backends if name not in chosen]
    why = f"fastest on {of} as measured on {table.device} ({table.results})"
    if len(chosen) > 1:
        why += ", each at some shapes"
    return ", ".join(chosen), f"{why}; not {', '.join(left)}" if left else why


def in_force(of: str | None) -> str:
    """The table of a family (None is no device) and the crossovers that follow, in one line."""
    table = None if of is None else family_table(of)
    if table is None:
        what = "no CUDA device" if of is None else f"nothing measured on {of}"
        return f"{what}; dense products above {ASSUMED_DENSE_SHARE:.2%} of pairs is assumed"
    shapes = sorted({point.call[1:4] for point in table.points if point.call.operator == "adapter"})
    shares = [
        f"{share:.2%} at T {tokens}, D {width}, F {features}"
        for tokens, width, features in shapes
        if (share := table.dense_share(tokens, width, features, _known(table))) is not None
    ]
    return f"{table.results}, read off {table.device}; dense above {', '.join(shares)}"


def dense_share(
    device: torch.device,
    tokens: int,
    width: int,
    features: int,
    backends: tuple[str, ...] | None = None,
) -> float:
    """Density of a layer above which dense products are faster than gathered rows.

    Measured where the device's family has a table, else assumed from rates
    (`kernels.ASSUMED_DENSE_SHARE`).

    Args:
        device: any; only CUDA devices were measured.
        tokens, width, features: T, D and F.
        backends: those to compare; None is all.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return ASSUMED_DENSE_SHARE
    return _dense_share(_family_of(device), tokens, width, features, backends)


@lru_cache(maxsize=4096)
def _dense_share(
    family: str, tokens: int, width: int, features: int, backends: tuple[str, ...] | None
) -> float:
    table = family_table(family)
    if table is None:
        return ASSUMED_DENSE_SHARE
    share = table.dense_share(tokens, width, features, backends or _known(table))
    return ASSUMED_DENSE_SHARE if share is None else share


@lru_cache(maxsize=4096)
def _chosen(call: Call, backends: tuple[str, ...], family: str) -> str:
    table = family_table(family)
    if table is not None:
        return table.choose(call, backends)
    _warn_once(family, ", ".join(name for name in backends if name != "reference"))
    return "reference"


@lru_cache
def _warn_once(family: str, others: str) -> None:
    if others:
        warnings.warn(
            f"nothing was measured on {family}, so plain PyTorch computes the adapters; set "
            f"{VARIABLE} to one of {others}, or measure with `make gpu` (tca-fast env says more)",
            stacklevel=2,
        )


@lru_cache
def _family_of(device: torch.device) -> str:
    found = family(device)
    assert found is not None
    return found


def _known(table: Table) -> tuple[str, ...]:
    return tuple({name for point in table.points for name in point.milliseconds})


def _distance(one: Call, other: Call) -> float:
    """Sum of the factors by which two calls differ, as logarithms."""
    least = 1e-9  # of a density
    return sum(
        abs(math.log(max(a, least) / max(b, least)))
        for a, b in zip(one[1:], other[1:], strict=True)
    )


def _point(row: dict[str, Any]) -> Point:
    call = Call(*(row[field] for field in Call._fields))
    times = row["milliseconds"]
    for by_regime in times.values():
        if not by_regime or not set(by_regime) <= set(REGIMES):
            raise ValueError(f"regimes are {sorted(by_regime)}, expected some of {REGIMES}")
        if not all(isinstance(ms, int | float) and ms > 0 for ms in by_regime.values()):
            raise ValueError(f"milliseconds are {by_regime}, expected positive numbers")
    if min(*call[1:4], call.density) <= 0 or call.density > 1:
        raise ValueError(f"{call} has a size that is not positive, or a density above 1")
    return Point(call, times)

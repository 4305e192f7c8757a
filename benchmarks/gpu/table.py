"""From the measurements of a device to the table that its family's backends are chosen from.

    python -m benchmarks.gpu.table FOLDER

takes FOLDER/tune.json and FOLDER/check.json, keeps the former as
benchmarks/results/FAMILY_tune.json and writes tca_fast/measured/FAMILY.json. Backends with a failed
check are left out.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.record import FAILED
from tca_fast import selection
from tca_fast.durable import Replacement
from tca_fast.errors import UserError

_ROOT = Path(__file__).parents[2]
RESULTS = Path("benchmarks") / "results"


def make_table(tune: Mapping[str, Any], wrong: set[str]) -> selection.Table | None:
    """The table of what the tune stage measured; None where nothing is left to choose from.

    Args:
        tune: content of its file.
        wrong: backends that failed a check.
    """
    family = tune["facts"]["family"]
    points = []
    for case in tune["cases"].values():
        if "point" not in case:
            continue
        point = dict(case["point"])
        times = {b: t for b, t in point.pop("milliseconds").items() if b not in wrong}
        if times:
            points.append(selection.Point(selection.Call(**point), times))
    if not points:
        return None
    results = (RESULTS / f"{family}_tune.json").as_posix()
    return selection.Table(family, tune["facts"]["device"], results, tuple(points))


def wrong_backends(check: Mapping[str, Any]) -> set[str]:
    """Backends that a failed check names, as the first of its parameters."""
    failed = [name for name, case in check["cases"].items() if case["status"] == FAILED]
    return {found[1] for name in failed if (found := re.search(r"\[(\w+)", name))}


def write_table(folder: Path) -> str:
    """Make FAMILY.json of what a folder has; says what became of it.

    Without checks, or with checks of another commit, nothing is written: a table must not choose
    what was not shown to be right.
    """
    tune = _read(folder / "tune.json")
    if not (folder / "check.json").exists():
        return "no table: run the stage check first"
    check = _read(folder / "check.json")
    for field in ("commit", "device", "device_type"):
        if check["facts"][field] != tune["facts"][field]:
            return f"no table: check.json and tune.json differ in {field}"
    if check["left"]:
        return f"no table: {len(check['left'])} checks are left"
    wrong = wrong_backends(check)
    table = make_table(tune, wrong)
    if table is None:
        return "no table: nothing was measured"
    path = folder / f"{table.family}.json"
    _store(path, json.dumps(selection.table_content(table), indent=1) + "\n")
    without = f", without {', '.join(sorted(wrong))}, which failed a check" if wrong else ""
    return f"{path}: {len(table.points)} points{without}"


def adopt(folder: Path) -> str:
    """Put a folder's table and the results it was made from into this repository.

    Raises:
        UserError: the folder has no table, or it is that of a rehearsal.
    """
    said = write_table(folder)
    if said.startswith("no table"):
        raise UserError(f"{folder}: {said}")
    tune = _read(folder / "tune.json")
    if tune["facts"]["rehearsal"]:
        raise UserError(f"{folder}: a rehearsal on a CPU measures nothing; run it on a GPU")
    family = tune["facts"]["family"]
    _store(_ROOT / RESULTS / f"{family}_tune.json", (folder / "tune.json").read_text("utf-8"))
    _store(selection.TABLES / f"{family}.json", (folder / f"{family}.json").read_text("utf-8"))
    return said


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _store(path: Path, text: str) -> None:
    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")
        json.loads(temporary.read_text(encoding="utf-8"))

    with Replacement(path.parent) as files:
        files.write(path.name, write)
        files.commit()


def main() -> None:
    """Adopt the table of a folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    try:
        print(adopt(parser.parse_args().folder))
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()

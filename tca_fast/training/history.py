"""A run's log, read while it may still be written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tca_fast.errors import UserError
from tca_fast.training.heartbeat import Beat, read_beats
from tca_fast.training.logs import LOG_NAME

Record = Mapping[str, Any]


@dataclass(frozen=True)
class History:
    """What a run has logged so far.

    Attributes:
        directory: of the run.
        records: lines of the log in order, each with `step` and `split`.
        beats: last signs of its ranks.
        config: the run's configuration as YAML text, empty where there is none.
    """

    directory: Path
    records: Sequence[Record]
    beats: Sequence[Beat]
    config: str

    def of(self, split: str) -> list[Record]:
        """Records of "train" or "validation"."""
        return [record for record in self.records if record.get("split") == split]

    def series(self, split: str, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one figure, where it was logged."""
        found = [(row["step"], row[name]) for row in self.of(split) if row.get(name) is not None]
        return [step for step, _ in found], [value for _, value in found]

    def by_depth(self, name: str) -> list[float]:
        """The newest value of a figure such as "nmse/state" at each depth, from 0 on."""
        for record in reversed(self.of("train")):
            values: list[float] = []
            while (key := f"{name}_{len(values)}") in record:
                values.append(float(record[key]))
            if values:
                return values
        return []


def read_history(directory: Path) -> History:
    """Read a run's directory; a half-written last line of its log is left out.

    Raises:
        UserError: no log there, no step in it yet, or a broken line that is not the last.
    """
    path = directory / LOG_NAME
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    except OSError as error:
        raise UserError(
            f"run: {path} cannot be read ({error.strerror}); give the run.output_dir of a run"
        ) from None
    records = []
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is not None:
            records.append(record)
        elif number < len(lines):
            raise UserError(f"run: line {number} of {path} is not a record; mend or remove it")
    if not records:
        raise UserError(f"run: {path} holds no step yet; try again when the first one is done")
    config = directory / "config.yaml"
    text = config.read_text(encoding="utf-8") if config.exists() else ""
    return History(directory, records, read_beats(directory), text)


def _parse(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        return None
    return record

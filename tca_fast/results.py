"""Files of benchmark results: rows of JSON that say what was measured, where, and how long."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tca_fast.errors import UserError

# What a results file says it is.
FORMAT = "tca_fast benchmark results 1"
# What makes two rows the same measurement. The shape is part of it, so that a case that was
# redefined under its old name is not compared.
_SHAPE = ("tokens", "width", "features", "l0", "rates", "k")
IDENTITY = ("operation", "case", "variant", "dtype", *_SHAPE)
TIMES = ("median_ms", "low_ms", "high_ms")
_FACTS = ("device", "commit", "versions", "backend")

Row = Mapping[str, Any]


def is_timed(row: Row) -> bool:
    """Whether a row has times, and says neither why it has none nor what memory was taken."""
    return "absent" not in row and "phase_peak_bytes" not in row


def read_results(path: Path) -> list[dict[str, Any]]:
    """Rows of a results file.

    Raises:
        UserError: no such file, not JSON, not a results file, or a row that lacks a field.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"results: {path} cannot be read ({error.strerror}); give one that `make bench` wrote"
        ) from error
    except ValueError as error:
        raise UserError(
            f"results: {path} is not JSON ({error}); give a file that `make bench` wrote"
        ) from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise UserError(
            f"results: {path} has format {found!r}, expected {FORMAT!r}; measure again with "
            "`make bench`"
        )
    rows = content.get("rows")
    if not isinstance(rows, list):
        raise UserError(
            f"results: {path}, rows is {rows!r}, expected a list; measure again with `make bench`"
        )
    for number, row in enumerate(rows):
        _check_row(f"{path}, row {number}", row)
    return rows


def _check_row(where: str, row: object) -> None:
    if not isinstance(row, dict):
        raise UserError(f"results: {where} is not an object; measure again with `make bench`")
    times = TIMES if is_timed(row) else ()
    for field in (*IDENTITY, *_FACTS, *times):
        if field not in row:
            raise UserError(f"results: {where} lacks {field!r}; measure again with `make bench`")
    for field in times:
        if not (isinstance(row[field], int | float) and row[field] > 0):
            raise UserError(
                f"results: {where} has {field} {row[field]!r}, expected a positive number of "
                "milliseconds; measure again with `make bench`"
            )

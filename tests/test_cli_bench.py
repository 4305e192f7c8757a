"""`tca-fast bench compare`: what changed, what cannot be compared, and users' mistakes."""

import json
import sys
from pathlib import Path

import pytest

from tca_fast import cli
from tca_fast.cli.bench import changes
from tca_fast.results import FORMAT, read_results


def row(variant="tca_fast", median=10.0, spread=1.0, **overrides):
    return {
        "operation": "layer",
        "case": "1.5B l0=8",
        "variant": variant,
        "dtype": "float32",
        "tokens": 1024,
        "width": 1536,
        "features": 8192,
        "l0": 8,
        "rates": "power",
        "k": None,
        "device": "a processor",
        "commit": "abc1234",
        "versions": {"torch": "2.13.0"},
        "backend": "cpp",
        "median_ms": median,
        "low_ms": median - spread,
        "high_ms": median + spread,
        **overrides,
    }


def absent(variant):
    return {**row(variant), "absent": "would gather 24 GiB of rows"}


@pytest.fixture(name="compare")
def _compare(tmp_path, monkeypatch, capsys):
    """Exit status, output and errors of `tca-fast bench compare` on two lists of rows."""

    def compare(old, new):
        for name, rows in (("old.json", old), ("new.json", new)):
            (tmp_path / name).write_text(json.dumps({"format": FORMAT, "rows": rows}))
        return run(monkeypatch, capsys, tmp_path / "old.json", tmp_path / "new.json")

    return compare


def run(monkeypatch, capsys, *paths):
    monkeypatch.setattr(sys, "argv", ["tca-fast", "bench", "compare", *map(str, paths)])
    try:
        cli.main()
        status = 0
    except SystemExit as end:
        status = end.code or 0
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_changes_beyond_the_spread_are_marked(compare):
    names = ["faster one", "slower one", "touching", "the same"]
    old = [row(name, 10.0) for name in names]
    new = [row(name, median) for name, median in zip(names, [7.9, 12.1, 12.0, 10.5], strict=True)]
    status, out, _ = compare(old, new)
    lines = {name: next(line for line in out.splitlines() if name in line) for name in names}
    assert status == 0
    assert lines["faster one"].split()[-2:] == ["-21.0%", "faster"]
    assert lines["slower one"].split()[-2:] == ["+21.0%", "slower"]
    assert lines["touching"].split()[-1] == "+20.0%"
    assert lines["the same"].split()[-1] == "+5.0%"
    for number in ("10", "9-11", "7.9", "6.9-8.9"):
        assert number in lines["faster one"].split()
    assert "4 compared: 1 faster, 1 slower, 2 within the spread" in out
    assert "warning" not in out and "only in" not in out


def test_numbers_survive_a_narrow_pipe(compare, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    _, out, _ = compare([row(median=1234.5)], [row(median=2345.6)])
    assert "1234" in out and "2346" in out and "+90.0%" in out


def test_other_machine_versions_and_backend_are_told(compare):
    now = row(
        device="another processor", versions={"torch": "2.14.0"}, backend="reference", commit="def"
    )
    status, out, _ = compare([row()], [now])
    assert status == 0
    assert "warning: device differs: a processor before, another processor now" in out
    assert "warning: versions differs: torch 2.13.0 before, torch 2.14.0 now" in out
    assert "cpp → reference" in out and "abc1234 → def" in out


@pytest.mark.parametrize("field", ["dtype", "tokens", "features", "l0", "rates", "k", "operation"])
def test_other_workloads_are_not_compared(field):
    """A case that was redefined under its old name is another case."""
    found, only_old, only_new = changes([row()], [row(**{field: "other"})])
    assert not found and len(only_old) == len(only_new) == 1


def test_what_only_one_file_has_is_listed(compare):
    old = [row(), row("gone"), row("lost"), absent("dense")]
    status, out, _ = compare(old, [row(), absent("lost"), row("dense")])
    assert status == 0 and "1 compared" in out
    assert "old.json: layer, 1.5B l0=8 (gone, lost)" in out
    assert "new.json: layer, 1.5B l0=8 (dense)" in out


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, ["cannot be read", "No such file"]),
        ("{not json", ["is not JSON"]),
        (b"\xff\xfe", ["is not JSON"]),
        ("[]", ["has format None", FORMAT]),
        ('{"machine_info": {}, "benchmarks": []}', ["has format None", FORMAT]),
        ('{"format": "tca_fast benchmark results 0", "rows": []}', ["results 0", FORMAT]),
        (json.dumps({"format": FORMAT, "rows": {}}), ["rows is {}"]),
        (json.dumps({"format": FORMAT, "rows": [row(), 3]}), ["row 1 is not an object"]),
        (json.dumps({"format": FORMAT, "rows": [{"case": "a"}]}), ["row 0 lacks 'operation'"]),
        (json.dumps({"format": FORMAT, "rows": [row(median_ms="fast")]}), ["median_ms 'fast'"]),
        (json.dumps({"format": FORMAT, "rows": [row(median_ms=0)]}), ["median_ms 0", "positive"]),
        (json.dumps({"format": FORMAT, "rows": [row(low_ms=float("nan"))]}), ["low_ms nan"]),
        (json.dumps({"format": FORMAT, "rows": []}), ["no measurement in common"]),
    ],
)
def test_mistakes(tmp_path, monkeypatch, capsys, content, expected):
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps({"format": FORMAT, "rows": [row()]}))
    if content is not None:
        bad.write_bytes(content if isinstance(content, bytes) else content.encode())
    status, _, err = run(monkeypatch, capsys, good, bad)
    assert status == 2
    assert err.startswith("error: results: ") and err.count("\n") == 1 and str(bad) in err
    for text in expected:
        assert text in err


def test_a_folder_is_a_mistake_too(tmp_path, monkeypatch, capsys):
    status, _, err = run(monkeypatch, capsys, tmp_path, tmp_path)
    assert status == 2 and "Is a directory" in err


def test_the_stored_results_can_be_read():
    stored = sorted((Path(__file__).parents[1] / "benchmarks" / "results").glob("*.json"))
    assert stored and all(read_results(path) for path in stored)

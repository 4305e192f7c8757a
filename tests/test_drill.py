"""A short failure drill: faults of each family, clean resumes, losses equal bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DRILL = Path(__file__).with_name("drill.py")
KINDS = [
    "SIGKILL one rank",
    "SIGKILL all ranks while saving",
    "SIGTERM one rank",
    "Ctrl-C",
    "file-size limit",
    "damaged two newest checkpoints",
]

pytestmark = pytest.mark.skipif(
    not Path(sys.executable).with_name("deepspeed").exists() or not hasattr(os, "fork"),
    reason="needs DeepSpeed and fork",
)


def test_a_short_drill_loses_nothing(tmp_path):
    command = [sys.executable, DRILL, "--faults", len(KINDS), "--out", tmp_path, "--kinds", *KINDS]
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    records = [json.loads(line) for line in (tmp_path / "drill.jsonl").open()]
    assert [record["kind"] for record in records] == KINDS
    assert all(record["resumed"] > 0 and record["lines_equal"] > 2 for record in records)
    # What a fault must have left behind, so that a drill that breaks nothing is noticed.
    killed, saving, term, interrupt, limit, damaged = records
    # Rank 0 says what it lost; rank 1 leaves that to it and is ended by the launcher.
    assert sorted(killed["statuses"]) in ([-15, -9], [-9, 2])
    assert saving["statuses"] == [-9, -9]
    assert term["statuses"] == interrupt["statuses"] == [130, 130]
    assert any("File too large" in text for text in limit["said"])
    assert len(damaged["skipped"]) == 2

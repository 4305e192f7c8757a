"""Everything a GPU has to show, in one call: `make gpu STAGE=all OUT=folder`.

    python -m benchmarks.gpu --stage check|bench|step|tune|all --out FOLDER [--device cpu]

A call takes at most eight minutes by its own clock: each stage runs in a process of its own, which
finishes the case at hand, writes what it has and says what is left. The same call again does what
is left. A case that ends the process twice has failed, and the stage goes on behind it in a new
one. Nothing is downloaded; torch, Triton, numpy, transformers and pytest are all that is needed.

    check     check.json, check.xml   tests/device: float64, bits, graphs, no waiting, sanitizer
    bench     bench.json              rates of the device, layers and operators, generation, peers
    step      step.json               training steps, memory of every phase, the longest sequence
    tune      tune.json, FAMILY.json  block sizes; which backend and regime is fastest where
    all       log.txt                 what the stages printed

On a CPU every stage runs at tiny shapes with the backends that run there, and every file says so:
a rehearsal, whose figures mean nothing.

Exit status: 0 all done, 1 something failed, 75 some of it is left.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

STAGES = ("check", "bench", "step", "tune")
SECONDS = 480.0
# A case that takes this much longer than the call may is ended.
GRACE = 60.0
LEFT, LOST = 75, 3


def run_stage(stage: str, out: Path, device: str, seconds: float) -> int:
    """Run a stage, in a new process whenever one was ended by a case; returns its status."""
    end = time.monotonic() + seconds
    path = out / f"{stage}.json"
    while True:
        before = path.read_bytes() if path.exists() else b""
        status = _run(stage, out, device, max(0.0, end - time.monotonic()))
        if status in (0, 1, LEFT):
            return status
        after = path.read_bytes() if path.exists() else b""
        if after == before:  # it died before its first case, and would again
            return 1
        if status != LOST:
            _log(out, f"{stage}: the process ended with status {status}; on without that case")


def _run(stage: str, out: Path, device: str, seconds: float) -> int:
    command = [sys.executable, "-m", "benchmarks.gpu.stage", stage]
    command += ["--out", str(out), "--device", device, "--seconds", f"{seconds:.1f}"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
    ) as process:
        ended = threading.Timer(seconds + GRACE, process.kill)
        ended.start()
        assert process.stdout is not None
        for line in process.stdout:
            _log(out, line.rstrip("\n"))
        status = process.wait()
        ended.cancel()
    return status


def _log(out: Path, line: str) -> None:
    print(line, flush=True)
    with (out / "log.txt").open("a", encoding="utf-8") as log:
        log.write(f"{line}\n")


def main() -> None:
    """Run the stages that are asked for, one after another."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=[*STAGES, "all"], default="all")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of the whole call")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    statuses = {}
    end = time.monotonic() + options.seconds
    for stage in STAGES if options.stage == "all" else [options.stage]:
        began = time.monotonic()
        if statuses and began >= end:
            statuses[stage] = LEFT
            _log(options.out, f"{stage}: not begun; call again")
            continue
        statuses[stage] = run_stage(stage, options.out, options.device, end - began)
        words = {0: "all done", 1: "something failed", LEFT: "some of it is left; call again"}
        seconds = time.monotonic() - began
        _log(options.out, f"{stage}: {words[statuses[stage]]} after {seconds:.0f} s")
    raise SystemExit(next((status for status in (1, LEFT) if status in statuses.values()), 0))


if __name__ == "__main__":
    main()

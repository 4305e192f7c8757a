"""Everything a GPU has to show, in one call: `make gpu STAGE=all OUT=folder`.

    python -m benchmarks.gpu --stage check|rates|kernels|tune|bench|all --out FOLDER

Each stage runs in a process of its own, for at most eight minutes, and leaves one file, named
.part until the stage has succeeded; a stage whose file is there is not run again. Nothing is
downloaded.

    check     check.xml      tests/device: against float64, bits, graphs, no waiting
    rates     rates.json     what the device gives: products, copies, gathered rows, top-k
    kernels   kernels.json   the layer replayed from a CUDA graph, and each of its kernels
    tune      tune.json      the same with other blocks, one setting changed at a time
    bench     bench.json     the suites of this folder against their baselines
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.cases import CASES, Case, layer_inputs
from benchmarks.operations import ARGUMENTS
from benchmarks.timing import copy_bandwidth, stopwatch

SECONDS = 480
ROUNDS = 20
CHECK = ["-m", "pytest", "--noconftest", "-v", "tests/device", "--junitxml"]
BENCH = ["-m", "pytest", "benchmarks/bench_layer.py", "benchmarks/bench_ops.py", "-q"]
BENCH += ["--benchmark-quiet", "--device", "cuda", "-k", "not compiled", "--out"]
# Other settings of kernels.launch, each tried on its own: (function, what it returns instead).
TRIALS: dict[str, tuple[str, Callable[..., Any]]] = {
    "2 rows in flight": ("rows_in_flight", lambda block, warps: 2),
    "8 rows in flight": ("rows_in_flight", lambda block, warps: 8),
    "16 rows in flight": ("rows_in_flight", lambda block, warps: 16),
    "4 warps a row": ("row", lambda width: (_power(width), 4)),
    "16 warps a row": ("row", lambda width: (_power(width), 16)),
    "slices of 1024": ("slice_of_row", lambda width, tokens: (1024, 4)),
    "slices of 2048": ("slice_of_row", lambda width, tokens: (2048, 8)),
    "8 warps for 1024 features": ("features_of_row", lambda features: (1024, 8)),
    "4 warps for 512 features": ("features_of_row", lambda features: (512, 4)),
    "8 warps for all features": ("whole_feature_row", lambda features: (_power(features), 8)),
    "32 warps for all features": ("whole_feature_row", lambda features: (_power(features), 32)),
}


def facts() -> dict[str, Any]:
    """The device and the software, without which a figure is worth nothing."""
    import triton

    query = "name,driver_version,clocks.sm,clocks.mem,temperature.gpu"
    return {
        "device": torch.cuda.get_device_name(),
        "nvidia-smi": _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"),
        "commit": _output("git", "describe", "--always", "--dirty"),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "cuda": torch.version.cuda,
    }


def rates(out: Path) -> None:
    """What performance floors are made of, read off this device."""
    device, dtype = torch.device("cuda"), torch.bfloat16
    x, W = (torch.randn(8192, 3584, device=device, dtype=dtype) for _ in range(2))
    z = torch.randn(8192, 8192, device=device, dtype=dtype)
    rows = torch.randint(8192, (81_920,), device=device)
    quantised = [torch.randint(-9, 9, (8192, 3584), device=device).to(torch.int8) for _ in range(2)]

    def select(k: int | None) -> Callable[[], object]:
        from tca_fast.kernels.select import Counts
        from tca_fast.kernels.select import select as kernel

        return lambda: kernel(z, None, k, Counts.empty(8192, 8192, device))

    calls: dict[str, Callable[[], object]] = {
        "encoder product, 8192 x 3584 x 8192": lambda: x @ W.T,
        "the same in int8": lambda: torch._int_mm(quantised[0], quantised[1].T),
        "81,920 rows of 7168 bytes gathered": lambda: W.index_select(0, rows),
        "torch.topk 64 of 8192, 8192 rows": lambda: z.topk(64),
        "our top-k 64": select(64),
        "our threshold": select(None),
    }
    known = facts()
    found: dict[str, Any] = {"copy, bytes/s": copy_bandwidth(device)}
    for name, call in calls.items():
        found[name] = _repeated(call)
        print(f"{name:45} {found[name]['ms']:.4f} ms", flush=True)
        _write(out, {**known, "rates": found})


def kernels(out: Path) -> None:
    """The layer forward and backward at every case, and where its time goes."""
    known, rows = facts(), []
    for case in CASES["cuda"]:
        step = _step(case)
        with _captured(step) as replay:
            row: dict[str, Any] = {"case": case.name, **_repeated(replay)}
        rows.append({**row, "kernels": _profile(step)})
        print(f"{case.name:25} {row['ms']:.4f} ms", flush=True)
        _write(out, {**known, "rows": rows})


def tune(out: Path) -> None:
    """The layer with one block size changed at a time."""
    from tca_fast.kernels import launch

    known, rows = facts(), []
    trials = {"as it is": ("row", launch.row), **TRIALS}
    for case in [case for case in CASES["cuda"] if case.name.startswith("7B")]:
        step = _step(case)
        for name, (function, value) in trials.items():
            with mock.patch.object(launch, function, value), _captured(step) as replay:
                row: dict[str, Any] = {"trial": name, "case": case.name, **_repeated(replay)}
            rows.append(row)
            print(f"{name:28} {case.name:25} {row['ms']:.4f} ms", flush=True)
            _write(out, {**known, "rows": rows})


def _step(case: Case) -> Callable[[], list[Tensor]]:
    """One layer forward and backward, gradients freshly allocated."""
    from tca_fast import ops

    tensors = layer_inputs(case, torch.device("cuda"), torch.bfloat16)
    arguments = [tensors[name].requires_grad_() for name in ARGUMENTS]

    def step() -> list[Tensor]:
        expected = case.active / case.features
        output = ops.adapter(*arguments, k=case.k, expected_density=expected)
        upstream = [tensors["grad_y"], torch.ones_like(output.l1)]
        return [output.y, *torch.autograd.grad([output.y, output.l1], arguments, upstream)]

    return step


@contextmanager
def _captured(step: Callable[[], list[Tensor]]) -> Iterator[Callable[[], None]]:
    """A step as a CUDA graph, which leaves the host out of the time."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step()
    yield graph.replay
    del kept, graph
    torch.cuda.empty_cache()


def _profile(call: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of every kernel of one call, the longest first.

    Not of a graph's replay, whose kernels not every version of the profiler tells apart.
    """
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(5):
            call()
        torch.cuda.synchronize()
    times = {event.key: event.device_time_total / 5e3 for event in profiler.key_averages()}
    return dict(sorted(times.items(), key=lambda item: -item[1])[:25])


def _repeated(call: Callable[[], object]) -> dict[str, float]:
    """Median and 20-80 % range over rounds with cold caches, after two of warm-up."""
    device = torch.device("cuda")
    evicted = torch.empty(2**28, dtype=torch.uint8, device=device)
    times = []
    for number in range(-2, ROUNDS):
        evicted.zero_()
        elapsed = stopwatch(device, call)
        if number >= 0:
            times.append(elapsed)
    times.sort()
    return {"ms": median(times), "low": times[ROUNDS // 5], "high": times[-ROUNDS // 5]}


def _power(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return f"no {command[0]} here"


def _write(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1) + "\n"
    path.write_text(text, encoding="utf-8")
    if json.loads(path.read_text(encoding="utf-8")) != json.loads(text):
        raise RuntimeError(f"{path}: what was written is not what is read back")


MEASURED: dict[str, Callable[[Path], None]] = {"rates": rates, "kernels": kernels, "tune": tune}
FILES = {
    "check": "check.xml",
    **{name: f"{name}.json" for name in MEASURED},
    "bench": "bench.json",
}


def run_stage(stage: str, out: Path) -> int:
    """Run one stage in a process of its own; returns its status, 124 where time ran out."""
    path = out / FILES[stage]
    if path.exists():
        print(f"{stage}: {path} is there", flush=True)
        return 0
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)
    arguments = {"check": [*CHECK, part], "bench": [*BENCH, part]}
    own = ["-m", "benchmarks.gpu", "--only", stage, "--out", out]
    command = [sys.executable, *arguments.get(stage, own)]
    print(f"{stage}: {' '.join(str(part) for part in command)}", flush=True)
    began = time.monotonic()
    try:
        status = subprocess.run(command, timeout=SECONDS).returncode
    except subprocess.TimeoutExpired:
        status = 124
    if status == 0:
        part.rename(path)
    print(f"{stage}: status {status} after {time.monotonic() - began:.0f} s", flush=True)
    return status


def main() -> None:
    """Run the stages that are asked for; the status is that of the first that failed."""
    parser = argparse.ArgumentParser(description="Everything a GPU has to show.")
    parser.add_argument("--stage", choices=[*FILES, "all"], default="all")
    parser.add_argument("--only", choices=list(MEASURED), help="in this process, for --stage")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device here: there is nothing to run")
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.only:
        MEASURED[arguments.only](arguments.out / f"{FILES[arguments.only]}.part")
        return
    stages = list(FILES) if arguments.stage == "all" else [arguments.stage]
    statuses = [run_stage(stage, arguments.out) for stage in stages]
    raise SystemExit(next((status for status in statuses if status), 0))


if __name__ == "__main__":
    main()

"""Train on two ranks for a long time, and see whether memory or open files grow.

    make soak MINUTES=30        or        python tests/soak.py --minutes 30 --out build/soak

`soak.jsonl` gets a line per sample: steps done, resident memory and open files of every rank.
`summary.json` has the slope of the memory by least squares, per 1,000 steps and relative to its
mean, over the samples after the first fifth. Exit status 1 if it is above 0.1 % or open files grow.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import forked_ranks
from tqdm import tqdm

BAR = 1e-3  # of the memory per 1,000 steps
CONFIGS = Path(__file__).parents[1] / "configs"


def sample(pid: int) -> tuple[int, int]:
    """Resident bytes and open files of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(list(Path(f"/proc/{pid}/fd").iterdir()))


def last_step(log: Path) -> int:
    """The step of the last whole line of a log, read from its end."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 20_000))
        lines = file.read().split(b"\n")[:-1]
    return json.loads(lines[-1])["step"] if lines else 0


def slope(steps: list[float], values: list[float]) -> float:
    """Least-squares slope of `values` per 1,000 steps, relative to their mean."""
    mean_step, mean = sum(steps) / len(steps), sum(values) / len(values)
    spread = sum((step - mean_step) ** 2 for step in steps)
    if not spread:
        return 0.0
    pairs = zip(steps, values, strict=True)
    return 1000 * sum((s - mean_step) * (v - mean) for s, v in pairs) / spread / mean


def summarise(samples: list[dict], minutes: float) -> dict:
    """Slopes over the samples after the first fifth, and the growth of open files."""
    kept = samples[len(samples) // 5 :]
    steps = [one["step"] for one in kept]
    num_ranks = len(kept[0]["bytes"])
    return {
        "minutes": minutes,
        "steps": samples[-1]["step"],
        "samples": len(samples),
        "mean_megabytes": [
            round(sum(one["bytes"][rank] for one in kept) / len(kept) / 1e6, 1)
            for rank in range(num_ranks)
        ],
        "memory_slope_per_1000_steps": [
            slope(steps, [one["bytes"][rank] for one in kept]) for rank in range(num_ranks)
        ],
        "open_files_first": kept[0]["files"],
        "open_files_last": kept[-1]["files"],
        "open_files_most": [max(one["files"][rank] for one in kept) for rank in range(num_ranks)],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--out", type=Path, default=Path("build/soak"))
    options = parser.parse_args()
    out = options.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    forked_ranks.preload()
    from tiny_pair import make_pair

    assert os.waitpid(forked_ranks.fork(lambda: make_pair(out) and 0), 0)[1] == 0
    arguments = [str(out / "run.yaml"), "--deepspeed", str(CONFIGS / "zero2.json")]
    arguments += ["run.max_steps=1000000", "run.num_epochs=1000000", f"run.output_dir={out}/run"]
    arguments += ["run.save_steps=200", "run.eval_steps=100"]
    ranks = forked_ranks.Ranks(2, arguments, out / "said")
    log, samples = out / "run" / "log.jsonl", []
    begin = time.monotonic()
    with tqdm(total=round(options.minutes * 60), desc="soak", unit="s") as bar:
        while ranks.is_running() and (passed := time.monotonic() - begin) < options.minutes * 60:
            time.sleep(min(5.0, options.minutes * 2))
            if not log.exists() or not (step := last_step(log)):
                continue
            figures = [sample(pid) for pid in ranks.pids]
            record = {"seconds": round(passed, 1), "step": step}
            record |= {"bytes": [one[0] for one in figures], "files": [one[1] for one in figures]}
            samples.append(record)
            with (out / "soak.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
            bar.update(round(passed) - bar.n)
    if not ranks.is_running():
        raise SystemExit(f"training ended with {ranks.statuses}\n{ranks.said()[-3000:]}")
    ranks.send(signal.SIGTERM)
    ranks.wait(60)
    summary = summarise(samples, options.minutes)
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))
    grown = [
        last > first
        for first, last in zip(summary["open_files_first"], summary["open_files_last"], strict=True)
    ]
    return 1 if any(grown) or max(summary["memory_slope_per_1000_steps"]) > BAR else 0


if __name__ == "__main__":
    sys.exit(main())

"""Break a training run in every way we know of, resume it, and compare its losses bit for bit.

    make drill N=200        or        python tests/drill.py --faults 200 --out build/drill

Two CPU ranks under ZeRO-2 train a tiny pair. Again and again something goes wrong at a random
point, then training resumes with `run.resume_from_checkpoint=latest`. After every fault:

- every checkpoint that had its name before the fault is whole (digests recomputed here), unless
  the fault was to damage it;
- resume takes the newest whole one, and names those it skipped;
- the log from the first step on is that of a run nobody disturbed, bit for bit;
- no rank has shown a traceback, and none had to be waited for.

`drill.jsonl` gets a line per fault, `summary.json` the counts. A drill that was stopped goes on
where it was. Exit status 1 if anything of the above did not hold.
"""

import argparse
import collections
import contextlib
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import forked_ranks
from tqdm import tqdm

CONFIGS = Path(__file__).parents[1] / "configs"
STEPS = 80  # of a run
LAST = STEPS - 20  # after which no further fault begins; then the next run does
RUN = [
    *("run.num_epochs=20", f"run.max_steps={STEPS}", "run.eval_steps=7"),
    *("run.save_steps=2", "run.save_total_limit=3"),
]
KINDS = (
    "SIGKILL one rank",
    "SIGKILL all ranks",
    "SIGKILL all ranks while saving",
    "SIGKILL one rank while saving",
    "SIGKILL all ranks while starting",
    "SIGTERM one rank",
    "SIGTERM all ranks",
    "Ctrl-C",
    "Ctrl-C twice",
    "full disk",
    "file-size limit",
    "damaged newest checkpoint",
    "damaged two newest checkpoints",
)
SLOW = 120.0  # seconds without a sign of life that count as a hang


class Failure(Exception):
    """Something that must not happen has happened."""


class Drill:
    """A run under attack."""

    def __init__(self, out: Path, seed: int, kinds: Sequence[str], is_small_disk: bool) -> None:
        self.out, self.seed, self.kinds = out, seed, kinds
        self.disk = out / "disk"
        self.is_small_disk = is_small_disk
        self.config = out / "pair" / "run.yaml"
        self.output = self.disk / "run"
        self.record = out / "drill.jsonl"
        self.unbroken: list[dict] = []
        self.ranks: forked_ranks.Ranks | None = None
        self.resumed_from = 0

    # Starting and looking

    def prepare(self) -> None:
        """The pair and the log of the undisturbed run, made once."""
        if not self.config.exists():
            from tiny_pair import make_pair

            (self.out / "pair").mkdir(parents=True, exist_ok=True)
            _wait_for(forked_ranks.fork(lambda: make_pair(self.out / "pair") and 0))
        undisturbed = self.out / "undisturbed"
        if not (undisturbed / "adapter").exists():
            shutil.rmtree(undisturbed, ignore_errors=True)
            ranks = self._launch(undisturbed)
            if not ranks.wait(600) or any(ranks.statuses.values()):
                raise SystemExit(f"the undisturbed run failed:\n{ranks.said()[-3000:]}")
        self.unbroken = _log(undisturbed)
        assert len(self.unbroken) >= STEPS

    def _launch(self, output: Path, *more: str) -> forked_ranks.Ranks:
        arguments = [str(self.config), "--deepspeed", str(CONFIGS / "zero2.json")]
        arguments += [*RUN, f"run.output_dir={output}", *more]
        return forked_ranks.Ranks(2, arguments, self.out / "said")

    def names(self) -> list[str]:
        """Checkpoints that have their name, oldest first."""
        directory = self.output / "checkpoints"
        found = directory.iterdir() if directory.is_dir() else ()
        return sorted(path.name for path in found if path.name.startswith("step_"))

    def start(self, damaged: list[str]) -> dict:
        """Begin or resume, wait for a new step, and check everything that the docstring says."""
        names = self.names()
        whole = [name for name in names if name not in damaged]
        expected = int(whole[-1][5:]) if whole else 0
        more = ["run.resume_from_checkpoint=latest"] if names else []
        self.ranks = self._launch(self.output, *more)
        lines = sum(record["step"] <= expected for record in self.unbroken)
        if names:
            # Only then has the log lost its lines of steps that are trained again.
            self._until(lambda: "resumed from " in self.ranks.said(), "no resume")
        self._until(lambda: len(_log(self.output)) > lines, "no step after the resume")
        said = self.ranks.said()
        if names:
            found = re.search(r"resumed from \S*/step_(\d+) after (\d+) steps", said)
            if not found or int(found[1]) != expected or int(found[2]) != expected:
                raise Failure(f"resumed from {found and found[1]}, not from step {expected}")
        skipped = re.findall(r"skipped (step_\d+), now \S+: (.*)", said)
        if [name for name, _ in skipped] != damaged[::-1]:
            raise Failure(f"skipped {skipped}, damaged were {damaged}")
        self.resumed_from = expected
        return {"resumed": expected, "skipped": [f"{name}: {why}" for name, why in skipped]}

    def compare(self) -> int:
        """The log so far against the undisturbed one; lines compared."""
        log = _log(self.output)
        for ours, theirs in zip(log, self.unbroken, strict=False):
            if ours != theirs:
                raise Failure(f"step {ours.get('step')} differs from the undisturbed run: {ours}")
        if len(log) > len(self.unbroken):
            raise Failure("the log is longer than that of the undisturbed run")
        return len(log)

    def _until(self, is_so, complaint: str) -> None:
        end = time.monotonic() + SLOW
        while not is_so():
            if not self.ranks.is_running() and not is_so():
                raise Failure(f"{complaint}; ended with {self.ranks.statuses}")
            if time.monotonic() > end:
                raise Failure(f"{complaint} within {SLOW:.0f} s")
            time.sleep(0.002)

    def check_whole(self) -> None:
        """Every named checkpoint is as it was written."""
        for name in self.names():
            checkpoint = self.output / "checkpoints" / name
            files = json.loads((checkpoint / "manifest.json").read_text())["files"]
            for path, record in files.items():
                content = (checkpoint / path).read_bytes()
                if hashlib.sha256(content).hexdigest() != record["sha256"]:
                    raise Failure(f"lost checkpoint: {name}/{path} is not whole")

    # Faults

    def fault(self, index: int) -> dict:
        """One fault, drawn from (seed, index), and the resume after it."""
        draw = random.Random(f"{self.seed}:{index}")
        kind = self.kinds[index % len(self.kinds)]
        if self.ranks is None or not self.ranks.is_running() or self.resumed_from > LAST:
            self._stop()
            shutil.rmtree(self.output, ignore_errors=True)
            self.start([])
        step = self.resumed_from + draw.randrange(1, 9)
        self._until(
            lambda: _step(self.output) >= step and self.names(), f"step {step} was not reached"
        )
        if kind.endswith("while starting"):
            self._stop()
            self.ranks = self._launch(self.output, "run.resume_from_checkpoint=latest")
            time.sleep(draw.uniform(0, 3))
        before = self.names()
        damaged = self._break(kind, draw)
        if "Traceback" in self.ranks.said() and kind != "Ctrl-C twice":
            raise Failure(f"traceback:\n{self.ranks.said()[-2000:]}")
        if not self.names() or self.names()[-1] < before[-1]:
            raise Failure(f"lost checkpoint: there were {before}, there are {self.names()}")
        heard = re.findall(r"(?:warning|error): (.*)", self.ranks.said())
        statuses = [self.ranks.statuses.get(rank) for rank in range(2)]
        resumed = self.start(damaged)
        lines = self.compare()
        return {
            "fault": index,
            "kind": kind,
            "step": step,
            "statuses": statuses,
            "said": sorted({" ".join(text.split())[:300] for text in heard}),
            "checkpoints": before,
            **resumed,
            "lines_equal": lines,
        }

    def _break(self, kind: str, draw: random.Random) -> list[str]:
        """Do it and wait until no rank is left; the checkpoints damaged, oldest first."""
        time.sleep(draw.uniform(0, 0.15))
        if kind.endswith("while saving"):
            saving = self.output / "checkpoints"
            self._until(lambda: any(saving.glob(".step_*.tmp")), "no checkpoint was begun")
            time.sleep(draw.uniform(0, 0.06))
        if kind.startswith("SIGKILL one"):
            self.ranks.send(signal.SIGKILL, draw.randrange(2))
        elif kind.startswith("SIGKILL all"):
            self.ranks.send(signal.SIGKILL)
        elif kind.startswith("SIGTERM"):
            self.ranks.send(signal.SIGTERM, draw.randrange(2) if "one" in kind else None)
        elif kind.startswith("Ctrl-C"):
            self.ranks.send(signal.SIGINT)
            if "twice" in kind:
                time.sleep(draw.uniform(0.02, 0.2))
                self.ranks.send(signal.SIGINT)
        elif kind == "full disk" and self.is_small_disk:
            self._fill(draw)
        elif kind in ("full disk", "file-size limit"):
            self._limit(draw)
        else:
            return self._damage(2 if "two" in kind else 1, draw)
        if not self.ranks.wait(SLOW):
            raise Failure(f"a rank was still there {SLOW:.0f} s after {kind}")
        if kind.startswith(("SIGTERM", "Ctrl-C")) and kind != "Ctrl-C twice":
            if set(self.ranks.statuses.values()) - {130, 0}:
                raise Failure(f"{kind} ended with {self.ranks.statuses}")
            newest = int(self.names()[-1][5:])
            if newest != min(_step(self.output), STEPS):
                raise Failure(f"saved step {newest}, logged step {_step(self.output)}")
        self.check_whole()
        return []

    def _fill(self, draw: random.Random) -> None:
        """Leave a few kB of the disk for some steps, then all of it."""
        filler = self.disk / "filler"
        left = draw.randrange(0, 90_000)
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            # The ranks may take space meanwhile; then nothing at all is left.
            file.write(b"\0" * max(0, shutil.disk_usage(self.disk).free - left))
        self._suffer()
        filler.unlink()

    def _limit(self, draw: random.Random) -> None:
        """A limit on the size of files, which fails whatever write exceeds it."""
        limit = draw.randrange(1000, 29_000)
        for pid in self.ranks.pids:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        self._suffer()

    def _suffer(self) -> None:
        """Some steps of a run that cannot write; it goes on, or ends with one clear line."""
        goal = min(_step(self.output) + 5, STEPS)
        end = time.monotonic() + 30
        while self.ranks.is_running() and _step(self.output) < goal and time.monotonic() < end:
            time.sleep(0.01)
        if self.ranks.is_running():
            self.ranks.send(signal.SIGKILL)
        elif set(self.ranks.statuses.values()) - {0} and "error: " not in self.ranks.said():
            raise Failure(f"ended without a word: {self.ranks.said()[-1000:]}")

    def _damage(self, count: int, draw: random.Random) -> list[str]:
        """Kill, then flip, cut, empty or remove a file in the newest checkpoints but one."""
        self._until(lambda: len(self.names()) > count, f"no {count + 1} checkpoints")
        self.ranks.send(signal.SIGKILL)
        self.ranks.wait(SLOW)
        self.check_whole()
        damaged = self.names()[-count:]
        for name in damaged:
            files = sorted(
                path for path in (self.output / "checkpoints" / name).rglob("*") if path.is_file()
            )
            path, how = draw.choice(files), draw.choice(("flip", "cut", "empty", "remove"))
            content = bytearray(path.read_bytes())
            if how == "flip":
                content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            path.write_bytes(
                {"cut": content[: draw.randrange(len(content))], "empty": b""}.get(how, content)
            )
            if how == "remove":
                path.unlink()
        return damaged

    def _stop(self) -> None:
        if self.ranks is not None:
            self.ranks.send(signal.SIGKILL)
            self.ranks.wait(SLOW)


def _wait_for(pid: int) -> None:
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _log(output: Path) -> list[dict]:
    """Whole lines of the log, without the figures that depend on clock and machine."""
    from tiny_pair import OF_THE_MACHINE

    path = output / "log.jsonl"
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    records = []
    for line in text.splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if line.endswith("\n"):
            records.append({k: v for k, v in record.items() if not k.startswith(OF_THE_MACHINE)})
    return records


def _step(output: Path) -> int:
    return max((record["step"] for record in _log(output)), default=0)


def small_disk(path: Path) -> bool:
    """A file system of 8 MB at `path`, where we may mount one."""
    path.mkdir(parents=True, exist_ok=True)
    if path.is_mount():
        return True
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "drill", str(path)]
    return subprocess.run(command, capture_output=True).returncode == 0


def summarise(records: list[dict], is_small_disk: bool) -> dict:
    """Counts of a drill."""
    kinds = collections.Counter(record["kind"] for record in records)
    failed = [record for record in records if "failure" in record]
    return {
        "faults": len(records),
        "clean_resumes": len(records) - len(failed),
        "checkpoints_skipped": sum(len(record.get("skipped", ())) for record in records),
        "log_lines_compared": sum(record.get("lines_equal", 0) for record in records),
        "small_disk": is_small_disk,
        "by_kind": dict(sorted(kinds.items())),
        "failures": [
            f"{record['fault']} {record['kind']}: {record['failure']}" for record in failed
        ],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("build/drill"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=KINDS, help="in the order given, repeated")
    options = parser.parse_args()
    out = options.out.resolve()
    is_small_disk = small_disk(out / "disk")
    forked_ranks.preload()
    drill = Drill(out, options.seed, options.kinds, is_small_disk)
    drill.prepare()
    done = [json.loads(line) for line in drill.record.open()] if drill.record.exists() else []
    bar = tqdm(total=options.faults, initial=len(done), desc="drill", unit="fault", smoothing=0.1)
    try:
        for index in range(len(done), options.faults):
            try:
                record = drill.fault(index)
            except Failure as failure:
                said = drill.ranks.said()[-2000:] if drill.ranks else ""
                kind = drill.kinds[index % len(drill.kinds)]
                record = {"fault": index, "kind": kind, "failure": str(failure), "said": said}
                drill._stop()
                shutil.rmtree(drill.output, ignore_errors=True)
            done.append(record)
            with drill.record.open("a") as file:
                file.write(json.dumps(record) + "\n")
            outcome = record.get("failure") or (
                f"resumed after {record['resumed']}, {record['lines_equal']} lines equal"
                + "".join(f"; skipped {text}" for text in record["skipped"])
            )
            tqdm.write(f"{index}: {record['kind']} at step {record.get('step')}: {outcome}")
            bar.update()
    finally:
        drill._stop()
        bar.close()
        summary = summarise(done, is_small_disk)
        (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        print(json.dumps(summary, indent=2))
        if is_small_disk:
            subprocess.run(["umount", str(out / "disk")], check=False)
    return 1 if summary["failures"] or len(done) < options.faults else 0


if __name__ == "__main__":
    sys.exit(main())

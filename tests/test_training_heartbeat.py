"""A rank that stops is noticed by the others and named; phases are timed."""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_pair import make_pair

from tca_fast.config import load_config
from tca_fast.training import run as running
from tca_fast.training.heartbeat import (
    Beat,
    Heartbeat,
    Watch,
    beat_path,
    behind,
    describe,
    read_beats,
    speaker,
)
from tca_fast.training.run import train

LAUNCHER = Path(sys.executable).with_name("deepspeed")


def beat(rank, turn, phase="data", step=3):
    return Beat(rank, step, phase, turn, 0.0, "host", 100 + rank)


def test_the_rank_that_came_least_far_is_named():
    beats = [beat(0, 9, "waiting"), beat(1, 8, "data"), beat(2, 9, "waiting")]
    stopped = behind(beats)
    assert [one.rank for one in stopped] == [1] and speaker(beats, stopped) == 0
    line = describe(beats, stopped, 61.0)
    for text in ("rank 1 (pid 101 on host)", "after 3 step(s), in data", "2 other", "61 s"):
        assert text in line
    assert "\n" not in line
    # The first rank hangs: the second tells.
    assert speaker([beat(0, 1), beat(1, 2)], [beat(0, 1)]) == 1
    together = [beat(0, 4, "forward"), beat(1, 4, "forward")]
    assert "all 2 are after 3 step(s), in forward" in describe(together, behind(together), 5.0)


_OTHER_RANK = """
import sys, time
from pathlib import Path
from tca_fast.training.heartbeat import Heartbeat
with Heartbeat(Path(sys.argv[1]), 1) as heart:
    for step in range(3):
        heart.beat(step, "waiting")
        time.sleep(0.05)
    heart.beat(3, "data")
    print("stopped", flush=True)
    sys.stdin.read()
"""


def test_another_process_that_stops_is_seen(tmp_path):
    said = []
    program = [sys.executable, "-c", _OTHER_RANK, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(program, text=True, **pipes) as other:
        assert other.stdout.readline() == "stopped\n"
        with Heartbeat(tmp_path, 0) as heart, Watch(tmp_path, 0, 2, 0.4, said.append):
            for step in range(3):
                heart.beat(step, "waiting")
            heart.beat(3, "data")
            heart.beat(3, "waiting")
            end = time.monotonic() + 20
            while not said and time.monotonic() < end:
                time.sleep(0.05)
            time.sleep(0.8)
        other.stdin.close()
    assert len(said) == 1, "one line for one stop"
    assert f"rank 1 (pid {other.pid} on" in said[0] and "after 3 step(s), in data" in said[0]


def test_ranks_that_move_are_left_alone(tmp_path):
    said = []
    watch = Watch(tmp_path, 0, 2, 2.0, said.append)
    with Heartbeat(tmp_path, 0) as first, Heartbeat(tmp_path, 1) as second, watch:
        end = time.monotonic() + 4
        while time.monotonic() < end:
            first.beat(1, "forward")
            second.beat(1, "forward")
            time.sleep(0.1)
    assert not said


def test_files_of_others_are_not_read(tmp_path):
    with Heartbeat(tmp_path, 0), Heartbeat(tmp_path, 5):
        beat_path(tmp_path, 1).write_text('{"rank": 1')
        beat_path(tmp_path, 2).write_text('{"foreign": true}')
        assert [one.rank for one in read_beats(tmp_path)] == [0, 5]
        assert [one.rank for one in read_beats(tmp_path, num_ranks=4)] == [0]


@pytest.mark.skipif(
    not LAUNCHER.exists(), reason="needs DeepSpeed: pip install 'tca_fast[deepspeed]'"
)
def test_a_rank_of_a_run_that_stops_is_named(tmp_path):
    config = make_pair(tmp_path)
    tests = Path(__file__).parent
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tests.parent)}
    command = [LAUNCHER, "--num_accelerators", 2, "--master_port", 29631]
    done = subprocess.run(
        [str(part) for part in (*command, tests / "deepspeed_hang.py", config)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed[-3000:]
    lines = [line for line in printed.splitlines() if "stopped after" in line]
    named = [line for line in lines if "after 3 step(s), in data" in line]
    assert len(named) == 1 and "rank 1 (pid" in named[0], lines
    assert [one.phase for one in read_beats(tmp_path / "out")] == ["end", "end"]


def test_slow_data_slow_the_throughput_that_is_logged(pair, tmp_path, monkeypatch):
    make = running.step_batches
    seconds = 0.2

    def slow(*arguments, **options):
        for batch in make(*arguments, **options):
            time.sleep(seconds)
            yield batch

    monkeypatch.setattr(running, "step_batches", slow)
    aside = ["run.save_steps=0", "run.eval_steps=0"]
    settings = [f"run.output_dir={tmp_path}", "run.max_steps=7", *aside]
    train(load_config(pair / "run.yaml", settings), show_progress=False)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    seen = [0, *(line["tokens_seen"] for line in lines)]
    took = [
        (after - before) / line["tokens_per_second"]
        for (before, after), line in zip(itertools.pairwise(seen), lines, strict=True)
    ]
    # Batches are made ahead of their steps, but not before the first is asked for.
    assert sum(took) > 0.95 * 7 * seconds


def test_the_log_says_where_the_time_goes(pair, tmp_path):
    settings = [f"run.output_dir={tmp_path}", "run.max_steps=6", "run.eval_steps=2"]
    train(load_config(pair / "run.yaml", settings), show_progress=False)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["split"] == "train"]
    for line in steps:
        shares = {name: value for name, value in line.items() if name.startswith("time/")}
        assert sum(shares.values()) == pytest.approx(1.0)
        assert {"time/data", "time/forward", "time/backward", "time/optimizer"} <= shares.keys()
        assert min(shares.values()) >= 0 and line["memory/peak_bytes"] > 2**20
    assert steps[2]["time/validation"] > 0 and steps[-1]["seconds_left"] == 0
    assert steps[0]["seconds_left"] > 0

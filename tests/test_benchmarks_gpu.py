"""The harness of a GPU, rehearsed on the CPU without anything that such a machine may lack."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # the suites are outside the package

from benchmarks.gpu import __main__ as gpu  # noqa: E402
from benchmarks.gpu import record as records  # noqa: E402
from benchmarks.gpu import table  # noqa: E402
from benchmarks.gpu.record import (  # noqa: E402
    Absent,
    Clock,
    DeviceLost,
    Record,
    run_cases,
    status_of,
)
from benchmarks.gpu.step import StepStage, longest  # noqa: E402
from benchmarks.results import find_machine  # noqa: E402
from tca_fast import selection  # noqa: E402
from tca_fast.errors import UserError  # noqa: E402
from tca_fast.results import read_results  # noqa: E402

FACTS = {"stage": "bench", "device": "a", "device_type": "cpu", "commit": "1", "rehearsal": True}
MISSING = ("pydantic", "typer", "rich", "deepspeed", "pytest_benchmark", "hypothesis", "matplotlib")


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The environment of a Python that has none of what a GPU machine may lack."""
    folder = tmp_path_factory.mktemp("bare")
    blocked = f"import sys\nfor name in {MISSING}:\n    sys.modules[name] = None\n"
    (folder / "sitecustomize.py").write_text(blocked)
    outside = {name: v for name, v in os.environ.items() if not name.startswith("PYTEST_")}
    outside.pop("TRITON_INTERPRET", None)
    return {**outside, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


def python(environment, *arguments):
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_the_bare_python_lacks_them(bare):
    for name in MISSING:
        assert "ModuleNotFoundError" in python(bare, "-c", f"import {name}").stderr, name


def test_all_stages_are_rehearsed_and_write_their_files(bare, tmp_path):
    out = tmp_path / "out"
    command = ["-m", "benchmarks.gpu", "--stage", "all", "--device", "cpu", "--out", str(out)]
    result = python(bare, *command)
    assert result.returncode == 0, result.stdout + result.stderr
    stages = [f"{stage}.json" for stage in gpu.STAGES]
    assert {path.name for path in out.iterdir()} == {*stages, "check.xml", "log.txt", "cpu.json"}

    contents = {stage: json.loads((out / f"{stage}.json").read_text()) for stage in gpu.STAGES}
    for stage, content in contents.items():
        facts = content["facts"]
        assert facts["device_type"] == "cpu" and facts["rehearsal"] is True, stage
        assert facts["versions"]["torch"] == torch.__version__ and facts["commit"]
        assert content["left"] == [] and content["cases"], stage
        for name, case in content["cases"].items():
            assert case["status"] == "done" or case["reason"], name
        assert read_results(out / f"{stage}.json") == content["rows"]

    # Every kind of case, and every backend that is here.
    done = {
        stage: [name for name, case in content["cases"].items() if case["status"] == "done"]
        for stage, content in contents.items()
    }
    for backend in contents["check"]["facts"]["backends"]:
        assert any(f"[{backend}" in name for name in done["check"]), backend
    for kind in ("rate", "layer", "kernels of cpp", "kernels of triton", "generation", "peers"):
        assert any(name.startswith(kind) for name in done["bench"]), kind
    for kind in ("step", "memory", "longest sequence"):
        assert any(name.startswith(kind) for name in done["step"]), kind
    for kind in ("adapter", "encode", "decode", "blocks"):
        assert any(name.startswith(kind) for name in done["tune"]), kind
    variants = {row["variant"] for row in contents["bench"]["rows"] if "absent" not in row}
    assert {"encoder product", "dense eager", "tca_fast, cpp", "tca_fast, triton"} <= variants
    assert "torch embedding_bag" in variants
    absent = {row["variant"]: row["absent"] for row in contents["bench"]["rows"] if "absent" in row}
    assert "cannot be imported" in absent["liger fused linear JSD"]

    suite = ElementTree.parse(out / "check.xml").getroot()
    assert int(suite.get("tests")) == len(contents["check"]["cases"])
    assert suite.get("failures") == "0"

    found = selection.read_table(out / "cpu.json")
    assert found.family == "cpu" and {p.call.operator for p in found.points} == {
        "adapter",
        "encode",
        "decode",
    }
    with pytest.raises(UserError, match="a rehearsal on a CPU measures nothing"):
        table.adopt(out)


def test_without_a_gpu_the_real_stages_say_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    result = python(os.environ, "-m", "benchmarks.gpu.stage", "bench", "--device", "cuda",
                    "--out", str(tmp_path), "--seconds", "1")  # fmt: skip
    assert result.returncode == 1 and "--device cpu rehearses" in result.stdout
    assert not list(tmp_path.iterdir())


@pytest.fixture
def path(tmp_path):
    return tmp_path / "bench.json"


def test_a_second_call_does_what_the_first_left(path):
    ran = []
    over = iter([False, False, True, True])

    class Ending(Clock):
        def is_over(self):
            return next(over)

    def case(name):
        return lambda: ran.append(name) or {"ms": 1.0}

    cases = {name: case(name) for name in "abcd"}
    first = Record(path, FACTS)
    run_cases(cases, first, Ending(1))
    assert ran == ["a", "b"] and first.left == ["c", "d"] and status_of([first]) == 75
    assert json.loads(path.read_text())["left"] == ["c", "d"]
    second = Record(path, FACTS)
    run_cases(cases, second, Clock(60))
    assert ran == ["a", "b", "c", "d"] and second.left == [] and status_of([second]) == 0
    assert second.cases["a"] == first.cases["a"]


def test_one_case_that_fails_or_is_absent_does_not_stop_the_others(path):
    def fails():
        raise ValueError("wrong\nin two lines")

    def is_absent():
        raise Absent("no such library")

    record = Record(path, FACTS)
    run_cases({"a": fails, "b": is_absent, "c": lambda: {"rows": []}}, record, Clock(60))
    assert [case["status"] for case in record.cases.values()] == ["failed", "absent", "done"]
    assert record.cases["a"]["reason"] == "ValueError: wrong"
    assert record.cases["b"]["reason"] == "no such library"
    assert status_of([record]) == 1


def test_a_lost_device_ends_the_process_and_running_out_of_memory_does_not(path):
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def full():
        raise torch.OutOfMemoryError("CUDA error: out of memory")

    record = Record(path, FACTS)
    run_cases({"full": full}, record, Clock(60))
    with pytest.raises(DeviceLost, match="lost"):
        run_cases({"lost": lost, "never": lambda: {}}, record, Clock(60))
    assert "never" not in record and record.cases["lost"]["status"] == "failed"


def test_steps_that_do_not_fit_are_left_out_one_by_one():
    """Of the largest case the recomputing step alone may fit, and its row is kept."""
    stage = StepStage(find_machine(torch.device("cpu"), None))

    def measured(names):
        if len(names) > 1:
            raise torch.OutOfMemoryError(f"no room for {names[0]}")
        return [{"variant": name, "tokens_per_s": 1.0} for name in names]

    found = stage._of_those_that_fit(["plain", "shared", "shared, checkpointed"], measured)
    assert [row["variant"] for row in found["rows"]] == ["shared, checkpointed"]
    assert found["left_out"] == {"plain": "no room for plain", "shared": "no room for shared"}
    with pytest.raises(Absent, match="not even shared fits: no room for shared"):
        stage._of_those_that_fit(["shared"], lambda names: measured([*names, "more"]))


def test_the_case_in_which_a_process_ended_twice_has_failed(path):
    """Once may have been the end of its time."""
    Record(path, FACTS).begin("a")
    record = Record(path, FACTS)
    assert "a" not in record
    record.begin("a")
    record = Record(path, FACTS)
    assert record.cases["a"]["status"] == "failed" and "a" in record
    assert status_of([record]) == 1


@pytest.mark.parametrize("field", ["device", "commit", "stage", "device_type"])
def test_one_file_holds_figures_of_one_device_and_commit(path, field):
    Record(path, FACTS).begin("a")
    with pytest.raises(UserError, match=f"{field} is .* give another folder"):
        Record(path, {**FACTS, field: "other"})


def test_a_stage_goes_on_behind_a_case_that_ended_its_process(monkeypatch, tmp_path):
    statuses = iter([-11, 3, 0])
    calls = []

    def run(stage, out, device, seconds):
        calls.append(seconds)
        (out / f"{stage}.json").write_text(str(len(calls)))
        return next(statuses)

    monkeypatch.setattr(gpu, "_run", run)
    assert gpu.run_stage("bench", tmp_path, "cpu", 60) == 0
    assert len(calls) == 3 and calls[0] > calls[1] > calls[2]


def test_a_stage_that_cannot_begin_is_not_started_again(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(gpu, "_run", lambda *arguments: calls.append(arguments) or -9)
    assert gpu.run_stage("bench", tmp_path, "cpu", 60) == 1 and len(calls) == 1


def test_a_case_that_hangs_is_ended(monkeypatch, tmp_path):
    hanging = tmp_path / "hangs.py"
    hanging.write_text("import time\nprint('begun', flush=True)\ntime.sleep(600)\n")
    monkeypatch.setattr(gpu, "GRACE", 1.0)
    real = subprocess.Popen

    def start(command, **options):
        return real([sys.executable, str(hanging)], **options)

    monkeypatch.setattr(gpu.subprocess, "Popen", start)
    began = time.monotonic()
    assert gpu.run_stage("bench", tmp_path, "cpu", 1.0) == 1
    assert time.monotonic() - began < 60 and "begun" in (tmp_path / "log.txt").read_text()


def test_the_longest_that_fits_is_what_a_search_finds():
    draw = random.Random(0)
    for _ in range(500):
        step, most, limit = draw.randint(1, 9), draw.randint(1, 200), draw.randint(0, 250)
        tried = []

        def fits(tokens, tried=tried, limit=limit):
            tried.append(tokens)
            return tokens <= limit

        expected = max((n for n in range(0, most + 1, step) if n <= limit), default=0)
        assert longest(fits, step, most) == expected
        assert all(0 < tokens <= most for tokens in tried) and len(tried) == len(set(tried))


def tune_and_check(folder, status="done", left=(), **facts):
    point = {"operator": "adapter", "tokens": 8, "width": 4, "features": 16, "density": 0.5}
    times = {"triton": {"dense": 1.0}, "cuda": {"dense": 2.0}}
    common = {"commit": "1", "device": "GPU", "device_type": "cuda", "rehearsal": False}
    tune = {
        "facts": {**common, "family": "sm_90"},
        "cases": {"a": {"status": "done", "point": {**point, "milliseconds": times}}},
    }
    name = "tests/device/test_operators.py::test_topk[triton-3-dtype0]"
    check = {
        "facts": {**common, **facts},
        "left": list(left),
        "cases": {name: {"status": status}, "other[cuda-1]": {"status": "done"}},
    }
    (folder / "tune.json").write_text(json.dumps(tune))
    (folder / "check.json").write_text(json.dumps(check))


def test_a_backend_that_failed_a_check_is_not_in_the_table(tmp_path):
    tune_and_check(tmp_path)
    assert "1 points" in table.write_table(tmp_path)
    whole = selection.read_table(tmp_path / "sm_90.json")
    tune_and_check(tmp_path, status="failed")
    assert "without triton" in table.write_table(tmp_path)
    call = whole.points[0].call
    assert whole.choose(call, ("triton", "cuda")) == "triton"
    found = selection.read_table(tmp_path / "sm_90.json")
    assert found.choose(call, ("triton", "cuda")) == "cuda"


def test_no_table_without_checks_of_the_same_commit(tmp_path):
    tune_and_check(tmp_path, commit="2")
    assert "differ in commit" in table.write_table(tmp_path)
    tune_and_check(tmp_path, left=["b"])
    assert "1 checks are left" in table.write_table(tmp_path)
    (tmp_path / "check.json").unlink()
    assert "run the stage check first" in table.write_table(tmp_path)
    assert not (tmp_path / "sm_90.json").exists()


def test_adopting_keeps_the_results_beside_the_table(tmp_path, monkeypatch):
    tune_and_check(tmp_path)
    monkeypatch.setattr(table, "_ROOT", tmp_path / "root")
    monkeypatch.setattr(selection, "TABLES", tmp_path / "measured")
    table.adopt(tmp_path)
    found = selection.read_table(tmp_path / "measured" / "sm_90.json")
    assert (tmp_path / "root" / found.results).read_text() == (tmp_path / "tune.json").read_text()


def test_committed_tables_are_those_of_their_results():
    for path in sorted(selection.TABLES.glob("*.json")):
        found = selection.read_table(path)
        tune = json.loads((ROOT / found.results).read_text())
        assert not tune["facts"]["rehearsal"] and tune["facts"]["device_type"] == "cuda"
        named = {backend for point in found.points for backend in point.milliseconds}
        points = [case["point"] for case in tune["cases"].values() if "point" in case]
        known = {backend for point in points for backend in point["milliseconds"]}
        assert table.make_table(tune, known - named) == found


def test_names_of_lost_devices():
    assert records.is_device_lost("RuntimeError: CUDA error: device-side assert triggered")
    assert not records.is_device_lost("AssertionError: dx: 0.1 > 0.01")

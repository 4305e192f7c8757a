"""The benchmark suites run, count what they say they count, and time nothing that is wrong."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # the suites are outside the package

from benchmarks import measure, predict, work  # noqa: E402
from benchmarks.cases import CASES, Case, firing_rates, layer_inputs  # noqa: E402
from benchmarks.layers import DENSE, OURS, TORCH_SPARSE, DenseEager  # noqa: E402
from benchmarks.memory import peak_bytes, saved_bytes  # noqa: E402
from benchmarks.operations import DECODE, ENCODE, FORWARD, LAYER  # noqa: E402
from benchmarks.results import write_results  # noqa: E402
from benchmarks.timing import Variant, interleaved, spread  # noqa: E402
from tca_fast.results import read_results  # noqa: E402

CPU = torch.device("cpu")
BY_HAND = Case("by hand", tokens=4, width=3, features=5, l0=2)
TINY = CASES["tiny"]


def machine(dtype=torch.float32):
    """Bandwidth 1 GB/s, so that bytes read as nanoseconds."""
    facts = {"device": "a", "commit": "b", "versions": {}, "dtype": str(dtype)}
    return measure.Machine(CPU, dtype, 1e9, facts)


@pytest.mark.parametrize(
    ("operator", "product_flops", "pair_flops", "product", "streamed", "gathered", "selection"),
    [
        # 8 active pairs: 8·(2+4) bytes of values and indices, 5·8 of row starts, 88 together.
        (work.encode, 2 * 4 * 3 * 5, 0, (12 + 15) * 2, 88, 0, 40),
        (work.decode, 0, 2 * 8 * 3, 0, 88 + 30 + 24, 8 * 6, 0),
        (work.forward, 120, 48, 54, 88 + 30 + 24 + 24, 48, 40),
        (work.backward, 0, 4 * 48, 0, 88 + 3 * 24 + 2 * 30 + 2 * 30, 3 * 48, 0),
        (work.dense_decode, 120, 0, (20 + 15 + 12) * 2, 88 + 40, 0, 0),
        (work.dense_forward, 240, 0, 54 + (24 + 15) * 2, 2 * 40, 0, 0),
        (work.dense_backward, 480, 0, 4 * 54, 3 * 40 + 3 * 30 + 24, 0, 0),
    ],
)
def test_work_of_a_case_counted_by_hand(
    operator, product_flops, pair_flops, product, streamed, gathered, selection
):
    counted = operator(BY_HAND, 2)
    assert counted == work.Work(product_flops, pair_flops, product, streamed, gathered, selection)
    assert counted.bytes == product + streamed


@pytest.mark.parametrize(
    ("l0", "floor", "expected"), [(1.4, 0.86, 0.975), (10, 1.07, 1.45), (4096, 4.15, 4.2)]
)
def test_predictions_are_those_of_the_study(l0, floor, expected):
    """performance §3b and §1, whose backward reads T·D once more, 0.02 ms where memory decides."""
    case = Case("", 8192, 3584, 8192, l0)
    ways = [(work.forward, work.backward), (work.dense_forward, work.dense_backward)]
    counted = min((f(case, 2) + b(case, 2) for f, b in ways), key=predict.expected_ms)
    separate = next((f(case, 2), b(case, 2)) for f, b in ways if f(case, 2) + b(case, 2) == counted)
    assert sum(map(predict.floor_ms, separate)) == pytest.approx(floor, abs=0.025)
    total = sum(map(predict.expected_ms, separate)) + 0.04
    assert total == pytest.approx(expected, abs=0.05)


def test_the_documented_predictions_are_those_of_the_code():
    assert predict.table() in (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("case", [case for cases in CASES.values() for case in cases], ids=str)
def test_firing_rates_add_up(case):
    rates = firing_rates(case)
    assert rates.sum().item() == pytest.approx(case.l0, rel=1e-6)
    assert rates.min() > 0 and rates.max() < 1


@pytest.mark.parametrize(
    "case",
    [replace(case, tokens=256) for case in CASES["cpu"] if case.name.startswith("1.5B")]
    + [replace(case, tokens=4096) for case in TINY],
    ids=lambda case: case.name,
)
def test_measured_sparsity_is_the_stated_one(case):
    """Within five standard errors of a mean of independent features, and 2 %."""
    tensors = layer_inputs(case)
    features = DenseEager(case).encode(tensors["x"], tensors["W_enc"], tensors["b_enc"])
    measured = (features > 0).sum(1).double().mean().item()
    if case.k is not None:
        assert measured == case.k == case.active
    else:
        error = 5 * (case.l0 / case.tokens) ** 0.5
        assert measured == pytest.approx(case.active, abs=error + 0.02 * case.l0)


def test_rounds_take_turns_and_preparation_is_not_timed():
    order = []

    def variant(name):
        def prepare():
            time.sleep(0.05)
            return name

        return Variant(prepare, order.append)

    times = interleaved({name: variant(name) for name in "abc"}, CPU, rounds=3, warmup=1)
    rounds = ["".join(order[i : i + 3]) for i in range(0, 12, 3)]
    assert rounds == ["cab", "abc", "bca", "cab"]
    assert all(len(values) == 3 and min(values) < 50 for values in times.values())


def test_spread_stays_within_the_rounds():
    assert spread([3.0]) == (3.0, 3.0, 3.0)
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == (3.5, 2.0, 5.0)


def test_peak_memory_counts_what_is_alive_together():
    def call(size):
        first = torch.empty(size, dtype=torch.uint8)
        second = torch.empty(2 * size, dtype=torch.uint8)
        del first, second
        return torch.empty(size, dtype=torch.uint8)

    # The allocator rounds a request up to its alignment, and the profiler reports the request.
    assert peak_bytes(CPU, call, 2**20) == 3 * 2**20


def test_saved_memory_leaves_arguments_out():
    x = torch.ones(1000, requires_grad=True)
    assert saved_bytes(lambda: x.exp(), [x]) == 4000  # its result
    assert saved_bytes(lambda: x.square(), [x]) == 0  # its argument


class NoBias(DenseEager):
    """Wrong: forgets the decoder bias."""

    def decode(self, features, W_dec, b_dec):
        return super().decode(features, W_dec, b_dec * 0)


class OnePairLost(DenseEager):
    """Wrong: drops the last active pair."""

    def encode(self, x, W_enc, b_enc):
        features = super().encode(x, W_enc, b_enc)
        token, feature = features.nonzero()[-1]
        kept = torch.ones_like(features)
        kept[token, feature] = 0
        return features * kept


@pytest.mark.parametrize("wrong", [NoBias, OnePairLost])
@pytest.mark.parametrize("operation", [DECODE, FORWARD, LAYER], ids=lambda one: one.name)
@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_nothing_is_timed_when_wrong(monkeypatch, wrong, operation, case):
    monkeypatch.setitem(measure.IMPLEMENTATIONS, OURS, wrong)
    monkeypatch.setattr(measure, "interleaved", lambda *_: pytest.fail("timed"))
    with pytest.raises(AssertionError, match=f"{case.name}, {operation.name}, {OURS}: .* is off"):
        measure.measure(operation, case, [OURS, DENSE], machine(), rounds=1)


class NoBranch(DenseEager):
    """Wrong: adds nothing to the MLP's output."""

    def decode(self, features, W_dec, b_dec):
        return super().decode(features, W_dec, b_dec) * 0


@pytest.mark.parametrize("operation", [FORWARD, LAYER], ids=lambda one: one.name)
def test_a_branch_left_out_is_seen_in_bfloat16(monkeypatch, operation):
    monkeypatch.setitem(measure.IMPLEMENTATIONS, OURS, NoBranch)
    with pytest.raises(AssertionError, match="y is off"):
        measure.measure(operation, TINY[0], [OURS], machine(torch.bfloat16), rounds=1)


def test_what_others_compute_wrong_is_absent_and_the_rest_is_timed(monkeypatch):
    class Broken(DenseEager):
        def encode(self, x, W_enc, b_enc):
            raise RuntimeError("no such kernel")

    for wrong, reason in ((NoBranch, "wrong, not timed: y is off"), (Broken, "fails: no such")):
        monkeypatch.setitem(measure.IMPLEMENTATIONS, TORCH_SPARSE, wrong)
        measured = measure.measure(LAYER, TINY[0], [OURS, TORCH_SPARSE], machine(), rounds=1)
        row = measured[TORCH_SPARSE].row
        assert row["absent"].startswith(reason) and row["is_refused"]
        assert measured[OURS].row["median_ms"] > 0


def test_undecided_features_are_allowed_for():
    """In bfloat16 many pairs lie within rounding of the threshold; the check must still pass."""
    measured = measure.measure(LAYER, TINY[2], [OURS], machine(torch.bfloat16), rounds=1)
    assert measured[OURS].row["median_ms"] > 0


def test_share_of_the_floor(monkeypatch):
    """Times and bandwidth given, the columns follow by hand."""
    given = {measure.PRODUCT: [4.0], OURS: [8.0], DENSE: [24.0]}
    monkeypatch.setattr(measure, "interleaved", lambda *_: given)
    case = TINY[0]
    measured = measure.measure(ENCODE, case, list(given), machine(), rounds=1)
    row, pairs = measured[OURS].row, 48 * 4
    packed = pairs * 8 + 49 * 8
    assert row["over_product"] == 2 and row["speedup"] == 3
    assert row["bytes"] == (48 * 32 + 160 * 32) * 4 + packed
    assert row["of_floor"] == pytest.approx((4.0 + packed * 1e-6) / 8.0)
    assert row["gb_per_s"] == pytest.approx(row["bytes"] * 1e-9 / 8e-3)
    assert measured[measure.PRODUCT].row["of_floor"] == 1


def test_results_are_read_back(tmp_path):
    with pytest.raises(ValueError, match="lacks 'operation'"):
        write_results(tmp_path / "new" / "results.json", [{"case": "incomplete"}])
    assert not (tmp_path / "new").exists()


def test_the_suites_run(tmp_path):
    """End to end: every operation, case and variant but the compiled one, which takes minutes."""
    out, played = tmp_path / "results.json", tmp_path / "pytest_benchmark.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks/bench_ops.py",
        "benchmarks/bench_layer.py",
    ]
    options = ["--device=cpu", "--cases=tiny", "--rounds=2", f"--out={out}"]
    plugin = ["-k", "not compiled", "-p", "no:cacheprovider", f"--benchmark-json={played}", "-q"]
    # Under pytest-xdist this process is a worker, and pytest-benchmark would think that it is one.
    outside = {name: v for name, v in os.environ.items() if not name.startswith("PYTEST_")}
    result = subprocess.run(
        [*command, *options, *plugin],
        cwd=ROOT,
        env={**outside, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    rows = read_results(out)
    operations = {"encode", "decode", "adapter forward", "adapter backward", "layer"}
    variants = {measure.PRODUCT, OURS, DENSE, "torch sparse"}
    expected = {(o, c.name, v) for o in operations for c in TINY for v in variants}
    assert {(row["operation"], row["case"], row["variant"]) for row in rows} == expected
    assert len(rows) == len(expected)
    for row in rows:
        assert row["median_ms"] > 0 and row["peak_bytes"] > 0 and row["bytes"] > 0
        assert row["dtype"] == "float32" and row["device"] and row["commit"]
        assert row["versions"]["torch"] == torch.__version__
    for heading in ("/ product", "speed-up", "of floor", "GB/s", "peak MiB", "saved MiB"):
        assert heading in result.stdout
    # pytest-benchmark was played the same rounds.
    benchmarks = json.loads(played.read_text())["benchmarks"]
    medians = {
        (b["extra_info"]["operation"], b["extra_info"]["case"], b["extra_info"]["variant"]): (
            b["stats"]["median"] * 1e3
        )
        for b in benchmarks
    }
    assert medians == {
        (row["operation"], row["case"], row["variant"]): pytest.approx(row["median_ms"])
        for row in rows
    }

"""The step benchmark runs, counts layer passes, and times nothing that is wrong."""

import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # the suites are outside the package

from benchmarks import losses, phases, settings, step
from benchmarks.measure import Machine
from benchmarks.memory import peak_bytes
from benchmarks.results import write_results
from benchmarks.step_cases import STEP_CASES
from benchmarks.step_variants import VARIANTS, Variant
from tca_fast.bridging.plain import PlainObjective
from tca_fast.config import AdapterConfig, ObjectiveConfig
from tca_fast.results import read_results

FACTS = {"device": "a", "commit": "b", "versions": {}, "dtype": "float32"}
MACHINE = Machine(torch.device("cpu"), torch.float32, 1e9, FACTS)


@pytest.fixture(scope="module")
def rows():
    bench = step.StepBench(STEP_CASES["tiny"][0], list(VARIANTS), MACHINE)
    return {row["variant"]: row for row in bench.rows(step.uniform_cutoffs(3, None))}


def test_passes_are_those_of_the_arithmetic(rows):
    """L 3, one uniform cutoff (performance.md §4): bridges run 1.5 layers on average each way."""

    def passes(name):
        return [rows[name]["passes"][kind] for kind in step._PASSES]

    # Adapter and reference forward, adapter and reference backward.
    published, shared = [9.0, 7.5, 9.0, 0.75], [3.75, 3.75, 3.75, 0.75]
    for name in ("published", "published, sparse adapters", "published, chunked losses"):
        assert passes(name) == published, name
    assert passes("plain") == [6.0, 4.5, 6.0, 0.75]
    assert passes("shared") == passes("published, shared passes") == shared


def test_rows_are_results(rows, tmp_path):
    for row in rows.values():
        assert row["measured_l0"] == pytest.approx(4, rel=0.2)
        assert 0 < row["forward_peak_bytes"] <= row["peak_bytes"] and row["host_waits"] is None
        assert row["tokens_per_s"] == pytest.approx(24 / row["mean_ms"] * 1e3)
    assert rows["published"]["speedup"] == rows["published"]["throughput_ratio"] == 1
    assert rows["published"]["backend"] == "dense" != rows["shared"]["backend"]
    write_results(tmp_path / "a.json", list(rows.values()))
    assert read_results(tmp_path / "a.json") == list(rows.values())


def test_phases_by_hand():
    """Sizes are those asked for: 1, 2 and 4 MiB, the second freed before the third."""
    meter = phases.PhaseMeter(torch.device("cpu"))
    MiB = 2**20

    def take(number):
        return torch.empty(number * MiB, dtype=torch.uint8)

    with meter.measuring():
        with meter.phase("first"):
            kept = take(1)
        with meter.phase("second"):
            freed = take(2)
            del freed
        with meter.phase("nothing"):
            time.sleep(0.001)
        between = take(4)
        del between
        with meter.phase("last"):
            take(1)
    del kept
    expected = {"first": 1, "second": 3, "nothing": 1, phases.REST: 5, "last": 2}
    assert meter.peaks == {name: number * MiB for name, number in expected.items()}


@pytest.mark.parametrize("name", ["plain", "shared"])
def test_phases_of_a_step(name):
    """Their highest peak is that of the whole step, measured without them."""
    bench = step.StepBench(STEP_CASES["tiny"][0], [name], MACHINE)
    (row,) = bench.phase_rows()
    found = row["phase_peak_bytes"]
    ends = {phases.REFERENCE, phases.ADAPTER, phases.HEAD, phases.BACKWARD, phases.OPTIMIZER}
    bridges = {"bridge"} if name == "plain" else {"bridge a2r(1)", "bridge r2a(1)"}
    assert set(found) == ends | bridges | {phases.REST}
    assert all(peak > 0 for peak in found.values())

    optimizer = torch.optim.AdamW(bench.parameters, lr=0.0)

    def whole():
        bench.objectives[name](**bench.batch, cutoffs=[1]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    whole()
    assert max(found.values()) == pytest.approx(peak_bytes(MACHINE.device, whole), rel=0.02)


def test_settings_are_those_of_the_configuration():
    assert asdict(settings.Adapter()) == AdapterConfig().model_dump()
    assert asdict(settings.Objective()) == ObjectiveConfig().model_dump()


class HalvedObjective(PlainObjective):
    def _passes(self, *inputs):
        passes = super()._passes(*inputs)
        return passes._replace(main={name: value / 2 for name, value in passes.main.items()})


def test_nothing_is_timed_that_is_wrong(monkeypatch):
    monkeypatch.setitem(VARIANTS, "shared", Variant(HalvedObjective, False))
    bench = step.StepBench(STEP_CASES["tiny"][0], ["plain", "shared"], MACHINE)
    with pytest.raises(SystemExit, match="shared is off by .*; nothing timed"):
        bench.rows([1])


def test_cutoffs_stand_for_the_uniform_distribution():
    assert step.uniform_cutoffs(28, None) == list(range(29))
    assert step.uniform_cutoffs(28, 29) == list(range(29))
    for number in (1, 3, 5, 10):
        cutoffs = step.uniform_cutoffs(28, number)
        assert len(set(cutoffs)) == number
        assert sum(cutoffs) / number == pytest.approx(14, abs=0.5)


def test_the_losses_are_compared_before_they_are_timed(monkeypatch):
    bench = losses.LossBench(losses.LOSS_CASES["tiny"][0], MACHINE)
    whole, chunks = bench.rows(rounds=1)
    assert whole["peak_share"] == 1 and chunks["peak_bytes"] > 0
    monkeypatch.setattr(bench, "chunked", lambda: [2 * value for value in bench.whole()])
    with pytest.raises(SystemExit, match="chunks are off by 1.0e"):
        bench.rows(rounds=1)

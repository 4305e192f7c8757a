"""A backend is chosen on CUDA only where it was measured to be the fastest."""

import json
import math
import random

import pytest
import torch

from tca_fast import ops, registry, selection
from tca_fast.errors import UserError
from tca_fast.kernels import ASSUMED_DENSE_SHARE
from tca_fast.selection import Call, Point, Table

CUDA = torch.device("cuda")


def point(density, operator="adapter", width=3584, features=8192, tokens=8192, **times):
    return Point(Call(operator, tokens, width, features, density), times)


def both(sparse, dense):
    return {"sparse": sparse, "dense": dense}


TABLE = Table(
    "sm_90",
    "a device",
    "benchmarks/results/a.json",
    (
        point(0.0001, triton=both(1.0, 4.0), cuda=both(0.9, 4.0), reference={"dense": 9.0}),
        point(0.001, triton=both(1.5, 4.0), cuda=both(1.6, 4.1)),
        point(0.004, triton=both(3.9, 4.0), cuda=both(4.2, 4.1)),
        point(0.01, triton=both(7.0, 4.0), cuda=both(8.0, 3.8)),
        # A layer of another shape, whose crossover is lower.
        point(0.0001, width=1536, triton=both(1.0, 2.0)),
        point(0.001, width=1536, triton=both(3.0, 2.0)),
        point(0.001, operator="decode", triton={"sparse": 1.0}, cuda={"sparse": 2.0}),
    ),
)
ALL = ("reference", "triton", "cuda")


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """A machine whose device is of the family of `TABLE`."""
    monkeypatch.setattr(selection, "TABLES", tmp_path)
    monkeypatch.setattr(selection, "family", lambda device=None: "sm_90")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    caches = ("family_table", "_dense_share", "_chosen", "_family_of", "_warn_once")
    for name in caches:
        getattr(selection, name).cache_clear()
    path = tmp_path / "sm_90.json"
    path.write_text(json.dumps(selection.table_content(TABLE)))
    yield path
    for name in caches:
        getattr(selection, name).cache_clear()


def test_tables_survive_writing(measured):
    assert selection.read_table(measured) == TABLE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "format is 'other'"),
        ({"points": []}, "points is empty"),
        ({"points": [{"operator": "adapter"}]}, "KeyError"),
        ({"family": "sm_80"}, "is of sm_80"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(measured, change, message):
    content = {**selection.table_content(TABLE), **change}
    measured.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        selection.family_table("sm_90")


@pytest.mark.parametrize("times", [{"fast": 1.0}, {}, {"sparse": 0.0}, {"sparse": "1"}])
def test_times_of_a_table_are_positive_and_of_a_known_regime(measured, times):
    content = selection.table_content(TABLE)
    content["points"][0]["milliseconds"] = {"triton": times}
    measured.write_text(json.dumps(content))
    with pytest.raises(UserError, match="regimes|positive"):
        selection.read_table(measured)


def test_the_fastest_at_the_nearest_point_is_chosen():
    def chosen(density, backends=ALL, **shape):
        return TABLE.choose(point(density, **shape).call, backends)

    assert chosen(0.00012) == "cuda"
    assert chosen(0.0009) == "triton"
    assert chosen(0.5) == "cuda"  # dense, and far beyond what was measured
    assert chosen(0.5, ("reference", "triton")) == "triton"
    assert chosen(0.0009, ("reference", "cuda")) == "cuda"
    assert chosen(0.0009, operator="decode") == "triton"
    # 2048 is nearer to 1536 than to 3584, on a logarithmic scale.
    assert chosen(0.0001, width=2048) == "triton"


def test_what_was_not_measured_is_never_chosen():
    assert TABLE.choose(point(0.01).call, ("reference", "new")) == "reference"
    assert TABLE.choose(point(0.01, operator="encode").call, ALL) == "reference"


def test_the_crossover_lies_between_the_points_around_it():
    found = TABLE.dense_share(8192, 3584, 8192, ALL)
    assert 0.004 < found < 0.01 and found == pytest.approx(math.sqrt(0.004 * 0.01))
    assert TABLE.dense_share(8192, 3584, 8192, ("cuda",)) == pytest.approx(math.sqrt(0.001 * 0.004))
    assert TABLE.dense_share(8192, 1536, 8192, ALL) == pytest.approx(math.sqrt(0.0001 * 0.001))
    assert TABLE.dense_share(8192, 3584, 8192, ("new",)) is None
    assert Table("", "", "", (point(0.5, triton=both(1, 2)),)).dense_share(8, 8, 8, ALL) == 1
    assert Table("", "", "", (point(0.1, triton=both(2, 1)),)).dense_share(8, 8, 8, ALL) == 0


def test_random_tables_choose_what_a_search_finds():
    draw = random.Random(0)
    for _ in range(200):
        points = tuple(
            point(
                draw.uniform(1e-4, 1),
                width=draw.choice([64, 512]),
                tokens=draw.choice([1, 8, 8192]),
                **{name: both(draw.random() + 0.1, draw.random() + 0.1) for name in ALL},
            )
            for _ in range(6)
        )
        call = draw.choice(points).call
        exact = next(p for p in points if p.call == call)
        times = {b: min(regimes.values()) for b, regimes in exact.milliseconds.items()}
        assert Table("", "", "", points).choose(call, ALL) == min(times, key=times.__getitem__)


def test_a_measured_device_takes_its_table(measured):
    assert selection.choose(point(0.0001).call, ALL, CUDA) == "cuda"
    assert selection.dense_share(CUDA, 8192, 3584, 8192) == pytest.approx(math.sqrt(0.004 * 0.01))
    name, why = selection.reason("adapter", ALL, "sm_90")
    assert name == "cuda, triton" and "benchmarks/results/a.json" in why
    assert selection.reason("encode", ALL, "sm_90")[0] == "reference"
    shown = selection.in_force("sm_90")
    assert "dense above 0.03% at T 8192, D 1536, F 8192, 0.63% at T 8192, D 3584, F 8192" in shown


def test_without_measurements_plain_pytorch_serves_and_says_so(measured):
    measured.unlink()
    with pytest.warns(UserWarning, match="nothing was measured on sm_90.*triton, cuda"):
        assert selection.choose(point(0.0001).call, ALL, CUDA) == "reference"
    assert selection.dense_share(CUDA, 8192, 3584, 8192) == ASSUMED_DENSE_SHARE
    name, why = selection.reason("adapter", ALL, "sm_90")
    assert name == "reference" and f"{selection.VARIABLE}=NAME" in why
    assert selection.in_force("sm_90").startswith("nothing measured on sm_90; dense products above")


def test_a_name_in_the_environment_wins(measured, monkeypatch):
    monkeypatch.setenv(selection.VARIABLE, "triton")
    assert selection.choose(point(0.0001).call, ALL, CUDA) == "triton"
    assert selection.reason("adapter", ALL, None)[0] == "triton"
    monkeypatch.setenv(selection.VARIABLE, "cudda")
    with pytest.raises(UserError, match="'cudda' is not here; choose one of reference, triton"):
        selection.choose(point(0.0001).call, ALL, CUDA)


def test_the_crossover_is_assumed_where_there_is_no_device():
    assert selection.dense_share(torch.device("meta"), 8, 64, 64) == ASSUMED_DENSE_SHARE


@pytest.mark.parametrize("expected_density", [0.004, 1.0])
def test_forward_and_backward_choose_by_the_same_call(monkeypatch, expected_density):
    """What runs on CUDA, run on the CPU: every operator asks once, and the backend answers."""
    asked = []

    def choose(call, backends, device):
        asked.append(call)
        return "reference"

    monkeypatch.setattr(selection, "choose", choose)
    chosen = {name: registry._measured(name) for name in registry._SCHEMAS}
    T, D, F = 6, 4, 1000
    x, W = torch.randn(T, D), torch.randn(F, D)
    capacity = T * 8 if expected_density < 1 else T * F
    forward = (x, x, W, torch.full((F,), -9.0), W, None, None, None, None, capacity)
    y, l1, _, _, *kept = chosen["adapter"](*forward)
    chosen["adapter_backward"](y, l1, x, W, forward[3], W, None, None, None, *kept)
    assert asked == [Call("adapter", T, D, F, expected_density)] * 2
    asked.clear()
    value, row_ptr, feature = chosen["encode"](x, W, torch.zeros(F), 5, T * 5)
    chosen["encode_backward"](value, row_ptr, feature, x, W)
    chosen["decode"](row_ptr, feature, value, W, None, None)
    chosen["decode_backward"](x, row_ptr, feature, value, W, None)
    rest = (T, D, F, 0.005)
    assert asked == [Call("encode", *rest)] * 2 + [Call("decode", *rest)] * 2
    # The same as the operators give without a choice.
    expected = ops.encode(x, W, torch.zeros(F), k=5)
    assert torch.equal(expected.feature, feature)


@pytest.mark.parametrize(
    ("fits", "change"),
    [
        (True, {}),
        (True, {"D": 4095}),
        (False, {"D": 4097}),
        (True, {"D": 8192}),
        (False, {"D": 8196}),
        (True, {"D": 16384, "dtype": torch.bfloat16}),
        (False, {"D": 16392, "dtype": torch.bfloat16}),
        (False, {"dtype": torch.float64}),
        (True, {"F": 65536, "k": 3}),
        (False, {"F": 65537, "k": 3}),
        (True, {"F": 65537}),
        (False, {"T": 2**17, "F": 2**16, "capacity": 2**31}),
        (True, {"T": 2**17, "F": 2**16, "capacity": 2**33}),
    ],
    ids=str,
)
def test_the_compiled_kernels_are_not_chosen_for_what_they_refuse(monkeypatch, fits, change):
    """The limits are those that csrc/cuda checks; other backends have none of them."""
    sizes = {"T": 4, "D": 8, "F": 16, "k": None, "capacity": 9, "dtype": torch.float32, **change}
    like = {"dtype": sizes["dtype"], "device": "meta"}
    x, W = torch.empty(sizes["T"], sizes["D"], **like), torch.empty(sizes["F"], sizes["D"], **like)
    forward = (x, x, W, W[:, 0], W, None, None, None, sizes["k"], sizes["capacity"])
    among = []
    monkeypatch.setattr(registry, "cuda_backends", lambda: ALL)
    monkeypatch.setattr(selection, "choose", lambda call, given, device: among.append(given) or "x")
    y, l1, _, _, *kept = torch.ops.tca_fast.adapter(*forward)
    backward = (y, l1, x, W, W[:, 0], W, None, None, sizes["k"], *kept)
    for name, arguments in (("adapter", forward), ("adapter_backward", backward)):
        with pytest.raises(KeyError):
            registry._measured(name)(*arguments)
    assert among == [ALL if fits else ("reference", "triton")] * 2


def test_a_choice_asks_the_dispatcher_nothing(monkeypatch):
    """It is made for every layer of every decode step."""
    found = registry.cuda_backends()
    monkeypatch.setattr(registry, "_is_registered", None)
    assert registry.cuda_backends() == found
    assert registry.dense_share(torch.device("cuda", 0), 1, 8, 16) > 0

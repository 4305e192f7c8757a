"""The Triton kernels: interpreted against dense autograd, and compiled for the GPUs they serve.

The interpreter takes about a second for a case, so cases are small and few here; `make test-long`
tries 500 of each.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from operator_cases import (
    Case,
    cases,
    check_large_gain_in_half_precision,
    gradients,
    raw,
    weights,
)
from test_ops_random import adapter_of, check_adapter, check_encode
from tiny import dense_adapter

from tca_fast import ops, registry
from tca_fast.errors import UserError

# The interpreter turns arrays of one number into numbers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def _triton():
    with ops.backend("triton"):
        yield


# The interpreter cuts numbers off when it stores them as bfloat16, where a device rounds.
CASES = cases(dtypes=[torch.float32, torch.float64, torch.float16])


def few(long: int = 500) -> settings:
    """As many cases as the profile asks for, up to what the interpreter can do."""
    is_long = settings.get_current_profile_name() == "long"
    return settings(
        max_examples=long if is_long else 12,
        phases=[Phase.explicit, Phase.generate],  # to shrink a failure takes too long
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


def small(case: Case) -> Case:
    features = min(case.F, 40)
    k = None if case.k is None else min(case.k, features)
    return replace(case, T=min(case.T, 12), D=min(case.D, 20), F=features, k=k)


@few()
@given(case=CASES.map(small))
def test_adapter_equals_dense_autograd(case):
    check_adapter(case, adapter_of(case))


# An MLP output and a decoder bias whose sum lies between two float16 numbers.
BIAS_BETWEEN = Case(
    T=12, D=20, F=4, k=1, bias=99.0, hot=True, empty_row=True, integers=False,
    zero_decoder=False, mask="some", gain=None, decoder_bias=True, density=0.01,
    layout="column-major", dtype=torch.float16, seed=1,
)  # fmt: skip


@few()
@given(case=CASES.map(small), room=st.sampled_from([0.0, 0.1, 0.6, 0.99]))
@example(case=BIAS_BETWEEN, room=0.99)
def test_an_overflow_drops_nothing(case, room):
    """Every capacity below T·F: what does not fit goes through the predicated dense products."""
    capacity = int(room * case.T * case.F)

    def ours(**inputs):
        named = [inputs[n] for n in ("x", "mlp_out", "W_enc", "b_enc", "W_dec", "b_dec")]
        y, l1, *_ = raw("adapter")(*named, case.gains, case.token_mask, case.k, capacity)
        return {"y": y, "l1": l1}

    check_adapter(case, ours)


@few()
@given(case=CASES.map(small))
def test_encode_and_decode_equal_dense_autograd(case):
    check_encode(case)
    x, W_enc, b_enc = (case.tensors[name] for name in ("x", "W_enc", "b_enc"))
    active = ops.encode(x, W_enc, b_enc, k=case.k)
    W_dec = case.tensors["W_dec"].contiguous().requires_grad_()
    y = ops.decode(active, W_dec, case.tensors["b_dec"], gain=case.gains)
    with ops.backend("reference"):
        expected = ops.decode(active, W_dec, case.tensors["b_dec"], gain=case.gains)
    rounding = dict(atol=1e-4, rtol=1e-4) if case.dtype.itemsize > 2 else dict(atol=0.05, rtol=0.01)
    torch.testing.assert_close(y, expected, **rounding)
    for a, b in zip(gradients([y], [W_dec]), gradients([expected], [W_dec]), strict=True):
        torch.testing.assert_close(a, b, **rounding)


@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("segments", [(8, 4096), (2, 9)], ids=["least length", "most segments"])
def test_a_feature_of_many_tokens_is_split_and_added_up_in_order(k, segments, monkeypatch):
    """One feature fires for all tokens: several segments, and the same bits in every run."""
    from tca_fast.kernels import launch

    least, most = segments
    monkeypatch.setattr(launch, "TOKENS_PER_SEGMENT", least)
    monkeypatch.setattr(launch, "MOST_EXTRA_SEGMENTS", most)
    tensors = weights(T=30, D=6, F=5, dtype=torch.float32)
    with torch.no_grad():
        tensors[3] -= 4
        tensors[3][2] = 50
    mask = torch.arange(30) % 5 > 0
    results = []
    for name in ("triton", "triton", "reference"):
        with ops.backend(name):
            y, l1, *_ = raw("adapter")(*tensors, None, mask, k, 30 * 4)
            results.append([y, l1, *gradients([y, l1], tensors)])
    first, again, expected = results
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for a, b in zip(first, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 64, 512])
def test_topk_of_the_widest_layer_is_exact_with_ties(dtype, k):
    """F = 65,536 pre-activations of few distinct values, so that most choices are between ties."""
    num_features = 65_536
    generator = torch.Generator().manual_seed(k)
    x = torch.ones(2, 1, dtype=dtype)
    W_enc = torch.randint(-300, 9, (num_features, 1), generator=generator).to(dtype) / 8
    b_enc = torch.zeros(num_features, dtype=dtype)
    b_enc[7] = torch.nan
    found = ops.encode(x, W_enc, b_enc, k=k).trim()
    with ops.backend("reference"):
        expected = ops.encode(x, W_enc, b_enc, k=k).trim()
    assert torch.equal(found.row_ptr, expected.row_ptr)
    assert torch.equal(found.feature, expected.feature)
    torch.testing.assert_close(found.value, expected.value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("room", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("grad_y", [1e-3, 6e4])
def test_a_large_gain_in_half_precision_does_not_overflow_in_between(room, grad_y):
    check_large_gain_in_half_precision(room, grad_y)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_visible(value):
    tensors = weights(grad=False)
    tensors[0][2, 1] = value
    output = ops.adapter(*tensors)
    y, l1, _ = dense_adapter(*tensors)
    torch.testing.assert_close(output.y, y, equal_nan=True)
    torch.testing.assert_close(output.l1, l1, equal_nan=True)
    assert not output.y[2].isfinite().all()


def test_packed_features_made_by_hand_are_not_read_out_of_bounds():
    """The device reports them as NaN, since the host does not wait to raise an error."""
    W_dec = torch.ones(5, 3)
    beyond = ops.ActiveFeatures(
        torch.tensor([0, 1, 2]), torch.tensor([0, 5], dtype=torch.int32), torch.ones(2), 5
    )
    assert ops.decode(beyond, W_dec).isnan().tolist() == [[False] * 3, [True] * 3]
    overflowed = ops.ActiveFeatures(
        torch.tensor([0, 1, 9]), torch.tensor([0, 4], dtype=torch.int32), torch.ones(2), 5
    )
    assert ops.decode(overflowed, W_dec).isnan().all()
    gradients = raw("encode_backward")(
        torch.ones(2), overflowed.row_ptr, overflowed.feature, torch.ones(2, 3), torch.ones(5, 3)
    )
    assert all(gradient.isnan().all() for gradient in gradients)


def test_opcheck():
    tensors = weights(T=3, D=2, F=4)
    mask = torch.tensor([True, False, True])
    for capacity in (12, 5):
        torch.library.opcheck(raw("adapter"), (*tensors, None, mask, None, capacity))
    value, row_ptr, feature = raw("encode")(tensors[0], *tensors[2:4], 2, 6)
    torch.library.opcheck(raw("encode"), (tensors[0], *tensors[2:4], 2, 6))
    value = value.detach().requires_grad_()
    decode = (row_ptr, feature, value, tensors[4], tensors[5], None)
    torch.library.opcheck(raw("decode"), decode)


def test_the_backend_is_refused_where_nothing_can_run_it(monkeypatch):
    monkeypatch.setattr(registry, "_triton_is_interpreted", lambda: False)
    with pytest.raises(UserError, match=r"'triton' needs a CUDA device .* TRITON_INTERPRET=1"):
        ops.backend("triton").__enter__()


def test_partial_sums_take_little_memory_however_much_room_there_is():
    """Of AuxK at T = F = 8192, D = 3584, with D / 2 features of a token: 117 MB, not 1.6 GB."""
    from tca_fast.kernels import launch

    capacity = 8192 * 1792
    num_extras = capacity // launch.segment_tokens(capacity)
    assert num_extras > 1000 and 2 * num_extras * 3584 * 4 < 120e6


def compiled_elsewhere(code: str) -> str:
    """What code prints in a process in which kernels are compiled, not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = os.path.dirname(os.path.dirname(__file__))
    report = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True
    )
    assert report.returncode == 0, report.stderr
    return report.stdout


def test_no_kernel_is_compiled_anew_for_another_number_of_tokens():
    """Those of an overflow apart, where it is a size of the matrices that they multiply."""
    code = """
import json, torch
from benchmarks import compiled
found = []
for compiled.TOKENS in (8192, 8191, 600):
    launches = compiled.launches_of_all_operators(torch.bfloat16, 3584)
    kept = [one for one in launches if one.kernel.__name__ != "overflow_product_kernel"]
    found.append(sorted({compiled._source(one, 90)[2] for one in kept}))
print(json.dumps(found))
"""
    first, *others = json.loads(compiled_elsewhere(code))
    assert first and all(other == first for other in others)


def test_every_kernel_compiles_without_spilling():
    """For A100 and H100, as every operator launches it, on tensors without data.

    That the operators run on such tensors also shows that nothing in them reads from the device.
    """
    code = (
        "import json, torch; from dataclasses import asdict; from benchmarks import compiled;"
        "print(json.dumps([asdict(row) for row in compiled.compile_all(torch.bfloat16, 3584)]))"
    )
    rows = json.loads(compiled_elsewhere(code))
    assert {row["capability"] for row in rows} == {80, 90}
    assert {"topk_kernel", "segment_kernel", "gather_kernel"} <= {row["kernel"] for row in rows}
    for row in rows:
        assert row["spilled_bytes"] == 0, row
        # Two programs must fit beside each other: 164 KiB on A100, 65,536 registers on both.
        assert row["shared_bytes"] <= 80 * 1024, row
        assert row["registers"] * row["warps"] * 32 <= 65_536, row

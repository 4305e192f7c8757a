"""The CUDA operators, whole, in the emulator: the host's code and every kernel, on CPU tensors.

Segments are split at 20 pairs, so that small cases have several. `make test-long` tries more.
"""

import sysconfig
from dataclasses import replace
from functools import partial

import pytest
import torch
from emulated import ACCESSES_ARE_WATCHED, built, has_compiler
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from operator_cases import (
    Floors,
    cases,
    check_large_gain_in_half_precision,
    dense_features,
    gradients,
    raw,
    weights,
)
from test_ops_random import adapter_of, check, check_adapter, check_encode
from tiny import dense_adapter

from tca_fast import ops, reference, registry

pytestmark = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")


@pytest.fixture(scope="module")
def _emulated():
    include = f"-I{sysconfig.get_path('include')}"
    torch.ops.load_library(built("operators.cpp", include, "-DTCA_FAST_PAIRS_PER_SEGMENT=20"))


@pytest.fixture(autouse=True)
def _cuda(_emulated, monkeypatch):
    """The backend without its condition that there is a device."""
    monkeypatch.setattr(registry, "_namespace", "tca_fast_cuda")


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = cases(dtypes=DTYPES)


def few(cases: int = 40) -> settings:
    is_long = settings.get_current_profile_name() == "long"
    return settings(
        max_examples=500 if is_long else cases,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


@few()
@given(case=CASES)
def test_adapter_equals_dense_autograd(case):
    check_adapter(case, adapter_of(case))


@few()
@given(case=CASES, room=st.sampled_from([0.0, 0.1, 0.6, 0.99]))
def test_an_overflow_drops_nothing(case, room):
    """Every capacity below T·F: what does not fit goes through the predicated dense products."""
    capacity = int(room * case.T * case.F)

    def ours(**inputs):
        named = [inputs[n] for n in ("x", "mlp_out", "W_enc", "b_enc", "W_dec", "b_dec")]
        y, l1, *_ = raw("adapter")(*named, case.gains, case.token_mask, case.k, capacity)
        return {"y": y, "l1": l1}

    check_adapter(case, ours)


@few(6)
@given(
    case=CASES,
    T=st.sampled_from([45, 300]),
    D=st.sampled_from([70, 264, 520, 1040]),
    F=st.sampled_from([40, 1100]),
    capacity=st.sampled_from([0.3, 1.0]),
)
def test_blocks_of_several_warps(case, T, D, F, capacity):
    """Also tiles of 256 tokens and of 1024 features, and segments of several batches."""
    k = None if case.k is None else min(case.k, F)
    case = replace(case, T=T, D=D, F=F, k=k, bias=-3.0 * D**0.5, density=capacity / 2)
    check_adapter(case, adapter_of(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_topk_of_a_wide_layer_with_ties(dtype):
    """Few distinct values, so that most choices are between ties; NaN is the largest."""
    generator = torch.Generator().manual_seed(0)
    W_enc = torch.randint(-300, 9, (9000, 1), generator=generator).to(dtype) / 8
    b_enc = torch.zeros(9000, dtype=dtype)
    b_enc[7] = torch.nan
    arguments = (torch.ones(2, 1, dtype=dtype), W_enc, b_enc, 200, 400)
    expected = reference.encode(*arguments)
    for ours, theirs in zip(raw("encode")(*arguments), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@few(12)
@given(case=CASES)
def test_encode_and_decode_equal_dense_autograd(case):
    check_encode(case)
    encoder = [case.tensors[name] for name in ("x", "W_enc", "b_enc")]
    features = dense_features(*encoder, case.k)
    arguments = {name: case.tensors[name] for name in ("W_dec", "b_dec")} | {"features": features}

    def decoded(W_dec, b_dec, features):
        active = ops.ActiveFeatures.from_dense(features)
        at = (active.tokens(), active.feature.long())
        active = replace(active, value=features[at])
        return {"y": ops.decode(active, W_dec, b_dec, gain=case.gains)}

    def densely(W_dec, b_dec, features):
        gained = features if case.gains is None else features * case.gains.to(features.dtype)
        y = torch.where(features != 0, gained, 0.0) @ W_dec
        return {"y": y if b_dec is None else y + b_dec}

    check(case, decoded, densely, partial(Floors(case).decode, features=features), arguments)


@pytest.mark.parametrize("room", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("grad_y", [1e-3, 6e4])
def test_a_large_gain_in_half_precision_does_not_overflow_in_between(room, grad_y):
    check_large_gain_in_half_precision(room, grad_y)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_visible(value):
    tensors = weights(dtype=torch.float32, grad=False)
    tensors[0][2, 1] = value
    output = ops.adapter(*tensors)
    y, l1, _ = dense_adapter(*tensors)
    torch.testing.assert_close(output.y, y, equal_nan=True)
    torch.testing.assert_close(output.l1, l1, equal_nan=True)
    assert not output.y[2].isfinite().all()


def test_packed_features_made_by_hand_are_not_read_out_of_bounds():
    """As with Triton: NaN tells of them, since the host does not wait to raise an error."""
    W_dec = torch.ones(5, 3)

    def decoded(row_ptr, feature):
        feature = torch.tensor(feature, dtype=torch.int32)
        value = torch.ones(len(feature), requires_grad=True)
        y = ops.decode(ops.ActiveFeatures(torch.tensor(row_ptr), feature, value, 5), W_dec)
        y.sum().backward()
        return y

    assert decoded([0, 1, 2], [0, 5]).isnan().tolist() == [[False] * 3, [True] * 3]
    assert decoded([0, 1, 9], [0, 4]).isnan().all()
    if ACCESSES_ARE_WATCHED:  # of two equal pairs either may be last
        with pytest.raises(RuntimeError, match="without a barrier between them"):
            decoded([0, 2, -4, 2], [3, 3])
    else:
        decoded([0, 2, -4, 2], [3, 3])


def test_every_run_gives_the_same_bits():
    """The emulator draws another order of threads and blocks in every run."""
    tensors = weights(T=90, D=70, F=40, dtype=torch.float32)
    with torch.no_grad():
        tensors[3] -= 15
        tensors[3][2] = 50
    results = []
    for _ in range(2):
        y, l1, *_ = raw("adapter")(*tensors, None, None, None, 90 * 10)
        results.append([y, l1, *gradients([y, l1], tensors)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_dtype_that_it_does_not_compute():
    with pytest.raises(RuntimeError, match="x: dtype Double, expected Float, BFloat16 or Half"):
        ops.adapter(*weights())


def test_opcheck():
    tensors = weights(T=3, D=2, F=4, dtype=torch.float32)
    mask = torch.tensor([True, False, True])
    for capacity in (12, 5):
        torch.library.opcheck(raw("adapter"), (*tensors, None, mask, None, capacity))

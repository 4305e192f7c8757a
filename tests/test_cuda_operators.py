"""The CUDA operators, whole, in the emulator: the host's code and every kernel, on CPU tensors.

Segments are split at 20 pairs, so that small cases have several. `make test-long` tries more.
"""

import sysconfig
from dataclasses import replace

import pytest
import torch
from emulated import built, has_compiler
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from operator_cases import cases, raw
from test_ops_random import adapter_of, check_adapter

from tca_fast import reference, registry

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
    case = replace(case, T=T, D=D, F=F, bias=-3.0 * D**0.5, density=capacity / 2)
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

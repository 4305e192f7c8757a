"""Operators against dense autograd on random cases; `make test-long` tries ten thousand of each."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operator_bounds import assert_as_good_as
from operator_cases import Case, Floors, cases, dense_features, differentiate
from tiny import dense_adapter

from tca_fast import ops

pytestmark = pytest.mark.usefixtures("backend", "share")
random_cases = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def check(case: Case, ours, dense, floors, arguments) -> None:
    """Hold `ours` to `dense` in the same dtype and in float64."""
    results, upstream = differentiate(ours, arguments, case.dtype, case)
    eager, _ = differentiate(dense, arguments, case.dtype, case)
    truth, _ = differentiate(dense, arguments, torch.float64, case)
    assert_as_good_as(results, eager, truth, floors(*upstream))


def adapter_of(case: Case):
    def ours(**inputs):
        output = ops.adapter(
            **inputs,
            k=case.k,
            gain=case.gains,
            token_mask=case.token_mask,
            expected_density=case.density,
        )
        return {"y": output.y, "l1": output.l1}

    return ours


def dense_adapter_of(case: Case):
    def dense(**inputs):
        gain = None if case.gains is None else case.gains.to(inputs["x"].dtype)
        y, l1, _ = dense_adapter(**inputs, k=case.k, gain=gain, mask=case.token_mask)
        return {"y": y, "l1": l1}

    return dense


def check_adapter(case: Case, ours) -> None:
    check(case, ours, dense_adapter_of(case), Floors(case).adapter, case.tensors)


def check_encode(case: Case) -> None:
    """Scattered to [T, F]: near zero, two right encoders may disagree on what is active."""
    arguments = {name: case.tensors[name] for name in ("x", "W_enc", "b_enc")}

    def ours(x, W_enc, b_enc):
        active = ops.encode(x, W_enc, b_enc, k=case.k).trim()
        dense = x.new_zeros(case.T, case.F)
        return {"value": dense.index_put((active.tokens(), active.feature), active.value)}

    def dense(x, W_enc, b_enc):
        return {"value": dense_features(x, W_enc, b_enc, case.k)}

    check(case, ours, dense, Floors(case).encode, arguments)


@random_cases
@given(case=cases())
def test_adapter_equals_dense_autograd(case):
    """Values and every gradient, at any density, mask, gain, dtype and T."""
    check_adapter(case, adapter_of(case))


@random_cases
@given(case=cases())
def test_encode_equals_dense_autograd(case):
    check_encode(case)


@random_cases
@given(case=cases())
def test_decode_equals_dense_autograd(case):
    """Of packed features that a caller made, with rubbish in the room beyond the last entry."""
    encoder = [case.tensors[name] for name in ("x", "W_enc", "b_enc")]
    features = dense_features(*encoder, k=case.k)
    active = features != 0
    arguments = {"features": features, "W_dec": case.tensors["W_dec"]}
    arguments["b_dec"] = case.tensors["b_dec"]

    def ours(features, W_dec, b_dec):
        row_ptr = torch.cat([torch.zeros(1, dtype=torch.int64), active.sum(1).cumsum(0)])
        feature = torch.cat([active.nonzero()[:, 1], torch.tensor([-1, case.F])])
        value = torch.cat([features[active], features.new_full((2,), torch.nan)])
        packed = ops.ActiveFeatures(row_ptr, feature.int(), value, case.F)
        return {"y": ops.decode(packed, W_dec, b_dec, gain=case.gains)}

    def dense(features, W_dec, b_dec):
        gain = 1 if case.gains is None else case.gains.to(features.dtype)
        y = (features * active * gain) @ W_dec
        return {"y": y if b_dec is None else y + b_dec}

    floors = Floors(case)
    check(case, ours, dense, lambda dy: floors.decode(dy, features), arguments)


FAULTS = [
    "an active pair dropped",
    "pre-activations in bfloat16",
    "decoder sums in bfloat16",
    "gain forgotten",
    "mask forgotten",
    "no gradient through the decoder norm",
    "ties to the highest index",
]


def faulty_adapter_of(case: Case, fault: str | None):
    """The dense adapter with one thing wrong."""

    def faulty(x, mlp_out, W_enc, b_enc, W_dec, b_dec):
        z = x @ W_enc.T + b_enc
        if fault == "pre-activations in bfloat16":
            z = z.bfloat16().to(z.dtype)
        features = z.relu()
        if case.k is not None:
            order = (z.flip(1) if fault == "ties to the highest index" else z).argsort(
                dim=1, descending=True, stable=True
            )
            order = case.F - 1 - order if fault == "ties to the highest index" else order
            features = features * torch.zeros_like(z).scatter(1, order[:, : case.k], 1.0)
        if fault == "an active pair dropped":
            middle = features.flatten().argsort()[-(features > 0).sum() // 2 :][:1]
            features = features.flatten().index_fill(0, middle, 0.0).view_as(features)
        gained = features if fault == "gain forgotten" else features * case.gains
        y = gained @ W_dec
        if fault == "decoder sums in bfloat16":
            y = y.bfloat16().to(y.dtype)
        norm = (W_dec.detach() if "norm" in (fault or "") else W_dec).norm(dim=1)
        l1 = features @ norm
        l1 = l1 if fault == "mask forgotten" else l1[case.token_mask]
        return {"y": mlp_out + y + b_dec, "l1": l1.sum()}

    return faulty


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_the_check_fails_where_something_is_wrong(fault):
    ties = fault == "ties to the highest index"
    case = Case(
        T=40,
        D=3 if ties else 33,
        F=100,
        k=9 if ties else None,
        bias=-1.0,
        hot=False,
        empty_row=False,
        integers=ties,
        zero_decoder=False,
        mask="some",
        gain="mixed",
        decoder_bias=True,
        density=None,
        layout="contiguous",
        dtype=torch.float32,
        seed=0,
    )
    if fault is None:
        check_adapter(case, faulty_adapter_of(case, fault))
        return
    with pytest.raises(AssertionError, match="elements; the worst is"):
        check_adapter(case, faulty_adapter_of(case, fault))


@random_cases
@given(case=cases([torch.float64]), value=st.sampled_from([torch.nan, torch.inf, -torch.inf]))
def test_what_is_not_finite_spreads_as_in_dense_arithmetic_and_no_further(case, value):
    """NaN or infinity in one input of the first token.

    Wherever dense arithmetic stays finite, so do we and with its numbers. Where it does not, we do
    not either, but for 0·∞ of an inactive pair, which is never multiplied.
    """
    arguments = dict(case.tensors)
    if case.T == 0:
        return
    arguments["x"] = arguments["x"].clone()
    arguments["x"][0, case.seed % case.D] = value
    ours, _ = differentiate(adapter_of(case), arguments, case.dtype, case)
    dense, _ = differentiate(dense_adapter_of(case), arguments, case.dtype, case)
    active = dense_features(arguments["x"], arguments["W_enc"], arguments["b_enc"], case.k)[0] != 0
    for name, expected in dense.items():
        finite = expected.isfinite()
        torch.testing.assert_close(ours[name][finite], expected[finite], rtol=1e-9, atol=1e-9)
        if name in ("dW_enc", "dW_dec"):
            finite = finite | ~active.unsqueeze(1)
        assert not ours[name][~finite].isfinite().any(), name

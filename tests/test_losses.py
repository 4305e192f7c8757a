"""Distances against loops in float64 and torch.distributions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence

from tca_fast import losses


def sample(B, S, V, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(B, S, V, generator=generator, dtype=torch.float64) for _ in range(2)]
    labels = torch.randint(0, V, (B, S), generator=generator)
    labels[torch.rand(B, S, generator=generator) < 0.4] = -100
    return [tensor.to(dtype) for tensor in logits], labels


@settings(max_examples=40, deadline=None)
@given(B=st.integers(1, 3), S=st.integers(1, 6), V=st.integers(2, 9), seed=st.integers(0, 999))
def test_kl_and_lm_equal_a_loop_over_positions(B, S, V, seed):
    (reference, model), labels = sample(B, S, V, seed)
    kl, lm, count = 0.0, 0.0, 0
    for b in range(B):
        for t in range(S - 1):
            if labels[b, t + 1] == -100:
                continue
            p, q = (Categorical(logits=x[b, t]) for x in (reference, model))
            kl += kl_divergence(p, q)
            lm -= q.log_prob(labels[b, t + 1])
            count += 1
    assert losses.label_mask(labels).sum() == count
    torch.testing.assert_close(losses.kl_sum(reference, model, labels).item(), float(kl))
    torch.testing.assert_close(losses.lm_sum(model, labels).item(), float(lm))


def test_half_precision_logits_are_reduced_in_float32():
    (reference, model), labels = sample(2, 5, 1000, 0, torch.bfloat16)
    ours = losses.kl_sum(reference, model, labels)
    truth = losses.kl_sum(reference.double(), model.double(), labels)
    assert ours.dtype == torch.float32
    assert abs(ours - truth) < 1e-5 * truth
    assert losses.kl_sum(model, model, labels).abs() < 1e-4


def test_all_masked_gives_zero_not_nan():
    (reference, model), labels = sample(1, 4, 5, 0)
    labels[:] = -100
    assert losses.kl_sum(reference, model, labels) == 0
    assert losses.lm_sum(model, labels) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_nmse_equals_its_definition_and_ignores_padding(dtype):
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (
        torch.randn(2, 4, 3, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)
    )
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    real = mask.bool()
    n = 3 * 6
    a, b = ours[real].double(), theirs[real].double()
    expected = ((a - b) ** 2).sum() / n / ((b**2).sum() / n + 1e-8)
    ours[1, 2:], theirs[1, 2:] = torch.nan, 7
    value = losses.nmse(*losses.squared_error_sums(ours, theirs, mask), n)
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_squared_error_has_the_gradients_of_its_definition(dtype):
    generator = torch.Generator().manual_seed(0)
    states = [
        torch.randn(2, 4, 3, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for _ in range(2)
    ]
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    error, _ = losses.squared_error_sums(*states, mask)
    ours = torch.autograd.grad(0.7 * error, states)
    exact = [state.detach().double() for state in states]
    difference = (exact[0] - exact[1]) * mask.unsqueeze(-1)
    for gradient, expected in zip(ours, (1.4 * difference, -1.4 * difference), strict=True):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient.double(), expected, rtol=torch.finfo(dtype).eps, atol=0)


def test_squared_error_keeps_nothing_but_its_arguments():
    states, reference = torch.randn(2, 1, 8, 4).unbind()
    states.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        losses.squared_error_sums(states, reference, torch.ones(1, 8))
    large = {t.data_ptr() for t in kept if t.numel() >= states.numel()}
    assert large == {states.data_ptr(), reference.data_ptr()}


def test_nmse_without_tokens_is_zero():
    empty = torch.zeros(1, 2, 3)
    sums = losses.squared_error_sums(empty, empty, torch.zeros(1, 2))
    assert losses.nmse(*sums, 0) == 0

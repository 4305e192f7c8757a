"""Chunked KL and LM against whole logits: values, gradients, and the memory they take."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peak_memory import peak_bytes

from tca_fast import losses
from tca_fast.bridging import head
from tca_fast.bridging.head import Readout, distances


class SoftCappedHead:
    """Logits between -cap and cap, as in Gemma 2; counts its evaluations by token."""

    def __init__(self, weight_VD, cap=4.0):
        self.weight, self.cap, self.vocab_size = weight_VD, cap, weight_VD.shape[0]
        self.tokens = 0

    def logits(self, states_TD):
        self.tokens += len(states_TD)
        return self.cap * (states_TD @ self.weight.T / self.cap).tanh()


def problem(B, S, V, D, students, seed, dtype=torch.float64):
    """A teacher, students that read with one of two heads, and labels."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    heads = [SoftCappedHead(normal(V, D)) for _ in range(2)]
    teacher = Readout(normal(B, S, D), heads[0])
    found = [Readout(normal(B, S, D).requires_grad_(), heads[i % 2]) for i in range(students)]
    labels = torch.randint(0, V, (B, S), generator=generator)
    labels[torch.rand(B, S, generator=generator) < 0.4] = losses.IGNORED_LABEL
    return teacher, found, labels


def of_whole_logits(teacher, students, labels):
    """KL [N], LM [N] and the teacher's LM by `losses` on logits of all positions."""

    def logits(readout):
        return readout.head.logits(readout.states.flatten(0, 1)).unflatten(0, labels.shape)

    reference = logits(teacher).detach()
    return (
        torch.stack([losses.kl_sum(reference, logits(s), labels) for s in students]),
        torch.stack([losses.lm_sum(logits(s), labels) for s in students]),
        losses.lm_sum(reference, labels),
    )


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(2, 40), st.integers(1, 5)),
    students=st.integers(1, 3),
    num_chunks=st.sampled_from([1, 3, 1000]),
    loss=st.sampled_from(["kl", "lm"]),
    everywhere=st.booleans(),
    seed=st.integers(0, 999),
)
def test_values_and_gradients_equal_those_of_whole_logits(
    shape, students, num_chunks, loss, everywhere, seed
):
    """Also with one token a chunk, with no label at all, under unequal upstream gradients, and
    evaluated at every position, as on devices that would have to be waited for."""
    teacher, readouts, labels = problem(*shape, students, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "_NUM_CHUNKS", num_chunks)
        patch.setattr(head, "_LEAST_CHUNK_BYTES", 1)
        if everywhere:
            patch.setattr(head, "_positions", lambda counted: torch.arange(len(counted)))
        ours = distances(teacher, readouts, labels, loss)
    expected = of_whole_logits(teacher, readouts, labels)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert [value.requires_grad for value in ours] == [loss == "kl", loss == "lm", False]
    upstream = torch.randn(students, dtype=torch.float64)
    states = [readout.states for readout in readouts]
    index = {"kl": 0, "lm": 1}[loss]
    for a, b in zip(
        torch.autograd.grad(ours[index], states, upstream),
        torch.autograd.grad(expected[index], states, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("loss", ["kl", "lm"])
def test_half_precision_is_as_good_as_whole_logits(loss):
    """Errors of values and gradients against float64 are at most twice those of whole logits."""
    teacher, readouts, labels = problem(2, 40, 500, 16, 2, 0, torch.bfloat16)
    index = {"kl": 0, "lm": 1}[loss]

    def with_gradients(found, states):
        value = found[index].sum()
        return [found[index].detach(), *torch.autograd.grad(value, states)]

    def double(readout):
        exact = SoftCappedHead(readout.head.weight.double())
        return Readout(readout.states.detach().double().requires_grad_(), exact)

    states = [readout.states for readout in readouts]
    ours = with_gradients(distances(teacher, readouts, labels, loss), states)
    whole = with_gradients(of_whole_logits(teacher, readouts, labels), states)
    exact_readouts = [double(readout) for readout in readouts]
    truth = with_gradients(
        of_whole_logits(double(teacher), exact_readouts, labels),
        [readout.states for readout in exact_readouts],
    )
    assert ours[0].dtype == torch.float32 and ours[1].dtype == torch.bfloat16
    for a, b, exact in zip(ours, whole, truth, strict=True):
        floor = 1e-6 * exact.norm()
        assert (a.double() - exact).norm() <= 2 * (b.double() - exact).norm() + floor


def test_the_teacher_is_evaluated_once_and_only_where_a_label_counts():
    teacher, readouts, labels = problem(2, 12, 30, 4, 3, 0)
    shared = teacher.head
    students = [Readout(readout.states, SoftCappedHead(shared.weight)) for readout in readouts]
    distances(teacher, students, labels)
    counted = int(losses.label_mask(labels).sum())
    assert 0 < counted < labels.numel() - 2
    assert [h.tokens for h in (shared, *(student.head for student in students))] == [counted] * 4


def test_without_gradient_nothing_is_kept():
    teacher, readouts, labels = problem(2, 12, 30, 4, 2, 0)
    with torch.no_grad():
        ours = distances(teacher, readouts, labels)
    assert not any(value.requires_grad for value in ours)
    for a, b in zip(ours, of_whole_logits(teacher, readouts, labels), strict=True):
        torch.testing.assert_close(a, b.detach())


def test_states_may_have_any_layout():
    teacher, readouts, labels = problem(2, 12, 30, 4, 1, 0)
    leaf = readouts[0].states.detach().transpose(0, 1).contiguous().requires_grad_()
    student = Readout(leaf.transpose(0, 1), readouts[0].head)
    found = [fn(teacher, [student], labels)[0].sum() for fn in (distances, of_whole_logits)]
    ours, expected = (torch.autograd.grad(kl, leaf)[0] for kl in found)
    assert expected.any()
    torch.testing.assert_close(ours, expected)


def test_states_without_gradient_get_none():
    teacher, (first, second), labels = problem(2, 12, 30, 4, 2, 0)
    second = Readout(second.states.detach(), second.head)
    ours = distances(teacher, [first, second], labels)
    expected = of_whole_logits(teacher, [first, second], labels)
    for a, b in zip(
        torch.autograd.grad(ours.kl.sum(), [first.states]),
        torch.autograd.grad(expected[0].sum(), [first.states]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_peak_memory_is_under_a_twentieth_of_whole_logits(monkeypatch):
    """At T 512, V 8192; the least chunk is lifted, since here it would hold half the tokens."""
    monkeypatch.setattr(head, "_LEAST_CHUNK_BYTES", 1)
    T, V, D = 512, 8192, 8
    teacher, readouts, labels = problem(1, T, V, D, 1, 0, torch.float32)
    labels.clamp_(min=0)

    def backward(kl):
        torch.autograd.grad(kl, readouts[0].states)

    chunked = peak_bytes(lambda: backward(distances(teacher, readouts, labels).kl[0]))
    whole = peak_bytes(lambda: backward(of_whole_logits(teacher, readouts, labels)[0][0]))
    assert whole > 4 * T * V * 4
    assert chunked < whole / 20

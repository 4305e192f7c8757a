"""KL and LM loss straight from residual states: norm, head and softmax over chunks of tokens.

Logits [T, V] of a long batch are the largest tensors of a step and five of them are alive in a
plain KL. Here they exist for one chunk of tokens at a time: the gradient with respect to the
states is computed in the forward, while a chunk's logits are there, and only [T, D] of it is kept.
One evaluation of the teacher serves every student. The head is frozen and gets no gradient.

liger-kernel's chunked distillation losses are not used: they compute a head gradient, take the
teacher anew for every student, sum KL over unlabelled tokens too, read a scalar on the host in the
backward, and know neither a norm nor a soft-cap before the softmax.

Shapes: T tokens, B sequences, S positions, D model width, V vocabulary, N students, C chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F

from tca_fast.losses import IGNORED_LABEL, accumulation_dtype

# A chunk is 1/16 of the tokens: then its four tensors [C, V] together are a quarter of one [T, V],
# of which a plain KL holds six or seven, and products with the head have enough rows to be fast.
# Chunks of few bytes would only cost calls.
_NUM_CHUNKS = 16
_LEAST_CHUNK_BYTES = 2**23


class Head(Protocol):
    """Final norm and output embedding of a frozen model, as `PartialRunner` has them."""

    vocab_size: int

    def logits(self, states_TD: Tensor) -> Tensor:
        """Logits [T, V] of residual states h_L, [T, D]."""


class Readout(NamedTuple):
    """A residual stream and what reads it.

    Attributes:
        states: h_L, before the final norm, [B, S, D].
        head: of the model whose layers ended in these states.
    """

    states: Tensor
    head: Head


class Distances(NamedTuple):
    """Sums over the counted positions, in nats (contract §3.1-3.2).

    Attributes:
        kl: KL(teacher || student) of every student, [N].
        lm: next-token cross-entropy of every student, [N].
        teacher_lm: that of the teacher, 0-d.
    """

    kl: Tensor
    lm: Tensor
    teacher_lm: Tensor


def distances(
    teacher: Readout,
    students: Sequence[Readout],
    labels_BS: Tensor,
    loss: Literal["kl", "lm"] = "kl",
) -> Distances:
    """KL and LM loss of several students against one teacher, without ever holding logits [T, V].

    Equals `losses.kl_sum` and `losses.lm_sum` of the logits, in one fixed order of summation. On a
    CPU only positions that count are evaluated; on other devices all are and the rest weigh 0,
    because choosing them would wait for the device.

    Args:
        teacher: the target; gets no gradient.
        students: models under training, whose states may require gradients.
        labels_BS: labels that say which positions count.
        loss: which of the two is differentiable; the other is a figure only.
    """
    differentiable = loss if torch.is_grad_enabled() else None
    heads = [student.head for student in students]
    states = [student.states for student in students]
    return Distances(*_ChunkedDistances.apply(teacher, heads, labels_BS, differentiable, *states))


class _ChunkedDistances(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        teacher: Readout,
        heads: Sequence[Head],
        labels_BS: Tensor,
        loss: Literal["kl", "lm"] | None,
        *states_BSD: Tensor,
    ) -> tuple[Tensor, ...]:
        wanted = [loss is not None and needed for needed in ctx.needs_input_grad[4:]]
        gradients = [
            torch.zeros_like(state, memory_format=torch.contiguous_format) if want else None
            for state, want in zip(states_BSD, wanted, strict=True)
        ]
        sums = []
        for chunk in _chunks(labels_BS, teacher.head.vocab_size):
            target = _Target(chunk, teacher)
            of_students = [
                target.distances(Readout(state, head), loss, gradient)
                for state, head, gradient in zip(states_BSD, heads, gradients, strict=True)
            ]
            sums.append(torch.stack([target.lm, *(d for pair in of_students for d in pair)]))
        totals = torch.stack(sums).sum(0)
        kl, lm, teacher_lm = totals[1::2].clone(), totals[2::2].clone(), totals[0].clone()
        ctx.loss = loss
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(
            teacher_lm, *(value for name, value in (("kl", kl), ("lm", lm)) if name != loss)
        )
        return kl, lm, teacher_lm

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_kl: Tensor, grad_lm: Tensor, _: Tensor) -> tuple[Any, ...]:
        upstream_N = (grad_kl if ctx.loss == "kl" else grad_lm).unbind()
        return (
            None,
            None,
            None,
            None,
            *(
                None if gradient is None else gradient * upstream
                for gradient, upstream in zip(ctx.saved_tensors, upstream_N, strict=True)
            ),
        )


class _Chunk(NamedTuple):
    """Some positions of the batch.

    Attributes:
        positions: int64 [C], into the B·S of the batch.
        next_tokens: int64 [C, 1], labels to be predicted there; 0 where nothing is.
        counted: bool [C].
    """

    positions: Tensor
    next_tokens: Tensor
    counted: Tensor

    def sum(self, values: Tensor) -> Tensor:
        """Sum of one value per position, [C], over those that count."""
        return torch.where(self.counted, values, 0.0).sum()

    def cross_entropy(self, log_probabilities: Tensor) -> Tensor:
        """LM loss, 0-d."""
        return self.sum(-log_probabilities.gather(1, self.next_tokens).squeeze(1))


def _chunks(labels_BS: Tensor, vocab_size: int) -> Iterator[_Chunk]:
    next_labels = F.pad(labels_BS[:, 1:], (0, 1), value=IGNORED_LABEL).flatten()
    counted = next_labels != IGNORED_LABEL
    positions = _positions(counted)
    least = _LEAST_CHUNK_BYTES // (4 * vocab_size)
    size = max(-(-len(positions) // _NUM_CHUNKS), least, 1)
    for part in positions.split(size):
        yield _Chunk(part, next_labels[part].clamp(min=0).unsqueeze(1), counted[part])


def _positions(counted: Tensor) -> Tensor:
    """Positions to evaluate: those that count where looking costs nothing, else all."""
    if counted.device.type == "cpu":
        return counted.nonzero().squeeze(1)
    return torch.arange(len(counted), device=counted.device)


class _Target:
    """The teacher's distribution over one chunk."""

    def __init__(self, chunk: _Chunk, teacher: Readout) -> None:
        self.chunk = chunk
        rows = teacher.states.flatten(0, 1)[chunk.positions]
        self.log_probabilities = _log_softmax(teacher.head.logits(rows))
        self.probabilities = self.log_probabilities.exp()
        self.lm = chunk.cross_entropy(self.log_probabilities)

    def distances(
        self, student: Readout, loss: Literal["kl", "lm"] | None, gradient_BSD: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """KL and LM loss of a student; writes the gradient of `loss` at these positions."""
        chunk = self.chunk
        rows = student.states.detach().flatten(0, 1)[chunk.positions]
        with torch.set_grad_enabled(gradient_BSD is not None):
            logits = student.head.logits(rows.requires_grad_(gradient_BSD is not None))
        # The edge is all that the gradient needs of the logits; they are freed.
        dtype, edge = logits.dtype, get_gradient_edge(logits) if logits.requires_grad else None
        log_probabilities = _log_softmax(logits.detach())
        del logits
        # Not two sums of logarithms: a small KL would be lost between them.
        difference = self.log_probabilities - log_probabilities
        kl = chunk.sum(difference.mul_(self.probabilities).sum(-1))
        del difference
        lm = chunk.cross_entropy(log_probabilities)
        if edge is None or gradient_BSD is None:
            return kl, lm
        # d/d logits: softmax(student) - softmax(teacher) of KL, softmax - one-hot of LM.
        upstream = log_probabilities.exp_()
        if loss == "kl":
            upstream -= self.probabilities
        else:
            one_hot = torch.ones_like(chunk.next_tokens, dtype=upstream.dtype)
            upstream.scatter_add_(1, chunk.next_tokens, -one_hot)
        upstream *= chunk.counted.unsqueeze(1)
        (gradient,) = torch.autograd.grad(edge, rows, upstream.to(dtype))
        gradient_BSD.view(-1, gradient.shape[1]).index_copy_(0, chunk.positions, gradient)
        return kl, lm


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1, dtype=accumulation_dtype(logits))

"""Others' ways of doing our operations, and ours: how each is called.

Every call is made of the loaded module and the operation's tensors, and gives named results that
all ways of one operation have in common. What others need in another form (integer types, padded
rows) is made outside of the call, so that it is not timed.

Shapes: T tokens, D model width, F features, V vocabulary.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.losses import LinearHead
from tca_fast import ops
from tca_fast.bridging.head import Readout, distances

Tensors = dict[str, Tensor]
OURS = "tca_fast"


@dataclass(frozen=True)
class Peer:
    """Somebody's way of doing an operation.

    Attributes:
        name: in tables.
        call: made of the loaded module and the operation's tensors, gives named results.
        module: to be imported; None is torch alone.
        needs_cuda: whether its kernels run on CUDA devices only.
        needs_k: whether every token must have equally many active features.
    """

    name: str
    call: Callable[[Any, Tensors], Callable[[], Tensors]]
    module: str | None = None
    needs_cuda: bool = False
    needs_k: bool = False

    def absence(self, device: torch.device, k: int | None) -> str | None:
        """Why it is not run, None where it is."""
        if self.needs_k and k is None:
            return "every token must have equally many active features"
        if self.module is not None:
            try:
                importlib.import_module(self.module)
            except ImportError as error:
                return f"{self.module.split('.')[0]} cannot be imported ({error})"
        if self.needs_cuda and device.type != "cuda":
            return "its kernels need a CUDA device"
        return None

    def make(self, tensors: Tensors) -> Callable[[], Tensors]:
        """What is timed."""
        module = None if self.module is None else importlib.import_module(self.module)
        return self.call(module, tensors)


def _leaves(tensors: Tensors, *names: str) -> list[Tensor]:
    return [tensors[name].detach().clone().requires_grad_() for name in names]


def _decoded(y: Callable[[Tensor, Tensor], Tensor], tensors: Tensors) -> Callable[[], Tensors]:
    """y and the gradients of activations and decoder."""
    value, W_dec = _leaves(tensors, "value", "W_dec")

    def run() -> Tensors:
        output = y(value, W_dec)
        dvalue, dW_dec = torch.autograd.grad(output, [value, W_dec], tensors["grad_y"])
        return {"y": output.detach(), "dvalue": dvalue, "dW_dec": dW_dec}

    return run


def _ours_decode(_: None, given: Tensors) -> Callable[[], Tensors]:
    F_ = len(given["W_dec"])

    def y(value: Tensor, W_dec: Tensor) -> Tensor:
        return ops.decode(ops.ActiveFeatures(given["row_ptr"], given["feature"], value, F_), W_dec)

    return _decoded(y, given)


def dense_decode(_: None, given: Tensors) -> Callable[[], Tensors]:
    """The dense product; its time includes writing the activations out as [T, F]."""

    def y(value: Tensor, W_dec: Tensor) -> Tensor:
        T = len(given["row_ptr"]) - 1
        place = (given["token"], given["feature"].long())
        return value.new_zeros(T, len(W_dec)).index_put(place, value) @ W_dec

    return _decoded(y, given)


def _embedding_bag(_: None, given: Tensors) -> Callable[[], Tensors]:
    # Indices and offsets of one dtype; made outside of the measured time.
    feature, offsets = given["feature"].long(), given["row_ptr"][:-1]

    def y(value: Tensor, W_dec: Tensor) -> Tensor:
        return F.embedding_bag(feature, W_dec, offsets, mode="sum", per_sample_weights=value)

    return _decoded(y, given)


def _sparsify_decode(module: Any, given: Tensors) -> Callable[[], Tensors]:
    T = len(given["row_ptr"]) - 1
    feature = given["feature"].long().view(T, -1)

    def y(value: Tensor, W_dec: Tensor) -> Tensor:
        return module.decoder_impl(feature, value.view(T, -1), W_dec.mT)

    return _decoded(y, given)


def _encoded(
    features: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]], given: Tensors
) -> Callable[[], Tensors]:
    """Activations and the gradients of x and the encoder; gives values and their places."""
    leaves = _leaves(given, "x", "W_enc", "b_enc")
    T, N = len(given["x"]), len(given["W_enc"])

    def run() -> Tensors:
        value, place = features(*leaves)
        upstream = given["grad_features"].flatten()[place]
        gradients = torch.autograd.grad(value, leaves, upstream)
        dense = value.new_zeros(T * N).index_put((place,), value.detach())
        names = ("dx", "dW_enc", "db_enc")
        return {"features": dense.view(T, N), **dict(zip(names, gradients, strict=True))}

    return run


def _places(token: Tensor, feature: Tensor, num_features: int) -> Tensor:
    return token * num_features + feature


def _ours_encode(_: None, given: Tensors) -> Callable[[], Tensors]:
    k, N = int(given["k"]), len(given["W_enc"])
    rows = torch.arange(len(given["x"]), device=given["x"].device).repeat_interleave(k)

    def features(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> tuple[Tensor, Tensor]:
        active = ops.encode(x, W_enc, b_enc, k=k)
        # At these biases more than k are positive for every token, so all places are taken.
        return active.value, _places(rows, active.feature.long(), N)

    return _encoded(features, given)


def torch_topk(_: None, given: Tensors) -> Callable[[], Tensors]:
    """The dense product and torch.topk, whose gradients are scattered into [T, F]."""
    k, N = int(given["k"]), len(given["W_enc"])
    rows = torch.arange(len(given["x"]), device=given["x"].device).unsqueeze(1)

    def features(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> tuple[Tensor, Tensor]:
        value, index = F.linear(x, W_enc, b_enc).relu().topk(k, dim=1, sorted=False)
        return value.flatten(), _places(rows, index, N).flatten()

    return _encoded(features, given)


def _sparsify_encode(module: Any, given: Tensors) -> Callable[[], Tensors]:
    k, N = int(given["k"]), len(given["W_enc"])
    rows = torch.arange(len(given["x"]), device=given["x"].device).unsqueeze(1)

    def features(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> tuple[Tensor, Tensor]:
        output = module.fused_encoder(x, W_enc, b_enc, k, "topk")
        return output.top_acts.flatten(), _places(rows, output.top_indices, N).flatten()

    return _encoded(features, given)


_SPARSIFY = "EleutherAI sparsify"
DECODERS = [
    Peer(OURS, _ours_decode),
    Peer("dense", dense_decode),
    Peer("torch embedding_bag", _embedding_bag),
    Peer(_SPARSIFY, _sparsify_decode, "sparsify.utils", needs_cuda=True, needs_k=True),
]
ENCODERS = [
    Peer(OURS, _ours_encode, needs_k=True),
    Peer("dense, torch.topk", torch_topk, needs_k=True),
    Peer(_SPARSIFY, _sparsify_encode, "sparsify.fused_encoder", needs_k=True),
]


def _liger(module: Any, given: Tensors) -> Callable[[], Tensors]:
    # Generalised Jensen-Shannon divergence at beta 0 is KL(teacher || student), its mean.
    loss = module.LigerFusedLinearJSD(jsd_beta=0.0)
    head, teacher = given["head"], given["teacher"]
    (states,) = _leaves(given, "states")

    def run() -> Tensors:
        kl = loss(states, head, teacher, head, None)
        return {"kl": kl.detach(), "dstates": torch.autograd.grad(kl, states)[0]}

    return run


def _fla(module: Any, given: Tensors) -> Callable[[], Tensors]:
    loss = module.FusedKLDivLoss()
    head, teacher = given["head"], given["teacher"]
    (states,) = _leaves(given, "states")

    def run() -> Tensors:
        kl = loss(states, teacher, head, head)
        return {"kl": kl.detach(), "dstates": torch.autograd.grad(kl, states)[0]}

    return run


def _ours_kl(_: None, given: Tensors) -> Callable[[], Tensors]:
    head = LinearHead(given["head"])
    (states,) = _leaves(given, "states")
    labels = torch.zeros(1, len(states) + 1, dtype=torch.int64, device=states.device)
    pad = torch.zeros_like(given["teacher"][:1])  # the last position predicts nothing
    teacher = Readout(torch.cat([given["teacher"], pad]).unsqueeze(0), head)

    def run() -> Tensors:
        student = Readout(torch.cat([states, pad]).unsqueeze(0), head)
        kl = distances(teacher, [student], labels).kl[0] / len(states)
        return {"kl": kl.detach(), "dstates": torch.autograd.grad(kl, states)[0]}

    return run


def whole_kl(_: None, given: Tensors) -> Callable[[], Tensors]:
    """KL by logits [T, V] of both models."""
    (states,) = _leaves(given, "states")

    def run() -> Tensors:
        student, teacher = (
            (state @ given["head"].T).log_softmax(-1, dtype=_wide(state))
            for state in (states, given["teacher"])
        )
        kl = (teacher.exp() * (teacher - student)).sum(-1).mean()
        return {"kl": kl.detach(), "dstates": torch.autograd.grad(kl, states)[0]}

    return run


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


_LIGER = "liger_kernel.transformers"
LOSSES = [
    Peer(OURS, _ours_kl),
    Peer("whole logits", whole_kl),
    Peer("liger fused linear JSD", _liger, _LIGER, needs_cuda=True),
    Peer("FLA fused KL", _fla, "fla.modules", needs_cuda=True),
]

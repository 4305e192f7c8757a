"""Layers of the tests on a device, and the dense arithmetic that they are held to.

Shapes: T tokens, D model width, F features.
"""

import importlib.util
import os
from dataclasses import dataclass

import pytest
import torch

from tca_fast import ops, registry

ON_CUDA = torch.cuda.is_available() and not os.environ.get("TRITON_INTERPRET")
if not ON_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the first kernel is called
DEVICE = torch.device("cuda" if ON_CUDA else "cpu")
needs_cuda = pytest.mark.skipif(not ON_CUDA, reason="needs a CUDA device")
# The interpreter cuts numbers off when it stores them as bfloat16.
DTYPES = [torch.bfloat16, torch.float16, torch.float32] if ON_CUDA else [torch.float32]
SHAPES = [(8192, 3584, 8192), (10_000, 1536, 8192), (257, 100, 8191)] if ON_CUDA else [(9, 8, 40)]
RUNS = 20 if ON_CUDA else 2

# Those that are written for speed; the reference waits for the device and says so.
FUSED = [name for name in registry.cuda_backends() if name != "reference"]
if not ON_CUDA:
    FUSED = ["triton"] if "triton" in FUSED else []
    if importlib.util.find_spec("tca_fast._C"):
        FUSED.append("cpp")
BACKENDS = ["reference", *FUSED]


@dataclass(frozen=True)
class Layer:
    """One layer whose features fire at a given mean number for each token."""

    T: int
    D: int
    F: int
    l0: float
    dtype: torch.dtype
    k: int | None = None
    hot: bool = False

    def tensors(self, seed=0):
        generator = torch.Generator(DEVICE).manual_seed(seed)

        def normal(*shape, scale=1.0):
            numbers = torch.randn(shape, generator=generator, device=DEVICE) * scale
            return numbers.to(self.dtype)

        quantile = torch.special.ndtri(torch.tensor(self.l0 / self.F, dtype=torch.float64))
        b_enc = torch.full((self.F,), float(quantile), device=DEVICE, dtype=self.dtype)
        if self.hot:
            b_enc[self.F // 2] = 6
        T, D, F = self.T, self.D, self.F
        weights = [normal(T, D), normal(T, D), normal(F, D, scale=D**-0.5), b_enc]
        return [*weights, normal(F, D, scale=0.05), normal(D, scale=0.05)]

    def mask(self):
        return torch.arange(self.T, device=DEVICE) % 7 > 0


def dense(k, x, mlp_out, W_enc, b_enc, W_dec, b_dec, mask):
    """The layer as the published code computes it."""
    features = torch.nn.functional.linear(x, W_enc, b_enc)
    if k is not None:
        kept = features.topk(k, dim=1).indices
        features = torch.zeros_like(features).scatter(1, kept, features.gather(1, kept))
    features = features.relu()
    y = mlp_out + torch.nn.functional.linear(features, W_dec.T, b_dec)
    return y, (features * W_dec.norm(dim=1)).sum(1)[mask].sum(), features


def differentiate(function, tensors, dtype):
    """(y, l1, gradients of all tensors) under one random upstream gradient."""
    inputs = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    y, l1 = function(*inputs)
    generator = torch.Generator(DEVICE).manual_seed(1)
    upstream = torch.randn(y.shape, generator=generator, device=DEVICE).to(tensors[0].dtype)
    upstreams = [upstream.to(dtype), torch.full_like(l1, 1e-3)]
    grads = torch.autograd.grad([y, l1], inputs, upstreams, materialize_grads=True)
    return [y.detach(), l1.detach(), *grads]


def adapter(layer, capacity=None):
    """Ours, with room for `capacity` active features, or as many as are expected."""

    def run(*tensors):
        if capacity is None:
            output = ops.adapter(
                *tensors,
                k=layer.k,
                token_mask=layer.mask(),
                expected_density=layer.l0 / layer.F,
            )
            return output.y, output.l1
        return registry.operator("adapter")(*tensors, None, layer.mask(), layer.k, capacity)[:2]

    return run


def separate(layer):
    """Ours by `encode` and `decode`, and the sum of the activations in the place of L1."""

    def run(x, mlp_out, W_enc, b_enc, W_dec, b_dec):
        active = ops.encode(x, W_enc, b_enc, k=layer.k).trim()
        return mlp_out + ops.decode(active, W_dec, b_dec), active.value.sum()

    return run


def dense_separate(layer):
    """The same by dense products."""

    def run(*tensors):
        y, _, features = dense(layer.k, *tensors, layer.mask())
        return y, features.sum()

    return run


def dense_adapter(layer):
    """The layer by dense products."""
    return lambda *tensors: dense(layer.k, *tensors, layer.mask())[:2]


def check(layer, ours, theirs):
    """At most twice the error of dense eager in the same dtype, in norm, plus one rounding."""
    tensors = layer.tensors()
    found = differentiate(ours, tensors, layer.dtype)
    eager = differentiate(theirs, tensors, layer.dtype)
    truth = differentiate(theirs, tensors, torch.float64)
    names = ["y", "l1", "dx", "dmlp_out", "dW_enc", "db_enc", "dW_dec", "db_dec"]
    for name, one, other, exact in zip(names, found, eager, truth, strict=True):
        size = exact.norm().clamp(min=1e-30)
        error = ((one.double() - exact).norm() / size).item()
        allowed = 2 * ((other.double() - exact).norm() / size).item()
        allowed += torch.finfo(layer.dtype).eps
        assert error <= allowed, f"{name}: {error} > {allowed}"

"""The operators of one device against float64, and what only a real device can show.

Needs torch, Triton and pytest and nothing else: `python -m pytest --noconftest tests/device`. On a
CUDA device the shapes are the real ones; elsewhere the same tests run at small shapes in Triton's
interpreter, so that they cannot rot.

Shapes: T tokens, D model width, F features.
"""

import os
from dataclasses import dataclass

import pytest
import torch

from tca_fast import ops

ON_CUDA = torch.cuda.is_available()
if not ON_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the first kernel is called
DEVICE = torch.device("cuda" if ON_CUDA else "cpu")
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
needs_cuda = pytest.mark.skipif(not ON_CUDA, reason="needs a CUDA device")
# The interpreter cuts numbers off when it stores them as bfloat16.
DTYPES = [torch.bfloat16, torch.float16, torch.float32] if ON_CUDA else [torch.float32]
SHAPES = [(8192, 3584, 8192), (10_000, 1536, 8192), (257, 100, 8191)] if ON_CUDA else [(9, 8, 40)]
RUNS = 20 if ON_CUDA else 2


@pytest.fixture(autouse=True)
def _triton():
    with ops.backend("triton"):
        yield


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
    grads = torch.autograd.grad([y, l1], inputs, [upstream.to(dtype), torch.full_like(l1, 1e-3)])
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
        operator = torch.ops.tca_fast_triton.adapter
        return operator(*tensors, None, layer.mask(), layer.k, capacity)[:2]

    return run


def check(layer, capacity=None):
    """At most twice the error of dense eager in the same dtype, in norm, plus one rounding."""
    tensors = layer.tensors()
    found = differentiate(adapter(layer, capacity), tensors, layer.dtype)

    def eager(*inputs):
        return dense(layer.k, *inputs, layer.mask())[:2]

    theirs = differentiate(eager, tensors, layer.dtype)
    truth = differentiate(eager, tensors, torch.float64)
    names = ["y", "l1", "dx", "dmlp_out", "dW_enc", "db_enc", "dW_dec", "db_dec"]
    for name, ours, other, exact in zip(names, found, theirs, truth, strict=True):
        size = exact.norm().clamp(min=1e-30)
        error = ((ours.double() - exact).norm() / size).item()
        allowed = 2 * ((other.double() - exact).norm() / size).item()
        assert error <= allowed + torch.finfo(layer.dtype).eps, f"{name}: {error} > {allowed}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.0002, 0.0012, 0.008, 0.5])
def test_every_density(shape, share, dtype):
    check(Layer(*shape, share * shape[2], dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_feature_hot_for_every_token(dtype):
    check(Layer(*SHAPES[0], 0.002 * SHAPES[0][2], dtype, hot=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 32, 64, 512] if ON_CUDA else [3])
def test_topk(k, dtype):
    """Ties between rounded pre-activations may be kept by either side: float32 has hardly any."""
    if dtype.itemsize == 4:
        check(Layer(*SHAPES[0], SHAPES[0][2] / 2, dtype, k))
    layer = Layer(*SHAPES[0], SHAPES[0][2] / 2, dtype, k)
    x, _, W_enc, b_enc, _, _ = layer.tensors()
    z = torch.addmm(b_enc, x, W_enc.T)
    active = ops.encode(x, W_enc, b_enc, k=k).trim()
    order = z.float().argsort(dim=1, descending=True, stable=True)[:, :k]
    expected = torch.zeros_like(z).scatter(1, order, z.gather(1, order)).relu()
    assert torch.equal(active.to_dense(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("room", [0.0, 0.5, 0.99])
def test_an_overflow_drops_nothing(room, dtype):
    layer = Layer(*SHAPES[-1], 0.01 * SHAPES[-1][2], dtype)
    check(layer, int(room * layer.T * layer.l0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.0012, 0.5])
def test_the_same_bits_in_every_run(share, dtype):
    layer = Layer(*SHAPES[0], share * SHAPES[0][2], dtype, hot=True)
    tensors = layer.tensors()
    first = differentiate(adapter(layer), tensors, dtype)
    for _ in range(RUNS - 1):
        again = differentiate(adapter(layer), tensors, dtype)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_unwritten_memory_is_never_read():
    layer = Layer(*SHAPES[0], 0.0012 * SHAPES[0][2], DTYPES[0])
    tensors = layer.tensors()
    expected = differentiate(adapter(layer), tensors, DTYPES[0])
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    try:
        poisoned = differentiate(adapter(layer), tensors, DTYPES[0])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(expected, poisoned, strict=True))


@needs_cuda
@pytest.mark.parametrize(("share", "k"), [(0.0012, None), (0.5, None), (0.5, 32), (0.5, 64)])
def test_nothing_waits_for_the_device(share, k):
    layer = Layer(*SHAPES[0], share * SHAPES[0][2], torch.bfloat16, k)
    tensors = layer.tensors()
    differentiate(adapter(layer), tensors, torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        differentiate(adapter(layer), tensors, torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.parametrize("k", [None, 32])
def test_a_captured_step_is_exact_when_the_density_changes(k):
    """Replayed with inputs that fit, that overflow, and that fit again."""
    layer = Layer(2048, 1536, 8192, 8, torch.bfloat16, k)
    tensors = [tensor.requires_grad_() for tensor in layer.tensors()]
    upstream = torch.randn_like(tensors[0])
    operator = torch.ops.tca_fast_triton.adapter
    capacity = layer.T * 16

    def step():
        y, l1, *_ = operator(*tensors, None, layer.mask(), k, capacity)
        grads = torch.autograd.grad([y, l1], tensors, [upstream, torch.ones_like(l1)])
        return [y, l1, *grads]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for shift in (0.0, 2.0, 0.0):
        with torch.no_grad():
            tensors[3] += shift
        graph.replay()
        found = [tensor.clone() for tensor in captured]
        for ours, again in zip(found, step(), strict=True):
            assert torch.equal(ours, again)
        with torch.no_grad():
            tensors[3] -= shift


@needs_cuda
def test_more_pairs_than_32_bits_can_count():
    T, F = 33_000, 65_536
    layer = Layer(T, 64, F, 4, torch.bfloat16)
    found = differentiate(adapter(layer), layer.tensors(), torch.bfloat16)
    assert all(tensor.isfinite().all() for tensor in found)
    last = [tensor[-512:] if len(tensor) == T else tensor for tensor in layer.tensors()]
    y = dense(None, *last, layer.mask()[-512:])[0]
    torch.testing.assert_close(found[0][-512:], y, atol=0.1, rtol=0.05)


@needs_cuda
def test_counts_reach_the_host_a_step_late():
    from tca_fast.density import DensityObserver

    observer = DensityObserver()
    for count in range(40):
        observer.observe(torch.tensor(count, device="cuda"), 1000)
    torch.cuda.synchronize()
    assert 0 < observer.take() <= 0.039

"""What only running on a device can show: bits, memory, waiting, graphs, and what PyTorch checks.

As tests/device/test_operators.py, for the backends that are written for speed.
"""

import pytest
import torch
from device_layers import (
    DTYPES,
    FUSED,
    ON_CUDA,
    RUNS,
    SHAPES,
    Layer,
    adapter,
    check,
    dense_adapter,
    differentiate,
    needs_cuda,
)

from tca_fast import ops, registry

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")


@pytest.fixture(autouse=True, params=FUSED)
def _backend(request):
    with ops.backend(request.param):
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.0012, 0.5])
def test_the_same_bits_in_every_run(share, dtype):
    layer = Layer(*SHAPES[0], share * SHAPES[0][2], dtype, hot=True)
    tensors = layer.tensors()
    first = differentiate(adapter(layer), tensors, dtype)
    for _ in range(RUNS - 1):
        again = differentiate(adapter(layer), tensors, dtype)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(("share", "k"), [(0.0012, None), (0.5, None), (0.5, 3)])
def test_unwritten_memory_is_never_read(share, k):
    layer = Layer(*SHAPES[0], share * SHAPES[0][2], DTYPES[0], k)
    tensors = layer.tensors()
    expected = differentiate(adapter(layer), tensors, DTYPES[0])
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    try:
        poisoned = differentiate(adapter(layer), tensors, DTYPES[0])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(expected, poisoned, strict=True))


@pytest.mark.parametrize("room", [1.0, 0.5, 2.0] if ON_CUDA else [0.5])
def test_opcheck(room):
    """Schema, shape rule, gradient and dispatch of the operators, by PyTorch's own checks."""
    layer = Layer(5, 16, 24, 6, torch.float32) if ON_CUDA else Layer(3, 2, 4, 2, torch.float32)
    tensors = [tensor.requires_grad_() for tensor in layer.tensors()]
    x, _, W_enc, b_enc, W_dec, b_dec = tensors
    capacity = int(room * layer.T * layer.l0)
    arguments = (*tensors, None, layer.mask(), None, capacity)
    torch.library.opcheck(registry.operator("adapter"), arguments)
    encode = registry.operator("encode")
    torch.library.opcheck(encode, (x, W_enc, b_enc, 2, 2 * layer.T))
    value, row_ptr, feature = encode(x, W_enc, b_enc, 2, 2 * layer.T)
    packed = (row_ptr, feature, value.detach().requires_grad_())
    torch.library.opcheck(registry.operator("decode"), (*packed, W_dec, b_dec, None))


@pytest.mark.parametrize(("k", "room"), [(None, 2.0), (None, 0.5), (5, 0.0)])
def test_under_the_sanitizer(k, room):
    """Small enough for compute-sanitizer, with sizes that no block divides; overflow included."""
    T, D, F = (67, 90, 301) if ON_CUDA else (5, 9, 33)
    layer = Layer(T, D, F, 6 if k is None else F / 2, DTYPES[0], k)
    capacity = int(room * layer.T * layer.l0) if k is None else layer.T * k
    check(layer, adapter(layer, capacity), dense_adapter(layer))


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
    operator = registry.operator("adapter")
    capacity = layer.T * 16 if k is None else layer.T * k

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
def test_counts_reach_the_host_a_step_late():
    from tca_fast.density import DensityObserver

    observer = DensityObserver()
    for count in range(40):
        observer.observe(torch.tensor(count, device="cuda"), 1000)
    torch.cuda.synchronize()
    assert 0 < observer.take() <= 0.039

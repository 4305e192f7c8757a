"""The operators of one device against float64, by every backend that is there.

Needs torch and pytest and nothing else: `python -m pytest --noconftest tests/device`. On a CUDA
device the shapes are the real ones; elsewhere the same tests run at small shapes, Triton's kernels
in its interpreter, so that they cannot rot.
"""

import pytest
import torch
from device_layers import (
    BACKENDS,
    DEVICE,
    DTYPES,
    ON_CUDA,
    SHAPES,
    Layer,
    adapter,
    check,
    dense,
    dense_adapter,
    dense_separate,
    differentiate,
    needs_cuda,
    separate,
)

from tca_fast import ops

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")


@pytest.fixture(autouse=True, params=BACKENDS)
def _backend(request):
    with ops.backend(request.param):
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.0002, 0.0012, 0.008, 0.5])
def test_every_density(shape, share, dtype):
    layer = Layer(*shape, share * shape[2], dtype)
    check(layer, adapter(layer), dense_adapter(layer))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[-2:])
@pytest.mark.parametrize("share", [0.0012, 0.05])
def test_encode_and_decode_by_themselves(shape, share, dtype):
    layer = Layer(*shape, share * shape[2], dtype)
    check(layer, separate(layer), dense_separate(layer))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_feature_hot_for_every_token(dtype):
    layer = Layer(*SHAPES[0], 0.002 * SHAPES[0][2], dtype, hot=True)
    check(layer, adapter(layer), dense_adapter(layer))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 32, 64, 512] if ON_CUDA else [3])
def test_topk(k, dtype):
    """Ties between rounded pre-activations may be kept by either side: float32 has hardly any."""
    layer = Layer(*SHAPES[0], SHAPES[0][2] / 2, dtype, k)
    if dtype.itemsize == 4:
        check(layer, adapter(layer), dense_adapter(layer))
    # Whole numbers: sums are exact in any order, so ties are ties for every backend.
    generator = torch.Generator(DEVICE).manual_seed(0)
    T, D, F = SHAPES[0]
    x = torch.randint(-1, 2, (T, D), generator=generator, device=DEVICE).to(dtype)
    W_enc = torch.randint(-1, 2, (F, D), generator=generator, device=DEVICE).to(dtype)
    b_enc = torch.zeros(F, device=DEVICE, dtype=dtype)
    z = (x.float() @ W_enc.float().T).to(dtype)
    active = ops.encode(x, W_enc, b_enc, k=k).trim()
    order = z.float().argsort(dim=1, descending=True, stable=True)[:, :k]
    expected = torch.zeros_like(z).scatter(1, order, z.gather(1, order)).relu()
    assert torch.equal(active.to_dense(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("room", [0.0, 0.5, 0.99])
def test_an_overflow_drops_nothing(room, dtype):
    layer = Layer(*SHAPES[-1], 0.01 * SHAPES[-1][2], dtype)
    capacity = int(room * layer.T * layer.l0)
    check(layer, adapter(layer, capacity), dense_adapter(layer))


@needs_cuda
def test_more_pairs_than_32_bits_can_count():
    T, F = 33_000, 65_536
    layer = Layer(T, 64, F, 4, torch.bfloat16)
    found = differentiate(adapter(layer), layer.tensors(), torch.bfloat16)
    assert all(tensor.isfinite().all() for tensor in found)
    last = [tensor[-512:] if len(tensor) == T else tensor for tensor in layer.tensors()]
    y = dense(None, *last, layer.mask()[-512:])[0]
    torch.testing.assert_close(found[0][-512:], y, atol=0.1, rtol=0.05)

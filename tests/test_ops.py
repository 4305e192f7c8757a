"""Operators against torch's own checks, and the properties that no random case shows."""

import pytest
import torch
from operator_cases import check_large_gain_in_half_precision, gradients, raw, weights
from tiny import dense_adapter

from tca_fast import AdapterConfig, ops
from tca_fast.adapter import TranscoderAdapter
from tca_fast.errors import UserError

T, D, F = 7, 5, 11
pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("k", [None, 3])
def test_statistics(k):
    x, mlp_out, W_enc, b_enc, W_dec, b_dec = weights(grad=False)
    mask = torch.tensor([1, 0, 1, 1, 0, 1, 1]).bool()
    output = ops.adapter(x, mlp_out, W_enc, b_enc, W_dec, b_dec, k=k, token_mask=mask)
    features = dense_adapter(x, mlp_out, W_enc, b_enc, W_dec, b_dec, k=k)[2]
    assert torch.equal(output.l0, (features > 0).sum(1, dtype=torch.int32) * mask)
    assert output.fired.tolist() == (features[mask] > 0).any(0).tolist()


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("capacity", [T * F, 2], ids=["fits", "overflows"])
def test_gradcheck_and_opcheck(k, capacity):
    """The overflow path recomputes in the backward and must have the same gradients."""
    tensors = weights()
    gain, mask = torch.randn(F, dtype=torch.float64), torch.arange(T) % 3 > 0
    adapter = raw("adapter")
    assert torch.autograd.gradcheck(lambda *a: adapter(*a, gain, mask, k, capacity)[:2], tensors)
    torch.library.opcheck(adapter, (*tensors, gain, mask, k, capacity))
    torch.library.opcheck(adapter, (*tensors[:5], None, None, None, k, capacity))


@pytest.mark.parametrize("k", [None, 3])
def test_gradcheck_and_opcheck_of_encode_and_decode(k):
    x, _, W_enc, b_enc, W_dec, b_dec = weights()
    encode, decode = raw("encode"), raw("decode")
    capacity = T * F
    assert torch.autograd.gradcheck(lambda *a: encode(*a, k, capacity)[0], (x, W_enc, b_enc))
    torch.library.opcheck(encode, (x, W_enc, b_enc, k, capacity))
    value, row_ptr, feature = encode(x, W_enc, b_enc, k, capacity)
    value, gain = value.detach().requires_grad_(), torch.randn(F, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda v, W, b: decode(row_ptr, feature, v, W, b, gain), (value, W_dec, b_dec)
    )
    torch.library.opcheck(decode, (row_ptr, feature, value, W_dec, b_dec, gain))


@pytest.mark.parametrize("k", [None, 3])
def test_encode_then_decode_is_the_adapter(k):
    x, mlp_out, W_enc, b_enc, W_dec, b_dec = weights(grad=False)
    active = ops.encode(x, W_enc, b_enc, k=k)
    assert torch.equal(active.counts(), (active.to_dense() > 0).sum(1))
    fused = ops.adapter(x, mlp_out, W_enc, b_enc, W_dec, b_dec, k=k).y
    torch.testing.assert_close(mlp_out + ops.decode(active, W_dec, b_dec), fused)


def test_compiles_without_graph_breaks():
    tensors = weights(dtype=torch.float32)

    def function(x, mlp_out, W_enc, b_enc, W_dec, b_dec):
        output = ops.adapter(x, mlp_out, W_enc, b_enc, W_dec, b_dec, k=3)
        active = ops.encode(x, W_enc, b_enc)
        return output.y.square().sum() + output.l1 + ops.decode(active, W_dec).square().sum()

    eager = gradients([function(*tensors)], tensors)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients([compiled(*tensors)], tensors), eager, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks_on_devices_that_choose_a_regime(dynamic):
    """As on CUDA: any device but a CPU is asked from which density on dense products win."""
    torch.compiler.reset()
    config = AdapterConfig(num_features=F, decoder_bias=True)
    compiled = torch.compile(
        TranscoderAdapter(D, config, device="meta"),
        fullgraph=True, backend="eager", dynamic=dynamic,
    )  # fmt: skip
    for tokens in (T, T + 2):
        x = torch.empty(1, tokens, D, device="meta")
        assert compiled(x, x).y.shape == x.shape


@pytest.mark.parametrize(("crossover", "room"), [(0.0, 8192), (0.01, 164), (1.0, 512)])
def test_without_gradients_a_device_that_chooses_expects_few_features(crossover, room, monkeypatch):
    """Room for all pairs is the dense regime, which reads the whole decoder for every token."""
    monkeypatch.setattr(ops, "dense_share", lambda *shape: crossover)
    x = torch.empty(3, 8, device="meta")
    assert ops._capacity(x, 8192, None, None) == 3 * 8192
    with torch.no_grad():
        assert ops._capacity(x, 8192, None, None) == 3 * room
        assert ops._capacity(x, 8192, 5, None) == 3 * 5
        # What was observed counts as it does with gradients.
        assert ops._capacity(x, 8192, None, 0.5) == 3 * 8192


def test_ablating_a_feature_subtracts_exactly_its_row():
    x, mlp_out, W_enc, b_enc, W_dec, b_dec = weights(grad=False)
    features = ops.encode(x, W_enc, b_enc).to_dense()
    gain = torch.ones(F, dtype=torch.float64)
    gain[4] = 0
    whole = ops.adapter(x, mlp_out, W_enc, b_enc, W_dec, b_dec).y
    ablated = ops.adapter(x, mlp_out, W_enc, b_enc, W_dec, b_dec, gain=gain).y
    torch.testing.assert_close(whole - ablated, features[:, 4:5] * W_dec[4])


ROWS = {
    "random": lambda noise: noise,
    "ties": lambda noise: (2 * noise).round(),
    "all equal": lambda noise: torch.ones_like(noise),
    "none positive": lambda noise: -noise.abs(),
    "few positive": lambda noise: torch.where(noise > 2.5, noise, -1.0),
    "ascending": lambda noise: noise.sort().values,
    "tiny": lambda noise: noise * torch.finfo(noise.dtype).tiny,
    "huge": lambda noise: (noise * torch.finfo(noise.dtype).max).nan_to_num(),
    "infinite": lambda noise: torch.where(noise > 2, torch.inf, noise),
    "not a number": lambda noise: torch.where(noise.abs() > 2.9, torch.nan, noise),
}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("k", [1, 7, 62, 63])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_topk_of_a_long_row(row, k, dtype):
    """The K largest by value, of equal ones the first, in whatever order they come."""
    num_features = 2011
    generator = torch.Generator().manual_seed(k)
    z = ROWS[row](torch.randn(num_features, generator=generator).to(dtype))
    zero = torch.zeros(num_features, dtype=dtype)
    active = ops.encode(torch.ones(1, 1, dtype=dtype), z.unsqueeze(1), zero, k=k).trim()
    kept = sorted(z.argsort(descending=True, stable=True)[:k].tolist())
    expected = [f for f in kept if not z[f] <= 0]
    assert active.feature.tolist() == expected
    assert torch.equal(active.value.nan_to_num(), z[expected].nan_to_num())


@pytest.mark.parametrize("shift", [-1.5, 3.0], ids=["sparse", "dense"])
@pytest.mark.parametrize("leading", [(1, 6), (2, 1, 3)], ids=str)
def test_a_batch_is_its_tokens_in_the_shape_of_the_batch(leading, shift):
    """Output and gradients, to the bit; and without a backward to keep anything for, the same."""
    tensors = weights(T=6, D=8, F=40, dtype=torch.float32)
    with torch.no_grad():
        tensors[3] += shift
    batch = [t.unflatten(0, leading) for t in tensors[:2]]
    by_token, batched = ops.adapter(*tensors), ops.adapter(*batch, *tensors[2:])
    assert batched.y.shape == (*leading, 8)
    both = [gradients([output.y, output.l1], tensors) for output in (by_token, batched)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*both, strict=True))
    with torch.no_grad():
        unkept = ops.adapter(*batch, *tensors[2:])
    for ours, whole, flat in zip(unkept, batched, by_token, strict=True):
        assert torch.equal(ours, whole) and torch.equal(whole.view(flat.shape), flat)


@pytest.mark.parametrize("room", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("grad_y", [1e-3, 6e4])
def test_a_large_gain_in_half_precision_does_not_overflow_in_between(room, grad_y):
    check_large_gain_in_half_precision(room, grad_y)


def test_nan_is_not_hidden():
    """A NaN in the input is active, reaches the output and the L1, in its own row only."""
    x, mlp_out, W_enc, b_enc, W_dec, b_dec = weights(grad=False)
    x[2, 0] = torch.nan
    output = ops.adapter(x, mlp_out, W_enc, b_enc, W_dec, b_dec)
    assert output.y[2].isnan().all() and output.l1.isnan() and output.l0[2] == F
    assert not output.y[[0, 1, 3, 4, 5, 6]].isnan().any()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("k", [None, 3])
def test_not_finite_values_propagate_as_in_dense_arithmetic(value, k):
    tensors = weights(grad=False)
    tensors[0][2, 1] = value
    output = ops.adapter(*tensors, k=k)
    y, l1, _ = dense_adapter(*tensors, k=k) if k is None else (output.y, output.l1, None)
    torch.testing.assert_close(output.y, y, equal_nan=True)
    torch.testing.assert_close(output.l1, l1, equal_nan=True)
    assert not output.y[2].isfinite().all()


def check_reproducible(shift, settings):
    """Bitwise equal results over (threads, expected density), one feature firing always."""
    tensors = weights(T=1300, D=40, F=100, dtype=torch.float32)
    with torch.no_grad():
        tensors[2] *= 40**-0.5
        tensors[3] += shift
        tensors[3][7] = 50
    threads = torch.get_num_threads()
    product, results = None, []
    for num_threads, density in settings:
        torch.set_num_threads(num_threads)
        vendor = tensors[0] @ tensors[2].T
        if product is None or torch.equal(vendor, product):
            product = vendor
            output = ops.adapter(*tensors, expected_density=density)
            results.append([output.y, output.l1, *gradients([output.y, output.l1], tensors)])
    torch.set_num_threads(threads)
    assert len(results) > 1
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("shift", [-5.0, 0.0], ids=["sparse", "dense"])
def test_results_do_not_depend_on_the_room_reserved(shift):
    check_reproducible(shift, [(1, density) for density in (None, 0.0, 0.5, 1.0, 0.02)])


def test_results_do_not_depend_on_the_number_of_threads(backend):
    """Where the vendor's encoder product does not; the reference is made of vendor products."""
    if backend != "reference":
        check_reproducible(-5.0, [(threads, None) for threads in (1, 2, 3, 5, 8)])


def test_unwritten_memory_is_never_read():
    """Fresh memory is filled with NaN, so a row that a kernel leaves out would show."""
    tensors = weights(T=40, D=33, F=100, dtype=torch.float32)
    clean = ops.adapter(*tensors)
    expected = [clean.y, clean.l1, *gradients([clean.y, clean.l1], tensors)]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        output = ops.adapter(*tensors)
        poisoned = [output.y, output.l1, *gradients([output.y, output.l1], tensors)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(expected, poisoned, strict=True))


def test_non_contiguous_and_zero_stride_inputs():
    x, mlp_out, W_enc, b_enc, W_dec, b_dec = weights(T=6, D=8, F=20)
    strided = [x.repeat(1, 2)[:, ::2], mlp_out.T.contiguous().T, W_enc[:, :1].expand(20, 8)]
    inputs = [*strided, b_enc, W_dec.flip(0).flip(0), b_dec]
    ours, dense = ops.adapter(*inputs), dense_adapter(*inputs)
    torch.testing.assert_close(ours.y, dense[0])
    live = [x, mlp_out, W_enc, b_enc, W_dec, b_dec]
    for a, b in zip(
        torch.autograd.grad(ours.y.sum(), live),
        torch.autograd.grad(dense[0].sum(), live),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_ptr": torch.tensor([0, 2, 1])}, "row_ptr"),
        ({"row_ptr": torch.tensor([1, 1, 2])}, "row_ptr"),
        ({"row_ptr": torch.tensor([0, 1, 9])}, "row_ptr|capacity"),
        ({"feature": torch.tensor([0, 5], dtype=torch.int32)}, "feature: entry 1 is 5"),
        ({"feature": torch.tensor([0, -1], dtype=torch.int32)}, "feature: entry 1 is -1"),
    ],
)
def test_packed_features_made_by_hand_are_checked(backend, change, message):
    if backend == "reference":
        message = ".*"  # the reference leaves it to torch's own indexing checks
    packed = {
        "row_ptr": torch.tensor([0, 1, 2]),
        "feature": torch.tensor([0, 4], dtype=torch.int32),
        "value": torch.ones(2),
    }
    arguments = {**packed, **change}
    active = ops.ActiveFeatures(
        arguments["row_ptr"], arguments["feature"], arguments["value"], num_features=5
    )
    with pytest.raises((RuntimeError, ValueError, IndexError), match=message):
        ops.decode(active, torch.ones(5, 3))


def test_memory_kept_for_the_backward_is_a_fraction_of_the_dense():
    """Under 2 % of the dense activations at 8 of 8192 active features, once that is known."""
    tensors = weights(T=64, D=16, F=8192, dtype=torch.float32)
    with torch.no_grad():
        tensors[2] /= 4
        z = tensors[0] @ tensors[2].T
        tensors[3].fill_(-float(z.flatten().kthvalue(z.numel() - 8 * 64).values))

    def kept(density):
        """Bytes saved for the backward beside the arguments."""
        sizes = {}

        def save(tensor):
            sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            ops.adapter(*tensors, expected_density=density)
        return sum(sizes.values()) - sum(sizes.get(t.data_ptr(), 0) for t in tensors)

    dense = 64 * 8192 * 4
    assert kept(1.0) >= dense
    assert kept(8 / 8192) < 0.02 * dense


def test_ties_go_to_the_lowest_index():
    x = torch.ones(1, 1)
    W_enc, b_enc = torch.tensor([[1.0], [2.0], [2.0], [2.0], [0.5]]), torch.zeros(5)
    active = ops.encode(x, W_enc, b_enc, k=2).trim()
    assert active.feature.tolist() == [1, 2]


def test_dense_round_trip():
    dense = torch.tensor([[0.0, 1.5, 0.0], [0.0, 0.0, 0.0], [2.0, 0.0, -1.0]])
    active = ops.ActiveFeatures.from_dense(dense)
    assert active.row_ptr.tolist() == [0, 1, 1, 3]
    assert active.feature.tolist() == [1, 0, 2]
    assert active.tokens().tolist() == [0, 2, 2]
    assert torch.equal(active.to_dense(), dense)


def test_overflowed_features_are_refused_not_dropped():
    x, _, W_enc, b_enc, W_dec, _ = weights(grad=False)
    value, row_ptr, feature = raw("encode")(x, W_enc, b_enc, None, 3)
    with pytest.raises((ValueError, RuntimeError), match="capacity of 3"):
        ops.decode(ops.ActiveFeatures(row_ptr, feature, value, F), W_dec)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(T, D + 1)}, "x: shape"),
        ({"x": torch.zeros(T, D, dtype=torch.int64)}, "x: torch.int64"),
        ({"mlp_out": torch.zeros(T + 1, D)}, "mlp_out: shape"),
        ({"mlp_out": torch.zeros(T, D, dtype=torch.float64)}, "mlp_out: torch.float64"),
        ({"W_enc": torch.zeros(F, D, 1)}, "W_enc: shape|x: shape"),
        ({"b_enc": torch.zeros(F + 1)}, "b_enc: shape"),
        ({"W_dec": torch.zeros(D, F)}, "W_dec: shape"),
        ({"b_dec": torch.zeros(F)}, "b_dec: shape"),
        ({"gain": torch.ones(D)}, "gain: shape"),
        ({"gain": torch.ones(F, requires_grad=True)}, "gain: requires_grad"),
        ({"token_mask": torch.ones(T)}, "token_mask: torch.float32"),
        ({"token_mask": torch.ones(T + 1).bool()}, "token_mask: torch.bool of shape"),
        ({"k": 0}, "k: 0 is outside"),
        ({"k": -1}, "k: -1 is outside"),
        ({"k": F + 1}, f"k: {F + 1} is outside"),
    ],
)
def test_bad_arguments_are_named(change, message):
    names = ["x", "mlp_out", "W_enc", "b_enc", "W_dec", "b_dec"]
    tensors = weights(dtype=torch.float32, grad=False)
    arguments = {**dict(zip(names, tensors, strict=True)), **change}
    with pytest.raises(UserError, match=message):
        ops.adapter(**arguments)


def test_every_operator_has_a_backend_on_every_device():
    table = ops.backends()
    assert set(table) >= {"encode", "decode", "adapter", "adapter_backward"}
    assert all(set(row) == {"CPU", "CUDA"} for row in table.values())

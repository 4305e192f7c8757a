"""The operators under PyTorch's own machinery: autocast, checkpointing, compilation, `.grad`."""

import pytest
import torch
from operator_cases import gradients, weights
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tca_fast import ops
from tca_fast.adapter import TranscoderAdapter
from tca_fast.config import AdapterConfig
from tca_fast.errors import UserError

D, F = 12, 40
pytestmark = pytest.mark.usefixtures("backend")


class Block(nn.Module):
    """A layer whose MLP has an adapter beside it, as in a decoder."""

    def __init__(self, k: int | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = AdapterConfig(num_features=F, activation="relu" if k is None else "topk", k=k)
        self.before, self.mlp = nn.Linear(D, D), nn.Linear(D, D)
        self.adapter = TranscoderAdapter(D, config)
        with torch.no_grad():
            for parameter in self.adapter.parameters():
                parameter.normal_()
        self.adapter.set_gain(3, -2.5)

    def forward(self, x):
        hidden = self.before(x)
        output = self.adapter(hidden, self.mlp(hidden), torch.arange(x.shape[0]) % 3 > 0)
        return output.y, output.l1


def results(function, block, x):
    """Outputs and the gradients of x and of every parameter."""
    y, l1 = function(x)
    return [y, l1, *gradients([y, l1], [x, *block.parameters()])]


def expect_equal(ours, reference, **tolerances):
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b, **tolerances)


def tokens():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(9, D, generator=generator).requires_grad_()


def by_reference(block, x):
    with ops.backend("reference"):
        return results(block, block, x)


@pytest.fixture(params=[None, 5], ids=["relu", "topk"])
def block(request):
    return Block(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(block, dtype):
    """The operators decide what they compute in; as the reference does, outside autocast."""
    x, mlp_out = (t.to(dtype).detach().requires_grad_() for t in (tokens(), tokens().flip(0)))

    def run():
        output = block.adapter(x, mlp_out)
        decoded = block.adapter.decode(block.adapter.encode(x))
        outputs = [output.y, output.l1, decoded]
        return [*outputs, *gradients(outputs, [x, mlp_out, *block.adapter.parameters()])]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run()
    outside = run()
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))
    with ops.backend("reference"):
        reference = run()
    scale = max(float(t.detach().abs().max()) for t in reference)
    # Half precision is rounded once at the end, single precision in every sum.
    unit_roundoffs = 1 if dtype == torch.bfloat16 else 24
    share = unit_roundoffs * torch.finfo(dtype).eps / 2
    expect_equal(inside, reference, rtol=2 * share, atol=share * scale)


def test_a_layer_under_autocast_agrees_with_the_reference(block):
    """Its activations are bfloat16, and so is the adapter; parameters get float32 gradients."""
    x = tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, reference = results(block, block, x), by_reference(block, x)
    assert ours[0].dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in ours[2:])
    scale = max(float(t.detach().abs().max()) for t in reference)
    expect_equal(ours, reference, rtol=2**-6, atol=2**-7 * scale)


def test_an_adapter_takes_the_dtype_that_autocast_gives_the_mlp(block):
    """Norms leave float32 hidden states where the MLP's products leave bfloat16."""
    x, mlp_out = tokens(), tokens().flip(0).bfloat16()
    expected = block.adapter(x.bfloat16(), mlp_out)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = block.adapter(x, mlp_out)
    assert output.y.dtype == torch.bfloat16
    assert torch.equal(output.y, expected.y) and torch.equal(output.l1, expected.l1)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_agrees_with_the_reference(block, use_reentrant):
    """A pass that is run again gives the same bits, and those of the reference but for rounding."""
    x = tokens()

    def function(x):
        return checkpoint(block, x, use_reentrant=use_reentrant)

    def accumulated():
        for leaf in (x, *block.parameters()):
            leaf.grad = None
        y, l1 = function(x)
        (y.square().sum() + l1).backward()
        return [y.detach(), l1.detach(), *(leaf.grad for leaf in (x, *block.parameters()))]

    ours = accumulated()
    with ops.backend("reference"):
        reference = accumulated()
    expect_equal(ours, reference, rtol=1e-5, atol=1e-4)
    y, l1 = block(x)
    leaves = [x, *block.parameters()]
    plain = torch.autograd.grad(y.square().sum() + l1, leaves)
    assert all(torch.equal(a, b) for a, b in zip(ours[2:], plain, strict=True))


def test_the_compiled_module_agrees_with_the_reference(block):
    x = tokens()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    expect_equal(results(compiled, block, x), by_reference(block, x), rtol=1e-5, atol=1e-4)


class BackwardOutputs(TorchDispatchMode):
    """Addresses of the tensors that the adapter's backward returns."""

    def __init__(self):
        super().__init__()
        self.addresses = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        if function._schema.name.endswith("::adapter_backward"):
            self.addresses |= {output.data_ptr() for output in outputs}
        return outputs


WEIGHTS = ["W_enc", "b_enc", "W_dec", "b_dec"]


def test_gradients_become_grad_without_a_copy():
    """The tensors that the backward allocates are the ones that `.grad` holds afterwards."""
    x, mlp_out, *parameters = weights(T=9, D=D, F=F, dtype=torch.float32)
    output = ops.adapter(x, mlp_out, *parameters)
    with BackwardOutputs() as seen:
        (output.y.square().sum() + output.l1).backward()
    copied = [
        name
        for name, p in zip(WEIGHTS, parameters, strict=True)
        if p.grad.data_ptr() not in seen.addresses
    ]
    assert copied == []


def test_gradients_accumulate_in_place():
    """Into the memory that `.grad` has, with the sum of both passes."""
    x, mlp_out, *parameters = weights(T=9, D=D, F=F, dtype=torch.float32)

    def backward(scale):
        output = ops.adapter(x * scale, mlp_out, *parameters)
        (output.y.square().sum() + output.l1).backward()
        return [p.grad.clone() for p in parameters]

    first = backward(1.0)
    addresses = [p.grad.data_ptr() for p in parameters]
    both = backward(0.5)
    assert [p.grad.data_ptr() for p in parameters] == addresses
    for p in parameters:
        p.grad = None
    second = backward(0.5)
    for sum_, a, b in zip(both, first, second, strict=True):
        torch.testing.assert_close(sum_, a + b, rtol=0, atol=0)


@pytest.mark.parametrize("density", [None, 1.0], ids=["packed", "dense"])
def test_gradients_in_a_graph_have_none_themselves(density):
    tensors = weights(D=D, F=F)
    output = ops.adapter(*tensors, expected_density=density)
    loss = output.y.square().sum() + output.l1
    recorded = torch.autograd.grad(loss, tensors, create_graph=True)
    plain = torch.autograd.grad(loss, tensors)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(recorded, plain, strict=True))
    with pytest.raises(UserError, match="create_graph: .* first derivatives only"):
        recorded[0].sum().backward()


@pytest.mark.parametrize("density", [None, 1.0], ids=["packed", "dense"])
def test_an_output_without_gradient_costs_none(density):
    """Of y alone and of L1 alone, as of both with the other's upstream gradient at zero."""
    tensors = weights(D=D, F=F)
    output = ops.adapter(*tensors, expected_density=density)
    both = [output.y, output.l1]
    zeros = [torch.zeros_like(tensor) for tensor in both]
    for number, one in enumerate(both):
        ones = [*zeros]
        ones[number] = torch.ones_like(one)
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        alone = torch.autograd.grad(one, tensors, ones[number], **options)
        expected = torch.autograd.grad(both, tensors, ones, **options)
        assert all(torch.equal(a, b) for a, b in zip(alone, expected, strict=True))

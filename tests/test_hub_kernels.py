"""Layers of others that Hugging Face's kernels package runs by our operators: the same numbers."""

import copy
import socket
import subprocess
import sys

import pytest
import torch
from tiny import tiny_qwen2
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("kernels.layer", reason="pip install 'kernels>=0.17'")
import kernels.layer.repos
from kernels import Mode, kernelize, use_kernel_forward_from_hub, use_kernel_mapping
from safetensors.torch import load_file, save_file

from tca_fast.errors import UserError
from tca_fast.integrations import hub_kernels

MODES = {
    "inference": Mode.INFERENCE,
    "training": Mode.TRAINING,
    "compiled inference": Mode.INFERENCE | Mode.TORCH_COMPILE,
    "compiled training": Mode.TRAINING | Mode.TORCH_COMPILE,
}
WIDTH, HIDDEN, FEATURES = 24, 40, 100


@use_kernel_forward_from_hub(hub_kernels.LAYER_NAME)
class PlainMLP(nn.Module):
    """As the paper's authors publish it, dense and by hand: the truth of these tests."""

    def __init__(self, width=WIDTH, hidden=HIDDEN, features=FEATURES, bias=True):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)
        self.act_fn = nn.SiLU()
        self.transcoder_enc = nn.Linear(width, features)
        self.transcoder_dec = nn.Linear(features, width, bias=bias)
        self.disable_transcoder = False

    def forward(self, x):
        mlp_out = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        if self.disable_transcoder:
            return mlp_out
        return mlp_out + self.transcoder_dec(torch.relu(self.transcoder_enc(x)))


class Operators(TorchDispatchMode):
    """Which of our operators were called."""

    def __init__(self):
        super().__init__()
        self.called = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "tca_fast":
            self.called.add(function._opname)
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """Registered for one test, in which nothing can be fetched from anywhere."""

    def refuse(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with use_kernel_mapping({}, inherit_mapping=False):
        hub_kernels.register()
        yield


def plain(seed=0, active=0.1, dtype=torch.float64, **options):
    """A layer of which about that share of features is active."""
    torch.manual_seed(seed)
    layer = PlainMLP(**options).to(dtype)
    threshold = torch.special.ndtri(torch.tensor(1 - active)) * 3**-0.5
    with torch.no_grad():
        layer.transcoder_enc.bias.sub_(threshold)
    return layer


def kernelized(layer, mode=Mode.TRAINING, device="cpu"):
    return kernelize(copy.deepcopy(layer), mode=mode, device=device, use_fallback=False)


def gradients(layer, x, upstream):
    tensors = (x, *layer.parameters())
    y = layer(x)
    return y, *torch.autograd.grad(y, tensors, upstream)


def test_a_connection_would_be_seen():
    with pytest.raises(AssertionError, match="a connection"):
        socket.create_connection(("127.0.0.1", 9))


@pytest.mark.parametrize("density", [None, 0.01, 1.0], ids=["unknown", "too low", "all"])
@pytest.mark.parametrize("active", [0.05, 0.9], ids=["few active", "most active"])
@pytest.mark.parametrize("bias", [True, False], ids=["decoder bias", "no decoder bias"])
@pytest.mark.parametrize("mode", MODES)
def test_values_and_every_gradient_are_those_of_the_plain_layer(mode, bias, active, density):
    hub_kernels.register(expected_density=density)
    ours = kernelized(theirs := plain(active=active, bias=bias), MODES[mode])
    x = torch.randn(3, 7, WIDTH, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(3, 7, WIDTH, dtype=torch.float64)
    expected = gradients(theirs, x, upstream)
    with Operators() as operators:
        got = gradients(ours, x, upstream)
    assert {"adapter", "adapter_backward"} <= operators.called
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_without_gradients_the_operator_runs_too():
    ours = kernelized(theirs := plain(), Mode.INFERENCE)
    x = torch.randn(1, WIDTH, dtype=torch.float64)
    with torch.inference_mode(), Operators() as operators:
        torch.testing.assert_close(ours(x), theirs(x))
    assert operators.called == {"adapter"}


def test_no_token_gives_no_output():
    ours = kernelized(plain())
    assert ours(torch.empty(0, WIDTH, dtype=torch.float64)).shape == (0, WIDTH)


def test_under_autocast_errors_are_at_most_twice_those_of_the_plain_layer():
    ours = kernelized(theirs := plain(dtype=torch.float32))
    x = torch.randn(64, WIDTH)
    truth = theirs.double()(x.double())
    theirs.float()
    with torch.autocast("cpu", torch.bfloat16):
        got, eager = ours(x), theirs(x)
    assert got.dtype == eager.dtype == torch.bfloat16
    floor = torch.finfo(torch.bfloat16).eps * truth.abs().max()
    assert (got - truth).abs().max() <= 2 * (eager - truth).abs().max() + floor


def test_it_compiles_without_a_break():
    ours = kernelized(plain(), Mode.TRAINING | Mode.TORCH_COMPILE)
    x = torch.randn(5, WIDTH, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(5, WIDTH, dtype=torch.float64)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    tensors = (x, *ours.parameters())
    for a, b in zip(
        torch.autograd.grad(compiled(x), tensors, upstream),
        torch.autograd.grad(ours(x), tensors, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_a_switched_off_adapter_stays_off():
    ours = kernelized(theirs := plain())
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    ours.disable_transcoder = theirs.disable_transcoder = True
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("mode", MODES)
def test_layers_on_cuda_find_it(mode, monkeypatch):
    monkeypatch.setattr(kernels.layer.repos, "_find_capability", lambda: 90)
    ours = kernelized(theirs := plain(), MODES[mode], device="cuda")
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    with Operators() as operators:
        torch.testing.assert_close(ours(x), theirs(x))
    assert operators.called == {"adapter"}


def test_only_decorated_layers_change():
    class Other(PlainMLP):
        kernel_layer_name = "SomethingElse"

    model = nn.ModuleList([plain(), Other()])
    kernelize(model, mode=Mode.TRAINING, device="cpu")
    assert [layer.forward.__func__ is PlainMLP.forward for layer in model] == [False, True]


def test_decoders_stored_by_feature_are_the_same_and_not_copied():
    ours = kernelized(plain())
    before = copy.deepcopy(ours.state_dict())
    x = torch.randn(5, WIDTH, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(5, WIDTH, dtype=torch.float64)
    expected = gradients(ours, x, upstream)
    hub_kernels.store_by_feature(ours)
    assert ours.transcoder_dec.weight.t().is_contiguous()
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())
    for a, b in zip(gradients(ours, x, upstream), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("lacking", ["down_proj", "transcoder_enc.bias"])
@pytest.mark.parametrize("mode", [Mode.INFERENCE, Mode.TRAINING | Mode.TORCH_COMPILE], ids=str)
def test_a_layer_of_another_layout_is_named_with_what_it_lacks(lacking, mode):
    layer = plain()
    if lacking == "down_proj":
        layer.c_proj = layer.down_proj
        del layer.down_proj
    else:
        layer.transcoder_enc.bias = None
    ours = kernelized(layer, mode)
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    for run in (lambda: ours(x), lambda: hub_kernels.store_by_feature(ours)):
        with pytest.raises(UserError, match=f"PlainMLP lacks {lacking}; rename") as caught:
            run()
        assert "\n" not in str(caught.value)


def test_an_error_within_a_part_stays_what_it_is():
    class Broken(nn.Module):
        def forward(self, x):
            return x.nothing

    layer = plain()
    layer.act_fn = Broken()
    with pytest.raises(AttributeError, match="nothing"):
        kernelized(layer)(torch.randn(5, WIDTH, dtype=torch.float64))


def test_decoders_stored_by_feature_are_saved_once_they_are_contiguous(tmp_path):
    layer = plain()
    before = copy.deepcopy(layer.state_dict())
    hub_kernels.store_by_feature(layer)
    with pytest.raises(ValueError, match="contiguous"):
        save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    tensors = {name: tensor.contiguous() for name, tensor in layer.state_dict().items()}
    save_file(tensors, tmp_path / "layer.safetensors")
    assert all(
        torch.equal(tensor, before[name])
        for name, tensor in load_file(tmp_path / "layer.safetensors").items()
    )


def test_a_model_of_theirs_generates_the_same_and_is_saved_the_same(tmp_path):
    model = tiny_qwen2()
    for layer in model.model.layers:
        adapted = plain(dtype=torch.float32)
        adapted.load_state_dict(layer.mlp.state_dict(), strict=False)
        layer.mlp = adapted
    tokens = torch.arange(1, 9)[None]
    expected = model.generate(tokens, max_new_tokens=6, do_sample=False)
    model.save_pretrained(tmp_path / "before")
    hub_kernels.store_by_feature(kernelize(model, mode=Mode.INFERENCE, device="cpu"))
    with Operators() as operators:
        assert torch.equal(model.generate(tokens, max_new_tokens=6, do_sample=False), expected)
    assert operators.called == {"adapter"}
    model.save_pretrained(tmp_path / "after")
    before, after = (tmp_path / name / "model.safetensors" for name in ("before", "after"))
    assert before.read_bytes() == after.read_bytes()


def test_without_the_package_the_error_names_it():
    code = "import sys; sys.modules['kernels'] = None; import tca_fast.integrations.hub_kernels"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    *_, answer = run.stderr.strip().splitlines()
    assert answer.startswith("ImportError: tca_fast.integrations.hub_kernels needs")
    assert answer.endswith("pip install 'kernels>=0.17'")

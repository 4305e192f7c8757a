"""Random cases for the operators, and the dense autograd that they are held to.

Hypothesis draws the shape, the pattern of activity and the settings of a case; the numbers come
from the case's seed. Shapes: T tokens, D model width, F features.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from hypothesis import strategies as st
from operator_bounds import (
    Activations,
    Arithmetic,
    Gradient,
    activation_gradient,
    activations,
    decoded,
    decoder_gradients,
    encoder_gradients,
    weighted,
)
from tiny import dense_adapter
from torch import Tensor

from tca_fast import reference, registry

# Every backend that can run on CPU tensors; none may be missing.
BACKENDS = ["reference", "cpp"]
# A long run tries each random test in this many shares of the profile's number of cases.
LONG_SHARES = {"cpp": 20}

NAMES = ["x", "mlp_out", "W_enc", "b_enc", "W_dec", "b_dec"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def raw(name):
    """The operator underneath, of the backend under test."""
    return registry.operator(name)


def weights(T=7, D=5, F=11, dtype=torch.float64, seed=0, grad=True):
    """x, mlp_out, W_enc, b_enc, W_dec and b_dec, standard normal."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(T, D), (T, D), (F, D), (F,), (F, D), (D,)]
    tensors = [torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes]
    return [tensor.to(dtype).requires_grad_(grad) for tensor in tensors]


def upstream(outputs, seed=3, dtype=torch.float64):
    """A random upstream gradient for every output, made of numbers that `dtype` can hold."""
    generator = torch.Generator().manual_seed(seed)
    random = [torch.randn(o.shape, dtype=torch.float64, generator=generator) for o in outputs]
    return [g.to(dtype).to(o.dtype) for g, o in zip(random, outputs, strict=True)]


def check_large_gain_in_half_precision(room, grad_y):
    """Activation times gain is 128,000, beyond float16's 65,504; what comes out is not.

    `room` is the share of all pairs that fit, `grad_y` the upstream gradient: of 60,000, the
    activations' is 96,000, while dx and dW_enc are below 4,000.
    """
    T, D, F = 4, 16, 32
    values = {(T, D): 0.01, (F, D): 1e-3, (F,): 128.0}
    x, W_enc, b_enc = (torch.full(shape, v).half().requires_grad_() for shape, v in values.items())
    W_dec = torch.full((F, D), 1e-4).half().requires_grad_()
    halves = [x, torch.zeros(T, D).half(), W_enc, b_enc, W_dec, torch.ones(D).half()]
    gain = torch.full((F,), 1000.0).half()
    results = []
    for run, dtype in (raw("adapter"), torch.float16), (reference.adapter, torch.float64):
        tensors = [tensor.to(dtype) for tensor in halves]
        y, l1, *packed = run(*tensors, gain.to(dtype), None, None, int(room * T * F))
        leaves = [x, W_enc, b_enc, W_dec]
        grad = torch.full_like(y, grad_y)
        results.append([y, l1.double(), *torch.autograd.grad(y, leaves, grad)])
    ours, exact = results
    # The activation is rounded and then the result: half an eps each.
    rounding = dict(rtol=torch.finfo(torch.float16).eps, atol=0, check_dtype=False)
    assert exact[0].abs().max() < 500 and exact[2].abs().max() < 4000
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), **rounding)


def gradients(outputs, inputs, seed=3):
    """Gradients of the inputs under a random upstream gradient."""
    grads = torch.autograd.grad(outputs, inputs, upstream(outputs, seed), allow_unused=True)
    return [torch.zeros_like(i) if g is None else g for g, i in zip(grads, inputs, strict=True)]


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same numbers, stored otherwise."""
    if layout == "every other":
        return torch.stack([tensor, tensor], dim=-1)[..., 0]
    if layout == "column-major" and tensor.dim() == 2:
        return tensor.T.contiguous().T
    if layout == "from the second on":  # of a buffer: no vector of several numbers is aligned
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)
    return tensor


@dataclass(frozen=True)
class Case:
    """One random call of the operators.

    Attributes:
        T, D, F: the shape.
        k: kept features of a token, or None.
        bias: added to every encoder bias; −99 empties rows and 99 fills them.
        hot: the first feature fires for every token.
        empty_row: the first token is zero and so are the biases: all its pre-activations are ±0.
        integers: every number is one, which makes ties and exact zeros.
        zero_decoder: as at initialisation, where norms are 0 and have no direction.
        mask: "none", "some" real tokens, or "no real" token.
        gain: of all features, "mixed", or None.
        decoder_bias: whether there is one.
        density: what is expected; decides the room for the backward.
        layout: how inputs and upstream gradients are stored.
        dtype: under test.
        seed: of the numbers.
    """

    T: int
    D: int
    F: int
    k: int | None
    bias: float
    hot: bool
    empty_row: bool
    integers: bool
    zero_decoder: bool
    mask: str
    gain: float | str | None
    decoder_bias: bool
    density: float | None
    layout: str
    dtype: torch.dtype
    seed: int

    @cached_property
    def tensors(self) -> dict[str, Tensor | None]:
        """The arguments by name, in the dtype under test."""
        named = dict(
            zip(NAMES, weights(self.T, self.D, self.F, seed=self.seed, grad=False), strict=True)
        )
        if self.integers:
            named = {name: tensor.round() for name, tensor in named.items()}
        named["b_enc"] += self.bias
        if self.hot:
            named["b_enc"][0] = 99
        if self.empty_row:
            named["x"][:1] = 0
            named["b_enc"] = torch.copysign(torch.zeros(()), named["b_enc"]).double()
        if self.zero_decoder:
            named["W_dec"].zero_()
        stored = {name: laid_out(t.to(self.dtype), self.layout) for name, t in named.items()}
        return stored if self.decoder_bias else {**stored, "b_dec": None}

    @cached_property
    def gains(self) -> Tensor | None:
        if self.gain == "mixed":
            choice = torch.tensor([0.0, 1.0, -2.5], dtype=self.dtype)
            return choice[torch.arange(self.F) % 3]
        if self.gain is None:
            return None
        return torch.full((self.F,), self.gain, dtype=self.dtype)

    @cached_property
    def token_mask(self) -> Tensor | None:
        if self.mask == "none":
            return None
        generator = torch.Generator().manual_seed(self.seed + 1)
        real = torch.rand(self.T, generator=generator) < 0.7
        return real & (self.mask == "some")


def cases(dtypes=DTYPES) -> st.SearchStrategy[Case]:
    """Sparsity patterns, shapes and settings; see `Case`."""
    drawn = st.builds(
        Case,
        T=st.sampled_from([0, 1, 2, 9, 40]),
        D=st.sampled_from([1, 3, 8, 33]),
        F=st.sampled_from([1, 4, 17, 100]),
        k=st.none() | st.integers(1, 100),
        bias=st.sampled_from([-99.0, -9.0, -1.0, 0.0, 99.0]),
        hot=st.booleans(),
        empty_row=st.sampled_from([False, False, True]),
        integers=st.booleans(),
        zero_decoder=st.sampled_from([False, False, False, True]),
        mask=st.sampled_from(["none", "some", "no real"]),
        gain=st.sampled_from([None, 0.0, 1.0, -2.5, "mixed"]),
        decoder_bias=st.booleans(),
        density=st.none() | st.sampled_from([0.0, 0.01, 0.5, 1.0]),
        layout=st.sampled_from(["contiguous", "every other", "column-major", "from the second on"]),
        dtype=st.sampled_from(dtypes),
        seed=st.integers(0, 10**6),
    )
    return drawn.map(lambda case: replace(case, k=None if case.k is None else min(case.k, case.F)))


def differentiate(
    function, arguments: dict[str, Tensor | None], dtype: torch.dtype, case: Case
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Outputs and gradients of `function(**arguments)`, and the upstream gradients of the outputs.

    `function` returns a dict of tensors; it is called with the arguments as `dtype`.
    """
    inputs = {
        name: None if t is None else t.detach().to(dtype).requires_grad_(True)
        for name, t in arguments.items()
    }
    outputs = function(**inputs)
    live = {name: t for name, t in inputs.items() if t is not None}
    random = upstream(list(outputs.values()), case.seed, case.dtype)
    random = [laid_out(g, case.layout) for g in random]
    grads = torch.autograd.grad(
        list(outputs.values()), list(live.values()), random, allow_unused=True
    )
    named = {
        f"d{name}": torch.zeros_like(t) if g is None else g
        for (name, t), g in zip(live.items(), grads, strict=True)
    }
    return {name: output.detach() for name, output in outputs.items()} | named, random


def dense_features(x, W_enc, b_enc, k=None):
    """Activations [T, F] by dense autograd."""
    zero = x.new_zeros(())
    width = x.new_zeros(W_enc.shape)
    return dense_adapter(x, zero, W_enc, b_enc, width, None, k=k)[2]


@dataclass(frozen=True)
class Floors:
    """What rounding alone may do to the results of one case; see `operator_bounds`."""

    case: Case

    @cached_property
    def at(self) -> Arithmetic:
        return Arithmetic(self.case.dtype)

    @cached_property
    def exact(self) -> dict[str, Tensor]:
        tensors = self.case.tensors
        return {name: t.double() for name, t in tensors.items() if t is not None}

    @cached_property
    def gains(self) -> Tensor:
        gains = self.case.gains
        return torch.ones(self.case.F).double() if gains is None else gains.double()

    @cached_property
    def mask(self) -> Tensor:
        mask = self.case.token_mask
        return torch.ones(self.case.T, dtype=torch.bool) if mask is None else mask

    def activations(self) -> Activations:
        encoder = [self.exact[name] for name in ("x", "W_enc", "b_enc")]
        features = dense_features(*encoder, k=self.case.k)
        return activations(*encoder, features, self.case.k, self.at)

    def encode(self, da: Tensor) -> dict[str, Tensor]:
        """For `value` scattered to [T, F] and its gradients under the upstream gradient `da`."""
        a = self.activations()
        dz = Gradient(da.double(), torch.zeros_like(a.value)).where_active(a)
        grads = encoder_gradients(dz, self.exact["x"], self.exact["W_enc"], self.at)
        return dict(zip(["value", "dx", "dW_enc", "db_enc"], [a.error, *grads], strict=True))

    def decode(self, dy: Tensor, features: Tensor) -> dict[str, Tensor]:
        """For y and its gradients under the upstream gradient `dy`, given the activations."""
        dy, zero = dy.double(), torch.zeros(()).double()
        a, W_dec, at = Activations.given(features.double()), self.exact["W_dec"], self.at
        biases = [self.exact["b_dec"]] if self.case.decoder_bias else []
        da = activation_gradient(dy, zero, W_dec, self.gains, self.mask, at).where_active(a)
        dW_dec, db_dec = decoder_gradients(a, dy, zero, W_dec, self.gains, self.mask, at)
        floors = {
            "y": decoded(a, W_dec, self.gains, biases, at),
            "dfeatures": da.error,
            "dW_dec": dW_dec,
        }
        return floors | ({"db_dec": db_dec} if self.case.decoder_bias else {})

    def adapter(self, dy: Tensor, dl1: Tensor) -> dict[str, Tensor]:
        """For y, l1 and every gradient under the upstream gradients `dy` and `dl1`."""
        dy, dl1, exact, at = dy.double(), dl1.double(), self.exact, self.at
        a, W_dec = self.activations(), exact["W_dec"]
        added = [exact["mlp_out"]] + ([exact["b_dec"]] if self.case.decoder_bias else [])
        da = activation_gradient(dy, dl1, W_dec, self.gains, self.mask, at).where_active(a)
        dx, dW_enc, db_enc = encoder_gradients(da, exact["x"], exact["W_enc"], at)
        dW_dec, db_dec = decoder_gradients(a, dy, dl1, W_dec, self.gains, self.mask, at)
        floors = {
            "y": decoded(a, W_dec, self.gains, added, at),
            "l1": weighted(a, W_dec, self.mask, at),
            "dx": dx,
            "dmlp_out": torch.zeros_like(dy),
            "dW_enc": dW_enc,
            "db_enc": db_enc,
            "dW_dec": dW_dec,
        }
        return floors | ({"db_dec": db_dec} if self.case.decoder_bias else {})

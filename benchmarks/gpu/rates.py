"""What performance floors are made of, read off the device: "what to measure first"."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cases import Case as LayerCase
from benchmarks.cases import layer_inputs
from benchmarks.correctness import with_gradients
from benchmarks.gpu.record import Absent, Case
from benchmarks.layers import DenseEager
from benchmarks.operations import LAYER
from benchmarks.timing import copy_bandwidth, repeated

_FULL = LayerCase("7B half dense", 8192, 3584, 8192, 4096, "uniform")
_REHEARSAL = LayerCase("rehearsal half dense", 3, 16, 40, 20, "uniform")


class Rates:
    """The calls, at the shapes of the 7B layer, or tiny ones on a CPU."""

    def __init__(self, device: torch.device) -> None:
        """Nothing is allocated yet."""
        self.device = device
        is_cuda = device.type == "cuda"
        self.layer = _FULL if is_cuda else _REHEARSAL
        self.dtype = torch.bfloat16 if is_cuda else torch.float32
        self.cube = 8192 if is_cuda else 64
        self.topk = [(8192, 64), (8192, 32), (65_536, 64)] if is_cuda else [(40, 3)]
        self.rounds = 20 if is_cuda else 1

    def cases(self) -> dict[str, Case]:
        """Every rate by name."""
        T, D, N = self.layer.tokens, self.layer.width, self.layer.features
        product = f"{T} x {D} x {N}"
        named: dict[str, Case] = {
            "copy": lambda: {"bytes_per_s": copy_bandwidth(self.device)},
            f"product {self.cube} cubed": self._cube,
            f"encoder product {product}": lambda: self._product(lambda x, W, b: x @ W.T),
            f"encoder product with bias and ReLU by cuBLASLt {product}": lambda: self._product(
                lambda x, W, b: torch._addmm_activation(b, x, W.T)
            ),
            f"encoder product with bias, then ReLU {product}": lambda: self._product(
                lambda x, W, b: torch.addmm(b, x, W.T).relu_()
            ),
            f"encoder product by our Triton kernel {product}": self._triton_product,
            f"encoder product in int8 {product}": self._int8,
            f"encoder product in fp8 {product}": self._fp8,
            f"rows of {D} gathered": self._gather,
            "eager layer, main pass": self._eager_main,
            "eager layer, bridge pass": self._eager_bridge,
            "density over the first 2500 steps": self._density,
        }
        for features, k in self.topk:
            named[f"torch.topk {k} of {features}"] = lambda f=features, k=k: self._topk(f, k)
            named[f"our top-k {k} of {features}"] = lambda f=features, k=k: self._select(f, k)
        named[f"our threshold of {N}"] = lambda: self._select(N, None)
        return {f"rate: {name}": case for name, case in named.items()}

    def _time(self, call: Callable[[], object], **work: float) -> dict[str, float]:
        found = repeated(call, self.device, self.rounds)
        for unit, amount in work.items():
            found[f"{unit}_per_s"] = amount / found["ms"] * 1e3
        return found

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)

    def _flops(self) -> float:
        return 2.0 * self.layer.tokens * self.layer.width * self.layer.features

    def _cube(self) -> dict[str, float]:
        a, b = (self._normal(self.cube, self.cube) for _ in range(2))
        return self._time(lambda: a @ b, flops=2.0 * self.cube**3)

    def _product(self, call: Callable[[Tensor, Tensor, Tensor], Tensor]) -> dict[str, float]:
        layer = self.layer
        x, W = self._normal(layer.tokens, layer.width), self._normal(layer.features, layer.width)
        bias = self._normal(layer.features)
        return self._time(lambda: call(x, W, bias), flops=self._flops())

    def _triton_product(self) -> dict[str, float]:
        self._needs("triton")
        from tca_fast.kernels.launch import Overflow
        from tca_fast.kernels.product import overflow_product

        def call(x: Tensor, W: Tensor, bias: Tensor) -> Tensor:
            overflow_product(x, W.T, result, overflows, bias=bias)
            return result

        T, N = self.layer.tokens, self.layer.features
        # The kernel runs where more fired than fit: always.
        row_ptr = torch.full((T + 1,), T * N, device=self.device)
        overflows, result = Overflow(row_ptr, 0), self._normal(T, N)
        return self._product(call)

    def _int8(self) -> dict[str, float]:
        shapes = [(n, self.layer.width) for n in (self.layer.tokens, self.layer.features)]
        x, W = (torch.randint(-9, 9, s, device=self.device).to(torch.int8) for s in shapes)
        return self._time(lambda: torch._int_mm(x, W.T), flops=self._flops())

    def _fp8(self) -> dict[str, float]:
        if self.device.type != "cuda":
            raise Absent("needs a CUDA device")
        if torch.cuda.get_device_capability(self.device) < (8, 9):
            raise Absent("needs compute capability 8.9")
        x = self._normal(self.layer.tokens, self.layer.width).to(torch.float8_e4m3fn)
        W = self._normal(self.layer.features, self.layer.width).to(torch.float8_e4m3fn)
        one = torch.ones((), device=self.device)
        options: dict[str, Any] = {"scale_a": one, "scale_b": one, "out_dtype": torch.bfloat16}
        return self._time(lambda: torch._scaled_mm(x, W.T, **options), flops=self._flops())

    def _gather(self) -> dict[str, float]:
        """Rows of the encoder at random, as gathers of the sparse regime read them."""
        W = self._normal(self.layer.features, self.layer.width)
        rows = torch.randint(len(W), (10 * self.layer.tokens,), device=self.device)
        moved = 2.0 * rows.numel() * W.shape[1] * W.element_size()  # read and written
        return self._time(lambda: W.index_select(0, rows), bytes=moved)

    def _layer_tensors(self) -> dict[str, Tensor]:
        return with_gradients(layer_inputs(self.layer, self.device, self.dtype))

    def _eager_main(self) -> dict[str, float]:
        tensors = self._layer_tensors()
        return self._time(LAYER.variant(DenseEager(self.layer), tensors))

    def _eager_bridge(self) -> dict[str, float]:
        """Without statistics."""
        tensors = self._layer_tensors()
        weights = [tensors[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")]
        x, mlp_out = tensors["x"], tensors["mlp_out"]
        W_enc, b_enc, W_dec, b_dec = weights

        def step() -> object:
            y = mlp_out + F.linear(F.linear(x, W_enc, b_enc).relu(), W_dec.T, b_dec)
            return torch.autograd.grad(y, [x, *weights], tensors["grad_y"])

        return self._time(step)

    def _topk(self, features: int, k: int) -> dict[str, float]:
        z = self._normal(self.layer.tokens, features)
        return self._time(lambda: z.topk(k), bytes=float(z.nbytes))

    def _select(self, features: int, k: int | None) -> dict[str, float]:
        self._needs("triton")
        from tca_fast.kernels.select import Counts, select

        z = self._normal(self.layer.tokens, features)

        def call() -> object:
            return select(z, None, k, Counts.empty(*z.shape, z.device))

        return self._time(call, bytes=float(z.nbytes))

    def _density(self) -> dict[str, float]:
        raise Absent("needs a training run; `tca-fast train` logs l0 of every layer and step")

    @staticmethod
    def _needs(module: str) -> None:
        if importlib.util.find_spec(module) is None:
            raise Absent(f"{module} is not installed")

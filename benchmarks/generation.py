"""What an adapter costs in one decode step: one token against the encoder product alone.

    python -m benchmarks.generation [--threads 1] [--rounds 60] [--set cpu]

At one token the layer reads W_enc once and a few rows of W_dec, so the product with W_enc is its
floor. Both run interleaved, with cold caches, and the ratio is taken round by round.
`--processor-time` counts the time that this process was given instead of the time that went by; it
wants `--threads 1`, and suffers less from others on the machine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.cases import CASES, Case, layer_inputs
from benchmarks.timing import spread
from tca_fast import TranscoderAdapter
from tca_fast.config import AdapterConfig

_EVICTED_BYTES = 2**28


class Step(NamedTuple):
    """One decode step of one layer.

    Attributes:
        case: at one token.
        layer_ms, product_ms: median of the adapter layer, and of x·W_encᵀ alone.
        ratio: median and 20th and 80th percentile of their quotient.
        rounds: how many.
    """

    case: Case
    layer_ms: float
    product_ms: float
    ratio: tuple[float, float, float]
    rounds: int


def measure(case: Case, rounds: int, clock: Callable[[], float] = time.perf_counter) -> Step:
    """Time one decode step of a case, whatever its number of tokens."""
    tensors = layer_inputs(case)
    adapter = _adapter(case, tensors)
    # [tokens, 1, 1, D]: every token as a decode step of a batch of one has it.
    x, mlp_out = (t[:, None, None] for t in (tensors["x"], torch.zeros_like(tensors["x"])))
    evicted = torch.empty(_EVICTED_BYTES, dtype=torch.uint8)

    def milliseconds(call: Callable[[], object]) -> float:
        evicted.zero_()
        began = clock()
        call()
        return (clock() - began) * 1e3

    layers: list[float] = []
    products: list[float] = []
    with torch.no_grad():
        for number in range(-3, rounds):
            token = number % len(x)
            one, out = x[token], mlp_out[token]
            calls = [
                (layers, lambda one=one, out=out: adapter(one, out)),
                (products, lambda one=one: nn.functional.linear(one, adapter.W_enc)),
            ]
            for found, call in calls if number % 2 else reversed(calls):
                elapsed = milliseconds(call)
                if number >= 0:
                    found.append(elapsed)
    ratios = [layer / product for layer, product in zip(layers, products, strict=True)]
    return Step(case, spread(layers)[0], spread(products)[0], spread(ratios), rounds)


def _adapter(case: Case, tensors: dict[str, Tensor]) -> TranscoderAdapter:
    kind = {} if case.k is None else {"activation": "topk", "k": case.k}
    config = AdapterConfig(num_features=case.features, **kind)
    adapter = TranscoderAdapter(case.width, config)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            parameter.copy_(tensors[name])
    return adapter


def main() -> None:
    """Print one line per case."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--set", choices=["cpu", "tiny"], default="cpu")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--processor-time", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.processor_time else time.perf_counter
    print(
        f"torch {torch.__version__}, {options.threads} threads, float32, 1 token, {clock.__name__}"
    )
    for case in CASES[options.set]:
        if options.only in case.name:
            step = measure(case, options.rounds, clock)
            median, low, high = step.ratio
            print(
                f"{case.name:<20} layer {step.layer_ms:8.3f} ms  product {step.product_ms:8.3f} ms"
                f"  ratio {median:.3f} ({low:.3f} to {high:.3f}), {step.rounds} rounds",
                flush=True,
            )


if __name__ == "__main__":
    main()

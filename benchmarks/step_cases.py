"""Pairs, batches and sparse adapters of the step benchmark.

Shapes: T tokens, D model width, F features, V vocabulary, L layers.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

import tca_fast
from benchmarks.cases import Case, firing_rates
from benchmarks.settings import Adapter
from tca_fast.bridging.streams import Streams, build_streams, load_streams

_ASSETS = Path(tca_fast.__file__).parent / "miniature" / "assets"
# Widths of Qwen2.5-1.5B and 7B: D, MLP, heads, key-value heads.
_1P5B, _7B = (1536, 8960, 12, 2), (3584, 18944, 28, 4)
# A quarter of the 1.5B widths, so that all cutoffs of all variants take minutes and products still
# dominate.
_QUARTER = (384, 2240, 6, 1)


@dataclass(frozen=True)
class StepCase:
    """One training step.

    Attributes:
        name: readable id.
        tokens: T, in sequences of equal length without padding.
        sequences: B.
        features: F.
        l0: mean active features per token and layer.
        widths: D, MLP, heads and key-value heads of a random Qwen2; None is the miniature pair.
        layers, vocab_size: of a random Qwen2.
    """

    name: str
    tokens: int
    features: int
    l0: float
    sequences: int = 1
    widths: tuple[int, int, int, int] | None = None
    layers: int = 28
    vocab_size: int = 152_064


STEP_CASES = {
    "cpu": [
        StepCase("miniature", 512, 4096, 8, sequences=8),
        StepCase("quarter of 1.5B", 512, 2048, 8, widths=_QUARTER, vocab_size=2048),
    ],
    "cuda": [
        StepCase(f"{size}, {tokens} tokens", tokens, 8192, 8, widths=widths)
        for size, widths in (("1.5B", _1P5B), ("7B", _7B))
        for tokens in (2048, 8192, 10_000)
    ],
    "tiny": [
        StepCase("tiny", 24, 64, 4, sequences=2, widths=(16, 24, 2, 1), layers=3, vocab_size=40)
    ],
}


def make_streams(case: StepCase, device: torch.device, dtype: torch.dtype) -> Streams:
    """Base, target and fresh adapters of a case."""
    config: Any = Adapter(case.features)
    if case.widths is None:
        from tca_fast.config import PairConfig

        name = str(dtype).removeprefix("torch.")
        pair = PairConfig.model_validate(
            {"base": str(_ASSETS / "base"), "target": str(_ASSETS / "target"), "dtype": name}
        )
        return load_streams(pair, config, device=str(device))
    width, mlp, heads, key_value_heads = case.widths
    shape = Qwen2Config(
        hidden_size=width,
        intermediate_size=mlp,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        num_hidden_layers=case.layers,
        vocab_size=case.vocab_size,
        tie_word_embeddings=False,
        max_position_embeddings=max(case.tokens, 4096),
    )
    torch.manual_seed(0)
    with device:
        target = Qwen2ForCausalLM(shape).to(dtype)
    base = copy.deepcopy(target)
    with torch.no_grad():  # tuning moves weights a little
        for parameter in base.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1 * parameter.std())
    return build_streams(base, target, config)


def make_batch(case: StepCase, streams: Streams, device: torch.device) -> dict[str, Tensor]:
    """Random tokens without padding; every position but the last counts."""
    vocab_size = streams.reference.config.vocab_size
    shape = case.sequences, case.tokens // case.sequences
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocab_size, shape, generator=generator).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


@torch.no_grad()
def make_sparse(case: StepCase, streams: Streams, batch: dict[str, Tensor]) -> None:
    """Give every adapter a decoder, and biases at which its features fire as in a trained one.

    The rates are those of the layer benchmark, fitted to the pre-activations that this batch has
    in the hybrid; the decoders are small enough to leave them nearly as they are.
    """
    inputs = _mlp_inputs(streams, batch)
    generator = torch.Generator(inputs[0].device).manual_seed(2)
    width = inputs[0].shape[-1]
    rates = firing_rates(Case(case.name, case.tokens, width, case.features, case.l0))
    # Whole numbers of tokens that add up to T·L0: the running sum, rounded.
    total = (rates * case.tokens).cumsum(0).round()
    tokens_F = total.diff(prepend=total.new_zeros(1)).long()
    for adapter, x_TD in zip(streams.adapted.layers, inputs, strict=True):
        z_FT = (x_TD.float() @ adapter.W_enc.float().T).T.sort(dim=1, descending=True).values
        below = torch.cat([z_FT, z_FT[:, -1:] - 1], dim=1)
        above = torch.cat([z_FT[:, :1] + 1, z_FT], dim=1)
        place = tokens_F.to(z_FT.device).unsqueeze(1)
        # Half-way between the last token that is to fire and the first that is not.
        adapter.b_enc.copy_(-(below.gather(1, place) + above.gather(1, place)).squeeze(1) / 2)
        adapter.W_dec.normal_(std=0.02 * width**-0.5, generator=generator)


def _mlp_inputs(streams: Streams, batch: dict[str, Tensor]) -> list[Tensor]:
    """Input of every MLP of the hybrid, [T, D]."""
    inputs: list[Tensor] = []
    hooks = [
        wrapped.register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, 1)))
        for wrapped in streams.adapted.wrapped
    ]
    with streams.adapted.disabled():
        streams.adapted.model(batch["input_ids"], use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return inputs

"""A tiny random model of every architecture that the parity suite covers.

Each is as its family's defaults make it, with what sets it apart switched on: windows shorter than
the test's sequences, soft-caps and scales far from 1. The README's table is made of this one.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tiny import SHAPE, random_model
from transformers import PreTrainedModel


class Architecture(NamedTuple):
    """One row of the README's table.

    Attributes:
        family: as people know it.
        model, config: classes of transformers.
        settings: of the config, beside `tiny.SHAPE`.
        apart: what it does otherwise than Llama.
    """

    family: str
    model: str
    config: str
    settings: dict[str, Any]
    apart: str


def _named(family: str, name: str, apart: str, **settings: Any) -> Architecture:
    return Architecture(family, f"{name}ForCausalLM", f"{name}Config", settings, apart)


ZOO = {
    architecture.family: architecture
    for architecture in (
        _named("Llama", "Llama", "–"),
        _named("Qwen2", "Qwen2", "biases in attention", tie_word_embeddings=True),
        _named("Qwen3", "Qwen3", "query and key norms", head_dim=6),
        _named("Mistral", "Mistral", "sliding window", sliding_window=4),
        _named(
            "Gemma 2",
            "Gemma2",
            "scaled embeddings, tied head, norms after the sublayers, soft-capped logits, "
            "sliding window in every other layer",
            head_dim=6,
            sliding_window=4,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
        ),
        Architecture(
            "Gemma 3",
            "Gemma3ForCausalLM",
            "Gemma3TextConfig",
            {"head_dim": 6, "sliding_window": 4, "layer_types": None},
            "as Gemma 2 without soft-caps, two rotary tables",
        ),
        _named("Phi-3", "Phi3", "fused projections"),
        _named("OLMo", "Olmo", "norms without weights"),
        _named("OLMo 2", "Olmo2", "norms after the sublayers"),
        _named("GPT-NeoX", "GPTNeoX", "attention and MLP in parallel, other names"),
        Architecture(
            "GPT-2",
            "GPT2LMHeadModel",
            "GPT2Config",
            {"n_inner": 40},
            "learned positions, tied head, other names",
        ),
        _named(
            "Granite",
            "Granite",
            "scaled embeddings, residuals and logits",
            embedding_multiplier=3.0,
            residual_multiplier=0.5,
            logits_scaling=2.0,
        ),
        _named("Cohere", "Cohere", "attention and MLP in parallel, scaled logits", logit_scale=0.5),
        _named("StarCoder 2", "Starcoder2", "biases everywhere, two-layer MLP"),
        _named("BLOOM", "Bloom", "ALiBi, norm after the embedding, MLP adds the residual"),
        _named("Mixtral", "Mixtral", "experts, beside the whole block", num_local_experts=4),
        _named(
            "Qwen3-MoE",
            "Qwen3Moe",
            "experts, beside the whole block",
            head_dim=6,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
        ),
        _named(
            "gpt-oss",
            "GptOss",
            "experts whose block returns a tuple, attention sinks",
            head_dim=6,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=4,
        ),
    )
}


def make(
    family: str, seed: int = 0, dtype: torch.dtype = torch.float32, num_layers: int = 3
) -> PreTrainedModel:
    """A random model of one of `ZOO`, with weights far from those of a fresh one."""
    entry = ZOO[family]
    config = getattr(transformers, entry.config)(
        **{**SHAPE, "num_hidden_layers": num_layers, **entry.settings}
    )
    return random_model(getattr(transformers, entry.model), config, seed).to(dtype)


def table() -> str:
    """The rows of `ZOO` in Markdown."""
    rows = [f"| {a.family} | `{a.model}` | {a.apart} |" for a in ZOO.values()]
    return "\n".join(["| architecture | class | beside Llama's parts |", "|---|---|---|", *rows])


def readme_with_table(readme: str) -> str:
    """The README with the table of this zoo between its marks."""
    before, _, rest = readme.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return f"{before}{_BEGIN}\n{table()}\n{_END}{after}"


README = Path(__file__).parents[1] / "README.md"
_BEGIN = "<!-- architectures: written by python tests/zoo.py -->"
_END = "<!-- end of architectures -->"

if __name__ == "__main__":
    README.write_text(readme_with_table(README.read_text(encoding="utf-8")), encoding="utf-8")

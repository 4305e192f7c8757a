"""The shape of a model, read without loading it.

Qwen2- and Llama-like decoders: grouped-query attention, a gated MLP of three products, RMSNorm.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tca_fast.errors import UserError

_NEEDED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)
# What these count for holds for no other: experts, MLPs of two products or of other names.
_PLANNED = {
    *("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "phi3", "olmo"),
    *("olmo2", "granite", "cohere"),
}
# Architectures whose query, key and value products have a bias that config.json does not mention.
_BIASED = {"qwen2"}
# Architectures whose head is the embedding unless config.json says otherwise.
_TIED = {"gemma", "gemma2", "gemma3_text", "cohere"}


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a causal language model, in the names of Hugging Face's config.json.

    Attributes:
        hidden_size: D.
        intermediate_size: inner width of the gated MLP.
        num_hidden_layers: L.
        num_attention_heads, num_key_value_heads, head_dim: of attention.
        vocab_size: V, rows of the embedding.
        tie_word_embeddings: the head is the embedding.
        attention_bias: query, key and value products add a bias.
        source: where these numbers come from.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    source: str = "given"

    @property
    def query_width(self) -> int:
        """Width of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Width of all key heads together, which is also that of the value heads."""
        return self.num_key_value_heads * self.head_dim

    @property
    def mlp_parameters(self) -> int:
        """Parameters of one gated MLP."""
        return 3 * self.hidden_size * self.intermediate_size

    @property
    def attention_parameters(self) -> int:
        """Parameters of one layer beside its MLP: attention and two norms."""
        products = 2 * self.hidden_size * (self.query_width + self.key_width)
        bias = (self.query_width + 2 * self.key_width) if self.attention_bias else 0
        return products + bias + 2 * self.hidden_size

    @property
    def outer_parameters(self) -> int:
        """Embedding, head and final norm."""
        tables = 1 if self.tie_word_embeddings else 2
        return tables * self.vocab_size * self.hidden_size + self.hidden_size

    @property
    def parameters(self) -> int:
        """All of them."""
        per_layer = self.mlp_parameters + self.attention_parameters
        return self.num_hidden_layers * per_layer + self.outer_parameters

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str, field: str) -> ModelShape:
        """The shape that a config.json, or options with its names, describes.

        Args:
            config: at least width, inner width, layers, heads and vocabulary.
            source: of the numbers, for the reader of a plan.
            field: named in errors.

        Raises:
            UserError: a number is missing or not a positive integer, or the architecture is
                another one.
        """
        architecture = config.get("model_type")
        if architecture is not None and architecture not in _PLANNED:
            raise UserError(
                f"{field}: {source} is of model_type {architecture!r}, which is not planned; "
                f"planned are {', '.join(sorted(_PLANNED))}"
            )
        missing = [name for name in _NEEDED if name not in config]
        if missing:
            raise UserError(f"{field}: {source} has no {missing[0]}; it needs {', '.join(_NEEDED)}")
        heads = config["num_attention_heads"]
        numbers = {name: config[name] for name in _NEEDED}
        numbers["num_key_value_heads"] = config.get("num_key_value_heads") or heads
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{field}: {source} has {name}={value!r}; give a positive integer")
        return cls(
            **numbers,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            tie_word_embeddings=bool(config.get("tie_word_embeddings", architecture in _TIED)),
            attention_bias=bool(config.get("attention_bias", config.get("model_type") in _BIASED)),
            source=source,
        )


def _qwen2(
    size: tuple[int, int, int, int, int, int], vocab_size: int, is_tied: bool = False
) -> dict[str, Any]:
    width, mlp, layers, heads, kv_heads, head_dim = size
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab_size,
        "tie_word_embeddings": is_tied,
        "model_type": "qwen2",
    }


_1P5B = (1536, 8960, 28, 12, 2, 128)
_7B = (3584, 18944, 28, 28, 4, 128)
_32B = (5120, 27648, 64, 40, 8, 128)
# From config.json of these repositories on the Hugging Face hub, so that a plan of the paper's runs
# needs no network. Their parameters add up to what the hub shows for the weights.
KNOWN: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-Math-1.5B": _qwen2(_1P5B, 151_936, is_tied=True),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": _qwen2(_1P5B, 151_936),
    "Qwen/Qwen2.5-Math-7B": _qwen2(_7B, 152_064),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": _qwen2(_7B, 152_064),
    "Qwen/Qwen2.5-32B": _qwen2(_32B, 152_064),
    "Qwen/QwQ-32B": _qwen2(_32B, 152_064),
}


def read_shape(name: str, field: str, revision: str | None = None) -> ModelShape:
    """The shape of a model by its local directory or hub id; never touches the network.

    Looked for in this order: `config.json` in the directory, the hub's cache on this machine, the
    table of the paper's models.

    Args:
        name: local directory or hub id.
        field: named in errors, such as "pair.target".
        revision: hub revision.

    Raises:
        UserError: found nowhere, or not readable.
    """
    path = Path(name) / "config.json"
    if not path.exists():
        path = _cached(name, revision) or path
    if path.exists():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{field}: {path} cannot be read as JSON ({error}); mend it") from None
        if not isinstance(config, dict):
            raise UserError(f"{field}: {path} is not a JSON object; give a model directory")
        return ModelShape.from_config(config, str(path), field)
    if name in KNOWN:
        source = f"the table of tca_fast (config.json of {name})"
        return ModelShape.from_config(KNOWN[name], source, field)
    raise UserError(
        f"{field}: the shape of {name!r} is not known here; give a local model directory, or the "
        "numbers of its config.json with --shape"
    )


def _cached(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None

"""The tokenizer of a model, as its files say."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model, or None where the model has none.

    A tokenizer that declares the generic class is read as its tokenizer.json says. `AutoTokenizer`
    would take the class of the model type instead, which for Qwen2 replaces the splitting rules
    and drops what its byte-level vocabulary does not know.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    try:
        declared = get_tokenizer_config(name, revision=revision).get("tokenizer_class")
        if declared in ("TokenizersBackend", "PreTrainedTokenizerFast"):
            return PreTrainedTokenizerFast.from_pretrained(name, revision=revision)
        return AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError, TypeError):
        return None

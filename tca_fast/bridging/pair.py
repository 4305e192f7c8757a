"""Does this base fit this target? Asked before anything is loaded or trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tca_fast.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

# What must be equal, and what a difference would break.
_FIELDS = {
    "model_type": "the MLPs belong to other architectures",
    "num_hidden_layers": "every layer of the target needs an MLP of the base",
    "hidden_size": "the base's MLPs cannot read the target's residual stream",
    "intermediate_size": "the MLPs differ in shape",
    "hidden_act": "the MLPs compute different functions",
    "vocab_size": "the two models' logits cannot be compared",
    "rope_parameters": "attention of the two models rotates differently",
    "layer_types": "attention of the two models sees different windows",
    "sliding_window": "attention of the two models sees different windows",
    "tie_word_embeddings": "one model's head is its embedding, the other's is not",
}

#: Differences a pair may be allowed to have when the backbone is the target, whose own setting is
#: then used throughout (contract §2.4): only the base's MLPs are taken.
ACCEPTABLE = ("rope_parameters", "tie_word_embeddings")

# Of attention alone and without a part in any weight: nothing is asked where the target's is used.
_OF_THE_BACKBONE = ("sliding_window",)


def check_pair(
    base: PretrainedConfig,
    target: PretrainedConfig,
    *,
    backbone: str = "target",
    accept: Sequence[str] = (),
) -> None:
    """Refuse two model configurations whose MLPs or vocabularies do not fit.

    Args:
        base: configuration of the MLP donor.
        target: configuration of the fine-tuned model.
        backbone: "target" or "base", as in `PairConfig`.
        accept: fields of `ACCEPTABLE` that may differ.

    Raises:
        UserError: names the first field that differs, and both values.
    """
    for field, consequence in _FIELDS.items():
        for setting, ours, theirs in _differences(field, base, target):
            if backbone == "target" and field in (*accept, *_OF_THE_BACKBONE):
                continue
            remedy = "choose a base and a target of one family and size"
            if field in ACCEPTABLE and backbone == "target":
                remedy += (
                    f", or add {field} to pair.accept_differences to use the target's throughout"
                )
            raise UserError(
                f"pair: {setting} is {ours!r} in the base and {theirs!r} in the target, so "
                f"{consequence}; {remedy}"
            )


def check_tokenizers(base: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase) -> None:
    """Refuse tokenizers that give an ordinary token different ids.

    Added tokens may differ: chat and reasoning markers are what tuning usually changes.

    Raises:
        UserError: names a token and both ids.
    """
    ours, theirs = _ordinary_tokens(base), _ordinary_tokens(target)
    for token in sorted(ours.keys() | theirs.keys()):
        if ours.get(token) != theirs.get(token):
            raise UserError(
                f"pair: tokenizer gives {token!r} the id {ours.get(token)} in the base and "
                f"{theirs.get(token)} in the target; choose models with one vocabulary"
            )


def _ordinary_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    added = tokenizer.get_added_vocab()
    return {token: i for token, i in tokenizer.get_vocab().items() if token not in added}


def _differences(
    field: str, base: PretrainedConfig, target: PretrainedConfig
) -> list[tuple[str, Any, Any]]:
    """(setting, base's value, target's value) wherever the two differ in a field."""
    ours, theirs = getattr(base, field, None), getattr(target, field, None)
    if isinstance(ours, dict) and isinstance(theirs, dict):
        settings = [
            (f"{field}.{key}", ours.get(key), theirs.get(key))
            for key in sorted(ours.keys() | theirs.keys())
        ]
    else:
        settings = [(field, ours, theirs)]
    return [setting for setting in settings if setting[1] != setting[2]]

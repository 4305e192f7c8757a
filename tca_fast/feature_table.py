"""The active features of a text, token by token, for people to look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tca_fast import activations
from tca_fast.errors import UserError
from tca_fast.ops import ActiveFeatures
from tca_fast.subject import evaluated

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tca_fast.adapted_model import AdaptedModel

_SHOWN_FEATURES = 5
_SHOWN_TOKENS = 60


@dataclass(frozen=True)
class FeatureTable:
    """Tokens by active features.

    Attributes:
        tokens: the text's tokens as text.
        layers: active features of these tokens, one entry per decoder layer.
    """

    tokens: list[str]
    layers: list[ActiveFeatures]

    def of_token(self, index: int) -> list[tuple[int, int, float]]:
        """(layer, feature, activation) of everything active at one token, strongest first.

        Args:
            index: of the token; a negative one counts from the end.

        Raises:
            IndexError: there is no such token.
        """
        index = range(len(self.tokens))[index]
        found = []
        for layer, active in enumerate(self.layers):
            row = slice(int(active.row_ptr[index]), int(active.row_ptr[index + 1]))
            pairs = zip(active.feature[row].tolist(), active.value[row].tolist(), strict=True)
            found += [(layer, feature, value) for feature, value in pairs]
        return sorted(found, key=lambda entry: -entry[2])

    def of_feature(self, layer: int, feature: int) -> list[float]:
        """The activation of one feature at every token, 0 where it is inactive.

        Raises:
            IndexError: there is no such layer or feature.
        """
        for name, index, count in (
            ("layer", layer, len(self.layers)),
            ("feature", feature, self.layers[0].num_features),
        ):
            if not 0 <= index < count:
                raise IndexError(f"{name}: {index} is none of 0..{count - 1}")
        return self.layers[layer].to_dense()[:, feature].tolist()

    def __repr__(self) -> str:
        """One line per token: how many features are active in all layers, and the strongest."""
        labels = [repr(token)[1:-1] for token in self.tokens[:_SHOWN_TOKENS]]
        width = max(map(len, ["token", *labels]))
        lines = [f"{'token':<{width}}  active  strongest, as layer/feature activation"]
        for index, label in enumerate(labels):
            active = self.of_token(index)
            shown = "  ".join(f"{la}/{f} {value:.2f}" for la, f, value in active[:_SHOWN_FEATURES])
            lines.append(f"{label:<{width}}  {len(active):>6}  {shown}".rstrip())
        if len(self.tokens) > len(labels):
            lines.append(f"... and {len(self.tokens) - len(labels)} more tokens")
        return "\n".join(lines)


def tabulate(
    adapted: AdaptedModel, text: str, tokenizer: PreTrainedTokenizerBase | None
) -> FeatureTable:
    """Run a text through the adapted model once; see `AdaptedModel.features`."""
    if not isinstance(text, str):
        raise UserError(f"text: {type(text).__name__} is no text; give one str")
    tokenizer = tokenizer or _tokenizer_of(adapted)
    if not callable(tokenizer):
        raise UserError(
            f"tokenizer: {tokenizer!r} is none; give AutoTokenizer.from_pretrained of a name"
        )
    input_ids = tokenizer(text, return_tensors="pt")["input_ids"]
    if input_ids.shape[1] == 0:
        raise UserError("text: has no tokens; give some text")
    known = adapted.model.get_input_embeddings().num_embeddings
    if (largest := int(input_ids.max())) >= known:
        raise UserError(
            f"tokenizer: gives token {largest}, and the model knows {known}; give the model's own"
        )
    if not all(wrapped.enabled for wrapped in adapted.wrapped):
        raise UserError("adapters: are switched off here, so no feature fires; call it outside")
    input_ids = input_ids.to(adapted.model.device)
    with torch.no_grad(), evaluated(adapted) as model, activations.record() as recording:
        model(input_ids=input_ids, use_cache=False)
    tokens = [tokenizer.decode([token]) for token in input_ids[0].tolist()]
    return FeatureTable(tokens, [recording.layer(layer) for layer in range(len(adapted.layers))])


def _tokenizer_of(adapted: AdaptedModel) -> PreTrainedTokenizerBase:
    from tca_fast.tokenizer import load_tokenizer

    name = adapted.model.config._name_or_path
    found = load_tokenizer(name) if name else None
    if found is None:
        raise UserError(
            f"tokenizer: {name or 'this model'!r} comes without one; pass features(text, tokenizer)"
        )
    return found

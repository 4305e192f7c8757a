"""The model under measurement: adapters or none, in eval mode for as long as it is measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tca_fast.adapted_model import AdaptedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def evaluated(model: PreTrainedModel | AdaptedModel) -> Iterator[PreTrainedModel]:
    """The Hugging Face model in eval mode (no dropout); every module gets its own mode back."""
    bare = model.model if isinstance(model, AdaptedModel) else model
    modes = [(module, module.training) for module in bare.modules()]
    bare.eval()
    try:
        yield bare
    finally:
        for module, training in modes:
            module.training = training

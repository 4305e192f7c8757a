"""The residual stream of a model, read while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tca_fast.architectures.structure import decoder_parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def residual_states(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collect the residual stream of the forward pass inside the block (contract §3.3).

    Yields:
        A list that receives h_0..h_L, each [B, S, D]: the input of every decoder layer and the
        input of the final norm. (`output_hidden_states` has the last one after the norm.)
    """
    parts = decoder_parts(model)
    states: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    watched = [*parts.layers, parts.final_norm]
    hooks = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in watched]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()

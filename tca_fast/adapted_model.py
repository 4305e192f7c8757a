"""A model with adapters beside its MLPs, as its user holds it: sets, gains, recordings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tca_fast import activations
from tca_fast.adapter import AdaptedMLP, TranscoderAdapter
from tca_fast.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tca_fast.adapter_config import Provenance
    from tca_fast.config import AdapterConfig
    from tca_fast.feature_table import FeatureTable

DEFAULT_NAME = "default"
NO_MERGE = (
    "merge: transcoder adapters cannot be merged, because the activation between encoder and "
    "decoder is not linear; keep them beside the MLPs"
)


@dataclass
class NamedAdapters:
    """One adapter for every decoder layer, and what is known of them.

    Attributes:
        config: shape and activation.
        layers: the adapters.
        provenance: models they were trained on, where they come from a checkpoint.
    """

    config: AdapterConfig
    layers: list[TranscoderAdapter]
    provenance: Provenance | None = None


class AdaptedModel:
    """A model whose MLPs have adapters beside them; made by `attach` or `load`.

    It may hold several sets of adapters by name. One of them is active: it alone is part of the
    model, so it alone runs, is trained and is saved; the others wait outside.

    Attributes:
        model: the Hugging Face model, changed in place; use it as before.
        wrapped: the MLPs with their adapters, one per decoder layer.
        active: name of the active set.
    """

    def __init__(self, model: PreTrainedModel, config: AdapterConfig) -> None:
        """Collect the adapters of a model; use `attach` to make them."""
        self.model = model
        self.wrapped = [module for module in model.modules() if isinstance(module, AdaptedMLP)]
        self.active = DEFAULT_NAME
        self._sets = {self.active: NamedAdapters(config, [mlp.adapter for mlp in self.wrapped])}

    @property
    def config(self) -> AdapterConfig:
        """Shape and activation of the active adapters."""
        return self._sets[self.active].config

    @property
    def layers(self) -> list[TranscoderAdapter]:
        """The active adapters, one per decoder layer."""
        return self._sets[self.active].layers

    @property
    def provenance(self) -> Provenance | None:
        """Models the active adapters were trained on, where they come from a checkpoint."""
        return self._sets[self.active].provenance

    @provenance.setter
    def provenance(self, provenance: Provenance | None) -> None:
        self._sets[self.active].provenance = provenance

    @property
    def names(self) -> list[str]:
        """Names of all sets of adapters, in the order they came."""
        return list(self._sets)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward."""
        self._check_attached()
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate`."""
        self._check_attached()
        return self.model.generate(*args, **kwargs)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The active adapters' parameters, which are all that is trained."""
        for layer in self.layers:
            yield from layer.parameters()

    @contextmanager
    def disabled(self) -> Iterator[AdaptedModel]:
        """Run the block without the adapters: the model as it was before `attach`."""
        self._check_attached()
        before = [wrapped.enabled for wrapped in self.wrapped]
        for wrapped in self.wrapped:
            wrapped.enabled = False
        try:
            yield self
        finally:
            for wrapped, enabled in zip(self.wrapped, before, strict=True):
                wrapped.enabled = enabled

    def add(
        self,
        name: str,
        config: AdapterConfig | None = None,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Make one more set of fresh adapters; `use` makes it the active one.

        Args:
            name: not in use yet.
            config, seed, dtype: as in `attach`.

        Raises:
            UserError: the name is in use.
        """
        self._check_new(name)
        width = self.layers[0].W_enc.shape[1]
        mlps = [wrapped.mlp for wrapped in self.wrapped]
        self._sets[name] = fresh_adapters(mlps, width, config, seed, dtype)

    def load(
        self,
        name: str,
        directory: str | Path,
        *,
        revision: str | None = None,
        check_model: bool = True,
    ) -> None:
        """Read one more set of adapters from a checkpoint; `use` makes it the active one.

        Args:
            name: not in use yet.
            directory, revision, check_model: as in `tca_fast.load`.

        Raises:
            UserError: the name is in use, or whatever `tca_fast.load` refuses.
        """
        from tca_fast import checkpoint

        self._check_new(name)
        info, tensors = checkpoint.read(
            self.model, directory, revision=revision, check_model=check_model
        )
        self.add(name, info.adapter, dtype=getattr(torch, info.dtype))
        self._sets[name].provenance = info.provenance
        checkpoint.copy_into(self._sets[name].layers, tensors)

    def use(self, name: str) -> None:
        """Make a set of adapters the active one; it goes to the device of the one it replaces.

        Raises:
            UserError: no set has that name.
        """
        self._check_attached()
        if name not in self._sets:
            raise UserError(f"name: no adapters are named {name!r}; there are {self._listed()}")
        before, after = self._sets[self.active].layers, self._sets[name].layers
        for wrapped, old, new in zip(self.wrapped, before, after, strict=True):
            wrapped.adapter = new.to(old.W_enc.device)
        self.active = name

    def remove(self, name: str) -> None:
        """Forget a set of adapters.

        Raises:
            UserError: no set has that name, or it is the active one.
        """
        if name not in self._sets or name == self.active:
            what = "is the active set, use another first" if name == self.active else "is no set"
            raise UserError(f"name: {name!r} {what}; there are {self._listed()}")
        del self._sets[name]

    def set_gain(
        self,
        layer: int | None,
        feature: int | Sequence[int] | Tensor | None,
        value: float | Sequence[float] | Tensor,
    ) -> None:
        """Multiply activations in every pass from now on (1 by default, 0 ablates).

        Args:
            layer: of the active adapters; None is all layers.
            feature: one, several (a list, an array or a tensor), or None for all features of the
                layer.
            value: the multiplier, or, with one feature or None, one for each row of the batches
                to come.

        Raises:
            UserError: no such layer or feature, a gain that is not finite, or several for several
                features.
        """
        self._check_attached()
        if layer is not None and not (_is_integer(layer) and 0 <= layer < len(self.layers)):
            raise UserError(
                f"layer: {layer!r} is none of 0..{len(self.layers) - 1}; give one, or None for all"
            )
        for adapter in self.layers if layer is None else [self.layers[layer]]:
            adapter.set_gain(feature, value)

    @contextmanager
    def gains(
        self,
        values: Mapping[tuple[int | None, int | None], float | Sequence[float] | Tensor],
    ) -> Iterator[AdaptedModel]:
        """Run the block with gains, and give back those that were set before.

        Args:
            values: {(layer, feature): value} as in `set_gain`, applied in order.

        Raises:
            UserError: as in `set_gain`; no gain is then changed.
        """
        self._check_attached()
        if not isinstance(values, Mapping):
            raise UserError(f"gains: {values!r} is no dict; write {{(3, 17): 0.0}}")
        layers = self.layers
        before = [adapter.gain for adapter in layers]
        try:
            for place, value in values.items():
                if not (isinstance(place, tuple) and len(place) == 2):
                    raise UserError(
                        f"gains: {place!r} is no pair of layer and feature; write {{(3, 17): 0.0}}"
                    )
                self.set_gain(*place, value)
            yield self
        finally:
            for adapter, gain in zip(layers, before, strict=True):
                adapter.gain = gain

    def clear_gains(self) -> None:
        """Set the gain of every feature of the active adapters back to 1."""
        for adapter in self.layers:
            adapter.clear_gain()

    def record(self) -> AbstractContextManager[activations.Recording]:
        """Record the active features of every layer and pass of the block, see `activations`."""
        return activations.record()

    def features(self, text: str, tokenizer: PreTrainedTokenizerBase | None = None) -> FeatureTable:
        """The active features of every token of a text, as a table to look at.

        Args:
            text: encoded as the tokenizer does by default.
            tokenizer: None is the one the model was loaded with.

        Raises:
            UserError: there is no tokenizer where the model came from.
        """
        self._check_attached()
        from tca_fast import feature_table

        return feature_table.tabulate(self, text, tokenizer)

    def merge(self) -> None:
        """Refused: an adapter is not linear.

        Raises:
            UserError: always.
        """
        raise UserError(NO_MERGE)

    def save_pretrained(self, directory: str | Path, provenance: Provenance | None = None) -> None:
        """Write the active adapters (and nothing of the model) to a directory; see `checkpoint`.

        Raises:
            UserError: as `checkpoint.save_pretrained`, or the model's layers are not those that
                were attached to.
        """
        from tca_fast import checkpoint

        here = [module for module in self.model.modules() if isinstance(module, AdaptedMLP)]
        if here and [*map(id, here)] != [*map(id, self.wrapped)]:
            raise UserError(
                f"model: has {len(here)} layers with adapters, not the {len(self.wrapped)} that "
                "were attached to; change its layers first and attach then"
            )
        checkpoint.save_pretrained(self, directory, provenance)

    def _check_attached(self) -> None:
        if not all(wrapped.is_attached for wrapped in self.wrapped):
            raise UserError(
                "model: these adapters were detached from it; attach or load them again"
            )

    def _check_new(self, name: str) -> None:
        self._check_attached()
        if not isinstance(name, str) or not name:
            raise UserError(f"name: {name!r} is no name; give a text")
        if name in self._sets:
            raise UserError(f"name: adapters named {name!r} are there already; choose another name")

    def _listed(self) -> str:
        return ", ".join(map(repr, self._sets))


def fresh_adapters(
    mlps: Sequence[nn.Module],
    width: int,
    config: AdapterConfig | None,
    seed: int,
    dtype: torch.dtype,
) -> NamedAdapters:
    """An adapter for every MLP, on its device."""
    if config is None:
        from tca_fast.config import AdapterConfig

        config = AdapterConfig()
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UserError(f"dtype: {dtype!r} is no floating-point dtype; pass torch.bfloat16")
    if not _is_integer(seed):
        raise UserError(f"seed: {seed!r} is no integer; pass one, such as 0")
    generator = torch.Generator().manual_seed(int(seed))
    adapters = NamedAdapters(config, [])
    for mlp in mlps:
        device = next((p.device for p in mlp.parameters()), None)
        adapters.layers.append(
            TranscoderAdapter(width, config, generator=generator, device=device, dtype=dtype)
        )
    return adapters


def _is_integer(value: Any) -> bool:
    """Whether it counts as one for Python, as numbers of numpy do; True and False do not here."""
    return isinstance(value, Integral) and not isinstance(value, bool)

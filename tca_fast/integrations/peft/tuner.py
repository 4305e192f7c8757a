"""The layer and the model class that PEFT asks a method for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from tca_fast.adapted_model import NO_MERGE
from tca_fast.adapter import AdaptedMLP, TranscoderAdapter, add_branches
from tca_fast.adapter_config import CONFIG_NAME, WEIGHTS_NAME
from tca_fast.architectures.structure import MLP_NAME, decoder_parts
from tca_fast.checkpoint import check_fingerprint, check_shape
from tca_fast.errors import UserError
from tca_fast.fingerprint import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tca_fast.integrations.peft.configuration import TranscoderAdapterConfig


class TranscoderAdapterLayer(nn.Module, BaseTunerLayer):
    """A frozen MLP with any number of named adapters beside it, in the place of the MLP.

    Attributes:
        base_layer: the MLP, untouched.
        adapter: adapters by name; those that are active add up.
        layer: index of the decoder layer, for statistics.
    """

    adapter_layer_names = ("adapter",)
    active_adapters: list[str]

    def __init__(self, base_layer: nn.Module, layer: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapter = nn.ModuleDict()
        self.layer = layer

    def add(self, name: str, adapter: TranscoderAdapter) -> None:
        """Put one more adapter beside the MLP, on its device."""
        parameter = next(self.base_layer.parameters(), None)
        if parameter is not None and not adapter.W_enc.is_meta:
            adapter = adapter.to(parameter.device)
        self.adapter[name] = adapter

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """MLP plus active adapters, as `AdaptedMLP.forward` has it."""
        mlp_out = self.base_layer(hidden_states, *args, **kwargs)
        if self.disable_adapters:
            return mlp_out
        active = [
            cast(TranscoderAdapter, self.adapter[name])
            for name in self.active_adapters
            if name in self.adapter
        ]
        return add_branches(active, self.layer, hidden_states, mlp_out)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused, see `TranscoderAdapterModel`."""
        raise UserError(NO_MERGE)

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        parameter = next(self.base_layer.parameters(), None)
        if adapter_name in self.adapter and parameter is not None:
            self.adapter[adapter_name].to(device or parameter.device)


class TranscoderAdapterModel(BaseTuner):
    """A causal language model with transcoder adapters, inside a `PeftModel`.

    Adapters keep the dtype of their file (float32 when fresh) whatever `autocast_adapter_dtype`
    says, because they are cast to the dtype of the activations when they are used. They cannot
    be merged: the activation between encoder and decoder is not linear.
    """

    prefix = "adapter"
    tuner_layer_cls = TranscoderAdapterLayer
    target_module_mapping: dict[str, list[str]] = {}

    def _prepare_adapter_config(
        self, peft_config: TranscoderAdapterConfig, model_config: dict[str, Any]
    ) -> TranscoderAdapterConfig:
        return peft_config

    def _prepare_model(self, peft_config: TranscoderAdapterConfig, model: PreTrainedModel) -> None:
        """Refuse a model that the adapters do not belong to, before it is changed."""
        if any(isinstance(module, AdaptedMLP) for module in model.modules()):
            raise UserError(
                "model: adapters are already attached; call tca_fast.detach(model) first"
            )
        with _bare(model):
            marks = fingerprint(model)
        if peft_config.from_file:
            info = peft_config.info()
            check_shape(model, info, CONFIG_NAME)
            check_fingerprint(marks, info, CONFIG_NAME, _OTHERWISE)
        else:
            peft_config.attach_to(model, marks)
        # One generator for all layers, as in `attach`, so that equal seeds give equal adapters.
        self._generator = torch.Generator().manual_seed(peft_config.seed)

    def _create_and_replace(
        self,
        peft_config: TranscoderAdapterConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        info = peft_config.info()
        adapter = TranscoderAdapter(
            info.hidden_size,
            info.adapter,
            generator=self._generator,
            dtype=getattr(torch, peft_config.dtype),
        )
        if adapter_name not in self.active_adapters:
            adapter.requires_grad_(False)
        if not isinstance(target, TranscoderAdapterLayer):
            target = TranscoderAdapterLayer(target, int(current_key.split(".")[-2]))
            self._replace_module(parent, target_name, target, target)
        target.add(adapter_name, adapter)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # PEFT's own moves a Linear's weight along; an MLP goes as a whole.
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Refuse what PEFT would drop without a word: an adapter for every row of a batch."""
        if kwargs.get("adapter_names") is not None:
            raise UserError(
                f"adapter_names: {kwargs['adapter_names']!r} cannot be used here, because all rows "
                "of a batch run with the same adapters; call set_adapter(name) and run the rows of "
                "each adapter apart"
            )
        yield

    def _check_merge_allowed(self) -> None:
        raise UserError(NO_MERGE)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Nothing: see the class."""

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: TranscoderAdapterConfig,
        adapter_name: str,
        state_dict: Mapping[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        found = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        expected = _parameters(model, adapter_name, config)
        _compare(found, expected, "state_dict", "gather the shards before saving (ZeRO-3, FSDP)")
        dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in found.values()}
        if len(dtypes) != 1:
            raise UserError(
                f"adapter {adapter_name!r}: parameters are {' and '.join(sorted(dtypes))}; a "
                "checkpoint has one dtype, so convert the adapter before saving"
            )
        config.dtype = dtypes.pop()
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: TranscoderAdapterConfig,
        adapter_name: str,
        state_dict: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        tensors = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        # PEFT loads what fits and warns; half an adapter gives wrong results without an error.
        expected = _parameters(model, adapter_name, config)
        _compare(tensors, expected, WEIGHTS_NAME, "save the adapters again")
        return tensors


_OTHERWISE = (
    "let tca_fast.integrations.peft.from_pretrained put it together, or pass "
    "PeftModel.from_pretrained a config whose fingerprint is None"
)


@contextmanager
def _bare(model: PreTrainedModel) -> Iterator[None]:
    """The model inside the block as it was before any adapter came."""
    wrapped: list[tuple[nn.Module, TranscoderAdapterLayer]] = [
        (layer, getattr(layer, MLP_NAME))
        for layer in decoder_parts(model).layers
        if isinstance(getattr(layer, MLP_NAME), TranscoderAdapterLayer)
    ]
    for layer, mlp in wrapped:
        setattr(layer, MLP_NAME, mlp.base_layer)
    try:
        yield
    finally:
        for layer, mlp in wrapped:
            setattr(layer, MLP_NAME, mlp)


def _parameters(
    model: nn.Module, adapter_name: str, config: TranscoderAdapterConfig
) -> dict[str, tuple[int, ...]]:
    """Names in the model and full shapes of one adapter's parameters."""
    info = config.info()
    features, width = info.adapter.num_features, info.hidden_size
    shapes = {
        "W_enc": (features, width),
        "b_enc": (features,),
        "W_dec": (features, width),
        "b_dec": (width,),
    }
    return {
        f"{path}.adapter.{adapter_name}.{name}": shapes[name]
        for path, module in model.named_modules()
        if isinstance(module, TranscoderAdapterLayer) and adapter_name in module.adapter
        for name, _ in module.adapter[adapter_name].named_parameters()
    }


def _compare(
    found: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], source: str, remedy: str
) -> None:
    for name in sorted(found.keys() ^ expected.keys()):
        problem = "is missing" if name in expected else "belongs to no adapter here"
        raise UserError(f"{source}: {name} {problem}; {remedy}")
    for name, shape in expected.items():
        if tuple(found[name].shape) != shape:
            raise UserError(
                f"{source}: {name} has shape {list(found[name].shape)} instead of {list(shape)}; "
                f"{remedy}"
            )

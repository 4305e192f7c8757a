"""Transcoder adapters as a PEFT method; importing this module registers it.

    import tca_fast.integrations.peft

    model = PeftModel.from_pretrained(model, "my-adapter")  # and everything else PEFT does

PEFT knows its methods by an enumeration that other packages cannot add to, so the member is put
there by hand; its tables of methods are filled by PEFT's own `register_peft_method`. Files are
those of `tca_fast.checkpoint`, byte for byte: either side reads what the other wrote.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tca_fast.adapter_config import PEFT_TYPE, PEFT_TYPE_IN_FILES
from tca_fast.checkpoint import local_directory

try:
    from peft.utils import PeftType, register_peft_method
except ImportError as error:
    raise ImportError(
        f"tca_fast.integrations.peft needs PEFT ({error}); pip install 'peft>=0.21'"
    ) from error

if TYPE_CHECKING:
    from peft import PeftModel


def _add_member() -> None:
    """`PeftType.TRANSCODER_ADAPTER`, as if it had been written into the class."""
    member = str.__new__(PeftType, PEFT_TYPE)
    member._name_ = PEFT_TYPE
    member._value_ = PEFT_TYPE
    PeftType._member_names_.append(PEFT_TYPE)
    PeftType._member_map_[PEFT_TYPE] = member
    PeftType._value2member_map_[PEFT_TYPE] = member
    type.__setattr__(PeftType, PEFT_TYPE, member)


def _register() -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE_IN_FILES] = TranscoderAdapterConfig
    register_peft_method(
        name=PEFT_TYPE.lower(),
        config_cls=TranscoderAdapterConfig,
        model_cls=TranscoderAdapterModel,
        prefix=TranscoderAdapterModel.prefix,
    )


def from_pretrained(
    directory: str | Path,
    *,
    base: str | None = None,
    target: str | None = None,
    revision: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: str = "cpu",
    is_trainable: bool = False,
) -> PeftModel:
    """The whole model of a checkpoint as a `PeftModel`, the base's MLPs included.

    `AutoPeftModelForCausalLM` would take the model named in the checkpoint as it is, but adapters
    with backbone "target" belong beside the base's MLPs.

    Args:
        directory: written by either side's `save_pretrained` or by a training run, or a hub id.
        base, target: where the two models are now; None is where they were in training.
        revision: of the adapters' hub repository.
        dtype: of the frozen weights, as in `PairConfig`.
        device: where the model goes.
        is_trainable: whether the adapters are to be trained further.

    Raises:
        UserError: the checkpoint or a model cannot be read, names no models, or does not fit.
    """
    from peft import PeftModel

    from tca_fast.bridging.streams import load_backbone

    local = local_directory(directory, revision)
    model = load_backbone(local, base=base, target=target, dtype=dtype, device=device)
    return PeftModel.from_pretrained(model, str(local), is_trainable=is_trainable)


_add_member()

# The class names the member that was just made.
from tca_fast.integrations.peft.configuration import TranscoderAdapterConfig  # noqa: E402
from tca_fast.integrations.peft.tuner import (  # noqa: E402
    TranscoderAdapterLayer,
    TranscoderAdapterModel,
)

_register()

__all__ = [
    "TranscoderAdapterConfig",
    "TranscoderAdapterLayer",
    "TranscoderAdapterModel",
    "from_pretrained",
]

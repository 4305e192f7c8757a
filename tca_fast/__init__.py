"""Transcoder adapters: sparse branches beside frozen MLPs (arXiv 2602.20904).

Names are imported when first used, so that importing the package costs no more than torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tca_fast.adapted_model import AdaptedModel
    from tca_fast.adapter import AdaptedMLP, TranscoderAdapter
    from tca_fast.attachment import attach, detach
    from tca_fast.bridging.streams import load_adapted
    from tca_fast.checkpoint import load
    from tca_fast.config import AdapterConfig
    from tca_fast.errors import UserError
    from tca_fast.hub.transfer import pull, push
    from tca_fast.ops import ActiveFeatures

__version__ = "0.1.0"

_HOMES = {
    "ActiveFeatures": "ops",
    "AdaptedMLP": "adapter",
    "AdaptedModel": "adapted_model",
    "AdapterConfig": "config",
    "TranscoderAdapter": "adapter",
    "UserError": "errors",
    "attach": "attachment",
    "detach": "attachment",
    "load": "checkpoint",
    "load_adapted": "bridging.streams",
    "pull": "hub.transfer",
    "push": "hub.transfer",
}

__all__ = [
    "ActiveFeatures",
    "AdaptedMLP",
    "AdaptedModel",
    "AdapterConfig",
    "TranscoderAdapter",
    "UserError",
    "attach",
    "detach",
    "load",
    "load_adapted",
    "pull",
    "push",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its home on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'tca_fast' has no attribute {name!r}")
    value = getattr(import_module(f"tca_fast.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

"""Settings of adapters and objective, as training has them by default, without pydantic.

A machine that only measures need not have what configuration files are read with. A test holds
these to `tca_fast.config`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Adapter:
    """Fields of `AdapterConfig`."""

    num_features: int = 8192
    activation: str = "relu"
    k: int | None = None
    decoder_bias: bool = True


@dataclass(frozen=True)
class Objective:
    """Fields of `ObjectiveConfig`."""

    lambda_adapt: float = 1.0
    l1_weight: float = 0.001
    l1_warmup_steps: int = 0
    lambda_nmse: float = 1.0
    lambda_bridge: float = 2.0
    num_cutoffs: int = 1
    cutoffs: str = "uniform"
    loss: str = "kl"
    auxk_weight: float = 0.0
    auxk_k: int | None = None
    step: str = "shared"
    gradient_checkpointing: bool = False

"""Which stretch of which adapter parameter a DeepSpeed rank's optimizer updates.

ZeRO 1 and 2 flatten all parameters into one vector and give every rank a contiguous part of it;
ZeRO-3 cuts every parameter into as many parts as there are ranks, the last one padded. DeepSpeed
records both on its optimizers, though under no public name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tca_fast.training.optimizer_state import Fragment


def inner_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The client's AdamW inside DeepSpeed's wrappers."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def fragments(engine: Any, parameters: Mapping[str, nn.Parameter], rank: int) -> list[Fragment]:
    """The stretches of this rank; under ZeRO-0 every rank has all of them.

    Args:
        engine: a DeepSpeed engine.
        parameters: trained parameters by their names in the adapter file.
        rank: of this process.
    """
    stage = int(engine.zero_optimization_stage())
    if stage == 0:
        return [
            Fragment(name, 0, parameter.detach().view(-1), parameter, 0)
            for name, parameter in parameters.items()
        ]
    own = _own_part_of_parameter if stage == 3 else _own_part_of_vector
    found = (own(engine, name, parameter, rank) for name, parameter in parameters.items())
    return [fragment for fragment in found if fragment is not None]


def _own_part_of_vector(
    engine: Any, name: str, parameter: nn.Parameter, rank: int
) -> Fragment | None:
    mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    (holder,) = inner_optimizer(engine).param_groups[mapping.param_group_index]["params"]
    start, numel = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
    weights = holder.detach().view(-1)[start : start + numel]
    return Fragment(name, mapping.lp_fragment_address.start, weights, holder, start)


def _own_part_of_parameter(engine: Any, name: str, parameter: Any, rank: int) -> Fragment | None:
    zero = engine.optimizer
    group, start, numel = zero.grad_position[zero.get_param_id(parameter)]
    offset = rank * numel
    numel = min(numel, parameter.ds_numel - offset)
    if numel <= 0:
        return None
    holder = zero.fp32_partitioned_groups_flat[group]
    return Fragment(name, offset, holder.detach()[start : start + numel], holder, start)


def write_working_copy(parameter: Any, whole: Tensor) -> None:
    """Set the weights that the forward pass uses, whole or this rank's part, from whole ones."""
    if not hasattr(parameter, "ds_tensor"):
        parameter.data.copy_(whole)
        return
    if parameter.data.numel() == whole.numel():
        # Below a threshold ZeRO-3 keeps a parameter whole between steps, too.
        parameter.data.copy_(whole)
    part = parameter.ds_tensor
    offset = torch.distributed.get_rank() * part.numel()
    own = whole.reshape(-1)[offset : offset + part.numel()]
    part.data[: own.numel()].copy_(own)

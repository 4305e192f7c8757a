"""Recognise the model that adapters were trained beside by a few of its weights.

Adapters fit one set of MLPs inside one backbone, and a wrong base model gives plausible but
wrong results without any error (ecosystem §1, rows 8 and 9), so a checkpoint keeps these hashes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tca_fast.adapter import AdaptedMLP
from tca_fast.architectures.structure import MLP_NAME, decoder_parts
from tca_fast.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NUM_ROWS = 64
_SMALLEST_NORMAL_HALF = 2.0**-14
_QUANTISED = (
    *(torch.int8, torch.uint8, torch.int16, torch.int32),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
)


@dataclass(frozen=True)
class Fingerprint:
    """Short hashes of the weights that adapters were trained beside.

    Attributes:
        mlp: of the MLPs of the first and last decoder layer.
        rest: of everything else in those two layers.
    """

    mlp: str
    rest: str


def fingerprinted_layers(model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    """The decoder layers whose weights a fingerprint is taken of, the first and the last."""
    layers = decoder_parts(model).layers
    return layers[0], layers[len(layers) - 1]


def fingerprint(model: PreTrainedModel) -> Fingerprint:
    """Hash some rows of every weight of the first and last decoder layer.

    Weights are rounded to bfloat16 and those too small for float16 are taken as zero, so the
    hash of a released checkpoint does not depend on the dtype it was loaded in (float16 rounds a
    float32 release otherwise, and that hash differs). Adapters do not count. It costs
    milliseconds: at most 64 evenly spaced rows per weight are read.
    """
    mlp, rest = hashlib.sha256(), hashlib.sha256()
    for layer in fingerprinted_layers(model):
        wrapped = getattr(layer, MLP_NAME)
        frozen = wrapped.mlp if isinstance(wrapped, AdaptedMLP) else wrapped
        in_mlp = {id(parameter) for parameter in wrapped.parameters()}
        _hash_weights(mlp, sorted(frozen.named_parameters()))
        others = [item for item in layer.named_parameters() if id(item[1]) not in in_mlp]
        _hash_weights(rest, sorted(others))
    return Fingerprint(mlp.hexdigest()[:16], rest.hexdigest()[:16])


def refuse_quantised(model: PreTrainedModel) -> None:
    """Say so where the MLPs differ from those of a released model because they are quantised.

    Raises:
        UserError: the first MLP holds packed integers or 8-bit floats, or no matrices at all.
    """
    mlp = getattr(decoder_parts(model).layers[0], MLP_NAME)
    tensors = dict([*mlp.named_parameters(), *mlp.named_buffers()])
    packed = [name for name, tensor in tensors.items() if tensor.dtype in _QUANTISED]
    if packed or not any(tensor.dim() >= 2 for tensor in tensors.values()):
        what = f"{packed[0]} is {tensors[packed[0]].dtype}" if packed else "no matrices are left"
        raise UserError(
            f"model: its MLP weights are quantised ({what}), so they cannot be compared with those "
            "that the adapters were trained beside; load it without quantisation, or pass "
            "check_model=False if it is meant"
        )


def _hash_weights(digest: Any, weights: list[tuple[str, nn.Parameter]]) -> None:
    for name, weight in weights:
        if weight.is_meta:
            raise UserError(
                f"fingerprint: {name} is not in memory (offloaded, or on the meta device); load "
                "the model without offloading"
            )
        if weight.numel() == 0:
            raise UserError(
                f"fingerprint: {name} holds no values here (partitioned by ZeRO-3?); take the "
                "fingerprint where they are whole and pass it in Provenance"
            )
        # The experts of a layer may be one tensor, [E, D, D'].
        rows = weight.detach().flatten(0, -2) if weight.dim() > 2 else weight.detach()
        rows = rows[:: -(-len(rows) // _NUM_ROWS)].cpu().float().to(torch.bfloat16)
        # Rounded first: a value just below the limit rounds up to it where a model is loaded in
        # bfloat16.
        rows = torch.where(rows.abs() < _SMALLEST_NORMAL_HALF, 0.0, rows)
        digest.update(str(tuple(weight.shape)).encode())
        digest.update(rows.contiguous().view(torch.int16).numpy().tobytes())

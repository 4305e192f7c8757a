"""ZeRO-3's partition of weights while they are read, so that no rank ever holds a whole model.

Left to itself, DeepSpeed partitions a model that every rank has loaded whole.
"""

from __future__ import annotations

import gc
import hashlib
import json
import socket
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tca_fast.errors import UserError

if TYPE_CHECKING:
    from tca_fast.training.deepspeed_engine import DeepSpeedGroup

_SAMPLES = 16


class Partition:
    """Leaves in every parameter it is called with this rank's part of it; see `placement.Place`.

    Each rank reads its own part of what is loaded from its own files, so that a checkpoint is read
    once by all ranks together. `finish` makes sure that these files are the same everywhere.
    """

    def __init__(self, group: DeepSpeedGroup) -> None:
        """Prepare as DeepSpeed will when it gets the model."""
        import deepspeed

        # An empty module, because with one DeepSpeed also brings its linear layer, which keeps no
        # gathered weight for the backward. It is given a copy of what it fills in.
        settings = json.loads(json.dumps(group.settings))
        self._init: Any = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=settings)
        self._group = group
        is_bf16 = group.settings["bf16"]["enabled"]
        self._dtype = torch.bfloat16 if is_bf16 else torch.float32
        self._digest = hashlib.sha256()

    @torch.no_grad()
    def __call__(self, parameter: nn.Parameter) -> None:
        """Convert a parameter to the dtype of the run and keep this rank's part of it."""
        if hasattr(parameter, "ds_id"):
            return
        data = parameter.data.to(self._dtype) if parameter.is_floating_point() else parameter.data
        parameter.data = data.contiguous()
        self._sample(parameter)
        self._init._convert_to_deepspeed_param(parameter)
        parameter.partition()  # type: ignore[attr-defined]
        # What is left is empty, but modules look here for the device they are on.
        parameter.data = parameter.data.to(self._group.device)

    def _sample(self, parameter: nn.Parameter) -> None:
        """Take a few values, which do not show where a mapped file has not been read yet."""
        values = parameter.data.view(-1)[:: max(1, parameter.numel() // _SAMPLES)]
        self._digest.update(str(tuple(parameter.shape)).encode())
        self._digest.update(values.cpu().contiguous().view(torch.uint8).numpy().tobytes())

    def finish(self) -> None:
        """Compare what the ranks have read, and free what they no longer need.

        Raises:
            UserError: on every rank; names the first that has read other weights than rank 0.
        """
        own = (socket.gethostname(), self._digest.hexdigest())
        ranks: list[Any] = [None] * self._group.num_ranks
        torch.distributed.all_gather_object(ranks, own)
        for rank, (host, digest) in enumerate(ranks):
            if digest != ranks[0][1]:
                raise UserError(
                    f"ranks: rank {rank} on {host} and rank 0 on {ranks[0][0]} have read different "
                    "weights; put the same files of pair.base and pair.target on every node"
                )
        # DeepSpeed's parameters refer to themselves, those of the base that are not used as well.
        gc.collect()

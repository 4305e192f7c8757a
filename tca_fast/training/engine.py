"""Who holds the optimizer: the interface, and the engine of a single process.

An engine runs the objective forward and backward and applies optimizer steps. Gradients are sums:
the objective divides by the token counts of the whole step, so adding up micro-batches and ranks
gives the gradient of the global batch.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tca_fast.config import OptimizerConfig
from tca_fast.errors import UserError
from tca_fast.training.state import ADAPTER_NAME, read_tensor_file, write_tensor_file

OPTIMIZER_NAME = "optimizer.safetensors"


class Engine(ABC):
    """One rank of a training run.

    Attributes:
        rank, num_ranks: of data parallelism.
        device: where batches go.
        name: recorded in checkpoints; only an engine of the same name resumes them.
    """

    rank: int = 0
    num_ranks: int = 1
    device: torch.device
    name: str

    @abstractmethod
    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Call the objective."""

    @abstractmethod
    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Add the gradient of one micro-batch; `is_last` marks the last one of the step."""

    @abstractmethod
    def apply(self, learning_rate: float, loss: Tensor) -> Tensor:
        """Clip, take one optimizer step, clear gradients.

        A step whose loss or gradient norm is not finite is not applied, nor is any after it.

        Args:
            learning_rate: of this step.
            loss: 0-d on the device, of the global batch.

        Returns:
            0-d on the device: the norm before clipping.

        Raises:
            FloatingPointError: an engine that waits for the device anyway found either not finite.
        """

    @abstractmethod
    def save_state(self, directory: Path) -> None:
        """Write what `load_state` needs beside the adapters; called on every rank."""

    @abstractmethod
    def load_state(self, directory: Path) -> None:
        """Restore parameters and optimizer from a checkpoint; called on every rank."""

    def sum_counts(self, counts: Sequence[int]) -> list[int]:
        """Sums over ranks of integers that the host knows."""
        return list(counts)

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """Sum of a tensor over ranks, the same on all of them."""
        return tensor

    def any_over_ranks(self, mask: Tensor) -> Tensor:
        """Logical or of a bool tensor over ranks, the same on all of them."""
        return mask

    def gather_text(self, text: str) -> list[str]:
        """The text of every rank."""
        return [text]

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Adapter parameters are whole on rank 0 inside the block."""
        yield

    def close(self) -> None:  # noqa: B027  (most engines hold nothing open)
        """Give back process groups and buffers."""


def trainable(objective: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by qualified name."""
    return {name: p for name, p in objective.named_parameters() if p.requires_grad}


def make_optimizer(parameters: list[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over one parameter group (contract §3.7); the rate is set at every step.

    The fused kind, because it alone can be told on the device to leave a step out.
    """
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


class LocalEngine(Engine):
    """One process, one device, float32 master parameters.

    The host never waits for the device here. A flag on the device tells the optimizer to leave out
    a step that is not finite; it stays set, because the host queues the next step before it learns.
    """

    name = "local"

    def __init__(self, objective: nn.Module, config: OptimizerConfig, device: torch.device) -> None:
        self.objective = objective.to(device)
        self.device = device
        self.max_grad_norm = config.max_grad_norm
        self.parameters = trainable(objective)
        self.optimizer = make_optimizer(list(self.parameters.values()), config)
        # 1 once a step was not finite. The name is the one by which `torch.amp.GradScaler` tells
        # fused optimizers to change neither parameters nor moments nor step counts.
        self._is_stopped = torch.zeros((), device=device)
        self.optimizer.found_inf = self._is_stopped  # type: ignore[attr-defined]

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Call the objective."""
        return self.objective(*inputs, **options)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Add the gradient of one micro-batch to `.grad`."""
        loss.backward()

    def apply(self, learning_rate: float, loss: Tensor) -> Tensor:
        """Clip the global 2-norm, step, clear; see `Engine.apply`. Raises nothing."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.max_grad_norm)
        self._is_stopped.masked_fill_(~(loss.isfinite() & norm.isfinite()), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def save_state(self, directory: Path) -> None:
        """Write AdamW's moments and step counts; the parameters are in `adapter/`."""
        tensors = {
            f"{name}/{key}": value
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }
        write_tensor_file(directory, OPTIMIZER_NAME, tensors)

    def load_state(self, directory: Path) -> None:
        """Read parameters and moments back, bit-exact.

        Raises:
            UserError: files missing, damaged, or not of these adapters.
        """
        weights_path = directory / ADAPTER_NAME / "adapter_model.safetensors"
        moments_path = directory / OPTIMIZER_NAME
        weights, moments = read_tensor_file(weights_path), read_tensor_file(moments_path)
        for name, parameter in self.parameters.items():
            # The artefact names a tensor after its place in the adapted model, of which the
            # objective holds a longer qualified name.
            key = next((key for key in weights if name.endswith(key.split(".", 2)[2])), None)
            if key is None or weights[key].shape != parameter.shape:
                raise UserError(
                    f"{weights_path}: no tensor fits {name} {list(parameter.shape)}; resume from a "
                    "checkpoint of these adapters"
                )
            with torch.no_grad():
                parameter.copy_(weights[key])
            state = {
                key.rpartition("/")[2]: value.to(parameter.device)
                for key, value in moments.items()
                if key.rpartition("/")[0] == name
            }
            if state:
                self.optimizer.state[parameter] = state

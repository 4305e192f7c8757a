"""Who holds the optimizer: the interface, and the engine of a single process.

An engine runs the objective forward and backward and applies optimizer steps. Gradients are sums:
the objective divides by the token counts of the whole step, so adding up micro-batches and ranks
gives the gradient of the global batch.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tca_fast.config import OptimizerConfig
from tca_fast.errors import UserError
from tca_fast.formats.tensor_files import Header, read_headers, read_tensor
from tca_fast.training.manifest import read_manifest
from tca_fast.training.optimizer_state import Fragment, is_part, read_parts, write_part

ADAPTER_FILE = "adapter/adapter_model.safetensors"


class Engine(ABC):
    """One rank of a training run.

    Attributes:
        rank, num_ranks: of data parallelism.
        device: where batches go.
        name: recorded in checkpoints; losses after a resume are bitwise those of an unbroken run
            under the same name, and within rounding under any other.
        parameters: what is trained, by the names of the adapter file.
    """

    rank: int = 0
    num_ranks: int = 1
    device: torch.device
    name: str
    parameters: dict[str, nn.Parameter]

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
        """Write this rank's part of the optimizer; called on every rank.

        Raises:
            UserError: on the ranks whose part cannot be written or read back.
        """

    @abstractmethod
    def load_state(self, directory: Path) -> None:
        """Restore parameters and optimizer, bit-exact, whatever engine wrote them.

        Called on every rank.

        Raises:
            UserError: files missing, damaged, or not of these adapters.
        """

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
        """Adapter parameters are whole and in float32 on rank 0 inside the block."""
        yield

    @contextlib.contextmanager
    def whole(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """All parameters of some modules are whole on every rank inside the block, to be read."""
        yield

    def is_lost_contact(self, error: RuntimeError) -> bool:
        """Whether an error says that another rank no longer answers."""
        return False

    def close(self) -> None:  # noqa: B027  (most engines hold nothing open)
        """Give back process groups and buffers."""


def trainable(objective: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by their names in the adapter file.

    The objective holds the adapted model under a name of its own.
    """
    return {
        f"base_model.model.{name.partition('.')[2]}": parameter
        for name, parameter in objective.named_parameters()
        if parameter.requires_grad
    }


def read_weights(
    directory: Path, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, Tensor]]:
    """The adapters of a checkpoint one by one, after all names, shapes and dtypes were compared.

    Raises:
        UserError: the file is unreadable or not of these adapters.
    """
    path = directory / ADAPTER_FILE
    found = read_headers(path)
    expected = {name: Header(shape, "F32") for name, shape in shapes.items()}
    wrong = sorted(name for name in found | expected if found.get(name) != expected.get(name))
    if wrong:
        raise UserError(
            f"{path}: {wrong[0]} is not as this run has it (there {found.get(wrong[0])}, here "
            f"{expected.get(wrong[0])}); resume from a checkpoint of these adapters"
        )
    for name in shapes:
        yield name, read_tensor(path, name)


def read_optimizer(
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    optimizer: torch.optim.Optimizer,
    fragments: Sequence[Fragment],
) -> None:
    """Fill a rank's optimizer from a checkpoint.

    Raises:
        UserError: the parts are unreadable or not of these adapters.
    """
    parts = [directory / name for name in sorted(read_manifest(directory)) if is_part(name)]
    if not parts:
        raise UserError(f"{directory}: holds no optimizer state; resume from another checkpoint")
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    read_parts(parts, sizes, optimizer, fragments)


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
        """Write AdamW's moments; the parameters are in `adapter/`."""
        write_part(directory, self.rank, self.optimizer, self._fragments())

    def load_state(self, directory: Path) -> None:
        """Read parameters and moments back; see `Engine.load_state`."""
        shapes = {name: tuple(p.shape) for name, p in self.parameters.items()}
        with torch.no_grad():
            for name, weights in read_weights(directory, shapes):
                self.parameters[name].copy_(weights)
        read_optimizer(directory, shapes, self.optimizer, self._fragments())

    def _fragments(self) -> list[Fragment]:
        return [
            Fragment(name, 0, parameter.detach().view(-1), parameter, 0)
            for name, parameter in self.parameters.items()
        ]

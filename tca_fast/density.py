"""How many features were active lately, learned without waiting for the device."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

# Counts of a device that may be on their way at once; further ones are left out.
_IN_FLIGHT = 16


class DensityObserver:
    """The largest share of active features of recent passes.

    A count on the CPU is read at once. A count on another device is copied to pinned memory and
    read when the copy has arrived, usually a step later; nobody waits for it.
    """

    def __init__(self) -> None:
        self._largest: float | None = None
        self._free: list[Tensor] = []
        self._pending: deque[tuple[Tensor, Any, int]] = deque()

    def observe(self, num_active: Tensor, num_pairs: int) -> None:
        """Note one pass.

        Args:
            num_active: int64 0-d, active pairs.
            num_pairs: T·F, all pairs.

        Does nothing where it cannot: without pairs, under `torch.compile`, or while a CUDA graph
        is captured.
        """
        if not num_pairs or torch.compiler.is_compiling():
            return
        if num_active.device.type == "cpu":
            self._note(int(num_active), num_pairs)
        elif num_active.is_cuda and not torch.cuda.is_current_stream_capturing():
            self._send(num_active, num_pairs)

    def take(self) -> float | None:
        """The largest share since the last call; None where no count has arrived."""
        while self._pending and self._pending[0][1].query():
            count, _, num_pairs = self._pending.popleft()
            self._note(int(count), num_pairs)
            self._free.append(count)
        largest, self._largest = self._largest, None
        return largest

    def __deepcopy__(self, memo: dict[int, Any]) -> DensityObserver:
        """A copied module starts without observations: events of a device cannot be copied."""
        return DensityObserver()

    def __reduce__(self) -> tuple[type[DensityObserver], tuple[()]]:
        return DensityObserver, ()

    def _note(self, num_active: int, num_pairs: int) -> None:
        self._largest = max(num_active / num_pairs, self._largest or 0.0)

    def _send(self, num_active: Tensor, num_pairs: int) -> None:
        if len(self._pending) == _IN_FLIGHT:
            return
        if not self._free:
            self._free.append(torch.empty((), dtype=torch.int64, pin_memory=True))
        count = self._free.pop()
        count.copy_(num_active, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(num_active.device))
        self._pending.append((count, arrived, num_pairs))

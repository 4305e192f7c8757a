"""Ctrl-C and SIGTERM: finish the step first."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """Notes SIGINT and SIGTERM inside a `with` block instead of acting on them.

    The loop looks at `requested` between steps. A second signal does what the first would have
    done without this. Outside the main thread, where Python allows no handlers, it never fires.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        """Install the handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        # Launchers repeat SIGTERM while they wait; only an impatient Ctrl-C cuts a step short.
        signal.signal(signal.SIGINT, self._previous[signal.SIGINT])

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Put the previous handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

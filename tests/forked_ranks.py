"""Training ranks forked from a parent that has imported everything, so that they start at once.

The ranks are real processes with a gloo group between them, in a process group of their own as
under a shell, and are ended as the DeepSpeed launcher ends them: when one leaves with an error the
others get SIGTERM, and SIGKILL if that does not help. The parent must never compute anything with
torch, whose threads would not survive the fork.
"""

import os
import signal
import socket
import sys
import time
from pathlib import Path

GRACE = 0.3  # seconds between the first rank that fails and SIGTERM to the others
PATIENCE = 30.0  # and from there to SIGKILL, as the launcher has it


def preload() -> None:
    """Import what ranks need; DeepSpeed has to be told of the CPU before."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    import deepspeed  # noqa: F401
    from tiny_pair import make_pair  # noqa: F401

    import tca_fast.train
    import tca_fast.training.deepspeed_engine
    import tca_fast.training.run  # noqa: F401


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fork(function, *arguments, output: Path | None = None, group: int = 0) -> int:
    """Call `function` in a child process, which exits with what it returns.

    Args:
        output: file for its stdout and stderr.
        group: process group to join; 0 makes one.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        os.setpgid(0, group)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == 2 else signal.SIG_DFL)
        if output is not None:
            descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
        status = function(*arguments) or 0
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class Ranks:
    """One start of `tca_fast.train` on some ranks.

    Attributes:
        pids: of the ranks, in order.
        statuses: exit status by rank, negative for a signal, of those that have ended.
    """

    def __init__(self, num_ranks: int, arguments: list[str], logs: Path) -> None:
        port = free_port()
        logs.mkdir(parents=True, exist_ok=True)
        self.outputs = [logs / f"rank{rank}.txt" for rank in range(num_ranks)]
        self.pids: list[int] = []
        self.statuses: dict[int, int] = {}
        self._failed_at: float | None = None
        self._is_told = False
        # Emptied here and not by the ranks, which may be slow to begin: what an earlier start said
        # in the same place is not theirs.
        for output in self.outputs:
            output.write_bytes(b"")
        for rank, output in enumerate(self.outputs):
            group = self.pids[0] if self.pids else 0
            pid = fork(_run, rank, num_ranks, port, arguments, output=output, group=group)
            os.setpgid(pid, group or pid)
            self.pids.append(pid)

    def is_running(self) -> bool:
        """Whether a rank still runs; ends those that outlive a failed one."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.statuses:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.statuses[rank] = os.waitstatus_to_exitcode(status)
        if len(self.statuses) == len(self.pids):
            return False
        if any(self.statuses.values()):
            now = time.monotonic()
            self._failed_at = self._failed_at or now
            if now > self._failed_at + GRACE and not self._is_told:
                self._is_told = True
                self.send(signal.SIGTERM)
            if now > self._failed_at + PATIENCE:
                self.send(signal.SIGKILL)
        return True

    def send(self, number: int, rank: int | None = None) -> None:
        """Send a signal to one rank, or to all that still run."""
        for index, pid in enumerate(self.pids):
            if index not in self.statuses and rank in (None, index):
                os.kill(pid, number)

    def wait(self, seconds: float) -> bool:
        """Wait for all to end; False if they have not by then."""
        end = time.monotonic() + seconds
        while self.is_running():
            if time.monotonic() > end:
                return False
            time.sleep(0.01)
        return True

    def said(self) -> str:
        """What all ranks have written."""
        return "\n".join(path.read_text(errors="replace") for path in self.outputs)


def _run(rank: int, num_ranks: int, port: int, arguments: list[str]) -> int:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    import torch

    from tca_fast.train import main

    torch.set_num_threads(1)
    return main(arguments)

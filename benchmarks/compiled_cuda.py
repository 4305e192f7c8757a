"""What the CUDA C++ kernels compile to, on a machine with nvcc and without a GPU.

    python -m benchmarks.compiled_cuda

Builds the extension as `TCA_FAST_CUDA=1 pip install` does, with the assembler's report of every
kernel: registers, spills and shared memory, for every architecture. A build is kept under build/
for each state of its sources.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
_COMPILING = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_NAME = re.compile(r"4cuda\d+(\w+?_kernel)I")


@dataclass(frozen=True)
class Compiled:
    """One kernel for one architecture.

    Attributes:
        kernel: its name, such as "gather_kernel".
        symbol: with the types it is compiled for.
        architecture: such as "sm_80".
        registers: of a thread.
        spilled_bytes: registers that had to go to memory, stores and loads, a thread.
        shared_bytes: static shared memory of a block.
    """

    kernel: str
    symbol: str
    architecture: str
    registers: int
    spilled_bytes: int
    shared_bytes: int


def build() -> tuple[Path, list[Compiled]]:
    """The library and what the assembler said of its kernels.

    Raises:
        RuntimeError: it does not compile; the compiler's words are in the message.
    """
    digest = hashlib.sha256(torch.__version__.encode())
    sources = [p for p in sorted((ROOT / "csrc").rglob("*")) if p.is_file()]
    for path in (ROOT / "setup.py", *sources):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    folder = ROOT / "build/cuda_compiled" / digest.hexdigest()[:16]
    log = folder / "report.txt"
    if not log.exists():
        environment = os.environ | {"TCA_FAST_CUDA": "1", "NVCC_APPEND_FLAGS": "-Xptxas -v"}
        command = [sys.executable, "setup.py", "-q", "build_cuda", "--build-lib", str(folder)]
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"csrc/cuda does not compile:\n{run.stdout}{run.stderr}")
        log.write_text(run.stdout + run.stderr, encoding="utf-8")
    (library,) = folder.glob("tca_fast/_cuda*.so")
    return library, read_report(log.read_text(encoding="utf-8"))


def read_report(text: str) -> list[Compiled]:
    """The kernels in a report of `-Xptxas -v`."""
    rows: list[Compiled] = []
    symbol = architecture = ""
    spilled = 0
    for line in text.splitlines():
        if found := _COMPILING.search(line):
            symbol, architecture = found.groups()
        elif found := _SPILLS.search(line):
            spilled = int(found[1]) + int(found[2])
        elif found := _USED.search(line):
            name, shared = _NAME.search(symbol), _SHARED.search(line)
            rows.append(
                Compiled(
                    name[1] if name else symbol,
                    symbol,
                    architecture,
                    int(found[1]),
                    spilled,
                    int(shared[1]) if shared else 0,
                )
            )
    return rows


def main() -> None:
    """Print one line for each kernel and architecture."""
    for row in build()[1]:
        print(*asdict(row).values(), sep="\t")


if __name__ == "__main__":
    main()

"""What the Triton kernels compile to, on a machine without a GPU.

    python -m benchmarks.compiled

The operators run on meta tensors at the benchmark shapes with every launch recorded instead of
made, so each kernel is compiled exactly as an operator would launch it: no list of kernels or
signatures has to be kept. Registers and spills come from the assembler, shared memory from the
compiler. Triton's interpreter must be off (no TRITON_INTERPRET), since it compiles nothing.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TOKENS, FEATURES = 8192, 8192
# CUDA compute capabilities: A100, and H100 or H200.
CAPABILITIES = (80, 90)


@dataclass(frozen=True)
class Launch:
    """One kernel as an operator launches it."""

    operator: str
    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Compiled:
    """What became of it.

    Attributes:
        operator, kernel: the operator that launches it, and its name.
        dtype: of the activations.
        width: D.
        capability: 80 or 90.
        registers: of a thread.
        spilled_bytes: registers that had to go to memory, stores and loads, a thread.
        shared_bytes: shared memory of a program.
        warps: of a program.
    """

    operator: str
    kernel: str
    dtype: str
    width: int
    capability: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    warps: int


@contextmanager
def recorded(operator: str) -> Iterator[list[Launch]]:
    """Collect the launches of the block instead of making them."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    def record(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(Launch(operator, kernel, arguments, options))

    original, JITFunction.run = JITFunction.run, record
    try:
        yield launches
    finally:
        JITFunction.run = original


def launches_of_all_operators(dtype: torch.dtype, width: int) -> list[Launch]:
    """Every launch of every operator and regime, at T = F = 8192."""
    from tca_fast.kernels import operators

    def weights(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, W, bias, b_dec = (
        weights(*shape) for shape in ((TOKENS, width), (FEATURES, width), (FEATURES,), (width,))
    )
    mask = torch.empty(TOKENS, dtype=torch.bool, device="meta")
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    grad_l1 = torch.empty((), dtype=sums, device="meta")
    pairs = TOKENS * FEATURES

    def both_ways(k: int | None, capacity: int) -> None:
        for gain, token_mask in ((None, None), (bias, mask)):
            forward = (x, x, W, bias, W, b_dec, gain, token_mask, k, capacity)
            kept = operators.adapter(*forward)[4:]
            operators.adapter_backward(x, grad_l1, x, W, bias, W, gain, token_mask, k, *kept)

    def encode() -> None:
        value, row_ptr, feature = operators.encode(x, W, bias, None, pairs // 256)
        operators.encode_backward(value, row_ptr, feature, x, W)

    def decode() -> None:
        value, row_ptr, feature = operators.encode(x, W, bias, None, pairs // 256)
        operators.decode(row_ptr, feature, value, W, b_dec, bias)
        operators.decode_backward(x, row_ptr, feature, value, W, bias)

    calls: dict[str, Callable[[], None]] = {
        "adapter, sparse": lambda: both_ways(None, pairs // 256),
        "adapter, dense": lambda: both_ways(None, pairs),
        "adapter, TopK 32": lambda: both_ways(32, TOKENS * 32),
        "adapter, TopK 512": lambda: both_ways(512, TOKENS * 512),
        "adapter, TopK 32, overflowing": lambda: both_ways(32, TOKENS),
        "encode": encode,
        "decode": decode,
    }
    found = []
    for operator, call in calls.items():
        with recorded(operator) as launches:
            call()
        found += launches
    return found


def compile_all(dtype: torch.dtype, width: int) -> list[Compiled]:
    """Compile every distinct launch for every capability."""
    rows, seen = [], set()
    for launch in launches_of_all_operators(dtype, width):
        for capability in CAPABILITIES:
            source, options, key = _source(launch, capability)
            if key in seen:
                continue
            seen.add(key)
            rows.append(_compile(launch, source, options, capability, dtype, width))
    return rows


def _source(launch: Launch, capability: int) -> tuple[Any, Any, str]:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel = launch.kernel
    backend = make_backend(GPUTarget("cuda", capability, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    named = dict(launch.options)
    bound, specialization, options = bind(*launch.arguments, debug=False, **named)
    options, signature, constants, attributes = kernel._pack_args(
        backend, named, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constants, attributes)
    return source, options, f"{capability} {kernel.__name__} {specialization} {options}"


def _compile(
    launch: Launch, source: Any, options: Any, capability: int, dtype: torch.dtype, width: int
) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", capability, 32)
    binary = triton.compile(source, target=target, options=options.__dict__)
    registers, spilled = _assembled(binary.asm["ptx"])
    return Compiled(
        launch.operator,
        launch.kernel.__name__,
        str(dtype).removeprefix("torch."),
        width,
        capability,
        registers,
        spilled,
        binary.metadata.shared,
        options.num_warps,
    )


def _assembled(ptx: str) -> tuple[int, int]:
    """Registers of a thread and bytes spilled by it, as the assembler reports them."""
    from triton.backends.nvidia.compiler import get_ptxas

    (architecture,) = re.findall(r"^\.target\s+(\w+)", ptx, re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx, encoding="utf-8")
        assembler = get_ptxas(int(re.sub(r"\D", "", architecture))).path
        report = subprocess.run(
            [assembler, "-v", f"--gpu-name={architecture}", path, "-o", Path(folder, "cubin")],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    (registers,) = re.findall(r"Used (\d+) registers", report)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    return int(registers), sum(int(spill) for spill in spills)


def main() -> None:
    """Print one line for each distinct kernel: registers, spills, shared memory."""
    import sys

    for dtype, width in ((torch.bfloat16, 3584), (torch.float32, 1536)):
        for row in compile_all(dtype, width):
            print(*asdict(row).values(), sep="\t")
            sys.stdout.flush()


if __name__ == "__main__":
    main()

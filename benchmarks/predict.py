"""What each operator should take on a GPU, from bytes and assumed rates. Nothing here is measured.

    python -m benchmarks.predict

prints the table of README.md. Rates are those of performance §0, for a device of the H100 class;
the L2 rate is an assumption.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks import work
from benchmarks.cases import Case
from benchmarks.work import Work

_PRODUCT_FLOPS = 750e12
_MEMORY_BYTES = 3.0e12
_CACHE_BYTES = 5.5e12
# What good kernels reach of the two bandwidths, and what their launches cost (performance §3b).
_OF_MEMORY, _OF_CACHE = 0.85, 0.6
_LAUNCHES_MS = 0.04
_BFLOAT16 = 2

CASES = [
    Case("L0 1.4", 8192, 3584, 8192, 1.4),
    Case("L0 10", 8192, 3584, 8192, 10),
    Case("L0 64", 8192, 3584, 8192, 64),
    Case("half dense", 8192, 3584, 8192, 4096, "uniform"),
    Case("TopK 64", 8192, 3584, 8192, 4096, "uniform", k=64),
]
# Operator, its work over active pairs only, and its work done densely where that exists.
Counted = Callable[[Case, int], Work]
OPERATORS: list[tuple[str, Counted, Counted | None]] = [
    ("encode", work.encode, None),
    ("decode", work.decode, work.dense_decode),
    ("adapter forward", work.forward, work.dense_forward),
    ("adapter backward", work.backward, work.dense_backward),
]


def floor_ms(needed: Work) -> float:
    """Products, then traffic of memory or of cache, whichever takes longer, at full rates."""
    return _milliseconds(needed, 1.0, 1.0)


def expected_ms(needed: Work) -> float:
    """What good kernels should take, launches left out.

    Bandwidths are reached in part, and pre-activations are read once more to find the active ones.
    """
    selection = needed.selection_bytes / (_MEMORY_BYTES * _OF_MEMORY) * 1e3
    return _milliseconds(needed, _OF_MEMORY, _OF_CACHE) + selection


def table() -> str:
    """Markdown: one row for each sparsity and operator, and one for the layer."""
    lines = [
        "| case | operator | way | TFLOP | memory MB | gathered MB | floor ms | expected ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in CASES:
        floor = expected = 0.0
        for operator, sparse, dense in OPERATORS:
            way, needed = _better(case, sparse, dense)
            lines.append(_line(case.name, operator, way, needed))
            if operator.startswith("adapter"):  # the two fused operators make up the layer
                floor += floor_ms(needed)
                expected += expected_ms(needed)
        layer = f"**{floor:.2f}** | **{expected + _LAUNCHES_MS:.2f}**"
        lines.append(f"| {case.name} | **layer** | | | | | {layer} |")
    return "\n".join(lines)


def _better(case: Case, sparse: Counted, dense: Counted | None) -> tuple[str, Work]:
    """The way that is expected to be faster."""
    ways = {"sparse": sparse(case, _BFLOAT16)}
    if dense is not None:
        ways["dense"] = dense(case, _BFLOAT16)
    return min(ways.items(), key=lambda way: expected_ms(way[1]))


def _line(case: str, operator: str, way: str, needed: Work) -> str:
    return (
        f"| {case} | {operator} | {way} "
        f"| {needed.product_flops * 1e-12:.2f} | {needed.bytes * 1e-6:.0f} "
        f"| {needed.gathered_bytes * 1e-6:.0f} | {floor_ms(needed):.3f} "
        f"| {expected_ms(needed):.3f} |"
    )


def _milliseconds(needed: Work, of_memory: float, of_cache: float) -> float:
    product = max(needed.product_flops / _PRODUCT_FLOPS, needed.product_bytes / _MEMORY_BYTES)
    memory = needed.streamed_bytes / (_MEMORY_BYTES * of_memory)
    cache = needed.gathered_bytes / (_CACHE_BYTES * of_cache)
    return (product + max(memory, cache)) * 1e3


if __name__ == "__main__":
    print(table())

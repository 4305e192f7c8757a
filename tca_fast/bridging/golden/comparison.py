"""Our numbers beside golden ones, and an account of golden numbers that nobody recomputed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

VALUE_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
# A KL is a mean of differences of log-probabilities, each rounded at ln V·2⁻²⁴ in float32; below
# 0.01 that is more than 1e-5 of it.
KL_FLOOR = 1e-7
VALUE_FLOOR = 1e-9
# Of the norm of the whole component: a tensor that is zero, or cancels to nearly zero.
GRADIENT_FLOOR = 1e-7

Path = tuple[str, ...]


@dataclass(frozen=True)
class Check:
    """One golden quantity.

    Attributes:
        name: file or block, and key.
        ours, golden: both values; norms for tensors, texts for exact comparisons.
        error: relative to the golden value or norm; absolute where that is zero.
        tolerance: what `error` may be; 0 for exact comparisons.
        ok: None for a quantity that is not checked.
        note: why it is not checked, or how it was compared.
    """

    name: str
    ours: float | str = ""
    golden: float | str = ""
    error: float = math.nan
    tolerance: float = math.nan
    ok: bool | None = None
    note: str = ""


class Comparison:
    """Collects checks and remembers which golden quantities were looked at."""

    def __init__(self, values: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]):
        """Compare against values.json and the tensors of each file (by file stem)."""
        self.values = values
        self.tensors = tensors
        self.checks: list[Check] = []
        self._claimed: set[Path] = set()

    def block(
        self,
        path: Path,
        ours: Mapping[str, Any],
        *,
        tolerance: float = VALUE_TOLERANCE,
        floor: float | None = None,
        required: bool = True,
    ) -> None:
        """Compare every entry of one golden block that `ours` has a number or list for.

        Args:
            path: of the block in values.json; () is the top level.
            ours: by key.
            tolerance: relative.
            floor: absolute; None is `KL_FLOOR` for a KL and `VALUE_FLOOR` for the rest.
            required: whether an entry of `ours` that the folder lacks is a miss.
        """
        golden = self.values
        for part in path:
            golden = golden.get(part, {})
        for key, own in ours.items():
            name = ".".join((*path, key))
            if key not in golden:
                if required:
                    self.checks.append(Check(name, ok=False, note="missing from values.json"))
                continue
            self.claim((*path, key))
            least = (KL_FLOOR if "kl" in key else VALUE_FLOOR) if floor is None else floor
            if isinstance(own, Sequence):
                self._numbers(name, own, golden[key], tolerance, least)
            else:
                self.number(name, own, golden[key], tolerance, least)

    def _numbers(
        self, name: str, ours: Sequence[float], golden: Any, tolerance: float, floor: float
    ) -> None:
        if not isinstance(golden, list) or len(golden) != len(ours):
            count = len(golden) if isinstance(golden, list) else "no"
            self.exact(name, f"{len(ours)} entries", f"{count} entries")
            return
        for i, (own, theirs) in enumerate(zip(ours, golden, strict=True)):
            self.number(f"{name}[{i}]", own, theirs, tolerance, floor)

    def number(
        self,
        name: str,
        ours: float,
        golden: Any,
        tolerance: float = VALUE_TOLERANCE,
        floor: float = VALUE_FLOOR,
        note: str = "",
    ) -> None:
        """Compare two numbers: |ours - golden| ≤ max(tolerance·|golden|, floor)."""
        if not isinstance(golden, (int, float)):
            self.exact(name, f"{ours}", f"{golden}")
            return
        self._distance(name, ours, golden, abs(ours - golden), tolerance, floor, note)

    def tensor(
        self,
        file: str,
        key: str,
        ours: Tensor,
        *,
        tolerance: float = VALUE_TOLERANCE,
        floor: float = 0.0,
        mask: Tensor | None = None,
        name: str | None = None,
    ) -> None:
        """Compare a tensor in norm: ‖ours - golden‖ ≤ max(tolerance·‖golden‖, floor).

        Args:
            file: stem of the golden file.
            key: name in it; a tensor that the file lacks is a miss.
            ours: same shape.
            tolerance, floor: relative and absolute.
            mask: bool, all dimensions but the last (and leading ones); compare only where true.
            name: of the check, where it is not file and key.
        """
        name = name or f"{file}: {key}"
        if key not in self.tensors[file]:
            self.checks.append(Check(name, ok=False, note=f"missing from {file}.safetensors"))
            return
        self.claim((file, key))
        golden = self.tensors[file][key]
        self._tensors(name, ours, golden, tolerance, floor, mask)

    def dense(self, file: str, key: str, ours: Tensor, golden: Tensor) -> None:
        """Compare a tensor with the dense form of the sparse golden tensor `key`, in norm."""
        self.claim((file, key))
        self._tensors(f"{file}: {key}", ours, golden, VALUE_TOLERANCE, 0.0, None)

    def stack(self, file: str, key: str, ours: Tensor, *, mask: Tensor) -> None:
        """Compare every entry of a tensor's first dimension by itself, as `tensor` does."""
        golden = self.tensors[file].get(key)
        if golden is None or len(golden) != len(ours):
            self.tensor(file, key, ours)
            return
        self.claim((file, key))
        for i, (own, theirs) in enumerate(zip(ours, golden, strict=True)):
            self._tensors(f"{file}: {key}[{i}]", own, theirs, VALUE_TOLERANCE, 0.0, mask)

    def _tensors(
        self,
        name: str,
        ours: Tensor,
        golden: Tensor,
        tolerance: float,
        floor: float,
        mask: Tensor | None,
    ) -> None:
        if golden.shape != ours.shape:
            self.exact(name, f"{list(ours.shape)}", f"{list(golden.shape)}", "shapes")
            return
        ours, golden = ours.detach().double(), golden.double()
        if mask is not None:
            ours, golden = ours[mask], golden[mask]
        error = (ours - golden).norm().item()
        self._distance(name, ours.norm().item(), golden.norm().item(), error, tolerance, floor)

    def _distance(
        self,
        name: str,
        ours: float,
        golden: float,
        distance: float,
        tolerance: float,
        floor: float,
        note: str = "",
    ) -> None:
        size = abs(golden)
        ok = distance <= max(tolerance * size, floor)
        if size > 0:
            distance, tolerance = distance / size, max(tolerance, floor / size)
        else:
            tolerance, note = floor, note or "golden is 0: absolute"
        self.checks.append(Check(name, ours, golden, distance, tolerance, ok, note))

    def exact(self, name: str, ours: str, golden: str, note: str = "") -> None:
        """Compare two texts."""
        same = ours == golden
        self.checks.append(Check(name, ours, golden, float(not same), 0.0, same, note))

    def bound(self, path: Path, ours: float, bound: float) -> None:
        """Check that a number that is rounding error in both stays below a bound."""
        golden = self.values.get(path[0])
        if golden is not None:
            self.claim(path)
            note = "rounding in both: bounded, not compared"
            ok = ours <= bound
            self.checks.append(Check(".".join(path), ours, golden, ours, bound, ok, note))

    def absent(self, name: str, *, miss: bool = False) -> None:
        """List something that the folder does not hold; a miss where it had to."""
        self.checks.append(Check(name, ok=False if miss else None, note="not in the folder"))

    def skip(self, path: Path, reason: str) -> None:
        """List a golden quantity as not checked."""
        self.claim(path)
        self.checks.append(Check(".".join(path), note=reason))

    def claim(self, path: Path) -> None:
        """Mark a golden quantity, or a whole block, as accounted for."""
        self._claimed.add(path)

    def skip_unclaimed(self, reasons: Mapping[Path, str]) -> None:
        """List everything that was not looked at, with the reason of its longest known prefix."""
        leaves = [*_leaves(self.values, ())]
        leaves += [(file, key) for file, tensors in self.tensors.items() for key in tensors]
        for leaf in leaves:
            prefixes = [leaf[:length] for length in range(len(leaf), 0, -1)]
            if any(prefix in self._claimed for prefix in prefixes):
                continue
            known = (reasons[prefix] for prefix in prefixes if prefix in reasons)
            self.skip(leaf, next(known, "unknown to this release"))


def _leaves(tree: Mapping[str, Any], path: Path) -> list[Path]:
    found: list[Path] = []
    for key, value in tree.items():
        found += _leaves(value, (*path, key)) if isinstance(value, dict) else [(*path, key)]
    return found

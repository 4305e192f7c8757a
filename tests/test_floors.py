"""Imports go down only, and importing the package stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tca_fast"
KERNELS = Path(__file__).parents[1] / "kernels" / "src"  # installed as tca_fast.kernels

# The floor of every room; `tca_fast.__init__` and `__main__` stand on top.
FLOORS = {
    "errors": 0,
    "config": 0,
    "reference": 0,
    "durable": 0,
    "pages": 0,
    "machine": 0,
    "results": 0,
    "kernels": 0,
    "registry": 1,
    "operator_rules": 1,
    "selection": 1,
    "ops": 1,
    "losses": 1,
    "density": 1,
    "planning": 1,
    "architectures": 1,
    "adapter": 2,
    "sparsity": 2,
    "activations": 2,
    "tokenizer": 2,
    "feature_table": 3,
    "residual_stream": 2,
    "adapted_model": 3,
    "subject": 3,
    "attachment": 3,
    "adapter_config": 3,
    "checkpoint": 3,
    "fingerprint": 3,
    "model_card": 3,
    "formats": 3,
    "bridging": 4,
    "evaluation": 4,
    "miniature": 4,
    "integrations": 5,
    "hub": 5,
    "training": 5,
    "held_out": 5,
    "sweep": 6,
    "cli": 6,
    "train": 6,
    "__init__": 6,
    "__main__": 6,
}
# Rooms of one floor that may not know each other.
APART = {"bridging", "evaluation", "miniature"}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_rooms(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    parts = [name.split(".") for name in names]
    return {part[1] for part in parts if part[0] == "tca_fast" and part[1] in FLOORS}


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda p: str(p.name))
def test_kernels_know_nothing_of_the_package(path):
    assert imported_rooms(path) <= {"kernels"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.name))
def test_imports_go_down(path):
    here = room(path)
    assert here in FLOORS, f"{here} has no floor"
    # A method may import from above at call time where a type-checking import says so too.
    for other in imported_rooms(path) - {here}:
        assert FLOORS[other] <= FLOORS[here], f"{path.name} imports {other}, which is above it"
        assert not {here, other} <= APART, f"{here} and {other} must not know each other"


def test_no_code_outside_the_rooms():
    rooms = {room(path) for path in PACKAGE.rglob("*.py")}
    assert rooms | {"kernels"} == set(FLOORS)


def test_import_needs_only_torch():
    """Importing the package and its core pulls in none of the heavy libraries."""
    code = (
        "import sys; import tca_fast; tca_fast.ops if False else None;"
        "heavy = {'transformers', 'deepspeed', 'triton', 'matplotlib', 'typer', 'pydantic'};"
        "heavy |= {'peft', 'accelerate'};"
        "found = heavy & set(sys.modules); assert not found, found"
    )
    subprocess.run([sys.executable, "-c", f"import torch; {code}"], check=True)


def test_import_is_fast():
    """Under 0.3 s beyond torch's own import (best of three: the machine may be busy)."""
    code = (
        "import torch, time; start = time.perf_counter(); import tca_fast;"
        "print(time.perf_counter() - start)"
    )
    seconds = [
        float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)
        for _ in range(3)
    ]
    assert min(seconds) < 0.3


def test_public_names_resolve():
    import tca_fast

    for name in tca_fast.__all__:
        assert callable(getattr(tca_fast, name)), name

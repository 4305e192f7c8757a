"""The layer in a model of one's own: the example as a user runs it."""

import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "plain_module.py"


def test_the_example_learns_the_difference_without_the_heavy_libraries():
    code = (
        "import runpy, sys; main = runpy.run_path(sys.argv[1])['main']; left = main();"
        "assert left < 0.1, left;"
        "found = {'transformers', 'deepspeed', 'peft'} & set(sys.modules); assert not found, found"
    )
    command = [sys.executable, "-c", code, str(EXAMPLE)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "of the difference is left" in result.stdout

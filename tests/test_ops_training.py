"""The demo's training gives the same losses whether the CPU's own backend computes it or not."""

import json
from pathlib import Path

import pytest

from tca_fast import miniature, ops
from tca_fast.config import load_config
from tca_fast.training.run import train

RECIPE = Path(miniature.__file__).with_name("recipe.yaml")


def losses(out: Path, backend: str, steps: int) -> list[float]:
    """Training losses of the recipe's first steps, run by one backend."""
    settings = {
        "pair.base": miniature.base_path(),
        "pair.target": miniature.target_path(),
        "data.train": miniature.train_data(),
        "data.validation": miniature.val_data(),
        "run.output_dir": out,
    }
    overrides = [f"{key}={json.dumps(str(value))}" for key, value in settings.items()]
    overrides += [f"run.max_steps={steps}", "run.eval_samples=4"]
    with ops.backend(backend):
        train(load_config(RECIPE, overrides), show_progress=False)
    rows = map(json.loads, (out / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return [row["loss"] for row in rows if row["split"] == "train"]


def test_losses_of_the_demo_do_not_depend_on_the_backend(tmp_path):
    steps = 10
    expected = losses(tmp_path / "reference", "reference", steps)
    found = losses(tmp_path / "cpp", "cpp", steps)
    assert len(expected) == steps and expected[-1] < expected[0]
    assert found == pytest.approx(expected, rel=0, abs=1e-5)

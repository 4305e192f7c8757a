"""Loggers outside this package."""

import sys

import pytest

from tca_fast.config import load_config
from tca_fast.errors import UserError
from tca_fast.training.run import train


def start(pair, output, *overrides):
    settings = [f"run.output_dir={output}", *overrides]
    return train(load_config(pair / "run.yaml", settings), show_progress=False)


def test_absent_loggers_are_named_with_their_package(pair, tmp_path, monkeypatch):
    for name in ("tensorboard", "wandb", "trackio"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            patch.setitem(sys.modules, "torch.utils.tensorboard", None)
            with pytest.raises(UserError, match=f"run.report_to: '{name}' .* pip install {name}"):
                start(pair, tmp_path / name, f"run.report_to=[{name}]")


def test_loggers_get_the_figures(pair, tmp_path, monkeypatch):
    class Recorder:
        def __init__(self):
            self.logged, self.finished = [], False

        def init(self, **options):
            self.options = options
            return self

        def log(self, figures, step):
            self.logged.append((step, figures))

        def finish(self):
            self.finished = True

    for name in ("wandb", "trackio"):
        recorder = Recorder()
        monkeypatch.setitem(sys.modules, name, recorder)
        options = [f"run.report_to=[{name}]", "run.max_steps=2", "run.run_name=mine"]
        start(pair, tmp_path / name, *options)
        steps = [step for step, figures in recorder.logged if "train/loss" in figures]
        assert steps == [1, 2] and recorder.finished
        assert recorder.options["name"] == "mine" and recorder.options["resume"] == "allow"

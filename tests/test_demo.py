"""`tca-fast demo`, a few steps of it, and what it does when it is stopped."""

import importlib
import io
import json
from pathlib import Path

import pytest
import typer
from rich.console import Console

from tca_fast.errors import UserError

# `tca_fast.cli.demo` as an attribute is the command, not the module.
module = importlib.import_module("tca_fast.cli.demo")
SHORT = [
    "run.max_steps=3",
    "run.train_batch_size=4",
    "run.per_device_train_batch_size=4",
    "run.eval_samples=4",
    "adapter.num_features=64",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "run"
    module.demo(SHORT, out=out, seed=7, l1_weight=0.5, num_problems=10)
    return out


def test_a_short_demo_leaves_adapters_log_and_report(trained: Path) -> None:
    assert (trained / "adapter" / "adapter_model.safetensors").is_file()
    assert (trained / "report.html").read_text(encoding="utf-8").count("<svg") == 6
    figures = json.loads((trained / "results.json").read_text(encoding="utf-8"))
    assert list(figures["models"]) == ["base", "hybrid", "adapter", "target"]
    assert figures["num_problems"] == 10
    assert figures["config"]["run"]["seed"] == 7
    assert figures["config"]["objective"]["l1_weight"] == 0.5
    steps = [row["step"] for row in figures["history"] if row["split"] == "train"]
    assert steps == [1, 2, 3]
    models = figures["models"]
    assert models["target"]["kl"] == pytest.approx(0, abs=1e-6)
    assert models["base"]["kl"] > models["target"]["kl"]
    assert models["adapter"]["l0_per_layer"] and models["hybrid"]["l0_per_layer"] is None
    assert set(figures["seconds"]) == {"training", "evaluation", "total"}


def test_evaluating_again_gives_the_same_figures(trained: Path) -> None:
    before = json.loads((trained / "results.json").read_text(encoding="utf-8"))["models"]
    module.demo(out=trained, num_problems=10, skip_training=True)
    assert json.loads((trained / "results.json").read_text(encoding="utf-8"))["models"] == before


def test_a_directory_with_a_run_is_not_overwritten(trained: Path) -> None:
    with pytest.raises(UserError, match="already holds a run"):
        module.demo(SHORT, out=trained, num_problems=10)


def test_ctrl_c_while_evaluating_keeps_the_adapters(trained, monkeypatch, capsys) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_evaluate", interrupted)
    before = sorted(path.name for path in trained.iterdir())
    with pytest.raises(typer.Exit) as stopped:
        module.demo(out=trained, num_problems=10, skip_training=True)
    assert stopped.value.exit_code == 130
    assert "--skip-training" in capsys.readouterr().out
    assert sorted(path.name for path in trained.iterdir()) == before


def test_ctrl_c_while_training_prints_the_command_that_goes_on(
    tmp_path, monkeypatch, capsys
) -> None:
    from tca_fast.training import run
    from tca_fast.training.trainer import TrainResult

    stopped_at = TrainResult(5, 9, True, tmp_path / "step_000005", None)
    monkeypatch.setattr(run, "train", lambda config: stopped_at)
    with pytest.raises(typer.Exit) as stopped:
        module.demo(SHORT[:1], out=tmp_path / "a run", l1_weight=0.5)
    assert stopped.value.exit_code == 130
    command = (
        f"tca-fast demo --out '{tmp_path}/a run' run.max_steps=3 objective.l1_weight=0.5 "
        "run.resume_from_checkpoint=latest"
    )
    assert command in capsys.readouterr().out


def test_unknown_settings_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'l1_weight'"):
        module.demo(["objective.l1_wieght=1"], out=tmp_path / "run")
    with pytest.raises(UserError, match="--out: missing"):
        module.demo(skip_training=True)
    assert not (tmp_path / "run").exists()


def test_a_used_default_directory_gives_way_to_the_next(tmp_path: Path) -> None:
    assert module._free_directory(tmp_path, "demo") == tmp_path / "demo"
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo-2").mkdir()
    assert module._free_directory(tmp_path, "demo") == tmp_path / "demo-3"


def test_samples_are_the_first_of_each_domain_and_the_first_failure() -> None:
    domains = ["math", "math", "code", "math", "science", "code"]
    correct = [True, True, False, False, True, False]
    assert module.choose_samples(domains, correct) == [0, 2, 4, 3]
    assert module.choose_samples(domains, [True] * 6) == [0, 2, 4]


def test_the_printed_table_fits_a_terminal() -> None:
    from test_evaluation import sample_report

    report = sample_report()
    report.seconds["total"] = 9.0
    console = Console(width=80, file=io.StringIO())
    module.show_table(console, report)
    shown = console.file.getvalue()
    assert "70.0 ± 14.5" in shown and "75.0 ± " in shown and "waits" in shown

"""The sweep over L1 weights: measured, resumable, and honest about its order."""

import json
import shutil

import pytest
from PIL import Image

from tca_fast import cli
from tca_fast.config import load_config
from tca_fast.errors import UserError
from tca_fast.sweep import runs
from tca_fast.sweep.plot import write_curve
from tca_fast.sweep.runs import Interrupted, Point, rising, run_sweep

WEIGHTS = (0.001, 0.3, 30.0)


def configs(pair, out, *overrides):
    settings = ["run.max_steps=16", "run.save_steps=4", "run.eval_steps=0", *overrides]
    return [
        load_config(
            pair / "run.yaml",
            [*settings, f"objective.l1_weight={weight}", f"run.output_dir={out}/l1_{weight:g}"],
        )
        for weight in WEIGHTS
    ]


def sweep(made):
    told = []
    points = run_sweep(made, num_samples=5, told=lambda config, what: told.append(what))
    return points, told


@pytest.fixture(scope="module")
def swept(pair):
    return sweep(configs(pair, pair / "sweep"))


def test_l0_falls_as_the_weight_grows(swept):
    points, told = swept
    assert told == ["trained"] * 3
    assert [point.l1_weight for point in points] == list(WEIGHTS)
    assert points[0].l0 > points[1].l0 > points[2].l0 and not rising(points)
    assert all(point.steps == 16 and point.kl > 0 and point.nmse > 0 for point in points)


def test_what_is_measured_is_not_done_again(pair, swept, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("done again")

    monkeypatch.setattr(runs, "train", refuse)
    points, told = sweep(configs(pair, pair / "sweep"))
    assert points == swept[0] and told == ["measured before"] * 3
    # Trained, but not measured: the process was killed in between.
    (pair / "sweep" / "l1_0.3" / runs.POINT_NAME).write_text('{"point"')
    points, told = sweep(configs(pair, pair / "sweep"))
    assert points == swept[0] and told[1] == "trained before"


def test_what_cannot_be_measured_is_not_trained(pair, tmp_path):
    with pytest.raises(UserError, match="data.validation: missing"):
        sweep(configs(pair, tmp_path, "data.validation=null"))
    assert not list(tmp_path.iterdir())


def test_an_interrupted_sweep_goes_on(pair, swept, tmp_path, monkeypatch):
    finish = runs.train
    calls = []

    def interrupted(config):
        calls.append(config.run.resume_from_checkpoint)
        result = finish(config)
        if len(calls) == 1:
            # Killed before the adapters were written.
            shutil.rmtree(tmp_path / "l1_0.001" / "adapter")
            raise Interrupted
        return result

    monkeypatch.setattr(runs, "train", interrupted)
    with pytest.raises(Interrupted):
        sweep(configs(pair, tmp_path))
    # A checkpoint of other settings is no beginning of this run.
    with pytest.raises(UserError, match="holds a run with other settings"):
        sweep(configs(pair, tmp_path, "optimizer.learning_rate=0.001"))
    points, told = sweep(configs(pair, tmp_path))
    assert told == ["resumed", "trained", "trained"] and calls[1] == "latest"
    assert [point.l0 for point in points] == pytest.approx([point.l0 for point in swept[0]])


def test_a_run_of_other_settings_is_not_mistaken_for_one(pair, swept):
    with pytest.raises(UserError, match="holds a run with other settings"):
        sweep(configs(pair, pair / "sweep", "run.seed=7"))
    # Under the same name, what was trained and measured is another's as well.
    for split in ("train", "val"):
        file = pair / f"{split}.jsonl"
        lines = file.read_text()
        file.write_text(lines + lines.splitlines()[0] + "\n")
        with pytest.raises(UserError, match="holds a run with other settings or data"):
            sweep(configs(pair, pair / "sweep"))
        file.write_text(lines)
    assert sweep(configs(pair, pair / "sweep"))[1] == ["measured before"] * 3


def point(weight, l0):
    return Point(weight, 10, l0, 0.1, 0.2, 99)


def test_a_weight_that_is_not_sparser_is_noticed():
    good = [point(0.1, 3.0), point(0.01, 9.0), point(1.0, 1.0)]
    assert rising(good) == []
    flat = [point(0.01, 9.0), point(0.1, 9.0)]
    assert rising(flat) == [(flat[0], flat[1])]
    # The table of contract §8 as it was published.
    published = [(0.01, 10.3), (0.003, 4.3), (0.001, 1.4), (0.0003, 0.4), (0.0001, 0.1)]
    assert len(rising([point(*pair) for pair in published])) == 4


def test_the_curve_is_a_picture_and_its_numbers(tmp_path):
    points = [point(0.01, 9.0), point(0.1, 3.0)]
    paths = write_curve(points, tmp_path)
    assert [path.name for path in paths] == ["tradeoff.json", "tradeoff.png"]
    assert [Point(**row) for row in json.loads(paths[0].read_text())] == points
    assert Image.open(paths[1]).size[0] > 1000


def test_the_command(pair, tmp_path, monkeypatch, capsys):
    program = ["tca-fast", "sweep", "--config", pair / "run.yaml", "--out", tmp_path]
    steps = ["run.max_steps=3", "run.eval_steps=0"]
    arguments = [*program, "--l1-weights", "0.001,30", "--num-samples", "5", *steps]
    monkeypatch.setattr("sys.argv", list(map(str, arguments)))
    with pytest.raises(SystemExit) as end:
        cli.main()
    printed = capsys.readouterr().out
    falls = not rising(
        [Point(**row) for row in json.loads((tmp_path / "tradeoff.json").read_text())]
    )
    assert (end.value.code or 0) == (0 if falls else 1)
    assert "2 of 2: l1_weight 30 trained" in printed and (tmp_path / "tradeoff.png").exists()
    monkeypatch.setattr("sys.argv", list(map(str, [*program, "--l1-weights", "a,b"])))
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2 and "--l1-weights: 'a,b'" in capsys.readouterr().err

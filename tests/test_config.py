"""Configuration files: what is read is what was written, and mistakes are named."""

import pytest

from tca_fast.config import dump_config, load_config
from tca_fast.errors import UserError

MINIMAL = "pair: {base: a, target: b}\ndata: {train: t.jsonl}\nrun: {output_dir: out}\n"


@pytest.fixture(name="path")
def _path(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(MINIMAL)
    return path


def test_defaults_are_the_papers(path):
    config = load_config(path)
    assert config.adapter.num_features == 8192 and config.adapter.decoder_bias
    assert config.objective.lambda_bridge == 2 and config.objective.l1_weight == 0.001
    assert config.optimizer.learning_rate == 8e-4 and config.optimizer.warmup_ratio == 0.05


def test_overrides_win_and_yaml_numbers_are_numbers(path):
    config = load_config(path, ["optimizer.learning_rate=1e-3", "objective.cutoffs=[1, 2]"])
    assert config.optimizer.learning_rate == 1e-3
    assert config.objective.cutoffs == [1, 2]


def test_round_trip(path, tmp_path):
    config = load_config(path, ["adapter.activation=topk", "adapter.k=4"])
    dump_config(config, tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (MINIMAL, ["objective.l1_weigth=1"], "'objective.l1_weigth'.*did you mean 'l1_weight'"),
        (MINIMAL, ["objectve.l1_weight=1"], "'objectve'.*did you mean 'objective'"),
        (MINIMAL, ["objective.l1_weight=abc"], "objective.l1_weight: 'abc'.*number"),
        (MINIMAL, ["objective.l1_weight=-1"], "objective.l1_weight: -1.*greater"),
        (MINIMAL, ["objective.l1_weight=.inf"], "objective.l1_weight: .*finite number"),
        (MINIMAL, ["run.train_batch_size=1.5"], "run.train_batch_size: 1.5.*integer"),
        (
            MINIMAL,
            ["objective.gradient_checkpointing=true", "objective.step=plain"],
            "objective: gradient_checkpointing needs step 'shared'",
        ),
        (
            MINIMAL,
            ["run.train_batch_tokens=100", "run.per_device_train_batch_tokens=64"],
            "run: train_batch_tokens=100 is not a whole number of rows",
        ),
        (MINIMAL, ["objective.cutoffs=every"], "objective.cutoffs.*'every'"),
        # Of a layer named twice the second would count in the divisor alone.
        (MINIMAL, ["objective.cutoffs=[2, 2]"], r"objective: cutoffs=\[2, 2\] names a layer twice"),
        (
            MINIMAL,
            [f"objective.{name}=0" for name in ("lambda_adapt", "l1_weight", "lambda_nmse")]
            + ["objective.num_cutoffs=0"],
            "objective: .* are all 0 and train nothing",
        ),
        (
            MINIMAL,
            ["optimizer.betas=[0.9, 1]"],
            "optimizer.betas.1: 1 does not fit.*less than 1",
        ),
        (MINIMAL, ["run.report_to=[mlflow]"], "run.report_to.*'mlflow'"),
        (MINIMAL, ["l1_weight"], "override: 'l1_weight' is not of the form"),
        (MINIMAL, ["pair.base.x=1"], "override: .*single value"),
        ("pair: {base: a}\ndata: {train: t}\nrun: {output_dir: o}", [], "pair.target: missing"),
        ("pair: [", [], "not valid YAML"),
        ("- 1", [], "holds list"),
        ("", [], "holds NoneType"),
    ],
)
def test_mistakes_are_named(path, text, overrides, message):
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_config(path, overrides)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_config(tmp_path / "missing.yaml")
    with pytest.raises(UserError, match="is a directory"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"pair: \xff\xfe")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path / "latin.yaml")

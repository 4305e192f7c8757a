"""Damaged checkpoints and configurations by the thousand: one clear line, never a traceback.

A few hundred cases of each kind here, ten thousand in `make test-long`. Every case is drawn from
its number, so a failure names what to run again. None may take longer than a few seconds.
"""

import contextlib
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from fuzzing import mutate, number_of_cases, within_seconds
from safetensors.torch import load_file, save_file
from test_training_checkpoints import PART, WEIGHTS, sealed

from tca_fast.bridging.steps import STEPS
from tca_fast.bridging.streams import load_streams
from tca_fast.config import load_config
from tca_fast.errors import UserError
from tca_fast.sparsity import FeatureAges
from tca_fast.training.checkpoints import newest_whole
from tca_fast.training.deepspeed_settings import fill_settings, read_settings
from tca_fast.training.engine import LocalEngine
from tca_fast.training.run import train
from tca_fast.training.state import changed_settings, load_ages, read_progress

pytestmark = pytest.mark.usefixtures("one_thread")
AGES, STATE, MANIFEST = "feature_ages.safetensors", "training_state.json", "manifest.json"
VALUES = [None, True, False, 0, -1, 7, 10**30, 0.5, float("nan"), "", "x", [], [1], {}, {"a": 1}]


@pytest.fixture(scope="module")
def num_cases(request) -> int:
    return number_of_cases(request.config)


class Resume:
    """A tiny engine that loads a checkpoint as a run does."""

    def __init__(self, root: Path) -> None:
        overrides = [f"run.output_dir={root}/fuzzed", "run.max_steps=4", "run.save_steps=4"]
        self.config = load_config(root / "run.yaml", [*overrides, "run.eval_steps=0"])
        train(self.config, show_progress=False)
        self.folder = root / "fuzzed"
        self.checkpoint = self.folder / "checkpoints" / "step_000004"
        self.original = {
            path.relative_to(self.checkpoint).as_posix(): path.read_bytes()
            for path in sorted(self.checkpoint.rglob("*"))
            if path.is_file()
        }
        state = json.loads(self.original[STATE])
        self.digests = state["data_digest"], state["models_digest"]
        streams = load_streams(self.config.pair, self.config.adapter)
        objective = STEPS[self.config.objective.step](streams, self.config.objective)
        self.engine = LocalEngine(objective, self.config.optimizer, torch.device("cpu"))
        self.ages = FeatureAges(streams.num_layers, self.config.adapter.num_features)

    def restore(self) -> None:
        for name, content in self.original.items():
            (self.checkpoint / name).write_bytes(content)

    def load(self) -> None:
        checkpoint, _ = newest_whole("latest", self.folder, self.engine)
        read_progress(checkpoint, self.config, *self.digests)
        changed_settings(checkpoint, self.config)
        load_ages(checkpoint, self.ages)
        self.engine.load_state(checkpoint)

    def complaint(self) -> str:
        """What resuming says, or nothing if it accepts."""
        try:
            self.load()
        except UserError as error:
            assert "\n" not in str(error), error
            return str(error)
        return ""


@pytest.fixture(scope="module")
def resume(pair) -> Resume:
    return Resume(pair)


def test_no_damage_on_the_disk_is_accepted(resume, num_cases):
    """Whatever byte changes, resume refuses, unless the manifest still says the very same."""
    resume.restore()
    assert resume.complaint() == ""
    for case in range(num_cases):
        draw = random.Random(f"disk:{case}")
        name = draw.choice(sorted(resume.original))
        damaged = mutate(resume.original[name], draw)
        (resume.checkpoint / name).write_bytes(damaged)
        with within_seconds(20, case):
            said = resume.complaint()
        if damaged != resume.original[name] and not said:
            assert name == MANIFEST, f"case {case}: damage to {name} was accepted"
            assert json.loads(damaged) == json.loads(resume.original[name]), case
        (resume.checkpoint / name).write_bytes(resume.original[name])


def change_tensors(path: Path, draw: random.Random) -> None:
    """Rename, drop, add, reshape, resize or recast a tensor, so that the file fits no more."""
    tensors = load_file(path)
    name = draw.choice(sorted(tensors))
    tensor = tensors[name]
    kind = draw.randrange(6)
    if kind == 0:
        tensors["x" + name[draw.randrange(len(name)) :]] = tensors.pop(name)
    elif kind == 1:
        del tensors[name]
    elif kind == 2:
        tensors[name + draw.choice(("/0", "x", "/exp_avg/0"))] = tensor.clone()
    elif kind == 3:
        tensors[name] = tensor.reshape(1, *tensor.shape)
    elif kind == 4:
        tensors[name] = torch.cat([tensor.reshape(-1), tensor.reshape(-1)])
    else:
        tensors[name] = tensor.to(draw.choice((torch.float16, torch.float64, torch.int32)))
    save_file(tensors, path, metadata={"format": "pt"})


def test_no_tensors_of_another_shape_are_accepted(resume, num_cases):
    """As if another program had written the checkpoint, manifest and all."""
    for case in range(num_cases // 3):
        draw = random.Random(f"tensors:{case}")
        resume.restore()
        name = draw.choice((PART, WEIGHTS, AGES))
        change_tensors(resume.checkpoint / name, draw)
        sealed(resume.checkpoint)
        with within_seconds(20, case):
            assert resume.complaint(), f"case {case}: foreign tensors in {name} were accepted"
    resume.restore()


def test_sealed_damage_gives_no_traceback(resume, num_cases):
    """Bytes that were damaged before the manifest was written, headers above all."""
    for case in range(num_cases // 3):
        draw = random.Random(f"sealed:{case}")
        resume.restore()
        name = draw.choice((PART, WEIGHTS, AGES, STATE))
        content = resume.original[name]
        header = 8 + int.from_bytes(content[:8], "little") if name != STATE else len(content)
        damaged = mutate(content[:header], draw) + content[header:]
        (resume.checkpoint / name).write_bytes(damaged)
        sealed(resume.checkpoint)
        with within_seconds(20, case):
            resume.complaint()
    resume.restore()


def change_json(tree, draw: random.Random) -> None:
    """Put another value, or another key, somewhere into a tree of dicts."""
    while True:
        key = draw.choice(sorted(tree))
        if isinstance(tree[key], dict) and tree[key] and draw.random() < 0.8:
            tree = tree[key]
            continue
        kind = draw.randrange(4)
        if kind == 0:
            del tree[key]
        elif kind == 1:
            tree[key + "x"] = tree.pop(key)
        else:
            tree[key] = draw.choice(VALUES)
        return


def test_no_training_state_of_another_form_is_accepted(resume, num_cases):
    for case in range(num_cases // 3):
        draw = random.Random(f"state:{case}")
        resume.restore()
        before = json.loads(resume.original[STATE])
        record = json.loads(resume.original[STATE])
        change_json(record, draw)
        (resume.checkpoint / STATE).write_text(json.dumps(record))
        sealed(resume.checkpoint)
        with within_seconds(20, case):
            said = resume.complaint()
        if said:
            continue
        # What a resume does not use may change; what it uses has to have a fitting value.
        for name in ("step", "total_steps", "tokens_seen", "sequences_seen"):
            assert type(record[name]) is int and record[name] >= 0, (case, name)
        for name in ("format_version", "data_digest", "models_digest"):
            assert record[name] == before[name], (case, name)
        for block in ("pair", "adapter"):
            # A field that is not there means the same as one that is None.
            for name, value in before["config"][block].items():
                assert record["config"][block].get(name) == value, (case, block, name)
    resume.restore()


# Configurations


def reflects(given, loaded) -> bool:
    """Whether what was loaded is what was written, up to how YAML spells numbers."""
    if isinstance(given, dict):
        return isinstance(loaded, dict) and all(
            key in loaded and reflects(value, loaded[key]) for key, value in given.items()
        )
    if isinstance(given, bool) or isinstance(loaded, bool):
        return given is loaded or str(given).lower() in _SPELLINGS.get(loaded, ())
    if isinstance(loaded, list | tuple):
        return len(given) == len(loaded) and all(map(reflects, given, loaded))
    if isinstance(loaded, int | float):
        return given == loaded or float(given) == float(loaded)
    return given == loaded


# What pydantic takes for a truth value.
_SPELLINGS = {
    True: ("1", "1.0", "true", "t", "yes", "y", "on"),
    False: ("0", "0.0", "false", "f", "no", "n", "off"),
}


def test_no_configuration_is_misread(pair, tmp_path, num_cases):
    path, text = tmp_path / "run.yaml", (pair / "run.yaml").read_bytes()
    accepted = 0
    for case in range(num_cases):
        draw = random.Random(f"config:{case}")
        overrides = []
        if draw.random() < 0.5:
            path.write_bytes(mutate(text, draw))
        else:
            tree = yaml.safe_load(text)
            change_json(tree, draw)
            path.write_text(yaml.safe_dump(tree))
        with within_seconds(20, case):
            try:
                loaded = load_config(path, overrides)
            except UserError as error:
                assert "\n" not in str(error), (case, error)
                continue
        accepted += 1
        given = yaml.safe_load(path.read_bytes())
        assert reflects(given, loaded.model_dump()), f"case {case}: {path.read_text()}"
    assert 0 < accepted < num_cases


def test_no_deepspeed_file_gives_a_traceback(pair, tmp_path, num_cases):
    configs = Path(__file__).parent.parent / "configs"
    config = load_config(pair / "run.yaml")
    path = tmp_path / "settings.json"
    for case in range(num_cases):
        draw = random.Random(f"deepspeed:{case}")
        shutil.copy(draw.choice(sorted(configs.glob("zero*.json"))), path)
        if draw.random() < 0.5:
            path.write_bytes(mutate(path.read_bytes(), draw))
        else:
            tree = json.loads(path.read_text())
            change_json(tree, draw)
            path.write_text(json.dumps(tree))
        with within_seconds(20, case), contextlib.suppress(UserError):
            filled = fill_settings(read_settings(path), config, 2, torch.device("cpu"), path)
            stage = filled.get("zero_optimization", {}).get("stage", 0)
            assert type(stage) is int and 0 <= stage <= 3, case
            assert '"auto"' not in json.dumps(filled), case

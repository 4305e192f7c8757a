"""Checkpoints on a disk that fills, lies and loses: what survives, and what resume says of it."""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pair import records

from tca_fast.config import load_config
from tca_fast.errors import UserError
from tca_fast.training import checkpoints as kept
from tca_fast.training.manifest import what_is_wrong
from tca_fast.training.run import train

pytestmark = pytest.mark.usefixtures("one_thread")
PART = "optimizer/part_00000.safetensors"
WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def unbroken(pair) -> Path:
    train(load_config(pair / "run.yaml"), show_progress=False)
    return pair / "out"


def start(pair, output, *overrides):
    config = load_config(pair / "run.yaml", [f"run.output_dir={output}", *overrides])
    return train(config, show_progress=False)


def sealed(checkpoint: Path) -> None:
    """Write the manifest anew, as if what is there had been saved so."""
    files = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != "manifest.json":
            content = path.read_bytes()
            record = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            files[path.relative_to(checkpoint).as_posix()] = record
    manifest = {"format_version": 1, "files": files}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def test_the_manifest_lists_every_file_as_it_is(unbroken):
    checkpoint = unbroken / "checkpoints" / "step_000016"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    there = {
        path.relative_to(checkpoint).as_posix(): path
        for path in checkpoint.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }
    assert manifest["files"].keys() == there.keys() and {PART, WEIGHTS} <= there.keys()
    for name, path in there.items():
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        assert manifest["files"][name] == {"bytes": len(content), "sha256": digest}
    assert what_is_wrong(checkpoint) == ""


def test_moments_are_those_of_adamw_by_name(unbroken):
    """After 8 steps every moment is float32 and flat, and holds each parameter once."""
    checkpoint = unbroken / "checkpoints" / "step_000008"
    moments, weights = load_file(checkpoint / PART), load_file(checkpoint / WEIGHTS)
    assert moments.pop("step") == 8
    expected = {f"{name}/{moment}/0" for name in weights for moment in ("exp_avg", "exp_avg_sq")}
    assert moments.keys() == expected
    for key, moment in moments.items():
        assert moment.shape == (weights[key.split("/")[0]].numel(),)
        assert moment.any() and (moment.min() >= 0 or "exp_avg_sq" not in key)


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 4
    elif how == "truncated":
        del content[len(content) // 2 :]
    elif how == "emptied":
        content.clear()
    path.write_bytes(content)
    if how == "removed":
        path.unlink()


@pytest.mark.parametrize(
    ("name", "how", "said"),
    [
        ("training_state.json", "flipped", "its contents are not those that were written"),
        (PART, "truncated", "bytes, was written with"),
        ("feature_ages.safetensors", "emptied", "has 0 bytes"),
        (WEIGHTS, "flipped", "its contents are not those that were written"),
        (PART, "removed", "No such file"),
        ("manifest.json", "truncated", "not a readable manifest"),
        ("manifest.json", "removed", "not a readable manifest"),
    ],
)
def test_resume_takes_the_newest_whole_one_and_says_what_it_skipped(
    pair, unbroken, tmp_path, capsys, name, how, said
):
    output = tmp_path / "run"
    shutil.copytree(unbroken, output)
    damage(output / "checkpoints" / "step_000016" / name, how)
    # Three steps of the same run: `max_steps` is the length of the schedule, so it stays.
    start(pair, output, "run.resume_from_checkpoint=latest", "run.save_steps=0")
    heard = capsys.readouterr().err
    assert f"resumed from {output}/checkpoints/step_000008 after 8 steps" in heard
    assert "skipped step_000016, now damaged_step_000016: " in heard and said in heard
    assert f"step_000016/{name}: " in heard
    assert records(output) == records(unbroken)
    names = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert names == ["damaged_step_000016", "step_000008"]


def test_without_a_whole_checkpoint_nothing_is_touched(pair, unbroken, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(unbroken, output)
    for step in ("step_000008", "step_000016"):
        damage(output / "checkpoints" / step / WEIGHTS, "truncated")
    before = {path: path.stat().st_mtime for path in output.rglob("*")}
    with pytest.raises(UserError, match=r"of 2 checkpoint\(s\) none is whole .*step_000016"):
        start(pair, output, "run.resume_from_checkpoint=latest")
    chosen = f"run.resume_from_checkpoint={output}/checkpoints/step_000008"
    with pytest.raises(UserError, match=r"of 1 checkpoint\(s\) none is whole .*step_000008"):
        start(pair, output, chosen)
    assert {path: path.stat().st_mtime for path in output.rglob("*")} == before


def rewritten(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (WEIGHTS, lambda t: t.update(other=t.pop(sorted(t)[0])), "W_dec|b_dec|is not as this run"),
        (WEIGHTS, lambda t: t.update({k: v[:1] for k, v in t.items()}), "is not as this run has"),
        (WEIGHTS, lambda t: t.update({k: v.half() for k, v in t.items()}), "is not as this run"),
        (PART, lambda t: t.pop("step"), "does not say its step"),
        (PART, lambda t: t.update(x=t.pop(sorted(t)[0])), "x .* is no moment of these adapters"),
        (PART, lambda t: t.pop(sorted(t)[0]), "is not there once and whole"),
        (PART, lambda t: t.update({sorted(t)[0]: torch.zeros(3)}), "is not there once and whole"),
        ("feature_ages.safetensors", lambda t: t.update(tokens=t["tokens"][:1]), "the counters"),
    ],
)
def test_a_sealed_checkpoint_of_something_else_is_refused(
    pair, unbroken, tmp_path, name, change, said
):
    output = tmp_path / "run"
    shutil.copytree(unbroken, output)
    rewritten(output / "checkpoints" / "step_000016" / name, change)
    sealed(output / "checkpoints" / "step_000016")
    with pytest.raises(UserError, match=said):
        start(pair, output, "run.resume_from_checkpoint=latest")


# A full disk


@pytest.mark.parametrize("name", ["adapter_model", "part_00000", "feature_ages", "manifest"])
def test_on_a_full_disk_training_goes_on_and_the_last_checkpoint_stays(
    pair, unbroken, tmp_path, monkeypatch, capsys, name
):
    """Writing fails at the system call, however the file is written."""
    output = tmp_path / "run"
    fsync = os.fsync

    def full(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if name in path and "step_000016" in path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        result = start(pair, output)
    assert result.step == 20 and result.adapter is not None
    heard = capsys.readouterr().err
    assert "warning: checkpoint: step 16 could not be saved" in heard
    assert "No space left on device" in heard and "Training goes on" in heard
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step_000008"]
    assert records(output) == records(unbroken)
    start(pair, output, "run.resume_from_checkpoint=latest")
    assert records(output) == records(unbroken)


def test_a_checkpoint_loses_its_name_before_its_files(tmp_path, monkeypatch):
    """Killed while it removes an old checkpoint, a run leaves none that looks whole."""
    for step in (1, 2, 3):
        (tmp_path / "checkpoints" / f"step_00000{step}").mkdir(parents=True)

    def die(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        kept.remove_old(tmp_path, 2)
    monkeypatch.undo()
    names = [path.name for path in kept.checkpoints(tmp_path)]
    assert names == ["step_000002", "step_000003"]
    kept.clear_unfinished(tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == names

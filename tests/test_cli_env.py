"""`tca-fast env` on machines that have and lack things."""

import importlib
import json
from collections.abc import Callable
from importlib import metadata

import pytest
import torch
import typer
from typer.testing import CliRunner

# `tca_fast.cli.env` as an attribute is the command, not the module.
env = importlib.import_module("tca_fast.cli.env")


def run(*arguments: str) -> str:
    app = typer.Typer()
    app.command()(env.env)
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Hide distributions and modules from every look-up."""
    find_spec, version = env.util.find_spec, metadata.version

    def hide(*names: str) -> None:
        def hidden_spec(name: str):
            return None if name in names else find_spec(name)

        def hidden_version(name: str) -> str:
            if name in names:
                raise metadata.PackageNotFoundError(name)
            return version(name)

        monkeypatch.setattr(env.util, "find_spec", hidden_spec)
        monkeypatch.setattr(env.metadata, "version", hidden_version)

    return hide


def test_json_has_the_versions_that_are_imported() -> None:
    found = json.loads(run("--json"))
    assert found["versions"]["torch"] == torch.__version__
    assert found["machine"]["torch threads"] == str(torch.get_num_threads())


def test_every_operator_is_listed_for_cpu_and_cuda_with_a_reason() -> None:
    from tca_fast import ops

    found = json.loads(run("--json"))["operators"]
    listed = {(row["operator"], row["device"]): row["backend"] for row in found}
    assert listed == {
        (operator, device): backend
        for operator, by_device in ops.backends().items()
        for device, backend in by_device.items()
    }
    assert {"encode", "decode", "adapter"} <= {operator for operator, _ in listed}
    assert all(row["reason"] for row in found)


def test_absent_packages_are_named_with_the_command_that_adds_them(without, monkeypatch) -> None:
    from tca_fast import registry

    without("triton", "deepspeed", "flash_attn", "flash-attn", "wandb", "tca_fast._C")
    monkeypatch.setattr(registry, "_is_registered", lambda *key: False)
    shown = run()
    assert "pip install deepspeed" in shown
    assert "run.report_to=[wandb]" in shown
    found = json.loads(run("--json"))
    assert found["versions"]["deepspeed"] is None
    assert found["versions"]["triton"] is None
    cpu = [row for row in found["operators"] if row["device"] == "CPU"]
    assert all("extension is not installed" in row["reason"] for row in cpu)
    assert "needs a C++ compiler" in shown


def test_what_only_a_gpu_needs_is_asked_for_only_beside_one(without, monkeypatch) -> None:
    without("triton", "flash_attn")
    monkeypatch.setattr(env, "_devices", list)
    names = {item.name for item in env.collect().missing}
    assert "CUDA device" in names and not names & {"triton", "flash-attn"}
    monkeypatch.setattr(env, "_devices", lambda: ["cuda:0 Some GPU"])
    names = {item.name for item in env.collect().missing}
    assert "CUDA device" not in names and {"triton", "flash-attn"} <= names


def test_present_packages_are_not_called_missing(monkeypatch) -> None:
    monkeypatch.setattr(env.util, "find_spec", lambda name: object())
    monkeypatch.setattr(env, "_devices", lambda: ["cuda:0 Some GPU"])
    assert env.collect().missing == []

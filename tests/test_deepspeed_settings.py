"""DeepSpeed files: what is filled in, and what is refused with the nearest that works."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tca_fast.config import load_config
from tca_fast.errors import UserError
from tca_fast.training.deepspeed_settings import fill_settings, read_settings
from tca_fast.training.run import train

CONFIGS = Path(__file__).parent.parent / "configs"
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHIPPED = ["zero0", "zero1", "zero2", "zero2_offload", "zero3"]


def fill(pair, settings, *overrides, num_ranks=1, device=CPU, path=Path("file.json")):
    config = load_config(pair / "run.yaml", overrides)
    return fill_settings(settings, config, num_ranks, device, path)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_leave_nothing_automatic(pair, name):
    path = CONFIGS / f"{name}.json"
    options = ["run.train_batch_size=16", "run.per_device_train_batch_size=2"]
    filled = fill(pair, read_settings(path), *options, num_ranks=4, path=path)
    assert '"auto"' not in json.dumps(filled)
    assert filled["train_batch_size"] == 16 and filled["train_micro_batch_size_per_gpu"] == 2
    assert filled["gradient_accumulation_steps"] == 2 and filled["gradient_clipping"] == 1.0
    assert filled["zero_optimization"]["stage"] == int(name[4])
    assert filled["bf16"]["enabled"] is False


@pytest.mark.parametrize(
    ("dtype", "device", "is_bf16"),
    [
        ("auto", CPU, False),
        ("auto", CUDA, True),
        ("bfloat16", CPU, True),
        ("float32", CUDA, False),
    ],
)
def test_bfloat16_follows_the_pair(pair, dtype, device, is_bf16):
    zero2 = {"zero_optimization": {"stage": 2}}
    filled = fill(pair, zero2, f"pair.dtype={dtype}", device=device)
    assert filled["bf16"]["enabled"] is is_bf16
    assert ("data_types" in filled) == is_bf16
    if is_bf16:
        assert filled["data_types"] == {"grad_accum_dtype": "fp32"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient_clipping": 7.0}, "gradient_clipping to 7.0, the run configuration means 1.0"),
        ({"zero_optimization": {"stage": "auto"}}, "zero_optimization.stage to .auto., which noth"),
        ({"zero_optimization": {"stage": 4}}, "stage to 4, which is none of ZeRO's; use 0, 1, 2"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}},
            "offload_optimizer.device to 'nvme', whose files .* use .cpu. .configs/zero2_offload",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "offload_param.device to 'cpu', which ZeRO-2 ignores; use stage 3",
        ),
        (
            {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}},
            "zero_hpz_partition_size to 8, which cuts parameters .*; use 1",
        ),
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
            "zero_quantized_weights to True, which rounds the frozen weights; use false",
        ),
        (
            {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
            "round_robin_gradients to True, which orders AdamW's state .*; use false",
        ),
        ({"elasticity": {"enabled": True}}, "elasticity to True, which changes the batch size"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size to 2, which gives ranks parts"),
    ],
)
def test_known_traps_are_refused_with_what_works(pair, settings, message):
    with pytest.raises(UserError, match=f"deepspeed: file.json sets .*{message}"):
        fill(pair, settings)


@pytest.mark.parametrize(
    ("dtype", "settings", "message"),
    [
        ("bfloat16", {"zero_optimization": {"stage": 0}}, "no float32 master .*configs/zero1"),
        (
            "bfloat16",
            {"zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": "bf16"}},
            "grad_accum_dtype to 'bf16', which loses small gradients",
        ),
        ("float16", {"zero_optimization": {"stage": 2}}, "pair.dtype: 'float16' .* use bfloat16"),
    ],
)
def test_precision_traps_are_refused(pair, dtype, settings, message):
    with pytest.raises(UserError, match=message):
        fill(pair, settings, f"pair.dtype={dtype}")


def test_what_is_off_is_no_trap(pair):
    zero = {"stage": 3, "zero_hpz_partition_size": 1, "zero_quantized_weights": False}
    off = {"zero_optimization": zero, "elasticity": {"enabled": False}, "sequence_parallel_size": 1}
    assert fill(pair, off)["zero_optimization"] == zero


def test_a_batch_that_the_ranks_cannot_share_is_named_by_its_field(pair):
    """DeepSpeed's own word for it would be 0 gradient accumulation steps."""
    one = ["run.train_batch_size=1", "run.per_device_train_batch_size=1"]
    with pytest.raises(UserError, match="run.train_batch_size: 1 is not divisible .* of 8"):
        fill(pair, {"zero_optimization": {"stage": 2}}, *one, num_ranks=8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "is not a JSON object"),
        ('{"optimizer": {"type": "Adam"}}', "sets 'optimizer'; remove it"),
        ('{"zero_optimisation": {"stage": 2}}', "unknown; did you mean 'zero_optimization'"),
        ('{"zero_optimization": 2}', "sets zero_optimization to 2; it needs a block"),
    ],
)
def test_files_that_cannot_be_meant_are_refused(tmp_path, text, message):
    path = tmp_path / "settings.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_settings(path)


def test_a_missing_file_is_reported_before_anything_is_written(pair, tmp_path):
    config = load_config(pair / "run.yaml", [f"run.output_dir={tmp_path}/out"])
    with pytest.raises(UserError, match="nowhere.json cannot be read"):
        train(config, tmp_path / "nowhere.json")
    assert not (tmp_path / "out").exists()


def refusal(pair, path, output, **environment) -> str:
    """What a rank of its own says before it leaves without having written anything."""
    command = [sys.executable, "-m", "tca_fast.train", pair / "run.yaml"]
    command += ["--deepspeed", path, f"run.output_dir={output}"]
    done = subprocess.run(
        [str(part) for part in command],
        env=os.environ | environment | {"PYTHONPATH": str(CONFIGS.parent)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr and not output.exists()
    return done.stderr


def test_ranks_that_cannot_meet_say_so_in_one_line(pair, tmp_path):
    """Another program listens where rank 0 should."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        said = refusal(pair, CONFIGS / "zero2.json", tmp_path / "out", **ranks, **where)
    assert "error: ranks: they cannot meet at 127.0.0.1:" in said


def test_settings_that_deepspeed_refuses_with_the_model_are_one_line(pair, tmp_path):
    path = tmp_path / "settings.json"
    path.write_text('{"zero_optimization": {"stage": 2}, "prescale_gradients": true}')
    said = refusal(pair, path, tmp_path / "out", CUDA_VISIBLE_DEVICES="")
    assert "error: deepspeed: DeepSpeed refuses its settings (pre-scale gradients is not" in said


def test_ranks_that_were_started_differently_are_named(pair, monkeypatch):
    from tca_fast.training.deepspeed_engine import DeepSpeedGroup

    group = DeepSpeedGroup.__new__(DeepSpeedGroup)
    group.num_ranks, group.settings = 3, {"bf16": {"enabled": False}}
    config = load_config(pair / "run.yaml")

    def gather(change):
        def all_gather_object(ranks, own):
            ranks[:] = [own, own, {**own, "host": "node-7", **change}]

        monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)

    gather({})
    group._check_agreement(config)
    gather({"deepspeed": "0.1"})
    with pytest.raises(UserError, match=r"rank 2 on node-7 and rank 0 .* deepspeed \(0.1 and 0"):
        group._check_agreement(config)
    gather({"the configuration": {}})
    with pytest.raises(UserError, match="rank 2 on node-7 .* differ in the configuration; install"):
        group._check_agreement(config)


def test_an_output_folder_that_only_rank_0_sees_is_refused(tmp_path):
    from tca_fast.training.run import _wait_to_see

    (tmp_path / "config.yaml").write_text("")
    _wait_to_see(tmp_path / "config.yaml", 1, seconds=0)
    with pytest.raises(UserError, match="run.output_dir: rank 1 on .* does not see .*nodes share"):
        _wait_to_see(tmp_path / "elsewhere" / "config.yaml", 1, seconds=0.2)

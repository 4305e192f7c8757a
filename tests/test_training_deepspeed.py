"""Two CPU ranks of which one meets something that is not finite, under every ZeRO stage."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from forked_ranks import free_port
from tiny_pair import make_pair, records

LAUNCHER = Path(sys.executable).with_name("deepspeed")

pytestmark = pytest.mark.skipif(
    not LAUNCHER.exists(), reason="needs DeepSpeed: pip install 'tca_fast[deepspeed]'"
)


@pytest.fixture(scope="module")
def diverged(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pair")
    config = make_pair(root)
    tests = Path(__file__).parent
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tests.parent)}
    command = [LAUNCHER, "--num_accelerators", 2, "--master_port", free_port()]
    done = subprocess.run(
        [str(part) for part in (*command, tests / "deepspeed_divergence.py", config)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return root


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("spoiled", "what"), [("loss", "the loss is nan"), ("gradient", "a gradient is not finite")]
)
def test_all_ranks_stop_before_the_step_is_applied(diverged, spoiled, what, stage):
    run = f"{spoiled}{stage}"
    told = [json.loads((diverged / f"divergence_rank{rank}.json").read_text()) for rank in (0, 1)]
    messages = {told[rank][run][0] for rank in (0, 1)}
    (message,) = messages
    checkpoint = diverged / run / "checkpoints" / "step_000002"
    assert f"{what} at step 3, " in message and str(checkpoint) in message
    assert told[0][run][1], "the parameters are those of the checkpoint"
    assert [record["step"] for record in records(diverged / run)] == [1, 2]

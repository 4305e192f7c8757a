"""Two CPU ranks load pairs under ZeRO-3 and compare what they hold with whole loading.

    python tests/partitioned_loading.py FOLDER [LAYERS WIDTH MLP FEATURES]

prints the peak of resident memory (VmHWM) on each rank while it loads a random pair and makes its
adapters, beyond what was resident before, in parts and whole. The default pair is one for a test.
"""

import gc
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import torch
import zoo
from tiny import tiny_qwen2

from tca_fast.bridging.streams import Streams, load_streams
from tca_fast.config import AdapterConfig, PairConfig, TrainConfig
from tca_fast.errors import UserError
from tca_fast.training.deepspeed_engine import DeepSpeedGroup
from tca_fast.training.partitioned_loading import Partition

RANKS = 2
#: Untied and tied, a scale in a buffer, weights stored transposed, experts that are merged as read.
FAMILIES = ("Llama", "Qwen2", "Gemma 2", "GPT-2", "Mixtral")
DTYPES = ("float32", "bfloat16")
SMALL = (6, 512, 1536, 2048)
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    # Freed blocks go back to the system, or they would count.
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}


def make(root: Path, layers: int, width: int, mlp: int, features: int) -> None:
    """Models that are stored in either dtype, and the sizes of the large pair."""
    for family in FAMILIES:
        for dtype in DTYPES:
            for seed, role in enumerate(("base", "target")):
                model = zoo.make(family, seed, getattr(torch, dtype))
                model.save_pretrained(root / family / dtype / role)
    shape = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": mlp}
    shape |= {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 2048}
    for seed, role in enumerate(("base", "target")):
        # Stored in the other dtype: what is converted is allocated, not mapped from the file.
        model = tiny_qwen2(seed, **shape, tie_word_embeddings=False)
        model.to(torch.bfloat16).save_pretrained(root / "large" / role)
    (root / "features").write_text(str(features))
    (root / "zero3.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))


class Rank:
    """One of the two.

    Attributes:
        group: its place.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        config = TrainConfig.model_validate(
            {
                "pair": self.pair("large").model_dump(),
                "data": {"train": "unused.jsonl", "max_length": 8},
                "run": {"output_dir": "unused", "train_batch_size": RANKS},
            }
        )
        self.group = DeepSpeedGroup(root / "zero3.json", config, torch.device("cpu"))

    def pair(self, folder: str, **options) -> PairConfig:
        base, target = (str(self.root / folder / role) for role in ("base", "target"))
        known = {"base": base, "target": target, "dtype": "float32", "attn_implementation": "eager"}
        return PairConfig(**{**known, **options})

    def load(self, pair: PairConfig, num_features: int = 32, *, whole: bool = False) -> Streams:
        config = AdapterConfig(num_features=num_features)
        if whole:
            return load_streams(pair, config, seed=3)
        partition = Partition(self.group)
        streams = load_streams(pair, config, seed=3, place=partition)
        partition.finish()
        return streams

    def compare(self, family: str, dtype: str, backbone: str) -> None:
        """Every parameter and buffer of both streams, bit for bit."""
        import deepspeed

        pair = self.pair(f"{family}/{dtype}", backbone=backbone)
        parts, whole = self.load(pair), self.load(pair, whole=True)
        case = (family, dtype, backbone)
        for ours, theirs in (
            (parts.adapted.model, whole.adapted.model),
            (parts.reference, whole.reference),
        ):
            expected = dict(theirs.named_parameters(remove_duplicate=False))
            found = dict(ours.named_parameters(remove_duplicate=False))
            assert found.keys() == expected.keys(), case
            for name, parameter in found.items():
                assert parameter.numel() == 0 and parameter.ds_tensor.numel() > 0, (*case, name)
                assert parameter.requires_grad == expected[name].requires_grad, (*case, name)
                with deepspeed.zero.GatheredParameters([parameter]):
                    assert torch.equal(parameter, expected[name]), (*case, name)
                    assert parameter.dtype == expected[name].dtype, (*case, name)
            buffers = dict(ours.named_buffers())
            assert buffers.keys() == dict(theirs.named_buffers()).keys(), case
            for name, buffer in theirs.named_buffers():
                assert torch.equal(buffers[name], buffer), (*case, name)
                assert buffers[name].dtype == buffer.dtype, (*case, name)

    def refusal(self) -> str:
        """What is said where rank 1 finds another target under the name of rank 0's."""
        folder = "Llama/float32"
        other = {"target": str(self.root / folder / "base")} if self.group.rank else {}
        try:
            self.load(self.pair(folder, **other))
        except UserError as error:
            return str(error)
        raise AssertionError("ranks that read different weights went on")

    def peak(self, *, whole: bool) -> int:
        """Most bytes resident while the large pair is loaded, beyond those before."""
        features = int((self.root / "features").read_text())
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        self.load(self.pair("large"), features, whole=whole)
        return _status("VmHWM") - before


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def run_rank(root: Path) -> None:
    rank = Rank(root)
    for family in FAMILIES:
        for dtype in DTYPES:
            for backbone in ("target", "base"):
                rank.compare(family, dtype, backbone)
    found = {
        "refusal": rank.refusal(),
        **{name: rank.peak(whole=name == "whole") for name in ("parts", "whole")},
    }
    (root / f"rank{rank.group.rank}.json").write_text(json.dumps(found))


def run(root: Path, sizes: tuple[int, int, int, int] = SMALL) -> list[dict]:
    """What each rank found.

    Raises:
        AssertionError: a rank failed; with what it said.
    """
    make(root, *sizes)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(RANKS):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_SIZE": RANKS}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks.append(
            subprocess.Popen(
                [sys.executable, __file__, "--rank", root],
                env={**os.environ, **ENVIRONMENT, **{key: str(place[key]) for key in place}},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        said = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert not any(rank.returncode for rank in ranks), "\n".join(text[-3000:] for text in said)
    return [json.loads((root / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


if __name__ == "__main__":
    if sys.argv[1] == "--rank":
        run_rank(Path(sys.argv[2]))
    else:
        sizes = tuple(map(int, sys.argv[2:])) or SMALL
        for number, found in enumerate(run(Path(sys.argv[1]), sizes)):
            print(
                f"rank {number}: {found['parts'] >> 20} MiB in parts, {found['whole'] >> 20} whole"
            )

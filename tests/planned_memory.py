"""Peak memory of a training run in a process of its own, against what the plan says.

    python tests/planned_memory.py CASE             one case of CASES, measured and planned, as JSON

A tiny run comes first, so that libraries are loaded and threads started; what is resident then is
the baseline. The peak is the operating system's (VmHWM), which knows every allocation, whoever
makes it. glibc is told to give freed blocks back, or it would count what is no longer in use.
Under several ranks every rank is measured and the largest counts.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}
STEPS = 3


@dataclass(frozen=True)
class MemoryCase:
    """A run of one sequence per step and rank; the cutoff is the one that needs most memory."""

    layers: int
    width: int
    mlp: int
    heads: int
    features: int
    tokens: int
    vocab_size: int
    stage: int | None = None
    ranks: int = 1
    checkpointing: bool = False


CASES = {
    "shallow": MemoryCase(3, 256, 1024, 4, 2048, 512, 4096),
    "deep": MemoryCase(12, 192, 512, 4, 512, 768, 2048),
    "wide": MemoryCase(3, 768, 2048, 8, 4096, 128, 2048),
    "long": MemoryCase(4, 128, 512, 4, 1024, 2048, 1024),
    "long, checkpointed": MemoryCase(4, 128, 512, 4, 1024, 2048, 1024, checkpointing=True),
    "large vocabulary": MemoryCase(2, 256, 512, 4, 512, 1024, 32768),
    "deep and wide": MemoryCase(8, 384, 1024, 6, 1536, 384, 8192),
    "ZeRO-0, 2 ranks": MemoryCase(4, 512, 1024, 8, 4096, 256, 2048, stage=0, ranks=2),
    "ZeRO-1, 2 ranks": MemoryCase(4, 512, 1024, 8, 4096, 256, 2048, stage=1, ranks=2),
    "ZeRO-2, 2 ranks": MemoryCase(4, 512, 1024, 8, 4096, 256, 2048, stage=2, ranks=2),
    "ZeRO-3, 2 ranks": MemoryCase(4, 512, 1024, 8, 4096, 256, 2048, stage=3, ranks=2),
    "ZeRO-2, 2 ranks, longer": MemoryCase(6, 256, 1536, 4, 2048, 512, 4096, stage=2, ranks=2),
}


def make_run(case: MemoryCase, root: Path) -> Path:
    """Random models, text and a configuration under `root`; returns the YAML file."""
    import torch
    from tiny import tiny_qwen2
    from tiny_pair import character_tokenizer, conversation_line

    shape = {
        "vocab_size": case.vocab_size,
        "hidden_size": case.width,
        "intermediate_size": case.mlp,
        "num_hidden_layers": case.layers,
        "num_attention_heads": case.heads,
        "num_key_value_heads": case.heads // 2,
        "max_position_embeddings": case.tokens,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "tie_word_embeddings": False,
    }
    for seed, name in enumerate(("base", "target")):
        # Loaded as float32: converted weights are allocated, not mapped from the file, of which
        # only the rows of the embedding in use would be resident.
        tiny_qwen2(seed=seed, **shape).to(torch.bfloat16).save_pretrained(root / name)
        character_tokenizer().save_pretrained(root / name)
    text = "so it goes " * (case.tokens // 8)
    line = conversation_line("why?", f"<think>{text}</think>so")
    (root / "train.jsonl").write_text((line + "\n") * STEPS * case.ranks)
    config = root / "run.yaml"
    config.write_text(
        f"""
pair: {{base: {root}/base, target: {root}/target}}
adapter: {{num_features: {case.features}}}
objective: {{cutoffs: [1], gradient_checkpointing: {str(case.checkpointing).lower()}}}
data: {{train: {root}/train.jsonl, max_length: {case.tokens}}}
run: {{output_dir: {root}/out, train_batch_size: {case.ranks}, save_steps: 0, device: cpu}}
""",
        encoding="utf-8",
    )
    if case.stage is not None:
        zero = {"stage": case.stage}
        (root / "zero.json").write_text(json.dumps({"zero_optimization": zero}))
    return config


def measure(case: MemoryCase, port: int = 29640) -> int:
    """Peak bytes of the run beyond what the libraries take, of the rank that needs most."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        tiny = MemoryCase(2, 16, 16, 2, 16, 64, 128, case.stage, case.ranks, case.checkpointing)
        for name, one in (("tiny", tiny), ("run", case)):
            (root / name).mkdir()
            make_run(one, root / name)
        program = [sys.executable]
        if case.ranks > 1:
            launcher = Path(sys.executable).with_name("deepspeed")
            program = [launcher, "--num_accelerators", case.ranks, "--master_port", port]
        done = subprocess.run(
            [str(part) for part in (*program, __file__, "--train", root)],
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(Path(__file__).parents[1])},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return max(int(path.read_text()) for path in root.glob("peak_*"))


def _train(root: Path) -> None:
    import gc

    from tca_fast.config import load_config
    from tca_fast.training.run import train

    def run(name: str) -> None:
        zero = root / name / "zero.json"
        config = load_config(root / name / "run.yaml")
        train(config, zero if zero.exists() else None, show_progress=False)

    run("tiny")
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    baseline = _status("VmRSS")
    run("run")
    rank = os.environ.get("RANK", "0")
    (root / f"peak_{rank}").write_text(str(_status("VmHWM") - baseline))


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def planned(case: MemoryCase):
    """The plan's parts for a case."""
    from tca_fast.config import AdapterConfig, ObjectiveConfig
    from tca_fast.planning.memory import Placement, plan_memory
    from tca_fast.planning.shapes import ModelShape

    shape = ModelShape(
        case.width, case.mlp, case.layers, case.heads, case.heads // 2,
        case.width // case.heads, case.vocab_size, attention_bias=True,
    )  # fmt: skip
    return plan_memory(
        shape,
        AdapterConfig(num_features=case.features),
        ObjectiveConfig(cutoffs=[1], gradient_checkpointing=case.checkpointing),
        tokens=case.tokens,
        placement=Placement(stage=case.stage, num_ranks=case.ranks, itemsize=4, device="cpu"),
    )


if __name__ == "__main__":
    if "--train" in sys.argv:
        _train(Path(sys.argv[-1]))
    else:
        case = CASES[sys.argv[1]]
        plan = planned(case)
        measured = measure(case)
        print(
            json.dumps(
                {
                    "case": sys.argv[1],
                    **asdict(case),
                    "measured": measured,
                    "planned": plan.peak,
                    "parts": plan.parts,
                }
            )
        )

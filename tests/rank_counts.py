"""Fifty steps on 1, 2 and 4 CPU ranks under every ZeRO stage, and every hand-over between them.

    python tests/rank_counts.py OUT [--steps 50] [--packed]

Writes OUT/{stage}x{ranks}/log.jsonl, and OUT/{stage}x{ranks}_resumed where the middle checkpoint of
the run before in the list is taken over. With --packed, one run on two ranks with a token budget is
handed over to one and to four.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import forked_ranks
from tqdm import tqdm

STAGES = ("0", "1", "2", "2_offload", "3")
RANKS = (1, 2, 4)
# Neighbours differ in stage and in ranks, so that hand-overs change both.
RUNS = [(stage, RANKS[(i + j) % 3]) for j in range(3) for i, stage in enumerate(STAGES)]
# In batches of 4 they leave a last one of 2 in every epoch, so two of four ranks stand by there.
NUM_SEQUENCES = 86
PACKED = ("2", 2)
PACKED_HEIRS = [("1", 1), ("2", 4)]


def name_of(stage: str, num_ranks: int) -> str:
    return f"{stage}x{num_ranks}"


def settings(out: Path, stage: str) -> Path:
    path = out / f"zero{stage}.json"
    zero: dict = {"stage": int(stage[0])}
    if stage == "2_offload":
        zero["offload_optimizer"] = {"device": "cpu"}
    if stage == "3":
        zero["stage3_param_persistence_threshold"] = 100
    path.write_text(json.dumps({"zero_optimization": zero}))
    return path


def train(out: Path, stage: str, num_ranks: int, output: str, steps: int, *more: str) -> None:
    arguments = [str(out / "run.yaml"), "--deepspeed", str(settings(out, stage))]
    arguments += ["run.per_device_train_batch_size=1", f"run.max_steps={steps}"]
    arguments += ["run.num_epochs=20", f"run.save_steps={steps // 2}", "run.save_total_limit=9"]
    arguments += [f"run.output_dir={out / output}", "run.eval_steps=0", *more]
    ranks = forked_ranks.Ranks(num_ranks, arguments, out / "said")
    if not ranks.wait(600) or any(ranks.statuses.values()):
        raise SystemExit(f"{output} ended with {ranks.statuses}\n{ranks.said()[-3000:]}")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--packed", action="store_true")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    forked_ranks.preload()
    from tiny_pair import make_pair, packed_overrides

    num_sequences = 22 if options.packed else NUM_SEQUENCES
    written = forked_ranks.fork(lambda: make_pair(out, num_sequences) and 0)
    assert os.waitpid(written, 0)[1] == 0
    if options.packed:
        runs, hand_overs = [PACKED], [(PACKED, heir) for heir in PACKED_HEIRS]
        # Four rows a step, of ten in an epoch: two of four ranks stand by in its last step.
        more = [*packed_overrides(out / "cache"), "run.train_batch_tokens=640"]
    else:
        runs, hand_overs, more = RUNS, list(zip(RUNS, RUNS[1:], strict=False)), []
    for stage, num_ranks in tqdm(runs, desc="runs"):
        train(out, stage, num_ranks, name_of(stage, num_ranks), options.steps, *more)
    for before, (stage, num_ranks) in tqdm(hand_overs, desc="resumes"):
        output = f"{name_of(stage, num_ranks)}_resumed"
        shutil.copytree(out / name_of(*before), out / output)
        shutil.rmtree(out / output / "adapter")
        checkpoint = out / output / "checkpoints" / f"step_{options.steps // 2:06d}"
        resume = f"run.resume_from_checkpoint={checkpoint}"
        train(out, stage, num_ranks, output, options.steps, *more, resume)
    return 0


if __name__ == "__main__":
    sys.exit(main())

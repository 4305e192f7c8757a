"""A warning before a run that will not fit into memory."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

from tca_fast.config import TrainConfig
from tca_fast.planning.memory import MemoryPlan, Placement, plan_memory
from tca_fast.planning.shapes import ModelShape

_GIB = 2**30


def warn_if_too_large(
    config: TrainConfig, device: torch.device, *, stage: int | None, num_ranks: int, is_main: bool
) -> None:
    """Say on stderr, before any weight is read, that a rank needs more memory than is free.

    The run goes on: the plan is arithmetic and the memory may be freed by others. A pair whose
    shape is not that of a Qwen2- or Llama-like decoder, or that cannot be read, gets no warning
    here; reading it comes next and says what is wrong.

    Args:
        config: the run.
        device: of this rank.
        stage: of ZeRO; None without DeepSpeed.
        num_ranks: of the run.
        is_main: this rank speaks.
    """
    if not is_main or config.objective.step != "shared":
        return
    plan = forecast(config, device, stage=stage, num_ranks=num_ranks)
    free = free_memory(device, num_ranks)
    if plan is None or free is None or plan.peak <= free:
        return
    largest = sorted(plan.parts, key=lambda name: -plan.parts[name])[:3]
    parts = ", ".join(f"{name} {plan.parts[name] / _GIB:.1f}" for name in largest)
    print(
        f"warning: a rank of this run needs about {plan.peak / _GIB:.1f} GiB ({parts}) and finds "
        f"{free / _GIB:.1f} GiB free on {device}; `tca-fast plan` shows what fits, "
        "objective.gradient_checkpointing=true and a lower data.max_length need less",
        file=sys.stderr,
    )


def forecast(
    config: TrainConfig, device: torch.device, *, stage: int | None, num_ranks: int
) -> MemoryPlan | None:
    """Memory of a rank; None where the shape of the pair is not known."""
    from transformers import AutoConfig

    pair, run = config.pair, config.run
    try:
        found = AutoConfig.from_pretrained(pair.target, revision=pair.target_revision)
        shape = ModelShape.from_config(found.to_dict(), pair.target, "pair.target")
    except (OSError, ValueError):
        return None
    is_half = pair.dtype in ("bfloat16", "float16") or (
        pair.dtype == "auto" and device.type == "cuda"
    )
    sequences, tokens = run.rows_per_forward, run.per_device_train_batch_tokens
    uses_flash = "flash" in pair.attn_implementation
    return plan_memory(
        shape,
        config.adapter,
        config.objective,
        tokens=tokens or sequences * config.data.max_length,
        sequences=sequences,
        placement=Placement(stage, num_ranks, 2 if is_half else 4, device.type, pair.backbone),
        has_mask=run.is_packed and not uses_flash or sequences > 1,
        micro_batches=max(1, run.rows_per_step // (sequences * num_ranks)),
    )


def free_memory(device: torch.device, num_ranks: int) -> int | None:
    """Bytes that a rank finds free; None where the system does not say.

    Ranks on a CPU share its memory; all are taken to be on this machine.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", text)
    return int(found[1]) * 1024 // num_ranks if found else None

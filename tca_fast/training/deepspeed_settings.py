"""The DeepSpeed JSON file of a run: every "auto" filled in, every known trap refused.

Traps are combinations that DeepSpeed accepts, or fails at far from the cause, and that would train
something else than the run configuration says or leave checkpoints that cannot be read.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import torch

from tca_fast.config import TrainConfig
from tca_fast.errors import UserError
from tca_fast.training.plans import check_share

_FOREIGN_BLOCKS = {
    "optimizer": "the optimizer block of the run configuration",
    "scheduler": "optimizer.learning_rate and optimizer.warmup_ratio of the run configuration",
    "fp16": "pair.dtype: bfloat16, since float16 would need loss scaling",
}


# What may stand in the file beside that: blocks, and single values.
_BLOCKS = ("bf16", "data_types", "zero_optimization", "comms_logger", "flops_profiler", "aio")
_VALUES = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    *("gradient_clipping", "zero_force_ds_cpu_optimizer", "zero_allow_untested_optimizer"),
    *("communication_data_type", "prescale_gradients", "gradient_predivide_factor"),
    *("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state"),
)

# Settings that are refused when on: why, and the nearest that works.
_TRAPS = {
    "elasticity": ("changes the batch size of the run", "resume on another number of ranks"),
    "pipeline": ("needs the model cut into stages", 'zero_optimization {"stage": 3}'),
    "tensor_parallel": ("gives ranks of one group the same data", 'zero_optimization {"stage": 3}'),
    "sequence_parallel_size": ("gives ranks parts of a sequence", "data.max_length"),
    "compression_training": ("changes the frozen weights", "no such block"),
    "zero_optimization.zero_quantized_weights": ("rounds the frozen weights", "false"),
    "zero_optimization.zero_quantized_nontrainable_weights": ("rounds frozen weights", "false"),
    "zero_optimization.zero_quantized_gradients": ("rounds the gradients", "false"),
    "zero_optimization.round_robin_gradients": (
        "orders AdamW's state in a way that DeepSpeed's own record of it does not say",
        "false",
    ),
    "zero_optimization.zenflow": ("updates with gradients of earlier steps", "offload_optimizer"),
    "zero_optimization.super_offload": ("replaces the optimizer", "offload_optimizer"),
}


def read_settings(path: Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON file.

    Raises:
        UserError: missing, not JSON, or with a block that the run configuration owns.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"deepspeed: {path} cannot be read as JSON ({reason}); give a file such as "
            "configs/zero2.json"
        ) from None
    if not isinstance(settings, dict):
        raise UserError(f"deepspeed: {path} is not a JSON object; see configs/zero2.json")
    for block, instead in _FOREIGN_BLOCKS.items():
        if block in settings:
            raise UserError(f"deepspeed: {path} sets {block!r}; remove it and use {instead}")
    known = [*_BLOCKS, *_VALUES, *(name for name in _TRAPS if "." not in name)]
    for name, value in settings.items():
        if name not in known:
            # DeepSpeed itself would pass over it, and train without the stage that was meant.
            near = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise UserError(f"deepspeed: {path} sets {name!r}, which is unknown; {remedy}")
        if (name in _BLOCKS) != isinstance(value, dict) and name not in _TRAPS:
            kind = "a block in braces" if name in _BLOCKS else "a single value"
            raise UserError(f"deepspeed: {path} sets {name} to {value!r}; it needs {kind}")
    return settings


def fill_settings(
    settings: dict[str, Any],
    config: TrainConfig,
    num_ranks: int,
    device: torch.device,
    path: Path,
) -> dict[str, Any]:
    """Replace every "auto" by what the run configuration says, and check what is not "auto".

    Raises:
        UserError: a value at odds with the run configuration, an "auto" of unknown meaning, or a
            batch that the ranks cannot share.
    """
    run = config.run
    check_share(run, num_ranks)
    dtype = config.pair.dtype
    is_bf16 = dtype == "bfloat16" or (dtype == "auto" and device.type == "cuda")
    known: dict[str, Any] = {
        "train_batch_size": run.rows_per_step,
        "train_micro_batch_size_per_gpu": run.rows_per_forward,
        "gradient_accumulation_steps": run.rows_per_step // (run.rows_per_forward * num_ranks),
        "gradient_clipping": config.optimizer.max_grad_norm,
        "bf16.enabled": is_bf16,
    }
    filled = json.loads(json.dumps(settings))
    for name, value in known.items():
        *blocks, key = name.split(".")
        block = filled
        for part in blocks:
            block = block.setdefault(part, {})
        if block.get(key, "auto") not in ("auto", value):
            raise UserError(
                f"deepspeed: {path} sets {name} to {block[key]!r}, the run configuration means "
                f'{value!r}; set it to "auto"'
            )
        block[key] = value
    if unknown := _auto_names(filled):
        raise UserError(
            f'deepspeed: {path} sets {unknown[0]} to "auto", which nothing here fills in; give a '
            "value or remove it"
        )
    if is_bf16:
        # Left to itself, DeepSpeed would add up micro-batches in bfloat16.
        filled.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    _refuse_traps(filled, config, is_bf16, path)
    # DeepSpeed's own CPU Adam would need compiled ops; AdamW of torch serves offloading too.
    filled.setdefault("zero_force_ds_cpu_optimizer", False)
    return filled


def _refuse_traps(filled: dict[str, Any], config: TrainConfig, is_bf16: bool, path: Path) -> None:
    def refuse(name: str, value: object, reason: str, instead: str) -> UserError:
        return UserError(f"deepspeed: {path} sets {name} to {value!r}, {reason}; use {instead}")

    if config.pair.dtype == "float16":
        raise UserError(
            "pair.dtype: 'float16' with DeepSpeed would need loss scaling; use bfloat16 or float32"
        )
    zero = filled.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if type(stage) is not int or not 0 <= stage <= 3:
        raise refuse("zero_optimization.stage", stage, "which is none of ZeRO's", "0, 1, 2 or 3")
    if is_bf16 and stage == 0:
        reason = "which keeps no float32 master of bfloat16 adapters"
        raise refuse("zero_optimization.stage", 0, reason, "1 (configs/zero1.json)")
    if is_bf16 and (dtype := filled["data_types"]["grad_accum_dtype"]) != "fp32":
        reason = "which loses small gradients when micro-batches are added up"
        raise refuse("data_types.grad_accum_dtype", dtype, reason, '"fp32"')
    for part, needed in (("offload_optimizer", 1), ("offload_param", 3)):
        offload = zero.get(part) or {}
        where = offload.get("device", "none") if isinstance(offload, dict) else offload
        name = f"zero_optimization.{part}.device"
        if where == "nvme":
            reason = "whose files checkpoints cannot read"
            raise refuse(name, where, reason, '"cpu" (configs/zero2_offload.json)')
        if where not in ("none", "cpu"):
            raise refuse(name, where, "which is not known", '"cpu" or "none"')
        if where == "cpu" and stage < needed:
            raise refuse(name, where, f"which ZeRO-{stage} ignores", f"stage {needed} or higher")
    for name, neutral in (("mics_shard_size", -1), ("zero_hpz_partition_size", 1)):
        if zero.get(name, neutral) != neutral:
            reason = "which cuts parameters in a way that checkpoints do not know"
            raise refuse(f"zero_optimization.{name}", zero[name], reason, str(neutral))
    for name, (reason, instead) in _TRAPS.items():
        value: Any = filled
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if isinstance(value, dict):
            value = bool(value) and value.get("enabled", True)
        if value and (value is True or value != 1):
            raise refuse(name, value, f"which {reason}", instead)


def _auto_names(block: dict[str, Any], prefix: str = "") -> list[str]:
    names = []
    for key, value in block.items():
        if isinstance(value, dict):
            names += _auto_names(value, f"{prefix}{key}.")
        elif value == "auto":
            names.append(prefix + key)
    return names

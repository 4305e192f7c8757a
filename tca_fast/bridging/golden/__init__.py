"""Recompute a golden folder with the real streams and objective, and compare every quantity.

The folder was written by the reference implementation (contract §10); `folder` describes its
files. What a release cannot recompute is listed with the reason, never left out.

Shapes: L layers, B sequences, S positions, F features.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tca_fast.bridging.golden import losses
from tca_fast.bridging.golden.comparison import Check, Comparison
from tca_fast.bridging.golden.folder import GRADIENTS, OUTPUTS, RELP, GoldenFolder, read_golden
from tca_fast.bridging.golden.prompt import check_attribution_prompt
from tca_fast.bridging.golden.recomputation import Recomputation
from tca_fast.bridging.pair import ACCEPTABLE
from tca_fast.bridging.steps import STEPS
from tca_fast.bridging.streams import Streams
from tca_fast.errors import UserError
from tca_fast.formats.paper import tensor_name, to_paper

__all__ = ["Check", "LearningRate", "verify"]

#: Learning rate of a step, from (step, peak, total steps, warm-up steps).
LearningRate = Callable[[int, float, int, int], float]

_EDGES = "edges_rows_features_then_logits_cols_features_then_tokens"
_NO_EDGES = "RelP attribution is not in this release"
_NO_ENCODER = "depends on the encoder of a fresh start, which is not in the folder"
_NOT_RECOMPUTED = {
    ("config_after_assembly",): "names of columns",
    ("_about",): "says how the folder was made",
    ("bf16_informational",): "for orientation only (contract §10): bfloat16 depends on kernels",
    ("fresh_init_zero_decoder", "l0_per_layer"): _NO_ENCODER,
    ("fresh_init_zero_decoder", "l0_avg"): _NO_ENCODER,
    ("relp", "max_abs_logit_diff_vs_training_model"): "rounding between two reference models",
    ("relp", "edges_abs_sum"): _NO_EDGES,
    ("relp", "edges_sum"): _NO_EDGES,
    ("relp", "top_logit_row_abs_sum"): _NO_EDGES,
    (RELP, _EDGES): _NO_EDGES,
}


def verify(
    directory: str | Path, *, step: str = "plain", learning_rate: LearningRate | None = None
) -> list[Check]:
    """Recompute every quantity of a golden folder.

    Values must agree to 1e-5, gradient tensors to 1e-4 in norm (contract §10), both relative;
    `comparison` has the absolute floors for what is zero or nearly so.

    Args:
        directory: golden folder.
        step: form of the training step that computes the losses, one of `STEPS`.
        learning_rate: schedule to compare `schedule_lr_example` with; without one that block is
            listed as not checked.

    Returns:
        One check per quantity, those that were not checked last.

    Raises:
        UserError: a missing or invalid folder, or an unknown step.
    """
    if step not in STEPS:
        raise UserError(f"step: {step!r} is unknown; choose one of {', '.join(STEPS)}")
    folder = read_golden(directory)
    ours = Recomputation(folder, STEPS[step])
    streams = ours.streams()
    compare = Comparison(
        folder.values,
        {GRADIENTS: folder.gradients, OUTPUTS: folder.outputs, RELP: folder.relp},
    )
    features = ours.adapter_pass(streams)
    _check_settings(compare, folder, streams)
    _check_assembly(compare, folder, streams)
    losses.check_outputs(compare, ours, streams, features)
    losses.check_variant(compare, ours, "target_backbone", streams, features)
    losses.check_variant(compare, ours, "fresh_init_zero_decoder", ours.streams(fresh=True), None)
    base = _base_streams(compare, ours)
    if base is not None:
        losses.check_variant(compare, ours, "base_backbone", base, ours.adapter_pass(base))
    losses.check_step(compare, ours, streams, features)
    losses.check_gradients(compare, ours, streams)
    losses.check_other_cutoffs(compare, ours, streams)
    losses.check_masked_prompts(compare, ours, streams)
    _check_configs(compare, streams, base)
    check_attribution_prompt(compare, ours, streams)
    _check_schedule(compare, learning_rate)
    capped = [key for key in folder.values.get("relp", {}) if key.startswith("capped_")]
    compare.skip_unclaimed(_NOT_RECOMPUTED | {("relp", key): _NO_EDGES for key in capped})
    return sorted(compare.checks, key=lambda check: check.ok is None)


def _check_settings(compare: Comparison, folder: GoldenFolder, streams: Streams) -> None:
    """Sizes that `_about` repeats must be those of the files, and the pair one that we assemble.

    Where base and target differ in rope or tied heads, the reference's numbers come from its
    mistaken assembly and no right one agrees with them: a miss that says so.
    """
    from transformers import AutoConfig

    about, config = compare.values["_about"], streams.reference.config
    sizes = {
        "hidden": config.hidden_size,
        "layers": folder.num_layers,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "vocab": config.vocab_size,
        "intermediate": config.intermediate_size,
        "n_features": folder.adapter_config.num_features,
    }
    if isinstance(about.get("tiny"), dict):
        compare.block(("_about", "tiny"), sizes, required=False)
    shape = list(folder.inputs["input_ids"].shape)
    compare.block(("_about",), {"batch": shape}, required=False)
    for key in about:
        match = re.fullmatch(r"padded_right_row(\d+)", key)
        if match and int(match[1]) < len(folder.real_tokens):
            real = folder.real_tokens[int(match[1])]
            padding = len(real) - int(real.sum())
            compare.block(("_about",), {key: padding})
    for name in ("lambda_adapt", "l1_weight", "lambda_nmse", "lambda_bridge", "k"):
        compare.claim(("_about", name))
    base = AutoConfig.from_pretrained(folder.directory / "base")
    for field in ACCEPTABLE:
        if _setting(base, field) != _setting(config, field):
            note = "the reference gave the target's weights the base's setting (contract §2.4)"
            compare.exact(f"pair: {field}", _setting(config, field), _setting(base, field), note)


def _check_assembly(compare: Comparison, folder: GoldenFolder, streams: Streams) -> None:
    """Our assembly of base and target is the model the reference saved, bit for bit."""
    ours = {
        name: tensor
        for name, tensor in streams.adapted.model.state_dict().items()
        if ".mlp.adapter." not in name
    }
    equal = [key for key, golden in folder.backbone.items() if _same(ours.get(key), golden)]
    differing = sorted(folder.backbone.keys() - equal)
    compare.exact(
        "adapter/: backbone tensors",
        f"{len(equal)} equal",
        f"{len(folder.backbone)} equal",
        f"differing: {', '.join(differing[:3])}" if differing else "bit for bit",
    )
    ours |= {
        tensor_name(layer, name): to_paper(name, parameter)
        for layer, adapter in enumerate(streams.adapted.layers)
        for name, parameter in adapter.named_parameters()
    }
    for key, golden_entry in compare.values.get("state_dict", {}).items():
        tensor = ours.get(key)
        entry = "missing" if tensor is None else f"{list(tensor.shape)} {tensor.dtype}"
        compare.claim(("state_dict", key))
        compare.exact(f"state_dict.{key}", entry, " ".join(map(str, golden_entry)))


def _same(ours: Tensor | None, golden: Tensor) -> bool:
    return ours is not None and ours.dtype == golden.dtype and torch.equal(ours, golden)


def _check_schedule(compare: Comparison, learning_rate: LearningRate | None) -> None:
    """Learning rates of single steps (contract §3.7); the peak is the rate where warm-up ends."""
    block = compare.values.get("schedule_lr_example", {})
    warmup, total = block.get("warmup"), block.get("total")
    if not block or learning_rate is None or f"{warmup}" not in block:
        reason = "no schedule was given" if learning_rate is None else "needs the rate at its peak"
        if block:
            compare.skip(("schedule_lr_example",), reason)
        return
    peak = block[f"{warmup}"]
    rates = {key: learning_rate(int(key), peak, total, warmup) for key in block if key.isdigit()}
    for name in ("total", "warmup"):
        compare.claim(("schedule_lr_example", name))
    compare.block(("schedule_lr_example",), rates, floor=0.0)


def _base_streams(compare: Comparison, ours: Recomputation) -> Streams | None:
    """The streams with the base as backbone, or None for a pair that is refused by design."""
    try:
        return ours.streams("base")
    except UserError as error:
        compare.skip(("base_backbone",), f"refused by design: {error}")
        return None


def _check_configs(compare: Comparison, streams: Streams, base: Streams | None) -> None:
    """Settings of the assembled models (contract §1.7, §2.4)."""
    configs = [
        None if base is None else base.adapted.model.config,
        streams.adapted.model.config,
        streams.reference.config,
    ]
    for field, columns in compare.values.get("config_after_assembly", {}).items():
        if field == "_columns" or len(columns) != len(configs):
            continue
        compare.claim(("config_after_assembly", field))
        name = f"config_after_assembly.{field}"
        of_base, of_adapted, of_target = columns
        if configs[0] is not None:
            compare.exact(f"{name}, base backbone", _setting(configs[0], field), f"{of_base}")
        note = "the target's own, as it is used throughout"
        if of_adapted != of_target:
            note = f"the target's own; the reference took the base's, {of_adapted}, by mistake"
        ours = _setting(configs[1], field)
        compare.exact(f"{name}, target backbone", ours, f"{of_target}", note)
        compare.exact(f"{name}, ref", _setting(configs[2], field), f"{of_target}")


def _setting(config: Any, field: str) -> str:
    rope = getattr(config, "rope_parameters", None) or {}
    return f"{rope.get(field, getattr(config, field, None))}"

"""Outputs, losses and gradients of a golden folder (contract §3, §10)."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from tca_fast.bridging.golden.comparison import GRADIENT_FLOOR, GRADIENT_TOLERANCE, Comparison
from tca_fast.bridging.golden.folder import GRADIENTS, OUTPUTS, GoldenFolder
from tca_fast.bridging.golden.recomputation import Features, Recomputation, total_norm
from tca_fast.bridging.streams import Streams
from tca_fast.formats.paper import load_paper_checkpoint, tensor_name
from tca_fast.losses import IGNORED_LABEL


def check_outputs(
    compare: Comparison, ours: Recomputation, streams: Streams, features: Features
) -> None:
    """Logits, features and residual states at real positions."""
    folder = ours.folder
    mask = folder.real_tokens
    reference_logits, reference_states = ours.reference_pass(streams)
    for key, tensor in (
        ("logits_adapter", features.logits),
        ("logits_ref", reference_logits),
    ):
        compare.tensor(OUTPUTS, key, tensor, mask=mask)
    for key, stack in (
        ("features", features.active),
        ("resid_adapter", features.states),
        ("resid_ref", reference_states),
    ):
        compare.stack(OUTPUTS, key, stack, mask=mask)
    expected = {("a2r", folder.cutoff)} if folder.cutoff > 0 else set()
    expected |= {("r2a", folder.cutoff)} if folder.cutoff < folder.num_layers else set()
    stored = [re.fullmatch(r"logits_(a2r|r2a)_k(\d+)", key) for key in folder.outputs]
    expected |= {(match[1], int(match[2])) for match in stored if match}
    for direction, cutoff in sorted(expected):
        logits = ours.mixed_logits(streams, direction, cutoff)
        compare.tensor(OUTPUTS, f"logits_{direction}_k{cutoff}", logits, mask=mask)
    imported = load_paper_checkpoint(folder.directory / "adapter", dtype=torch.float32)
    with torch.no_grad():
        logits = imported(**ours.model_inputs()).logits
    compare.tensor(OUTPUTS, "logits_adapter", logits, mask=mask, name="adapter/ imported: logits")


def check_variant(
    compare: Comparison,
    ours: Recomputation,
    block: str,
    streams: Streams,
    features: Features | None,
) -> None:
    """Every loss and statistic of one assembly, at every cutoff.

    `features` is None where the folder does not hold the encoder, which leaves L0 out.
    """
    if block not in compare.values:
        compare.absent(block)
        return
    layers = range(ours.folder.num_layers)
    metrics = ours.metrics(streams, range(ours.folder.num_layers + 1))
    values: dict[str, Any] = {
        "kl": metrics["kl"],
        "lm": metrics["lm"],
        "ref_lm": metrics["reference_lm"],
        "l1_sum": metrics["l1"],
        "l1_per_layer": [metrics[f"l1/layer_{i}"] for i in layers],
        "nmse": metrics["nmse"],
        "nmse_per_hidden_state": [metrics[f"nmse/state_{i}"] for i in (*layers, len(layers))],
    }
    for name, value in metrics.items():
        if match := re.fullmatch(r"((?:a2r|r2a)_(?:kl|lm))/cutoff_(\d+)", name):
            values[f"{match[1]}_{match[2]}"] = value
    compare.block((block,), values)
    if features is not None:
        slack = _l0_slack(ours.folder, features)
        per_layer = [metrics[f"l0/layer_{i}"] for i in layers]
        compare.block((block,), {"l0_per_layer": per_layer}, floor=max(slack))
        compare.block((block,), {"l0_avg": metrics["l0"]}, floor=sum(slack) / len(slack))


def _l0_slack(folder: GoldenFolder, features: Features) -> list[float]:
    """How far rounding may move the L0 of each layer: its undecided features per token."""
    mask = folder.real_tokens
    return (features.undecided[:, mask].sum((1, 2)) / mask.sum()).tolist()


def check_step(
    compare: Comparison, ours: Recomputation, streams: Streams, features: Features
) -> None:
    """What the reference's training step logs, and its dead-feature counters."""
    folder = ours.folder
    cutoffs = [folder.cutoff]
    metrics = ours.metrics(streams, cutoffs)
    logged = _logged(folder, metrics)
    compare.block(
        (),
        {"optimised_total": metrics["loss"], "logged_total": logged["train/total_loss"]},
        required=False,
    )
    if "train_step_metrics" not in compare.values:
        compare.absent("train_step_metrics")
        return
    values = {
        "train/kl_to_ref": metrics["kl"],
        "train/lm_loss": metrics["lm"],
        "bridging/adapt_only": metrics["kl"],
        "train/sparsity": metrics["l1"],
        "bridging/nmse": metrics["nmse"],
        "bridging/total": logged["train/total_loss"],
        **logged,
    }
    for name, value in metrics.items():
        if match := re.fullmatch(r"nmse/state_(\d+)", name):
            values[f"bridging_layerwise/nmse_layer_{match[1]}"] = value
        elif match := re.fullmatch(r"((?:a2r|r2a)_(?:kl|lm))/cutoff_(\d+)", name):
            values[f"bridging_layerwise/{match[1]}_layer_{match[2]}"] = value
    # Terms of weight 0 are left out by the reference.
    compare.block(("train_step_metrics",), values, required=False)
    _check_statistics(compare, ours, streams, features, metrics)


def _check_statistics(
    compare: Comparison,
    ours: Recomputation,
    streams: Streams,
    features: Features,
    metrics: dict[str, float],
) -> None:
    """Logged L0 and dead counts, and the counters behind them (contract §1.5).

    The reference counts sequences, and padding as firing; ours counts real tokens. Here its rule
    is applied to our activations.
    """
    folder = ours.folder
    num_sequences = len(folder.inputs["input_ids"])
    silent = (~ours.fired_with_padding(streams)).sum(1).tolist()
    slack = _l0_slack(folder, features)
    flips = features.undecided.any(1).any(1).sum(1).tolist()
    block = ("train_step_metrics",)
    counters = compare.values.get("dead_counters_after_one_step", {})
    for layer in range(folder.num_layers):
        name = f"layer_{layer}"
        prefix = f"adapter_stats_per_layer/{name}"
        l0 = {f"{prefix}_l0_count": metrics[f"l0/{name}"]}
        compare.block(block, l0, required=False, floor=slack[layer])
        for age in (100, 1000):
            dead = silent[layer] if num_sequences >= age else 0
            compare.block(block, {f"{prefix}_dead_features_{age}": dead}, required=False)
        if name in counters:
            path = ("dead_counters_after_one_step", name)
            zero = folder.adapter_config.num_features - silent[layer]
            compare.block(path, {"zero": zero}, floor=flips[layer])
            compare.block(path, {"max": num_sequences if silent[layer] else 0})
    mean = {"adapter_stats_avg/l0_count": metrics["l0"]}
    compare.block(block, mean, required=False, floor=sum(slack) / len(slack))
    for age in (100, 1000):
        dead = sum(silent) / len(silent) if num_sequences >= age else 0
        average = {f"adapter_stats_avg/dead_features_{age}": dead}
        compare.block(block, average, required=False)


def _logged(folder: GoldenFolder, metrics: dict[str, float]) -> dict[str, float]:
    """The totals as the reference logs them: half the bridging, no sparsity (contract §3.5)."""
    weights = folder.objective
    bridge = metrics["bridge"] / 2
    total = (
        weights.lambda_adapt * metrics["kl"]
        + weights.lambda_nmse * metrics["nmse"]
        + weights.lambda_bridge * bridge
    )
    return {"bridging/bridge": bridge, "train/total_loss": total}


def check_gradients(compare: Comparison, ours: Recomputation, streams: Streams) -> None:
    """Each gradient tensor of each component, unweighted, and of the objective."""
    folder = ours.folder
    cutoff, weights = folder.cutoff, folder.objective
    # One cutoff's two directions reach disjoint layers: a2r those below it, r2a the others.
    bridge = ours.gradients(streams, [cutoff], {"lambda_bridge": 1.0})
    zeros = {key: torch.zeros_like(tensor) for key, tensor in bridge.items()}
    below = {tensor_name(i, n) for i in range(cutoff) for n in folder.adapters[i]}
    components = {
        "kl": (weights.lambda_adapt, ours.gradients(streams, [], {"lambda_adapt": 1.0})),
        "l1": (weights.l1_weight, ours.gradients(streams, [], {"l1_weight": 1.0})),
        "nmse": (weights.lambda_nmse, ours.gradients(streams, [], {"lambda_nmse": 1.0})),
        "a2r": (weights.lambda_bridge, zeros | {key: bridge[key] for key in below}),
        "r2a": (weights.lambda_bridge, bridge | {key: zeros[key] for key in below}),
    }
    total = ours.gradients(streams, [cutoff])
    weighted = {
        key: sum((weight * part[key] for weight, part in components.values()), zeros[key])
        for key in total
    }
    gradients = {name: part for name, (_, part) in components.items()} | {"total": total}
    norms = {name: total_norm(part) for name, part in gradients.items()}
    for name, part in gradients.items():
        if not any(key.startswith(f"{name}/") for key in folder.gradients):
            compare.absent(f"{GRADIENTS}: {name}/", miss=norms[name] > 0)
            continue
        floor = GRADIENT_FLOOR * norms[name]
        for key, tensor in part.items():
            compare.tensor(
                GRADIENTS, f"{name}/{key}", tensor, tolerance=GRADIENT_TOLERANCE, floor=floor
            )
    compare.block(("grad_norms",), norms, tolerance=GRADIENT_TOLERANCE, required=False)
    preclip = {"grad_norm_total_preclip": norms["total"]}
    compare.block((), preclip, tolerance=GRADIENT_TOLERANCE, required=False)
    compare.bound(
        ("check_total_grad_equals_weighted_sum_max_rel_err",),
        max(_relative(weighted[key], total[key]) for key in total),
        GRADIENT_TOLERANCE,
    )


def _relative(ours: Tensor, truth: Tensor) -> float:
    size = truth.norm().item()
    return (ours - truth).norm().item() / size if size else ours.norm().item()


def check_other_cutoffs(compare: Comparison, ours: Recomputation, streams: Streams) -> None:
    """Logged losses and gradient norm of the step at other cutoffs."""
    for block in compare.values:
        match = re.fullmatch(r"cutoffs_(\d+(?:_\d+)*)", block)
        if not match:
            continue
        cutoffs = [int(part) for part in match[1].split("_")]
        if max(cutoffs) > ours.folder.num_layers:
            compare.skip((block,), f"the model has {ours.folder.num_layers} layers")
            continue
        compare.block((block,), _logged(ours.folder, ours.metrics(streams, cutoffs)))
        norm = {"grad_norm_total": total_norm(ours.gradients(streams, cutoffs))}
        compare.block((block,), norm, tolerance=GRADIENT_TOLERANCE)


def check_masked_prompts(compare: Comparison, ours: Recomputation, streams: Streams) -> None:
    """KL and LM with the first labels of every sequence masked."""
    for block in compare.values:
        if match := re.fullmatch(r"prompt_masked_(\d+)", block):
            labels = ours.folder.inputs["labels"].clone()
            labels[:, : int(match[1])] = IGNORED_LABEL
            metrics = ours.metrics(streams, [], labels)
            compare.block((block,), {name: metrics[name] for name in ("kl", "lm")})

"""The attribution prompt of a golden folder: what is a forward quantity (contract §6.6)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tca_fast.bridging.golden.comparison import VALUE_TOLERANCE, Comparison
from tca_fast.bridging.golden.folder import RELP
from tca_fast.bridging.golden.recomputation import Recomputation
from tca_fast.bridging.streams import Streams

_CUMULATIVE_PROBABILITY = 0.95


def check_attribution_prompt(compare: Comparison, ours: Recomputation, streams: Streams) -> None:
    """Active features, their activations, and the attributed logits of the prompt."""
    block = compare.values.get("relp", {})
    if "prompt" not in block:
        compare.absent("relp")
        return
    compare.claim(("relp", "prompt"))
    prompt = torch.tensor([block["prompt"]])
    features = ours.adapter_pass(streams, prompt)
    active = features.active[:, 0]
    _check_active(compare, active, features.undecided[:, 0])
    probabilities = features.logits[0, -1].softmax(-1)
    num_logits = _check_logits(compare, block, probabilities)
    num_layers, num_tokens = active.shape[:2]
    num_active = int(torch.count_nonzero(active))
    flips = int(features.undecided.sum())
    compare.block(("relp",), {"n_active_features": num_active}, required=False, floor=flips)
    # Nodes: features, one error node per layer and token, tokens, logits.
    side = num_active + num_layers * num_tokens + num_tokens + num_logits
    compare.block(("relp",), {"adjacency_side": side}, required=False, floor=flips)


def _check_active(compare: Comparison, active_LSF: Tensor, undecided_LSF: Tensor) -> None:
    """Compare the activations after scattering them to dense, where rounding decides nothing."""
    names = ("features_layer_pos_idx", "activation_values")
    if any(name not in compare.tensors[RELP] for name in names):
        for name in names:
            compare.absent(f"{RELP}: {name}", miss=bool(compare.tensors[RELP]))
        return
    index, values = (compare.tensors[RELP][name] for name in names)
    golden = torch.zeros_like(active_LSF)
    inside = index.shape[-1] == 3 and bool(
        ((index >= 0) & (index < torch.tensor(active_LSF.shape))).all()
    )
    if inside and len(index) == len(values):
        golden[tuple(index.T)] = values.to(golden.dtype)
    compare.dense(RELP, "activation_values", active_LSF, golden)
    compare.claim((RELP, "features_layer_pos_idx"))
    differing = ((active_LSF > 0) != (golden > 0)) & ~undecided_LSF
    ours_count, golden_count = int((active_LSF > 0).sum()), len(index)
    compare.exact(
        f"{RELP}: features_layer_pos_idx",
        f"{ours_count} features, {int(differing.sum())} others",
        f"{golden_count} features, 0 others",
        "the same (layer, position, feature) triples",
    )


def _check_logits(compare: Comparison, block: dict[str, Any], probabilities_V: Tensor) -> int:
    """The attributed tokens are the most probable ones; returns how many the graph has."""
    stored = compare.tensors[RELP]
    fallback = stored.get("logit_tokens", torch.tensor([], dtype=torch.int64))
    tokens = [int(token) for token in block.get("logit_tokens", fallback.tolist())]
    if not tokens or not all(0 <= token < len(probabilities_V) for token in tokens):
        compare.absent("relp.logit_tokens", miss=True)
        return len(tokens)
    own = probabilities_V[tokens]
    best = probabilities_V.topk(len(tokens))
    # Equally probable tokens may stand in any order.
    as_probable = bool(((own - best.values).abs() <= VALUE_TOLERANCE * best.values).all())
    top = tokens if as_probable else best.indices.tolist()
    compare.claim(("relp", "logit_tokens"))
    compare.exact("relp.logit_tokens", f"{top}", f"{tokens}", "most probable first")
    compare.block(("relp",), {"logit_probs": own.tolist()}, required=False)
    if stored:
        compare.tensor(RELP, "logit_tokens", torch.tensor(top))
        compare.tensor(RELP, "logit_probs", own)
    if "n_logits" in block:
        reached = probabilities_V.sort(descending=True).values.cumsum(0)
        needed = int((reached < _CUMULATIVE_PROBABILITY).sum()) + 1
        compare.claim(("relp", "n_logits"))
        compare.exact(
            "relp.n_logits",
            f"{min(needed, len(tokens))}",
            f"{block['n_logits']}",
            f"{needed} reach probability 0.95; the cap is not in the folder",
        )
    return len(tokens)

"""The part of a model card that only a run can write: its figures, its data and its program."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tca_fast.training.logs import LOG_NAME
from tca_fast.training.origin import ORIGIN_NAME
from tca_fast.training.run import CONFIG_NAME

MISSING = "not recorded"
_HEADING = "## Figures of the run"
_FIGURES = {
    "kl": "KL(target ‖ adapter), nats per token",
    "nmse": "NMSE of the residual stream, mean of the layers' inputs",
    "l0": "L0, active features per token and layer",
    "lm": "LM loss, nats per token",
    "reference_lm": "LM loss of the target",
}
_SETTINGS = {
    "L1 weight": ("objective", "l1_weight"),
    "learning rate": ("optimizer", "learning_rate"),
    "sequences per step": ("run", "train_batch_size"),
    "seed": ("run", "seed"),
}


def with_figures(card: str, run: Path | None) -> str:
    """A model card with the figures of a run at its end, in place of those it may have.

    Args:
        card: as `save_pretrained` wrote it, or as edited since.
        run: the run's output directory; a file missing there leaves figures out and says so. None
            leaves the figures that the card has, and says so where it has none.
    """
    if run is None and _HEADING in card:
        return card
    head = card.partition(_HEADING)[0].rstrip()
    config = _yaml(run / CONFIG_NAME) if run else {}
    origin = _json(run / ORIGIN_NAME) if run else {}
    split, last = _last_figures(run / LOG_NAME if run else None)
    source = {
        "validation": f"On the validation sequences, after step {last.get('step')}.",
        "train": f"On the training batch of step {last.get('step')}; the run had no validation.",
        None: "There is no log of the run that trained these adapters.",
    }[split]
    figures = {label: _number(last.get(name)) for name, label in _FIGURES.items()}
    trained = {name: _show(_get(config, *keys)) for name, keys in _SETTINGS.items()}
    data = {
        f"{name} data": _data(config, origin, split)
        for name, split in (("training", "train"), ("validation", "validation"))
    }
    program = {
        "tca_fast": _show(origin.get("tca_fast")),
        "commit": _show(origin.get("commit")),
        "torch, transformers": f"{_show(origin.get('torch'))}, {_show(origin.get('transformers'))}",
    }
    blocks = [head, _HEADING, source, _table(figures), _table({**data, **trained, **program})]
    return "\n\n".join(blocks) + "\n"


def figures_in(card: str) -> str:
    """The part of a card that `with_figures` wrote; empty where there is none."""
    _, heading, figures = card.partition(_HEADING)
    return f"\n{heading}{figures}" if heading else ""


def _last_figures(log: Path | None) -> tuple[str | None, dict[str, Any]]:
    """The last validation, else the last training step, with the split it is of."""
    last: dict[str, dict[str, Any]] = {}
    if log is not None and log.is_file():
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue  # a line that a crash cut off
            if isinstance(record, dict):
                last[str(record.get("split"))] = record
    for split in ("validation", "train"):
        if split in last:
            return split, last[split]
    return None, {}


def _data(config: Mapping[str, Any], origin: Mapping[str, Any], split: str) -> str:
    """Name, length and digest of a data file; of a local one the name alone, without its folder."""
    name = _get(config, "data", split)
    if name is None:
        return "none" if config else MISSING
    shown = str(name) if str(name).startswith("hf://") else Path(str(name)).name
    facts = _get(origin, "data", split) or {}
    return (
        f"`{shown}`, {_show(facts.get('sequences'))} sequences, "
        f"SHA-256 beginning {_show(facts.get('sha256'))}"
    )


def _get(tree: Any, *keys: str) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _json(path: Path) -> dict[str, Any]:
    return _dictionary(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _yaml(path: Path) -> dict[str, Any]:
    return _dictionary(yaml.safe_load(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _dictionary(tree: Any) -> dict[str, Any]:
    return tree if isinstance(tree, dict) else {}


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else MISSING


def _show(value: Any) -> str:
    return MISSING if value is None else str(value)


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(
        ["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items())]
    )

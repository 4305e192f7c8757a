"""A tiny base/reasoning pair and its data, so that everything runs on a laptop in minutes.

The base answers directly and is mostly wrong; the target, an ordinary fine-tune of it, works step
by step, sometimes hesitates with ``wait`` and corrects itself, then answers. See ``task`` for the
problems and ``build`` for the making. Importing this package loads nothing but ``pathlib``.
"""

from __future__ import annotations

from pathlib import Path

ASSETS: Path = Path(__file__).resolve().parent / "assets"


def _asset(name: str) -> Path:
    path = ASSETS / name
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing; make it with: python -m tca_fast.miniature.build --out {ASSETS}"
        )
    return path


def base_path() -> Path:
    """Hugging Face folder of the base model; raises FileNotFoundError if the assets were not
    shipped.
    """
    return _asset("base")


def target_path() -> Path:
    """Hugging Face folder of the reasoning-tuned model; raises FileNotFoundError if the assets
    were not shipped.
    """
    return _asset("target")


def train_data() -> Path:
    """JSONL file of the training problems, OpenThoughts schema; raises FileNotFoundError if it was
    not shipped.
    """
    return _asset("train.jsonl")


def val_data() -> Path:
    """JSONL file of the validation problems, no prompt of ``train_data``; raises FileNotFoundError
    if missing.
    """
    return _asset("val.jsonl")

"""Weights of a Hugging Face checkpoint: one safetensors file, or shards and an index."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from tca_fast.errors import UserError

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


def weight_files(directory: Path) -> dict[Path, set[str] | None]:
    """Files that hold the weights, each with the keys the index promises (None without an index).

    Raises:
        UserError: there is neither a file nor a readable index.
    """
    index = directory / INDEX_NAME
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            # The name alone: a path could lead out of the directory.
            paths = {name: directory / Path(name).name for name in sorted(set(weight_map.values()))}
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{index}: not a weight index ({error}); copy it again") from None
        return {
            path: {key for key, file in weight_map.items() if file == name}
            for name, path in paths.items()
        }
    if not (directory / WEIGHTS_NAME).is_file():
        raise UserError(
            f"directory: {directory} has neither {WEIGHTS_NAME} nor {INDEX_NAME}; give a whole "
            "checkpoint"
        )
    return {directory / WEIGHTS_NAME: None}


def read_tensors(
    files: Mapping[Path, set[str] | None], wanted: Callable[[str], bool] = lambda key: True
) -> dict[str, Tensor]:
    """Read the wanted tensors of some safetensors files.

    Args:
        files: paths, each with exactly the keys it must hold, or None.
        wanted: which keys to read.

    Raises:
        UserError: a file is missing, truncated, not safetensors, or holds other keys.
    """
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, Tensor] = {}
    for path, keys in files.items():
        try:
            with safe_open(path, framework="pt") as file:
                found = set(file.keys())
                if keys is not None and found != keys:
                    raise UserError(
                        f"{path}: differs from {INDEX_NAME} in {sorted(found ^ keys)[0]}; the "
                        "shards are not of one checkpoint"
                    )
                tensors |= {key: file.get_tensor(key) for key in sorted(found) if wanted(key)}
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path}: not a whole safetensors file ({error}); copy or download it again"
            ) from None
    return tensors

"""The checkpoints released with the paper: a whole Qwen2 model, adapters included (contract §1.7).

    model.layers.{i}.mlp.transcoder_enc.weight [F, D]    .bias [F]
    model.layers.{i}.mlp.transcoder_dec.weight [D, F]    .bias [D], only with decoder bias

Everything else in the directory is a stock Qwen2 checkpoint, in one safetensors file or in shards
with an index. `AutoModelForCausalLM` accepts such a directory and silently drops the adapters.

Shapes: F features per layer, D model width.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tca_fast.adapted_model import AdaptedModel
from tca_fast.adapter_config import Provenance
from tca_fast.attachment import attach
from tca_fast.config import AdapterConfig
from tca_fast.errors import UserError
from tca_fast.formats.adapter_set import AdapterSet, Placement, foreign_config, open_adapters
from tca_fast.formats.qwen2 import qwen2_configuration, qwen2_fingerprint
from tca_fast.formats.shards import WEIGHTS_NAME, read_tensors, weight_files
from tca_fast.formats.tensor_files import read_headers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GENERATION_NAME = "generation_config.json"
_SUFFIXES = {
    "W_enc": "transcoder_enc.weight",
    "b_enc": "transcoder_enc.bias",
    "W_dec": "transcoder_dec.weight",
    "b_dec": "transcoder_dec.bias",
}
_NAMES = {suffix: name for name, suffix in _SUFFIXES.items()}
_KEY = re.compile(r"model\.layers\.(\d+)\.mlp\.(" + "|".join(map(re.escape, _NAMES)) + ")")


def tensor_name(layer: int, name: str) -> str:
    """The paper's key of our tensor `name` ("W_enc", "b_enc", "W_dec" or "b_dec") of a layer."""
    return f"model.layers.{layer}.mlp.{_SUFFIXES[name]}"


def is_adapter_tensor(key: str) -> bool:
    """Whether a key of a checkpoint belongs to an adapter rather than to the backbone."""
    return _KEY.fullmatch(key) is not None


def to_paper(name: str, tensor: Tensor) -> Tensor:
    """One of our tensors, or its gradient, as the paper lays it out: the decoder is [D, F]."""
    return tensor.T if name == "W_dec" else tensor


def recognises(directory: Path) -> bool:
    """Whether a directory holds a checkpoint with adapters in the paper's format."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "transcoder_n_features" in config


def read(directory: Path) -> AdapterSet:
    """Open the adapters of a released checkpoint, to be read one tensor at a time.

    The fingerprint is that of the backbone beside them, so the adapters are refused by other
    models wherever they go.

    Raises:
        UserError: as `read_paper_checkpoint`.
    """
    raw = _read_config(directory)
    files = {key: path for path in weight_files(directory) for key in read_headers(path)}
    adapter = _adapter_config(raw, directory)
    names = [name for name in _SUFFIXES if name != "b_dec" or adapter.decoder_bias]
    somewhere = next(iter(files.values()), directory / WEIGHTS_NAME)
    expected = {
        tensor_name(layer, name) for layer in range(raw["num_hidden_layers"]) for name in names
    }
    if stray := sorted(key for key in files if "transcoder" in key and key not in expected):
        raise UserError(
            f"{files[stray[0]]}: {stray[0]} is not called for by config.json; give a whole "
            "checkpoint in the paper's format"
        )

    def placements(layer: int) -> list[Placement]:
        keys = {name: tensor_name(layer, name) for name in names}
        return [
            Placement(name, files.get(key, somewhere).name, key, transposed=name == "W_dec")
            for name, key in keys.items()
        ]

    return open_adapters(
        directory,
        adapter,
        Provenance(fingerprint=qwen2_fingerprint(directory, raw, files)),
        placements,
        num_layers=raw["num_hidden_layers"],
        hidden_size=raw["hidden_size"],
        unknown=("base", "target", "backbone"),
        other_keys=lambda key: "transcoder" not in key,
    )


def read_paper_checkpoint(
    directory: str | Path,
) -> tuple[AdapterConfig, dict[int, dict[str, Tensor]]]:
    """Read the adapters of a released checkpoint.

    Returns:
        The configuration, and by layer index `W_enc [F, D]`, `b_enc [F]`, `W_dec [F, D]`
        (transposed from the file) and, with decoder bias, `b_dec [D]`, in the dtype of the file.

    Raises:
        UserError: not such a directory, unreadable or truncated files, adapter tensors missing
            or misshapen.
    """
    directory = Path(directory)
    raw = _read_config(directory)
    tensors = read_tensors(weight_files(directory), is_adapter_tensor)
    return _adapter_config(raw, directory), _adapter_layers(raw, tensors, directory)


def load_paper_checkpoint(
    directory: str | Path, *, dtype: torch.dtype | None = None
) -> AdaptedModel:
    """Build the Qwen2 model of a released checkpoint and attach its adapters.

    Every tensor of the directory is used: a backbone tensor that the model lacks, or the other
    way round, is an error. What `generate` does by default is what the directory says.

    Args:
        directory: holds `config.json` and safetensors.
        dtype: of the backbone; None is the dtype that `config.json` names. Adapters keep the
            dtype of the file.

    Raises:
        UserError: as `read_paper_checkpoint`, or a backbone that does not fit its configuration.
    """
    directory = Path(directory)
    raw = _read_config(directory)
    tensors = read_tensors(weight_files(directory))
    layers = _adapter_layers(raw, tensors, directory)
    backbone = {key: tensor for key, tensor in tensors.items() if not is_adapter_tensor(key)}
    model = _build_backbone(directory, backbone, dtype)
    adapted = attach(model, _adapter_config(raw, directory), dtype=layers[0]["W_enc"].dtype)
    with torch.no_grad():
        for index, adapter in enumerate(adapted.layers):
            for name, parameter in adapter.named_parameters():
                parameter.copy_(layers[index][name])
    return adapted


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"directory: {directory} has no config.json; give a directory with config.json and "
            "safetensors in the paper's format"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); copy the file again") from None
    if not isinstance(config, dict) or config.get("model_type") != "qwen2":
        raise UserError(f"{path}: model_type is not 'qwen2'; the paper's checkpoints are Qwen2")
    for key, kind in (("transcoder_n_features", int), ("transcoder_dec_bias", bool)):
        if not isinstance(config.get(key), kind):
            remedy = "give a checkpoint with adapters (for a plain model, use attach)"
            if (directory / "adapter_config.json").exists():
                remedy = "this is a tca_fast adapter, use tca_fast.load"
            raise UserError(f"{path}: {key} is {config.get(key)!r}; {remedy}")
    for key in ("num_hidden_layers", "hidden_size"):
        if not isinstance(config.get(key), int):
            raise UserError(
                f"{path}: {key} is {config.get(key)!r}, not a number; copy the file again"
            )
    return config


def _adapter_config(raw: dict[str, Any], directory: Path) -> AdapterConfig:
    return foreign_config(
        directory / "config.json",
        num_features_key="transcoder_n_features",
        num_features=raw["transcoder_n_features"],
        activation="relu",
        k=None,
        decoder_bias=raw["transcoder_dec_bias"],
    )


def _adapter_layers(
    raw: dict[str, Any], tensors: dict[str, Tensor], directory: Path
) -> dict[int, dict[str, Tensor]]:
    """Adapter tensors by layer, in our layout, after every name and shape was checked."""
    features, width = raw["transcoder_n_features"], raw["hidden_size"]
    shapes = {"W_enc": [features, width], "b_enc": [features], "W_dec": [width, features]}
    if raw["transcoder_dec_bias"]:
        shapes["b_dec"] = [width]
    expected = {
        tensor_name(layer, name): shape
        for layer in range(raw["num_hidden_layers"])
        for name, shape in shapes.items()
    }
    found = {key: list(tensor.shape) for key, tensor in tensors.items() if "transcoder" in key}
    wrong = [key for key in expected | found if expected.get(key) != found.get(key)]
    if wrong:
        key = wrong[0]
        raise UserError(
            f"{directory}: {key} has shape {found.get(key, 'missing')}, config.json calls for "
            f"{expected.get(key, 'no such tensor')}"
            f"{f', and {len(wrong) - 1} more tensors differ' if len(wrong) > 1 else ''}; give a "
            "whole checkpoint in the paper's format"
        )
    layers: dict[int, dict[str, Tensor]] = {}
    for key in expected:
        layer, suffix = re.fullmatch(_KEY, key).groups()  # type: ignore[union-attr]
        tensor = tensors[key]
        name = _NAMES[suffix]
        own = tensor.T.contiguous() if name == "W_dec" else tensor
        layers.setdefault(int(layer), {})[name] = own
    return layers


def _build_backbone(
    directory: Path, tensors: dict[str, Tensor], dtype: torch.dtype | None
) -> PreTrainedModel:
    """A plain Qwen2 model with exactly these tensors."""
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    with qwen2_configuration(directory):
        config = Qwen2Config.from_pretrained(directory)
    config.architectures = ["Qwen2ForCausalLM"]
    for key in ("transcoder_n_features", "transcoder_dec_bias"):
        delattr(config, key)
    model, report = Qwen2ForCausalLM.from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        dtype=dtype or config.dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(str(key) for key in report[kind])
        if keys:
            raise UserError(
                f"{directory}: backbone has {kind.replace('_', ' ')}: {', '.join(keys[:4])}"
                f"{f' and {len(keys) - 4} more' if len(keys) > 4 else ''}; config.json and weights "
                "are not of one checkpoint"
            )
    # As `from_pretrained` of a directory leaves them: where the tokenizer is, how to generate.
    model.name_or_path = model.config._name_or_path = str(directory)
    if (directory / GENERATION_NAME).is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(directory)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{directory / GENERATION_NAME}: not readable ({error}); copy the file again"
            ) from None
    return model.eval()

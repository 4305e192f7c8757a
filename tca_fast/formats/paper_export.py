"""Adapters and their backbone as one checkpoint of the kind released with the paper.

Such a checkpoint is a whole Qwen2 model (see `formats.paper`), so the two models the adapters were
trained on must be at hand: the backbone gives everything but the MLPs, the base gives the MLPs, and
the tokenizer is the target's, by which they were trained (contract §2.1, §2.3). The authors' code
reads the directory as one of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tca_fast.adapter_config import Provenance
from tca_fast.errors import UserError, one_line
from tca_fast.formats.adapter_set import AdapterSet, Export, Placement
from tca_fast.formats.paper import GENERATION_NAME, is_adapter_tensor, tensor_name
from tca_fast.formats.qwen2 import qwen2_fingerprint
from tca_fast.formats.shards import INDEX_NAME, WEIGHTS_NAME, weight_files
from tca_fast.formats.tensor_files import Entry, Header, read_headers, read_tensor

_SHARD_BYTES = 5 * 10**9
_NOTHING = Header((-1,), "")
_MLP = re.compile(r"model\.layers\.\d+\.mlp\..+")
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def export(adapters: AdapterSet) -> Export:
    """A whole model with the adapters in it.

    Raises:
        UserError: TopK adapters, models that are not named, not to be had or not Qwen2, or models
            other than those the adapters were trained beside.
    """
    info = adapters.info
    if info.adapter.activation != "relu":
        raise UserError(
            f"activation: {info.adapter.activation!r} has no counterpart in the paper's format, "
            "which has ReLU only; use sparsify or circuit-tracer"
        )
    base, target = (_model_directory(role, info.provenance) for role in ("base", "target"))
    backbone, other = (target, base) if info.provenance.backbone == "target" else (base, target)
    config, base_config = _read_config(backbone), _read_config(base)
    for field, saved in (("hidden_size", info.hidden_size), ("num_hidden_layers", info.num_layers)):
        for directory, found in ((backbone, config.get(field)), (base, base_config.get(field))):
            if found != saved:
                raise UserError(
                    f"{directory}: {field} is {found!r}, the adapters have {saved}; name the "
                    "models they were trained on with --base and --target"
                )
    files, headers = _assemble(backbone, base)
    expected = info.provenance.fingerprint
    if expected is not None and qwen2_fingerprint(backbone, config, files) != expected:
        raise UserError(
            f"{backbone} with the MLPs of {base} is not the model the adapters were trained "
            "beside; name those models with --base and --target"
        )
    if info.provenance.backbone == "base":
        config |= _taken_from_target(_read_config(other))
    config |= {
        "architectures": ["Qwen2ForCausalLMWithTranscoder"],
        "transcoder_n_features": info.adapter.num_features,
        "transcoder_dec_bias": info.adapter.decoder_bias,
    }
    copied = {GENERATION_NAME: backbone} | dict.fromkeys(_TOKENIZER, target)
    return _export(adapters, files, headers, config, backbone, copied)


def _export(
    adapters: AdapterSet,
    files: Mapping[str, Path],
    headers: Mapping[str, Header],
    config: Mapping[str, Any],
    backbone: Path,
    copied: Mapping[str, Path],
) -> Export:
    def keys(layer: int) -> dict[str, str]:
        return {name: tensor_name(layer, name) for name in adapters.shapes()}

    sizes = {key: header.num_bytes for key, header in headers.items()}
    for layer in range(adapters.info.num_layers):
        for name, key in keys(layer).items():
            entry = adapters.entry(layer, Placement(name, "", key))
            sizes[key] = entry.header.num_bytes
    shards = _shards(sizes)
    others: dict[str, list[Entry]] = {}
    for key, header in headers.items():
        others.setdefault(shards[key], []).append(Entry(key, header, _reader(files[key], key)))
    texts = {"config.json": (json.dumps(config, indent=2) + "\n").encode()}
    if len(set(shards.values())) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": shards}
        texts[INDEX_NAME] = (json.dumps(index, indent=2) + "\n").encode()
    texts |= {
        name: (directory / name).read_bytes()
        for name, directory in copied.items()
        if (directory / name).is_file()
    }
    return Export(
        lambda layer: [
            Placement(name, shards[key], key, transposed=name == "W_dec")
            for name, key in keys(layer).items()
        ],
        texts,
        [
            f"the {len(headers)} tensors of the backbone are copied from {backbone} and the MLPs "
            "of the base, because the format is a whole model",
            "the names of base and target, and which was the backbone, have no place in the "
            "format: coming back, give them with --base, --target and --backbone "
            f"{adapters.info.provenance.backbone}",
            "AutoModelForCausalLM drops the adapters of such a directory without an error",
        ],
        others,
    )


def _assemble(backbone: Path, base: Path) -> tuple[dict[str, Path], dict[str, Header]]:
    """File and header of every tensor of the model the adapters stand in."""
    files, headers = _tensors(backbone)
    base_files, base_headers = _tensors(base)
    mlps = [key for key in headers | base_headers if _MLP.fullmatch(key)]
    for key in mlps:
        here, there = (
            f"{list(found[key].shape)} in {directory}"
            if key in found
            else f"missing in {directory}"
            for found, directory in ((base_headers, base), (headers, backbone))
        )
        if base_headers.get(key, _NOTHING).shape != headers.get(key, _NOTHING).shape:
            raise UserError(f"{key} is {here} and {there}; name two models of one shape")
    files |= {key: base_files[key] for key in mlps}
    headers |= {key: base_headers[key] for key in mlps}
    return files, headers


def _tensors(directory: Path) -> tuple[dict[str, Path], dict[str, Header]]:
    files: dict[str, Path] = {}
    headers: dict[str, Header] = {}
    for path in weight_files(directory):
        found = read_headers(path)
        if adapter := next(filter(is_adapter_tensor, found), None):
            raise UserError(f"{path}: has adapters already ({adapter}); give a plain model")
        headers |= found
        files |= dict.fromkeys(found, path)
    return files, headers


def _shards(sizes: Mapping[str, int]) -> dict[str, str]:
    """The file of every tensor: one, or as many as keep each near 5 GB."""
    numbers: dict[str, int] = {}
    number = filled = 0
    for key in _in_model_order(sizes):
        if filled and filled + sizes[key] > _SHARD_BYTES:
            number, filled = number + 1, 0
        numbers[key], filled = number, filled + sizes[key]
    if number == 0:
        return dict.fromkeys(numbers, WEIGHTS_NAME)
    return {
        key: f"model-{one + 1:05d}-of-{number + 1:05d}.safetensors" for key, one in numbers.items()
    }


def _in_model_order(keys: Iterable[str]) -> list[str]:
    return sorted(keys, key=lambda key: [int(p) if p.isdigit() else -1 for p in key.split(".")])


def _reader(path: Path, key: str) -> Callable[[], Tensor]:
    return lambda: read_tensor(path, key)


def _taken_from_target(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a model with the base as backbone takes from the target (contract §1.7)."""
    return {key: config[key] for key in ("max_position_embeddings", "eos_token_id")}


def _model_directory(role: str, provenance: Provenance) -> Path:
    """Where the files of the base or the target are; a hub id is fetched."""
    name = getattr(provenance, role)
    if name is None:
        raise UserError(
            f"--{role}: the adapters do not say which model it was, and the paper's format is a "
            "whole model; name it by directory or hub id"
        )
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name,
                revision=getattr(provenance, f"{role}_revision"),
                allow_patterns=[
                    "config.json",
                    "*.safetensors",
                    INDEX_NAME,
                    GENERATION_NAME,
                    *_TOKENIZER,
                ],
            )
        )
    except Exception as error:
        raise UserError(
            f"--{role}: {name} is neither a directory here nor a model that the hub gives "
            f"({type(error).__name__}: {one_line(error)}); name one that is"
        ) from None


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); give a whole model") from None
    if not isinstance(config, dict) or config.get("model_type") != "qwen2":
        raise UserError(f"{path}: model_type is not 'qwen2'; the paper's checkpoints are Qwen2")
    return config

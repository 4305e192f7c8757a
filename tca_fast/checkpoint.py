"""Adapter checkpoints: a PEFT-shaped directory with the adapters and nothing else.

    adapter_config.json         which models, which shapes; what PEFT calls the base model is the
                                one the adapters attach to
    adapter_model.safetensors   base_model.model.{path of the MLP}.adapter.{W_enc,b_enc,W_dec,b_dec}
    README.md                   model card

A save is written beside the previous files, read back, and only then moved into place, so a full
disk or an interrupted job leaves the previous checkpoint whole. Nothing is pickled.

Shapes: F features per layer, D model width, L layers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tca_fast.attachment import MLP_NAME, AdaptedModel, attach, decoder_parts
from tca_fast.durable import Replacement
from tca_fast.errors import UserError
from tca_fast.fingerprint import Fingerprint, fingerprint
from tca_fast.formats.shards import read_tensors
from tca_fast.model_card import model_card, model_to_load

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tca_fast.adapter import TranscoderAdapter
    from tca_fast.config import AdapterConfig

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
CARD_NAME = "README.md"
PEFT_TYPE = "TRANSCODER_ADAPTER"
# As it stands in a file. PEFT looks the type up in its table of methods and, where it is not there,
# raises KeyError with this text and nothing else, so the remedy has to be part of it.
PEFT_TYPE_IN_FILES = (
    f"{PEFT_TYPE} (install tca_fast, then import tca_fast.integrations.peft before loading with "
    "PEFT; or load with tca_fast.load)"
)
FORMAT_VERSION = 1

_DTYPES = ("float64", "float32", "float16", "bfloat16")
_TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec")
_KEY = re.compile(
    rf"base_model\.model\.(?:[^.]*[^.\d][^.]*\.)*(\d+)\.(?:[^.]+\.)*adapter\.({'|'.join(_TENSORS)})"
)


@dataclass(frozen=True)
class Provenance:
    """Where adapters come from.

    Attributes:
        base, base_revision: model that gave the MLPs; None where unknown.
        target, target_revision: fine-tuned model that the adapters imitate.
        backbone: which of the two gave everything but the MLPs ("target" or "base").
        fingerprint: of the model attached to; `save_pretrained` takes it when None. A trainer
            that partitions parameters (ZeRO-3) takes it beforehand.
    """

    base: str | None = None
    base_revision: str | None = None
    target: str | None = None
    target_revision: str | None = None
    backbone: str = "target"
    fingerprint: Fingerprint | None = None


@dataclass(frozen=True)
class CheckpointInfo:
    """What `adapter_config.json` says.

    Attributes:
        adapter: shape and activation of the adapters.
        provenance: models, revisions, backbone and fingerprint.
        num_layers: L.
        hidden_size: D.
        dtype: of the stored tensors, e.g. "float32".
    """

    adapter: AdapterConfig
    provenance: Provenance
    num_layers: int
    hidden_size: int
    dtype: str


def save_pretrained(
    adapted: AdaptedModel, directory: str | Path, provenance: Provenance | None = None
) -> None:
    """Write the adapters of a model to a directory, leaving its other files alone.

    Parameters are stored in the dtype they have, gains (an intervention, not a parameter) are
    not stored. Equal adapters and provenance give byte-equal files.

    Args:
        adapted: model with adapters.
        directory: created if missing.
        provenance: names for `adapter_config.json` and the model card; None is what the adapters
            were loaded with.

    Raises:
        UserError: the files cannot be written (full disk, no permission) or do not read back as
            written; files of an earlier save are then still whole.
    """
    directory = Path(directory)
    provenance = provenance or adapted.provenance or Provenance()
    if provenance.fingerprint is None:
        provenance = replace(provenance, fingerprint=fingerprint(adapted.model))
    layers_name = decoder_parts(adapted.model).layers_name
    tensors = {
        f"base_model.model.{layers_name}.{index}.{MLP_NAME}.adapter.{name}": (
            parameter.detach().cpu().contiguous()
        )
        for index, adapter in enumerate(adapted.layers)
        for name, parameter in adapter.named_parameters()
    }
    info = CheckpointInfo(
        adapted.config,
        provenance,
        num_layers=len(adapted.layers),
        hidden_size=adapted.layers[0].W_enc.shape[1],
        dtype=str(adapted.layers[0].W_enc.dtype).removeprefix("torch."),
    )
    config = adapter_config_json(info, target_modules(layers_name))
    card = model_card(info)
    with Replacement(directory) as files:
        files.write(WEIGHTS_NAME, lambda path: _write_tensors(path, tensors))
        files.write(CONFIG_NAME, lambda path: _write_text(path, config))
        files.write(CARD_NAME, lambda path: _write_text(path, card))
        files.commit()


def load(
    model: PreTrainedModel,
    directory: str | Path,
    *,
    revision: str | None = None,
    check_model: bool = True,
) -> AdaptedModel:
    """Attach the adapters of a checkpoint to a model, in place and bit-exact.

    With backbone "target" the adapters belong beside the base model's MLPs, so the model to give
    is the hybrid (the target with the base's MLPs), not the plain target.

    Args:
        model: Hugging Face causal LM without adapters.
        directory: directory written by `save_pretrained`, or a hub id.
        revision: of the hub repository.
        check_model: compare the model with the fingerprint in the checkpoint. Turn it off for
            weights that are meant to differ (quantised, edited, tuned further).

    Returns:
        The adapted model; adapter parameters have the dtype of the file and the device of the
        MLP they belong to.

    Raises:
        UserError: no adapter there, unreadable file, tensors missing, left over or of the wrong
            shape, a model of other shape or other weights, a format newer than this version.
            The model is then unchanged.
    """
    info, tensors = read(model, directory, revision=revision, check_model=check_model)
    adapted = attach(model, info.adapter, dtype=getattr(torch, info.dtype))
    copy_into(adapted.layers, tensors)
    adapted.provenance = info.provenance
    return adapted


def read(
    model: PreTrainedModel,
    directory: str | Path,
    *,
    revision: str | None = None,
    check_model: bool = True,
) -> tuple[CheckpointInfo, list[dict[str, Tensor]]]:
    """What `load` attaches: the checked configuration, and the tensors of every layer by name.

    Args and errors are those of `load`; the model is not changed.
    """
    directory = local_directory(directory, revision)
    info = read_adapter_config(directory)
    check_shape(model, info, directory)
    if check_model:
        check_fingerprint(fingerprint(model), info, directory, "pass check_model=False")
    return info, _read_layers(directory / WEIGHTS_NAME, info)


def copy_into(adapters: Sequence[TranscoderAdapter], layers: Sequence[dict[str, Tensor]]) -> None:
    """Set the parameters of every layer's adapter to tensors of their shapes."""
    with torch.no_grad():
        for adapter, tensors in zip(adapters, layers, strict=True):
            for name, parameter in adapter.named_parameters():
                parameter.copy_(tensors[name])


def read_adapter_config(directory: str | Path) -> CheckpointInfo:
    """Read and check `adapter_config.json` of a local checkpoint directory.

    Raises:
        UserError: no such file, not JSON, not a transcoder adapter, keys missing, values that do
            not fit, or a format newer than this version.
    """
    path = Path(directory) / CONFIG_NAME
    if not path.is_file():
        raise UserError(_nothing_here(Path(directory)))
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, OSError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); copy the file again") from None
    if not isinstance(config, dict) or config.get("peft_type") not in (
        PEFT_TYPE,
        PEFT_TYPE_IN_FILES,
    ):
        found = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise UserError(
            f"{path}: peft_type is {found!r}, not {PEFT_TYPE!r}; give a tca_fast adapter"
        )
    return parse_adapter_config(config, path)


def adapter_config_json(info: CheckpointInfo, targets: str) -> str:
    """The text of `adapter_config.json`.

    Args:
        info: what it shall say.
        targets: which modules have adapters beside them, see `target_modules`.
    """
    names = asdict(info.provenance)
    backbone = info.provenance.backbone
    config = {
        "peft_type": PEFT_TYPE_IN_FILES,
        "task_type": "CAUSAL_LM",
        "auto_mapping": None,
        "base_model_name_or_path": names[backbone],
        "revision": names[f"{backbone}_revision"],
        "target_modules": targets,
        "inference_mode": True,
        **names,
        **info.adapter.model_dump(mode="json"),
        "num_layers": info.num_layers,
        "hidden_size": info.hidden_size,
        "dtype": info.dtype,
        "format_version": FORMAT_VERSION,
        "tca_fast_version": metadata.version("tca_fast"),
    }
    return json.dumps(config, indent=2) + "\n"


def target_modules(layers_name: str) -> str:
    """The MLPs of all decoder layers, as a regular expression that PEFT matches with paths.

    Args:
        layers_name: dotted path of the decoder layers in the model, for example "model.layers".
    """
    return rf"{re.escape(layers_name)}\.\d+\.{MLP_NAME}"


def parse_adapter_config(config: Mapping[str, Any], path: Path | str) -> CheckpointInfo:
    """Check the entries of `adapter_config.json`, read from `path`.

    Raises:
        UserError: keys missing, values that do not fit, or a format newer than this version.
    """
    from tca_fast.config import AdapterConfig

    version = config.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version {version!r} is newer than {FORMAT_VERSION}, the newest that "
            "this tca_fast reads; upgrade tca_fast"
        )

    def get(name: str, kind: type | tuple[type, ...]) -> Any:
        value = config.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"{path}: {name} is {value!r}, which does not fit; save it again")
        return value

    text = (str, type(None))
    try:
        adapter = AdapterConfig(**{name: config[name] for name in AdapterConfig.model_fields})
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]} is missing; save the adapters again") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    marks = get("fingerprint", (dict, type(None)))
    if marks is not None and {"mlp", "rest"} - marks.keys():
        raise UserError(f"{path}: fingerprint lacks mlp or rest; save the adapters again")
    provenance = Provenance(
        base=get("base", text),
        base_revision=get("base_revision", text),
        target=get("target", text),
        target_revision=get("target_revision", text),
        backbone=get("backbone", str),
        fingerprint=Fingerprint(marks["mlp"], marks["rest"]) if marks else None,
    )
    if get("dtype", str) not in _DTYPES:
        raise UserError(f"{path}: dtype is {config['dtype']!r}; known are {', '.join(_DTYPES)}")
    return CheckpointInfo(
        adapter, provenance, get("num_layers", int), get("hidden_size", int), config["dtype"]
    )


def check_shape(model: PreTrainedModel, info: CheckpointInfo, source: str | Path) -> None:
    """Refuse a model with other layers or another width than the adapters of `source` have.

    Raises:
        UserError: names what differs and the model to load.
    """
    parts = decoder_parts(model)
    for field, saved, found in (
        ("num_layers", info.num_layers, len(parts.layers)),
        ("hidden_size", info.hidden_size, parts.width),
    ):
        if saved != found:
            raise UserError(
                f"{field}: the adapters in {source} were trained with {saved}, this model has "
                f"{found}; load {model_to_load(info.provenance)}"
            )


def check_fingerprint(
    found: Fingerprint, info: CheckpointInfo, source: str | Path, otherwise: str
) -> None:
    """Refuse a model whose weights are not those that the adapters were trained beside.

    Args:
        found: of the model; nothing is checked where the checkpoint has none to compare it with.
        info, source: the checkpoint, and where it is.
        otherwise: how to load it all the same, for the message.

    Raises:
        UserError: names what differs and the model to load.
    """
    expected = info.provenance.fingerprint
    if expected is None:
        return
    differing = [
        f"{what} {theirs} instead of {ours}"
        for what, ours, theirs in (
            ("MLP weights", expected.mlp, found.mlp),
            ("attention and norm weights", expected.rest, found.rest),
        )
        if ours != theirs
    ]
    if differing:
        raise UserError(
            f"model: its fingerprint has {' and '.join(differing)}, so it is not the model the "
            f"adapters in {source} were trained beside; load "
            f"{model_to_load(info.provenance)}, or {otherwise} if that is meant"
        )


def local_directory(directory: str | Path, revision: str | None) -> Path:
    """The directory itself, or the snapshot of a hub repository.

    Raises:
        UserError: neither a directory here nor a repository that the hub gives.
    """
    path = Path(directory)
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(directory)):
        return path
    from huggingface_hub import snapshot_download

    try:
        files = [CONFIG_NAME, WEIGHTS_NAME]
        return Path(snapshot_download(str(directory), revision=revision, allow_patterns=files))
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"directory: {directory} is neither a directory here nor a repository that the hub "
            f"gives ({type(error).__name__}: {reason[:200]}); check the path or the hub id"
        ) from None


def _nothing_here(directory: Path) -> str:
    """Why a directory without `adapter_config.json` cannot be loaded, and what to do."""
    if not directory.is_dir():
        return f"directory: {directory} does not exist; give a directory with {CONFIG_NAME}"
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    if isinstance(config, dict) and "transcoder_n_features" in config:
        return (
            f"directory: {directory} is a whole model in the paper's format; use "
            "tca_fast.formats.paper.load_paper_checkpoint"
        )
    found = ", ".join(sorted(child.name for child in directory.iterdir())[:8]) or "nothing"
    return (
        f"directory: no adapter in {directory}: expected {CONFIG_NAME} and {WEIGHTS_NAME}, found "
        f"{found}; give the directory that save_pretrained wrote"
    )


def _read_layers(path: Path, info: CheckpointInfo) -> list[dict[str, Tensor]]:
    """The tensors of every layer, after every name, shape and dtype was checked."""
    if not path.is_file():
        raise UserError(f"{path}: missing beside {CONFIG_NAME}; copy it there")
    shapes = _expected_shapes(info)
    layers: list[dict[str, Tensor]] = [{} for _ in range(info.num_layers)]
    foreign = []
    for key, tensor in read_tensors({path: None}).items():
        match = _KEY.fullmatch(key)
        layer, name = (int(match[1]), match[2]) if match else (-1, "")
        if not (0 <= layer < len(layers) and name in shapes) or name in layers[layer]:
            foreign.append(key)
            continue
        found = (list(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        expected = (list(shapes[name]), info.dtype)
        if found != expected:
            raise UserError(
                f"{path}: {key} is {found[0]} {found[1]}, but {CONFIG_NAME} calls for "
                f"{expected[0]} {expected[1]}; the two files are not of one save"
            )
        layers[layer][name] = tensor
    missing = [
        f"layer {layer} {name}"
        for layer, tensors in enumerate(layers)
        for name in shapes
        if name not in tensors
    ]
    for problem, names in (("lacks", missing), ("has unknown tensors", foreign)):
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            raise UserError(
                f"{path}: {problem} {', '.join(names[:4])}{more}; save the adapters again"
            )
    return layers


def _expected_shapes(info: CheckpointInfo) -> dict[str, tuple[int, ...]]:
    features, width = info.adapter.num_features, info.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (features, width),
        "b_enc": (features,),
        "W_dec": (features, width),
    }
    return shapes | ({"b_dec": (width,)} if info.adapter.decoder_bias else {})


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file, then read its header back and compare it."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})
    try:
        with safe_open(path, framework="pt") as file:
            written = {
                key: (tuple(tensor.shape), tensor.dtype)
                for key in file.keys()  # noqa: SIM118  (a safe_open handle is not iterable)
                for tensor in [file.get_tensor(key)]
            }
    except SafetensorError as error:
        raise UserError(
            f"{path}: does not read back after writing ({error}); check the disk"
        ) from None
    expected = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
    if written != expected:
        wrong = sorted(key for key in expected | written if expected.get(key) != written.get(key))
        raise UserError(f"{path}: {wrong[0]} reads back otherwise than written; check the disk")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    if path.read_text(encoding="utf-8") != text:
        raise UserError(f"{path}: reads back otherwise than written; check the disk")

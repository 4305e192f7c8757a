"""`adapter_config.json`: which models adapters belong to, and which shapes they have.

What PEFT calls the base model is the one the adapters attach to.

Shapes: F features per layer, D model width, L layers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tca_fast.architectures.structure import MLP_NAME
from tca_fast.errors import UserError
from tca_fast.fingerprint import Fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
_DONOR = "_tca_fast_mlps_of"
_PAPER_KEY = "transcoder_n_features"


@dataclass(frozen=True)
class Provenance:
    """Where adapters come from.

    Attributes:
        base, base_revision: model that gave the MLPs; None where unknown.
        target, target_revision: fine-tuned model that the adapters imitate.
        backbone: which of the two gave everything but the MLPs ("target" or "base").
        fingerprint: of the model attached to; `save_pretrained` takes it when None. A trainer
            that partitions parameters (ZeRO-3) takes it where they are whole.
    """

    base: str | None = None
    base_revision: str | None = None
    target: str | None = None
    target_revision: str | None = None
    backbone: str = "target"
    fingerprint: Fingerprint | None = None

    def __post_init__(self) -> None:
        """Check the backbone.

        Raises:
            UserError: it is neither of the two models.
        """
        if self.backbone not in ("base", "target"):
            raise UserError(
                f"backbone {self.backbone!r} is neither 'base' nor 'target'; name the one that "
                "gives everything but the MLPs"
            )


def provenance_of(model: PreTrainedModel) -> Provenance:
    """Which models fresh adapters on `model` belong to, as far as it says.

    Args:
        model: with or without adapters.

    Returns:
        The model itself as base and backbone; for a hybrid (see `mark_hybrid`) the models it was
        put together from; nothing where the model has no name, or where its files are a hybrid
        that does not say of which models (the paper's format).
    """
    name = getattr(model, "name_or_path", None) or None
    if hasattr(model, _DONOR):
        return Provenance(base=getattr(model, _DONOR), target=name)
    if name is None or hasattr(model.config, _PAPER_KEY) or _PAPER_KEY in _model_config(Path(name)):
        return Provenance()
    return Provenance(base=name, backbone="base")


def mark_hybrid(model: PreTrainedModel, donor: PreTrainedModel) -> None:
    """Keep in `model`, whose MLPs are those of `donor` now, where they come from."""
    setattr(model, _DONOR, getattr(donor, "name_or_path", None) or None)


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


def tensor_shapes(adapter: AdapterConfig, hidden_size: int) -> dict[str, tuple[int, ...]]:
    """The tensors of one layer's adapter and their shapes: F features, D = `hidden_size`."""
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (adapter.num_features, hidden_size),
        "b_enc": (adapter.num_features,),
        "W_dec": (adapter.num_features, hidden_size),
    }
    return shapes | ({"b_dec": (hidden_size,)} if adapter.decoder_bias else {})


def check_dtype(dtype: str) -> None:
    """Refuse what is no dtype of adapters.

    Raises:
        UserError: names those there are.
    """
    if dtype not in _DTYPES:
        raise UserError(f"dtype is {dtype!r}; known are {', '.join(_DTYPES)}")


def parse_adapter_config(config: Mapping[str, Any], path: Path | str) -> CheckpointInfo:
    """Check the entries of `adapter_config.json`, read from `path`.

    Raises:
        UserError: keys missing, values that do not fit, or a format newer than this version.
    """
    from tca_fast.config import AdapterConfig

    def get(name: str, kind: type | tuple[type, ...]) -> Any:
        value: Any = config.get(name)
        fits = isinstance(value, kind) and not isinstance(value, bool)
        # All whole numbers here count from one.
        if not fits or (kind is int and value < 1):
            raise UserError(f"{path}: {name} is {value!r}, which does not fit; save it again")
        return value

    if (version := get("format_version", int)) > FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version {version} is newer than {FORMAT_VERSION}, the newest that "
            "this tca_fast reads; upgrade tca_fast"
        )
    text = (str, type(None))
    try:
        adapter = AdapterConfig(**{name: config[name] for name in AdapterConfig.model_fields})
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]} is missing; save the adapters again") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    marks = get("fingerprint", (dict, type(None)))
    if marks is not None and not all(isinstance(marks.get(key), str) for key in ("mlp", "rest")):
        raise UserError(f"{path}: fingerprint lacks mlp or rest; save the adapters again")
    names = {
        name: get(name, text) for name in ("base", "base_revision", "target", "target_revision")
    }
    mark = Fingerprint(marks["mlp"], marks["rest"]) if marks else None
    backbone, dtype = get("backbone", str), get("dtype", str)
    try:
        provenance = Provenance(**names, backbone=backbone, fingerprint=mark)
        check_dtype(dtype)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return CheckpointInfo(
        adapter, provenance, get("num_layers", int), get("hidden_size", int), dtype
    )


def _nothing_here(directory: Path) -> str:
    """Why a directory without `adapter_config.json` cannot be loaded, and what to do."""
    if directory.is_file():
        return f"directory: {directory} is a file; give its directory, {directory.parent}"
    if not directory.is_dir():
        return f"directory: {directory} does not exist; give a directory with {CONFIG_NAME}"
    if (directory / "adapter" / CONFIG_NAME).is_file():
        return f"directory: {directory} is that of a run; give its adapter, {directory / 'adapter'}"
    if _PAPER_KEY in _model_config(directory):
        return (
            f"directory: {directory} is a whole model in the paper's format; use "
            "tca_fast.formats.paper.load_paper_checkpoint"
        )
    found = ", ".join(sorted(child.name for child in directory.iterdir())[:8]) or "nothing"
    return (
        f"directory: no adapter in {directory}: expected {CONFIG_NAME} and {WEIGHTS_NAME}, found "
        f"{found}; give the directory that save_pretrained wrote"
    )


def _model_config(directory: Path) -> dict[str, Any]:
    """`config.json` of a directory; empty where it has none."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}

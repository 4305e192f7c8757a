"""`adapter_config.json` as PEFT holds it in memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftConfig
from peft.utils import PeftType

from tca_fast.adapter_config import (
    CONFIG_NAME,
    FORMAT_VERSION,
    CheckpointInfo,
    Provenance,
    adapter_config_json,
    check_dtype,
    parse_adapter_config,
    provenance_of,
    target_modules,
)
from tca_fast.architectures.structure import decoder_parts
from tca_fast.config import AdapterConfig
from tca_fast.durable import Replacement
from tca_fast.errors import UserError
from tca_fast.fingerprint import Fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class TranscoderAdapterConfig(PeftConfig):
    """Shape of the adapters, and which models they belong to.

    Give shape and seed, and the names of the models if they are a pair; the rest stands in a
    checkpoint and is filled in from the model when fresh adapters are saved.

    Attributes:
        num_features, activation, k, decoder_bias: as in `tca_fast.AdapterConfig`.
        seed: of fresh encoder weights; not saved.
        base, base_revision, target, target_revision, backbone: as in `adapter_config.Provenance`.
            Without any of them the model at hand is recorded as base and backbone, and the two
            models of a hybrid as what they are.
        fingerprint: of the model that the adapters belong to; None accepts any of their shape.
        target_modules: the MLPs of all decoder layers; adapters stand beside every one.
        num_layers, hidden_size: L and D.
        dtype: of the adapters' parameters.
        format_version, tca_fast_version: of the checkpoint.
    """

    task_type: str | None = "CAUSAL_LM"
    num_features: int = 8192
    activation: str = "relu"
    k: int | None = None
    decoder_bias: bool = True
    seed: int = 0
    base: str | None = None
    base_revision: str | None = None
    target: str | None = None
    target_revision: str | None = None
    backbone: str = "target"
    fingerprint: dict[str, str] | None = None
    target_modules: str | None = None
    num_layers: int | None = None
    hidden_size: int | None = None
    dtype: str = "float32"
    format_version: int = FORMAT_VERSION
    tca_fast_version: str | None = None
    _attached: CheckpointInfo | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UserError: a value that does not fit; also a checkpoint of a newer format.
        """
        super().__post_init__()
        self.peft_type = PeftType.TRANSCODER_ADAPTER
        self.adapter()
        self._named()
        check_dtype(self.dtype)
        if self.from_file:
            self.info()
        elif self.target_modules is not None:
            raise UserError(
                f"target_modules: {self.target_modules!r}; leave it out, because the adapters "
                "stand beside the MLP of every decoder layer"
            )

    @property
    def from_file(self) -> bool:
        """Whether a checkpoint says which model the adapters belong to."""
        return self.num_layers is not None

    def adapter(self) -> AdapterConfig:
        """Shape and activation, checked."""
        return AdapterConfig(**{name: getattr(self, name) for name in AdapterConfig.model_fields})

    def info(self) -> CheckpointInfo:
        """What `adapter_config.json` says or is going to say.

        Raises:
            UserError: values that do not fit, or adapters that were never put into a model.
        """
        if self.from_file:
            return parse_adapter_config(vars(self), CONFIG_NAME)
        if self._attached is None:
            raise UserError(
                "config: belongs to no model yet; call get_peft_model before it is saved"
            )
        return self._attached

    def attach_to(self, model: PreTrainedModel, marks: Fingerprint) -> None:
        """Take note of the model that fresh adapters are put into.

        Args:
            model: without adapters.
            marks: its fingerprint.
        """
        parts = decoder_parts(model)
        found = provenance_of(model)
        if self.base is None and self.target is None and found.target is not None:
            provenance = replace(found, fingerprint=marks)
        elif self.base is None and self.target is None:
            name = self.base_model_name_or_path
            provenance = Provenance(name, self.revision, backbone="base", fingerprint=marks)
        else:
            provenance = replace(self._named(), fingerprint=marks)
        self.target_modules = target_modules(parts.layers_name)
        self._attached = CheckpointInfo(
            self.adapter(), provenance, len(parts.layers), parts.width, self.dtype
        )

    def _named(self) -> Provenance:
        """The models that were given."""
        return Provenance(
            self.base, self.base_revision, self.target, self.target_revision, self.backbone
        )

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json` as `tca_fast.checkpoint` does.

        Raises:
            UserError: the file cannot be written, or there is no model to name in it.
        """
        info = self.info()
        values = {**vars(info), "dtype": self.dtype}
        text = adapter_config_json(CheckpointInfo(**values), str(self.target_modules))
        with Replacement(save_directory) as files:
            files.write(CONFIG_NAME, lambda path: _write(path, text))
            files.commit()

    def to_dict(self) -> dict[str, Any]:
        """The fields, as PEFT and loggers show them."""
        return {name: value for name, value in asdict(self).items() if name != "_attached"}


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")

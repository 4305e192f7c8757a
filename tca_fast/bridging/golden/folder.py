"""Read a golden folder: weights, inputs, and what the reference implementation made of them.

    values.json           losses, statistics, gradient norms; `_about` holds the settings
    inputs.safetensors    input_ids, attention_mask, labels, each [B, S]
    outputs.safetensors   logits, features and residual states
    grads.safetensors     {component}/{parameter name of the paper}
    relp.safetensors      attribution graph of one prompt (may be absent)
    base/ target/         Hugging Face models
    adapter/              the assembled model with adapters, in the paper's format

Sizes, weights of the objective, cutoffs and batch are whatever the files say (contract §10).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tca_fast.config import AdapterConfig, ObjectiveConfig
from tca_fast.errors import UserError
from tca_fast.formats.paper import is_adapter_tensor, read_paper_checkpoint
from tca_fast.formats.shards import read_tensors, weight_files

GRADIENTS = "grads.safetensors"
OUTPUTS = "outputs.safetensors"
RELP = "relp.safetensors"
_REQUIRED = (
    "values.json",
    "inputs.safetensors",
    OUTPUTS,
    GRADIENTS,
    "base/config.json",
    "target/config.json",
    "adapter/config.json",
)


@dataclass(frozen=True)
class GoldenFolder:
    """The contents of a golden folder.

    Attributes:
        directory: the folder.
        values: values.json.
        inputs: input_ids, attention_mask and labels, int64 [B, S].
        outputs, gradients, relp: tensors by name; `relp` is empty where there is no such file.
        adapter_config: of the adapters in adapter/.
        adapters: their tensors, by layer and in our layout.
        backbone: every other tensor of adapter/.
        objective: the weights in `_about`.
        cutoff: the fixed cutoff of the training step, in 0..L.
    """

    directory: Path
    values: dict[str, Any]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    relp: dict[str, Tensor]
    adapter_config: AdapterConfig
    adapters: dict[int, dict[str, Tensor]]
    backbone: dict[str, Tensor]
    objective: ObjectiveConfig
    cutoff: int

    @property
    def num_layers(self) -> int:
        """L, decoder layers."""
        return len(self.adapters)

    @property
    def real_tokens(self) -> Tensor:
        """Bool [B, S], true where a token is not padding."""
        return self.inputs["attention_mask"].bool()


def read_golden(directory: str | Path) -> GoldenFolder:
    """Read and check a golden folder.

    Raises:
        UserError: the folder or one of its files is missing, unreadable or incomplete.
    """
    directory = Path(directory)
    missing = [name for name in _REQUIRED if not (directory / name).is_file()]
    if missing:
        what = "does not exist" if not directory.is_dir() else f"lacks {', '.join(missing)}"
        raise UserError(
            f"directory: {directory} {what}; give a golden folder ({', '.join(_REQUIRED)})"
        )
    values = _read_values(directory / "values.json")
    adapter_config, adapters = read_paper_checkpoint(directory / "adapter")
    objective, cutoff = _settings(values, len(adapters), directory)
    relp = directory / RELP
    return GoldenFolder(
        directory=directory,
        values=values,
        inputs=_read_inputs(directory / "inputs.safetensors"),
        outputs=read_tensors({directory / OUTPUTS: None}),
        gradients=read_tensors({directory / GRADIENTS: None}),
        relp=read_tensors({relp: None}) if relp.is_file() else {},
        adapter_config=adapter_config,
        adapters=adapters,
        backbone={
            key: tensor
            for key, tensor in read_tensors(weight_files(directory / "adapter")).items()
            if not is_adapter_tensor(key)
        },
        objective=objective,
        cutoff=cutoff,
    )


def _read_values(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); copy the file again") from None
    if not isinstance(values, dict) or not isinstance(values.get("_about"), dict):
        raise UserError(f"{path}: has no block '_about' with the settings; give a golden folder")
    return values


def _read_inputs(path: Path) -> dict[str, Tensor]:
    inputs = read_tensors({path: None})
    names = ("input_ids", "attention_mask", "labels")
    shapes = {name: list(inputs[name].shape) for name in names if name in inputs}
    if len(shapes) < len(names) or len({tuple(shape) for shape in shapes.values()}) > 1:
        raise UserError(
            f"{path}: holds {shapes or 'none'} of {', '.join(names)}; all three are needed, "
            "with one shape [batch, sequence]"
        )
    return {name: inputs[name].long() for name in names}


def _settings(
    values: dict[str, Any], num_layers: int, directory: Path
) -> tuple[ObjectiveConfig, int]:
    about = values["_about"]
    names = ("lambda_adapt", "l1_weight", "lambda_nmse", "lambda_bridge")
    for name in (*names, "k"):
        if not isinstance(about.get(name), (int, float)):
            raise UserError(
                f"{directory / 'values.json'}: _about.{name} is {about.get(name)!r}; it must be "
                "a number"
            )
    cutoff = about["k"]
    if not isinstance(cutoff, int) or not 0 <= cutoff <= num_layers:
        raise UserError(
            f"{directory / 'values.json'}: _about.k is {cutoff!r}; it must be one cutoff in "
            f"0..{num_layers}"
        )
    weights = {name: float(about[name]) for name in names}
    return ObjectiveConfig.model_validate({**weights, "cutoffs": [cutoff]}), cutoff

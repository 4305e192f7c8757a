"""The fingerprint of a Qwen2 checkpoint from its files, without loading the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tca_fast.errors import UserError, one_line
from tca_fast.fingerprint import Fingerprint, fingerprint
from tca_fast.formats.tensor_files import read_tensor


@contextmanager
def qwen2_configuration(directory: Path) -> Iterator[None]:
    """What transformers says of the values in a directory's `config.json`, as one line.

    Raises:
        UserError: the block fails, with whatever error.
    """
    try:
        yield
    except Exception as error:
        raise UserError(
            f"{directory / 'config.json'}: is no configuration of Qwen2 ({one_line(error)}); "
            "copy the file again"
        ) from None


def qwen2_fingerprint(
    directory: Path, config: Mapping[str, Any], files: Mapping[str, Path]
) -> Fingerprint:
    """What `fingerprint` gives for the loaded model, with two layers in memory.

    Args:
        directory: holds `config.json`.
        config: what it says.
        files: the file of every tensor.

    Raises:
        UserError: a value in `config.json` that Qwen2 cannot have, or a tensor of the first or last
            layer is missing or misshapen.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    num_layers = config["num_hidden_layers"]
    ends = [0] if num_layers == 1 else [0, num_layers - 1]
    # Only the first and last layer count, so a model of these alone has the same fingerprint.
    small = {
        key: value
        for key, value in config.items()
        if key not in ("layer_types", "bos_token_id", "eos_token_id", "pad_token_id")
    } | {"num_hidden_layers": len(ends), "vocab_size": 1}
    with qwen2_configuration(directory), torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config.from_dict(small))
    for layer, module in zip(ends, model.model.layers, strict=True):
        tensors = {}
        for name, parameter in module.named_parameters():
            key = f"model.layers.{layer}.{name}"
            if key not in files:
                raise UserError(f"{key} is in none of the files; give a whole checkpoint")
            tensors[name] = read_tensor(files[key], key)
            if tensors[name].shape != parameter.shape:
                raise UserError(
                    f"{files[key]}: {key} has shape {list(tensors[name].shape)}, config.json "
                    f"calls for {list(parameter.shape)}; the files are not of one checkpoint"
                )
        module.load_state_dict(tensors, assign=True)
    return fingerprint(model)

"""Adapters in files of any format, read one tensor at a time.

A format is a list of placements: which of our tensors stands under which name in which file, and
whether it is transposed there. Reading, writing and the dry run of `tca-fast convert` all follow
the same placements, so what is printed is what happens.

Shapes: F features per layer, D model width, L layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tca_fast.adapter_config import CheckpointInfo, Provenance, tensor_shapes
from tca_fast.config import AdapterConfig
from tca_fast.errors import UserError
from tca_fast.fingerprint import Fingerprint
from tca_fast.formats.tensor_files import DTYPES, Entry, Header, header, read_headers, read_tensor

DEFAULT_LAYERS_NAME = "model.layers"
ORIGIN_KEY = "tca_fast"  # foreign configurations keep what they have no field for under this key


class Placement(NamedTuple):
    """Where one of our tensors stands in a format.

    Attributes:
        name: our tensor: "W_enc", "b_enc", "W_dec" or "b_dec".
        file: the file, relative to the directory.
        key: its name there.
        transposed: whether the file has it transposed.
    """

    name: str
    file: str
    key: str
    transposed: bool = False


class Export(NamedTuple):
    """Everything a format needs written.

    Attributes:
        placements: of the tensors of a layer.
        texts: other files, by path relative to the directory.
        notes: what has no counterpart in the format, and the consequence.
        others: tensors that are not the adapters', by file.
    """

    placements: Callable[[int], list[Placement]]
    texts: Mapping[str, bytes]
    notes: Sequence[str]
    others: Mapping[str, Sequence[Entry]]


@dataclass(frozen=True)
class AdapterSet:
    """The adapters of every layer, in files.

    Attributes:
        info: shapes, activation, dtype and where the adapters come from.
        layers_name: dotted path of the decoder layers in the model, for example "model.layers".
        directory: holds the files.
        placements: of the tensors of a layer.
        notes: what the files leave open, and the consequence.
        unknown: fields of `Provenance` that the files do not give.
    """

    info: CheckpointInfo
    layers_name: str
    directory: Path
    placements: Callable[[int], list[Placement]]
    notes: Sequence[str] = ()
    unknown: Sequence[str] = ()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Our tensors of one layer and their shapes."""
        return tensor_shapes(self.info.adapter, self.info.hidden_size)

    def tensor(self, layer: int, name: str) -> Tensor:
        """One tensor in our layout, read now; zeros for a decoder bias the adapters lack."""
        for placement in self.placements(layer):
            if placement.name == name:
                tensor = read_tensor(self.directory / placement.file, placement.key)
                return tensor.T.contiguous() if placement.transposed else tensor
        return torch.zeros(self.info.hidden_size, dtype=getattr(torch, self.info.dtype))

    def entry(self, layer: int, placement: Placement) -> Entry:
        """One tensor of a layer as another format places it."""
        shape = self.shapes().get(placement.name, (self.info.hidden_size,))

        def read() -> Tensor:
            tensor = self.tensor(layer, placement.name)
            return tensor.T if placement.transposed else tensor

        turned = reversed(shape) if placement.transposed else shape
        return Entry(placement.key, header(turned, self.info.dtype), read)


def foreign_config(
    path: Path, *, num_features_key: str = "num_features", **fields: Any
) -> AdapterConfig:
    """The adapter configuration that a foreign file calls for.

    Args:
        path: the file.
        num_features_key: what it calls `num_features`.
        fields: of `AdapterConfig`.

    Raises:
        UserError: the fields do not fit; the message names the file and its own key.
    """
    try:
        return AdapterConfig(**fields)
    except UserError as error:
        said = str(error).replace("num_features", num_features_key)
        raise UserError(f"{path}: {said}") from None


def open_adapters(
    directory: Path,
    adapter: AdapterConfig,
    provenance: Provenance,
    placements: Callable[[int], list[Placement]],
    *,
    num_layers: int,
    hidden_size: int,
    layers_name: str = DEFAULT_LAYERS_NAME,
    notes: Sequence[str] = (),
    unknown: Sequence[str] = (),
    other_keys: Callable[[str], bool] = lambda key: False,
) -> AdapterSet:
    """Check every name, shape and dtype in the files against the configuration.

    Args:
        directory: holds the files.
        adapter: what the configuration calls for.
        provenance: where the adapters come from.
        placements: of the tensors of a layer in the files.
        num_layers, hidden_size: L and D.
        layers_name: dotted path of the decoder layers.
        notes, unknown: passed on to the set.
        other_keys: which keys of the files may be left over.

    Raises:
        UserError: a tensor is missing, left over, misshapen or of another dtype, or `layers_name`
            is no path of a module.
    """
    # Formats name folders after it, so a slash in it would lead out of the directory to write.
    if not re.fullmatch(r"\w+(\.\w+)*", layers_name):
        raise UserError(
            f"{directory}: decoder layers are at {layers_name!r}, which is no path of a module "
            f"such as {DEFAULT_LAYERS_NAME!r}; save the adapters again"
        )
    shapes = tensor_shapes(adapter, hidden_size)
    placed: dict[str, dict[str, tuple[int, ...]]] = {}
    for layer in range(num_layers):
        for name, file, key, transposed in placements(layer):
            shape = shapes[name]
            placed.setdefault(file, {})[key] = shape[::-1] if transposed else shape
    dtypes: dict[str, str] = {}
    for file, expected in placed.items():
        path = directory / file
        found = read_headers(path)
        for key in [*expected, *(key for key in found if key not in expected)]:
            if key not in expected and other_keys(key):
                continue
            _check_tensor(path, key, found.get(key), expected.get(key))
            dtypes.setdefault(found[key].dtype, f"{path}: {key}")
    if len(dtypes) > 1 or not dtypes.keys() <= set(DTYPES.values()):
        listed = "; ".join(f"{where} is {dtype}" for dtype, where in sorted(dtypes.items()))
        raise UserError(f"{listed}; adapters have one floating dtype, so convert the tensors first")
    info = CheckpointInfo(adapter, provenance, num_layers, hidden_size, next(iter(dtypes)))
    return AdapterSet(info, layers_name, directory, placements, tuple(notes), unknown)


def _check_tensor(
    path: Path, key: str, found: Header | None, expected: tuple[int, ...] | None
) -> None:
    if found is None or expected is None or found.shape != expected:
        here = "missing" if found is None else f"of shape {list(found.shape)}"
        wanted = "not to be there" if expected is None else f"of shape {list(expected)}"
        raise UserError(
            f"{path}: {key} is {here}, expected {wanted}; the files are not of one export"
        )


def origin_record(adapters: AdapterSet) -> dict[str, Any]:
    """What foreign configurations keep under `ORIGIN_KEY`, so that nothing is lost on the way back.

    Plain JSON values: whether the adapters have a decoder bias, the path of the decoder layers,
    and the models they were trained on with the fingerprint.
    """
    return {
        "decoder_bias": adapters.info.adapter.decoder_bias,
        "layers_name": adapters.layers_name,
        **asdict(adapters.info.provenance),
    }


class Origin(NamedTuple):
    """An origin record as read.

    Attributes:
        provenance: models and fingerprint.
        layers_name: dotted path of the decoder layers.
        decoder_bias: whether the decoder bias in the files is one, rather than zeros for none.
    """

    provenance: Provenance
    layers_name: str
    decoder_bias: bool


def read_origin(record: Any, where: str) -> Origin:
    """Parse what `origin_record` wrote.

    Raises:
        UserError: another record; the message starts with `where`.
    """
    try:
        names = dict(record)
        decoder_bias, layers_name = names.pop("decoder_bias"), names.pop("layers_name")
        marks = names.pop("fingerprint")
        mark = Fingerprint(**marks) if marks else None
        provenance = Provenance(**names, fingerprint=mark)
        if not isinstance(layers_name, str):
            raise ValueError(f"layers_name {layers_name!r}")
        for field in ("base", "base_revision", "target", "target_revision"):
            if not isinstance(name := getattr(provenance, field), str | None):
                raise ValueError(f"{field} {name!r}")
        if not isinstance(decoder_bias, bool):
            raise ValueError(f"decoder_bias {decoder_bias!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{where}: the record of tca_fast does not fit ({error}); remove it to read without"
        ) from None
    return Origin(provenance, layers_name, decoder_bias)


def check_no_decoder_bias(files: Iterable[Path]) -> None:
    """Check that the `b_dec` of files whose record says there is none is zero.

    Raises:
        UserError: one is not.
    """
    for path in files:
        if read_tensor(path, "b_dec").count_nonzero():
            raise UserError(
                f"{path}: b_dec is not zero, but tca_fast's record says decoder_bias false; set it "
                "to true there"
            )

"""From files of one format to files of another, one tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from tca_fast.durable import Replacement
from tca_fast.errors import UserError
from tca_fast.formats import circuit_tracer, native, paper, paper_export, saelens, sparsify
from tca_fast.formats.adapter_set import AdapterSet, Export
from tca_fast.formats.shards import INDEX_NAME
from tca_fast.formats.tensor_files import Entry, write_tensors

_MODEL_CONFIG = "config.json"
# What decides which format a directory holds and how many layers.
_READ_FROM_A_DIRECTORY = (
    *(native.CONFIG_NAME, _MODEL_CONFIG, INDEX_NAME, circuit_tracer.CONFIG_NAME),
    *("*.safetensors", f"*/{saelens.WEIGHTS_NAME}", f"*/{sparsify.WEIGHTS_NAME}"),
)
# Notes on the fields of `AdapterSet.unknown`.
_UNKNOWN = {
    "base": "the base is not named in the files: name it with --base",
    "target": "the target is not named in the files: name it with --target",
    "backbone": "which model was the backbone is not in the files: it is taken to be the target; "
    "if it was the base, give --backbone base",
}


class Format(NamedTuple):
    """A format that adapters are stored in.

    Attributes:
        recognises: whether a directory holds it.
        read: opens such a directory; None where it is only written.
        export: what to write for a set of adapters.
    """

    recognises: Callable[[Path], bool]
    read: Callable[[Path], AdapterSet] | None
    export: Callable[[AdapterSet], Export]


FORMATS = {
    "tca_fast": Format(native.recognises, native.read, native.export),
    "paper": Format(paper.recognises, paper.read, paper_export.export),
    "circuit-tracer": Format(circuit_tracer.recognises, circuit_tracer.read, circuit_tracer.export),
    "saelens": Format(saelens.recognises, None, saelens.export),
    "sparsify": Format(sparsify.recognises, sparsify.read, sparsify.export),
}


class Conversion(NamedTuple):
    """A conversion that is ready to run.

    Attributes:
        source, destination: names in `FORMATS`.
        adapters: what is read.
        export: what is written.
    """

    source: str
    destination: str
    adapters: AdapterSet
    export: Export


def prepare(
    directory: Path,
    destination: str,
    *,
    base: str | None = None,
    target: str | None = None,
    backbone: str | None = None,
) -> Conversion:
    """Recognise and check the files of a directory, and place their tensors in another format.

    Args:
        directory: adapters in any format that is read.
        destination: a name in `FORMATS`.
        base, target: names of the two models; None is what the files say.
        backbone: which of the two the adapters stand in; None is what the files say.

    Raises:
        UserError: the directory holds no known format, or the other cannot hold these adapters.
    """
    if destination not in FORMATS:
        raise UserError(f"--to: {destination!r} is unknown; formats are {', '.join(FORMATS)}")
    if backbone not in (None, "base", "target"):
        raise UserError(f"--backbone: {backbone!r} is neither base nor target; give one of them")
    source = _recognise(directory)
    read = FORMATS[source].read
    if read is None:
        raise UserError(
            f"{directory}: {source} files are written and not read; give what they were made of"
        )
    adapters = read(directory)
    provenance = adapters.info.provenance
    if base is not None:
        provenance = replace(provenance, base=base, base_revision=None)
    if target is not None:
        provenance = replace(provenance, target=target, target_revision=None)
    if backbone is not None:
        provenance = replace(provenance, backbone=backbone)
    given = {"base": base, "target": target, "backbone": backbone}
    open_questions = [_UNKNOWN[field] for field in adapters.unknown if given[field] is None]
    adapters = replace(
        adapters,
        info=replace(adapters.info, provenance=provenance),
        notes=(*adapters.notes, *open_questions),
    )
    return Conversion(source, destination, adapters, FORMATS[destination].export(adapters))


def convert(conversion: Conversion, directory: Path) -> None:
    """Write the files beside those that are there, read them back, and only then put them in place.

    At most one tensor is in memory at a time.

    Raises:
        UserError: as `check_destination`, or the files cannot be written or read back otherwise
            than written. Earlier files are then unchanged.
    """
    check_destination(conversion, directory)
    export, files = conversion.export, _files(conversion)
    with ExitStack() as stack:
        folders: dict[str, Replacement] = {}

        def folder(name: str) -> Replacement:
            if name not in folders:
                folders[name] = stack.enter_context(Replacement(directory / name))
            return folders[name]

        folder(".")
        for name, entries in files.items():
            path = Path(name)
            folder(str(path.parent)).write(path.name, _tensor_writer(entries))
        for name, contents in export.texts.items():
            path = Path(name)
            folder(str(path.parent)).write(path.name, _bytes_writer(contents))
        for files_of_folder in folders.values():
            files_of_folder.commit()


def check_destination(conversion: Conversion, directory: Path) -> None:
    """Check that a directory can be written, loses no model, and then holds one set of adapters.

    Raises:
        UserError: it is the one that is read, a file, not to be written, or it holds a whole model
            or files of adapters that would stay beside the new ones.
    """
    if directory.resolve() == conversion.adapters.directory.resolve():
        raise UserError(f"{directory}: is what is being read; give another directory to write to")
    if (directory / _MODEL_CONFIG).exists() and not paper.recognises(directory):
        raise UserError(
            f"{directory}: holds a whole model ({_MODEL_CONFIG}), which is not written over; "
            "give another directory"
        )
    there = next(path for path in (directory, *directory.parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{there}: is a file; give a directory to write to")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{there}: cannot be written; choose a directory that you may write")
    written = {directory / name for name in (*_files(conversion), *conversion.export.texts)}
    held = {path for pattern in _READ_FROM_A_DIRECTORY for path in directory.glob(pattern)}
    if left := sorted(held - written):
        raise UserError(
            f"{directory}: {left[0].relative_to(directory)} of earlier files would stay and be "
            "read with the new ones; remove it or give an empty directory"
        )


def _recognise(directory: Path) -> str:
    if directory.is_file():
        raise UserError(f"{directory}: is a file; give its directory")
    if not directory.is_dir():
        raise UserError(
            f"{directory}: no such directory; give one with adapters (hf download gets one)"
        )
    of_run = directory / "adapter"
    if native.recognises(of_run) and not native.recognises(directory):
        raise UserError(f"{directory}: is that of a run; give its adapter, {of_run}")
    for name, known in FORMATS.items():
        if known.recognises(directory):
            return name
    found = ", ".join(sorted(child.name for child in directory.iterdir())[:8]) or "nothing"
    raise UserError(
        f"{directory}: holds no format that is read ({', '.join(readable())}); found {found}"
    )


def readable() -> list[str]:
    """Names of the formats that can be read."""
    return [name for name, known in FORMATS.items() if known.read is not None]


def _files(conversion: Conversion) -> dict[str, list[Entry]]:
    adapters, export = conversion.adapters, conversion.export
    files = {name: list(entries) for name, entries in export.others.items()}
    for layer in range(adapters.info.num_layers):
        for placement in export.placements(layer):
            files.setdefault(placement.file, []).append(adapters.entry(layer, placement))
    return files


def _tensor_writer(entries: list[Entry]) -> Callable[[Path], None]:
    return lambda path: write_tensors(path, entries)


def _bytes_writer(contents: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(contents)
        if path.read_bytes() != contents:
            raise UserError(f"{path}: reads back otherwise than written; check the disk")

    return write

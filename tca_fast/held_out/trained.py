"""What there is to measure: a run with its adapters and text, or adapters by themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tca_fast import adapter_config
from tca_fast.adapter_config import WEIGHTS_NAME, read_adapter_config
from tca_fast.bridging.pair import ACCEPTABLE
from tca_fast.config import TrainConfig, load_config, parse_config
from tca_fast.errors import UserError
from tca_fast.held_out.text import HeldOutText
from tca_fast.training.checkpoints import checkpoints
from tca_fast.training.manifest import file_record
from tca_fast.training.origin import ORIGIN_NAME
from tca_fast.training.run import CONFIG_NAME
from tca_fast.training.state import ADAPTER_NAME

# The rest of a configuration says how adapters are trained, and these are.
_OVERRIDES = ("pair.", "data.", "run.device=")


@dataclass(frozen=True)
class Trained:
    """Trained adapters, and what their run says of models and text.

    Attributes:
        adapter: directory of the adapters.
        config: of the run, with what was asked for otherwise; `data.validation` is the text.
        digests: of the run's data files by split, as far as they are known.
        notes: what was assumed.
    """

    adapter: Path
    config: TrainConfig
    digests: Mapping[str, str]
    notes: Sequence[str] = ()

    def describe(self) -> dict[str, Any]:
        """Which adapters these are and which models they belong beside, as plain data."""
        info = read_adapter_config(self.adapter)
        return {
            "directory": str(self.adapter),
            "weights_sha256": file_record(self.adapter / WEIGHTS_NAME)["sha256"],
            **asdict(info.provenance),
            **info.adapter.model_dump(mode="json"),
            "num_layers": info.num_layers,
            "hidden_size": info.hidden_size,
            "dtype": info.dtype,
        }


def find_trained(
    directory: Path, data: str | None = None, overrides: Sequence[str] = ()
) -> Trained:
    """Find adapters, their models and the text to measure them on.

    Args:
        directory: output directory of a run, the `adapter` of a run or of one of its checkpoints,
            or any directory that `save_pretrained` wrote.
        data: the text instead of the run's validation file; adapters without a run need it.
        overrides: `pair.…`, `data.…` and `run.device` for those of the run.

    Raises:
        UserError: no run or adapters there, a run that has none yet, no text, or an override that
            would change nothing.
    """
    for override in overrides:
        if not override.startswith(_OVERRIDES):
            raise UserError(
                f"override: {override!r} changes nothing about trained adapters; pair.…, data.… "
                "and run.device can be given"
            )
    if data is not None:
        overrides = [*overrides, f"data.validation={json.dumps(data)}"]
    adapter, run = _places(directory)
    trained = _alone(adapter, overrides) if run is None else _of_run(adapter, run, overrides)
    if trained.config.data.validation is None:
        what = f"the run in {run} had none" if run else f"{adapter} has no run that would name it"
        raise UserError(
            f"data.validation: {what}; name conversations it was not trained on with --data"
        )
    return trained


def doubts(trained: Trained, text: HeldOutText) -> list[str]:
    """What has to be known before the figures of this text are believed."""
    found, digest, path = list(trained.notes), text.corpus.digest, text.corpus.path
    before = trained.digests.get("validation", digest)
    if digest == trained.digests.get("train"):
        found.append(
            f"{path} is what the run was trained on: these figures are not of held-out text"
        )
    if digest != before:
        found.append(
            f"{path} has changed since the run, which had another file there (SHA-256 beginning "
            f"{before}, now {digest}): figures of the run's log are of that one"
        )
    return found


def _places(directory: Path) -> tuple[Path, Path | None]:
    """Where the adapters are, and the run they belong to.

    Raises:
        UserError: no adapters are there.
    """
    if not directory.exists():
        raise UserError(
            f"run: {directory} does not exist; give the run.output_dir of a training run"
        )
    if (directory / adapter_config.CONFIG_NAME).is_file():
        inside = directory.resolve().parent
        # That of a checkpoint lies two levels deeper.
        run = inside.parents[1] if inside.parent.name == "checkpoints" else inside
        return directory, run if _is_run(run) else None
    adapter = directory / ADAPTER_NAME
    if (adapter / adapter_config.CONFIG_NAME).is_file():
        return adapter, directory if _is_run(directory) else _places(adapter)[1]
    if not _is_run(directory):
        raise UserError(
            f"run: {directory} holds neither a run ({CONFIG_NAME}, {ORIGIN_NAME}) nor adapters "
            f"({adapter_config.CONFIG_NAME}); give the run.output_dir of a training run"
        )
    saved = checkpoints(directory)
    newest = (
        f"its newest checkpoint can be given instead, {saved[-1] / ADAPTER_NAME}"
        if saved
        else "there is no checkpoint either, so nothing can be measured yet"
    )
    raise UserError(
        f"run: {directory} has no {ADAPTER_NAME}/, it still trains or was stopped before its end; "
        f"{newest}"
    )


def _is_run(directory: Path) -> bool:
    return all((directory / name).is_file() for name in (CONFIG_NAME, ORIGIN_NAME))


def _of_run(adapter: Path, run: Path, overrides: Sequence[str]) -> Trained:
    config = load_config(run / CONFIG_NAME, overrides)
    path = run / ORIGIN_NAME
    try:
        data = json.loads(path.read_text(encoding="utf-8"))["data"]
        digests = {split: str(file["sha256"]) for split, file in data.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"run: {path} cannot be read ({type(error).__name__}); copy it again"
        ) from None
    if config.data.validation != load_config(run / CONFIG_NAME).data.validation:
        digests.pop("validation", None)
    return Trained(adapter, config, digests)


def _alone(adapter: Path, overrides: Sequence[str]) -> Trained:
    """Adapters without their run: what they say themselves, and the defaults of everything else."""
    info = read_adapter_config(adapter)
    origin = info.provenance
    given = {override.partition("=")[0] for override in overrides}
    for role, name in (("base", origin.base), ("target", origin.target)):
        if name is None and f"pair.{role}" not in given:
            raise UserError(
                f"pair.{role}: {adapter} does not say which model it was; add pair.{role}=…"
            )
    tree = {
        "pair": {
            "base": origin.base,
            "base_revision": origin.base_revision,
            "target": origin.target,
            "target_revision": origin.target_revision,
            "backbone": origin.backbone,
            # Those who trained them have accepted what differs.
            "accept_differences": list(ACCEPTABLE) if origin.backbone == "target" else [],
        },
        "adapter": info.adapter.model_dump(),
        "data": {"train": "unknown"},
        "run": {"output_dir": str(adapter)},
    }
    config = parse_config(tree, overrides, f"adapter {adapter}")
    notes = []
    if "data.format" not in given:
        notes.append(
            f"{adapter} has no run that says how conversations were written: the format "
            f"{config.data.format!r} is assumed, data.format=… gives another"
        )
    return Trained(adapter, config, {}, notes)

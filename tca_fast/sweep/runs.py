"""The runs of a sweep: trained, measured on held-out text, and each of them resumable."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tca_fast.config import TrainConfig
from tca_fast.durable import replace_files
from tca_fast.errors import UserError
from tca_fast.evaluation.faithfulness import Faithfulness
from tca_fast.held_out.measure import measure_adapter
from tca_fast.training.checkpoints import checkpoints
from tca_fast.training.data import open_corpus
from tca_fast.training.origin import ORIGIN_NAME
from tca_fast.training.run import train

POINT_NAME = "point.json"


@dataclass(frozen=True)
class Point:
    """What one L1 weight came to.

    Attributes:
        l1_weight: of the run.
        steps: optimizer steps trained.
        l0: mean active features per held-out token and layer.
        kl: KL(target || adapter model) per counted token, nats.
        nmse: mean over the residual states.
        num_counted: tokens behind `kl`.
    """

    l1_weight: float
    steps: int
    l0: float
    kl: float
    nmse: float
    num_counted: int


class Interrupted(Exception):
    """A run of the sweep was stopped by a signal, after its checkpoint was saved."""


def run_sweep(
    configs: Sequence[TrainConfig], *, num_samples: int, told: Callable[[TrainConfig, str], None]
) -> list[Point]:
    """Train and measure every configuration; what is done already is not done again.

    Args:
        configs: runs that differ in `objective.l1_weight` and `run.output_dir`.
        num_samples: held-out sequences of each measurement.
        told: called with a run and what happens to it ("trained before", "resumed", "trained").

    Returns:
        One point for each, in order of the weights.

    Raises:
        Interrupted: by Ctrl-C or SIGTERM; the same call goes on from there.
        UserError: no validation file, a directory that holds another run, and what `train` raises.
    """
    if any(config.data.validation is None for config in configs):
        raise UserError("data.validation: missing; a sweep is measured on held-out text, name it")
    points = []
    data = _digests(configs[0])
    for config in sorted(configs, key=lambda config: config.objective.l1_weight):
        identity = {"config": config.model_dump(mode="json"), "num_samples": num_samples, **data}
        point = _stored(config, identity)
        if point is None:
            told(config, _train(config, data))
            point = measure(config, num_samples)
            _store(config, identity, point)
        else:
            told(config, "measured before")
        points.append(point)
    return points


def _digests(config: TrainConfig) -> dict[str, str]:
    """Of the data files by split: a file may change under its name."""
    sources = {"train": config.data.train, "validation": config.data.validation}
    return {
        split: open_corpus(source, f"data.{split}", config.data.bad_lines).digest
        for split, source in sources.items()
        if source is not None
    }


def _train(config: TrainConfig, data: dict[str, str]) -> str:
    """Train, go on, or find it done; returns which."""
    output_dir = Path(config.run.output_dir)
    if (output_dir / "adapter").exists():
        _check_same(config, data)
        return "trained before"
    did = "trained"
    if checkpoints(output_dir):
        _check_same(config, data)
        did = "resumed"
        run = config.run.model_copy(update={"resume_from_checkpoint": "latest"})
        config = config.model_copy(update={"run": run})
    if train(config).interrupted:
        raise Interrupted
    return did


def _check_same(config: TrainConfig, data: dict[str, str]) -> None:
    """What lies there must be of this configuration and these files.

    Raises:
        UserError: they are not.
    """
    from tca_fast.config import load_config

    path = Path(config.run.output_dir) / "config.yaml"
    found = load_config(path)
    resume = {"resume_from_checkpoint": config.run.resume_from_checkpoint}
    found = found.model_copy(update={"run": found.run.model_copy(update=resume)})
    origin = json.loads((path.parent / ORIGIN_NAME).read_text(encoding="utf-8"))
    of_files = {split: file["sha256"] for split, file in origin["data"].items()}
    if found != config or of_files != data:
        raise UserError(
            f"--out: {path.parent} holds a run with other settings or data; give another "
            "directory, or what that run had"
        )


def measure(config: TrainConfig, num_samples: int) -> Point:
    """Faithfulness of a trained run on its validation file.

    Raises:
        UserError: adapters or data that cannot be read.
    """
    adapter = Path(config.run.output_dir) / "adapter"
    return _point(config, measure_adapter(config, adapter, num_samples))


def _point(config: TrainConfig, found: Faithfulness) -> Point:
    path = Path(config.run.output_dir) / "log.jsonl"
    last = path.read_text(encoding="utf-8").splitlines()[-1]
    assert found.mean_l0 is not None, "adapters were enabled"
    return Point(
        config.objective.l1_weight,
        int(json.loads(last)["step"]),
        found.mean_l0,
        found.kl,
        found.mean_nmse,
        found.num_counted,
    )


def _stored(config: TrainConfig, identity: dict[str, Any]) -> Point | None:
    """The point of this very configuration and data, if it was measured."""
    path = Path(config.run.output_dir) / POINT_NAME
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["of"] == identity:
            return Point(**stored["point"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None


def _store(config: TrainConfig, identity: dict[str, Any], point: Point) -> None:
    content = {"point": asdict(point), "of": identity}
    text = json.dumps(content, indent=1) + "\n"
    replace_files(config.run.output_dir, {POINT_NAME: text.encode()})


def rising(points: Sequence[Point]) -> list[tuple[Point, Point]]:
    """Neighbours in the weight of which the larger weight has no lower L0."""
    ordered = sorted(points, key=lambda point: point.l1_weight)
    pairs = zip(ordered, ordered[1:], strict=False)
    return [(low, high) for low, high in pairs if not high.l0 < low.l0]

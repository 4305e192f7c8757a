"""Where the figures of a run go: a JSONL file always, a progress bar, other loggers when asked.

Every line of `log.jsonl` is an object with `step` (optimizer steps done), `split` ("train" or
"validation") and figures of the global batch of that step, or of the validation sequences.
A step's line is written when the next step has been queued, see `metrics`; `time/…` are the shares
of the phases since the line before it.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from tca_fast.config import TrainConfig
from tca_fast.durable import Replacement
from tca_fast.errors import UserError

LOG_NAME = "log.jsonl"
PROJECT = "tca_fast"
_SHOWN = ("loss", "kl", "nmse", "l0", "dead", "GiB", "data %", "backward %")


class Reporter(Protocol):
    """A logger outside this package."""

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Record figures, named `split/figure`, of one optimizer step."""

    def close(self) -> None:
        """Flush."""


class JsonLog:
    """`log.jsonl`, one flushed line per record; a resumed run continues it.

    Lines of steps after `resume_step`, which are about to be trained again, and a half-written
    last line are dropped first.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        kept = _lines_until(path, resume_step) if resume_step else []
        text = "".join(kept)
        with Replacement(path.parent) as files:
            files.write(path.name, lambda new: _write(new, text))
            files.commit()
        self._path = path
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Append one record.

        Raises:
            UserError: the disk is full.
        """
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"run.output_dir: {self._path} cannot be written ({error.strerror}); make room, "
                "then resume with run.resume_from_checkpoint=latest"
            ) from None

    def close(self) -> None:
        """Close the file."""
        try:
            self._file.close()
        except OSError:
            # A line that did not fit was reported when it was written.
            return


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _lines_until(path: Path, last_step: int) -> list[str]:
    """Whole lines of steps up to `last_step`."""
    if not path.exists():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if line.endswith("\n") and record.get("step", 0) <= last_step:
            kept.append(line)
    return kept


class RunLog:
    """All logs of one rank; only rank 0 writes anything."""

    def __init__(
        self,
        config: TrainConfig,
        output_dir: Path,
        *,
        run_id: str,
        resume_step: int,
        total_steps: int,
        is_main: bool = True,
        show_progress: bool = True,
    ) -> None:
        self._json = JsonLog(output_dir / LOG_NAME, resume_step) if is_main else None
        self._reporters: list[Reporter] = []
        self._bar: Any = None
        if is_main:
            for name in config.run.report_to:
                self._reporters.append(_REPORTERS[name](config, output_dir, run_id, resume_step))
            if show_progress:
                self._bar = _progress_bar(resume_step, total_steps)

    def log(self, split: str, step: int, figures: dict[str, Any]) -> None:
        """Record the figures of one step on every log."""
        if self._json is None:
            return
        self._json.write({"step": step, "split": split, **figures})
        named = {f"{split}/{name}": float(value) for name, value in figures.items()}
        for reporter in self._reporters:
            reporter.log(step, named)

    def progress(self, figures: dict[str, float], tokens_per_second: float) -> None:
        """Move the progress bar by one step."""
        if self._bar is not None:
            shown = {name: f"{figures[name]:.3g}" for name in _SHOWN if name in figures}
            self._bar.set_postfix({**shown, "tok/s": f"{tokens_per_second:.0f}"}, refresh=False)
            self._bar.update()

    def note(self, text: str) -> None:
        """Say something on stderr without breaking the progress bar."""
        if self._json is not None:
            print_line(text)

    def close(self) -> None:
        """Flush and close everything."""
        if self._bar is not None:
            self._bar.close()
        for reporter in self._reporters:
            reporter.close()
        if self._json is not None:
            self._json.close()


def check_loggers(names: Sequence[str]) -> None:
    """Import the packages of `run.report_to`, before anything that takes long.

    Raises:
        UserError: one is missing.
    """
    for name in names:
        _package(name)


def print_line(text: str) -> None:
    """Print on stderr from any rank and thread, without breaking a progress bar."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)


def _progress_bar(done: int, total: int) -> Any:
    from tqdm import tqdm

    # A log file gets a line now and then, a terminal a smooth bar.
    interval = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(
        total=total, initial=done, desc="train", unit="step", mininterval=interval, file=sys.stderr
    )


_MODULES = {
    "tensorboard": "torch.utils.tensorboard",
    "wandb": "wandb",
    "trackio": "trackio",
}


def _package(name: str) -> Any:
    """The module of a logger, or the complaint that its package is missing."""
    try:
        return importlib.import_module(_MODULES[name])
    except ImportError:
        raise UserError(
            f"run.report_to: {name!r} needs the package {name}; pip install {name}, or leave it "
            "out (log.jsonl is written in any case)"
        ) from None


class _TensorBoard:
    def __init__(
        self, config: TrainConfig, output_dir: Path, run_id: str, resume_step: int
    ) -> None:
        writer = _package("tensorboard").SummaryWriter
        purge = resume_step + 1 if resume_step else None
        self._writer: Any = writer(str(output_dir / "tensorboard"), purge_step=purge)

    def log(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _TrackedRun:
    """A run of wandb, or of trackio, which has the same interface."""

    def __init__(self, package: Any, config: TrainConfig, **options: Any) -> None:
        settings = config.model_dump(mode="json")
        self._run: Any = package.init(project=PROJECT, config=settings, resume="allow", **options)

    def log(self, step: int, figures: dict[str, float]) -> None:
        self._run.log(figures, step=step)

    def close(self) -> None:
        self._run.finish()


def _wandb(config: TrainConfig, output_dir: Path, run_id: str, resume_step: int) -> Reporter:
    package, name = _package("wandb"), config.run.run_name
    return _TrackedRun(package, config, id=run_id, name=name, dir=str(output_dir))


def _trackio(config: TrainConfig, output_dir: Path, run_id: str, resume_step: int) -> Reporter:
    # A run is continued by its name here; there is no id.
    package, name = _package("trackio"), config.run.run_name or run_id
    return _TrackedRun(package, config, name=name)


_REPORTERS: dict[str, Callable[[TrainConfig, Path, str, int], Reporter]] = {
    "tensorboard": _TensorBoard,
    "wandb": _wandb,
    "trackio": _trackio,
}

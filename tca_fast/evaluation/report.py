"""The figures of one training run, and the files that show them.

`report.html` is one self-contained page, `results.json` every figure behind it, `figure.png` and
`figure.svg` one picture for a README.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from tca_fast.durable import replace_files
from tca_fast.evaluation.faithfulness import Faithfulness
from tca_fast.evaluation.reasoning import Reasoning

ModelName = Literal["base", "hybrid", "adapter", "target"]
MODEL_NAMES: tuple[ModelName, ...] = ("base", "hybrid", "adapter", "target")
NUM_RESAMPLES = 2000
_COMPARED: tuple[ModelName, ...] = ("base", "adapter", "target")


@dataclass(frozen=True, slots=True)
class ModelResult:
    """Everything measured on one model."""

    name: ModelName
    faithfulness: Faithfulness
    reasoning: Reasoning


@dataclass(frozen=True, slots=True)
class RunReport:
    """What the page shows.

    Attributes:
        title: heading of the page.
        models: base, hybrid (target with the base's MLPs), adapter and target, in this order, all
            measured on the same data and problems.
        num_features: F, features per layer.
        prompts, answers: of the problems, as text, in the order of the responses.
        samples: indices of the problems shown with all four responses.
        samples_note: how they were chosen.
        history: the run's log, one mapping per record with `step`, `split` ("train" or
            "validation") and, where known, `kl`, `nmse` and `l0`.
        config: the run's configuration, as plain data.
        environment: versions, machine and backend, shown as they are.
        seconds: time taken by each stage.
    """

    title: str
    models: tuple[ModelResult, ...]
    num_features: int
    prompts: Sequence[str]
    answers: Sequence[str]
    samples: Sequence[int] = ()
    samples_note: str = ""
    history: Sequence[Mapping[str, Any]] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    def model(self, name: ModelName) -> ModelResult:
        """The result of one of the four models."""
        return next(model for model in self.models if model.name == name)

    @property
    def faithfulness(self) -> dict[ModelName, Faithfulness]:
        """The faithfulness of every model by its name."""
        return {model.name: model.faithfulness for model in self.models}

    @property
    def active_share(self) -> float | None:
        """Active features per token over F, mean over the adapter model's layers."""
        mean_l0 = self.model("adapter").faithfulness.mean_l0
        return None if mean_l0 is None else mean_l0 / self.num_features

    @property
    def length_ratio(self) -> float:
        """Mean response length of the adapter model over the target's."""
        target = self.model("target").reasoning.mean_length
        return self.model("adapter").reasoning.mean_length / target if target else math.nan

    @property
    def accuracy_recovered(self) -> float:
        """(adapter - base) / (target - base); NaN where the target is no better than the base."""
        return _recovered(*(self.model(name).reasoning.accuracy for name in _COMPARED))

    def accuracy_recovered_se(self) -> float:
        """Standard error of `accuracy_recovered`: paired bootstrap over the problems.

        The three models answer the same problems, so problems are resampled, not answers.
        """
        correct = torch.tensor(
            [
                [response.correct for response in self.model(name).reasoning.responses]
                for name in _COMPARED
            ],
            dtype=torch.float64,
        )
        count = correct.shape[1]
        generator = torch.Generator().manual_seed(0)
        draws = torch.randint(count, (NUM_RESAMPLES, count), generator=generator)
        accuracies = correct[:, draws].mean(-1)
        recovered = [_recovered(*column) for column in accuracies.T.tolist()]
        finite = torch.tensor([value for value in recovered if math.isfinite(value)])
        return finite.std().item() if len(finite) > 1 else math.nan


def results(report: RunReport) -> dict[str, Any]:
    """Every figure of the report as plain data, NaN as None; what `results.json` holds."""
    return plain(
        {
            "title": report.title,
            "accuracy_recovered": report.accuracy_recovered,
            "accuracy_recovered_se": report.accuracy_recovered_se(),
            "active_share": report.active_share,
            "length_ratio": report.length_ratio,
            "num_features": report.num_features,
            "num_problems": len(report.prompts),
            "models": {model.name: _model_figures(model) for model in report.models},
            "seconds": dict(report.seconds),
            "environment": dict(report.environment),
            "config": dict(report.config),
            "history": [dict(row) for row in report.history],
        }
    )


def write_report(report: RunReport, directory: str | Path) -> dict[str, Path]:
    """Write `report.html`, `results.json`, `figure.png` and `figure.svg`, and read them back.

    The files replace older ones together, once all are whole; a full disk leaves those as they
    were.

    Returns:
        The paths by file name.

    Raises:
        UserError: the directory cannot be made or written, or a file reads back different.
    """
    from tca_fast.evaluation.figures import figure_files
    from tca_fast.evaluation.page import render_page

    contents = {
        "results.json": (json.dumps(results(report), indent=2) + "\n").encode(),
        **figure_files(report),
        "report.html": render_page(report).encode(),
    }
    return replace_files(directory, contents)


def faithfulness_figures(faithfulness: Faithfulness) -> dict[str, Any]:
    """What was measured of one model, by the names that JSON files have."""
    return {
        "kl": faithfulness.kl,
        "lm_loss": faithfulness.lm_loss,
        "agreement": faithfulness.agreement,
        "nmse": faithfulness.mean_nmse,
        "nmse_per_state": faithfulness.nmse,
        "l0": faithfulness.mean_l0,
        "l0_per_layer": faithfulness.l0,
        "num_counted_tokens": faithfulness.num_counted,
        "num_real_tokens": faithfulness.num_real,
    }


def _model_figures(model: ModelResult) -> dict[str, Any]:
    reasoning = model.reasoning
    return {
        **faithfulness_figures(model.faithfulness),
        "accuracy": reasoning.accuracy,
        "accuracy_se": reasoning.accuracy_se,
        "mean_length": reasoning.mean_length,
        "mean_length_se": reasoning.mean_length_se,
        "waits_per_response": reasoning.waits_per_response,
        "truncated_share": reasoning.truncated_share,
    }


def _recovered(base: float, adapter: float, target: float) -> float:
    return (adapter - base) / (target - base) if target > base else math.nan


def plain(value: Any) -> Any:
    """Lists and dictionaries for JSON, which has no NaN or infinity: they become None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

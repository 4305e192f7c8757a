"""How faithful the models of one run are, as `faithfulness.json` and a page that loads nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import yaml

from tca_fast.durable import replace_files
from tca_fast.evaluation.faithfulness import Faithfulness
from tca_fast.evaluation.figures import draw_l0, draw_nmse
from tca_fast.evaluation.page import l0_cell, model_table, nmse_table, percent
from tca_fast.evaluation.report import ModelName, faithfulness_figures, plain
from tca_fast.pages.charts import svg
from tca_fast.pages.document import document, folded

FIGURES_NAME = "faithfulness.json"
PAGE_NAME = "faithfulness.html"

_CSS = "@media (min-width: 861px) { .charts { grid-template-columns: repeat(2, 1fr); } }"


@dataclass(frozen=True, slots=True)
class FaithfulnessReport:
    """What the file and the page show.

    Attributes:
        title: heading of the page.
        faithfulness: of each model by its name, all on the same text and against the same target;
            at least "adapter", and the hybrid only where it is no other model by another name.
        num_features: F, features per layer.
        data: which text it was, as plain data with `file`, `sequences` and `truncated`.
        adapter: which adapters, beside which models, as plain data.
        settings: how it was measured, as plain data.
        environment: versions, machine and backend.
        notes: what a reader has to know before believing a figure.
    """

    title: str
    faithfulness: Mapping[ModelName, Faithfulness]
    num_features: int
    data: Mapping[str, Any]
    adapter: Mapping[str, Any]
    settings: Mapping[str, Any]
    environment: Mapping[str, str]
    notes: Sequence[str] = ()


def figures(report: FaithfulnessReport) -> dict[str, Any]:
    """Everything in the report as plain data, NaN as None; what `faithfulness.json` holds."""
    return plain(
        {
            "models": {
                name: faithfulness_figures(found) for name, found in report.faithfulness.items()
            },
            "num_features": report.num_features,
            "notes": list(report.notes),
            "data": report.data,
            "adapter": report.adapter,
            "settings": report.settings,
            "environment": report.environment,
        }
    )


def write_faithfulness(report: FaithfulnessReport, directory: str | Path) -> dict[str, Path]:
    """Write `faithfulness.json` and `faithfulness.html`, which replace older ones together.

    Returns:
        The paths by file name.

    Raises:
        UserError: the directory cannot be made or written, or a file reads back different.
    """
    text = json.dumps(figures(report), indent=2, allow_nan=False) + "\n"
    contents = {FIGURES_NAME: text.encode(), PAGE_NAME: render(report).encode()}
    return replace_files(directory, contents)


def render(report: FaithfulnessReport) -> str:
    """The whole page as text."""
    adapter = report.faithfulness["adapter"]
    notes = "".join(f'<p class="note"><b>{escape(note)}</b></p>' for note in report.notes)
    charts = {
        "nmse": svg(lambda axes: draw_nmse(axes, report.faithfulness), salt="nmse"),
        "l0": svg(lambda axes: draw_l0(axes, adapter.l0 or (), report.num_features), salt="l0"),
    }
    panels = "".join(f'<figure class="panel">{chart}</figure>' for chart in charts.values())
    body = f"""<p class="lead">{_summary(report)}</p>{notes}
<h2>The same text, read by each model</h2>
{_table(report)}
<p class="note">KL(target ‖ model) and LM loss are means over the counted tokens, agreement is the
share of them for which both models find the same next token likeliest. NMSE is the mean over all
residual states. L0 is active features per token and layer, with its share of all features. The
target is compared with itself, as a check.</p>
<h2>By depth</h2>
<div class="charts">{panels}</div>
<h2>Residual stream error, state by state</h2>
{nmse_table(report.faithfulness)}
<h2>How it was measured</h2>
{_details(report)}"""
    return document(report.title, body, _CSS)


def _summary(report: FaithfulnessReport) -> str:
    adapter = report.faithfulness["adapter"]
    return (
        f"With the adapters, the base’s MLPs leave {adapter.kl:.4f} nats per token of KL to the "
        f"target, and {percent(adapter.agreement)} of the next tokens are the target’s: "
        f"{adapter.num_counted:,} tokens of {report.data['sequences']:,} sequences of "
        f"<code>{escape(str(report.data['file']))}</code>."
    )


def _table(report: FaithfulnessReport) -> str:
    heads = (
        "Model",
        "KL to target<br>nats/token",
        "LM loss<br>nats/token",
        "NMSE,<br>mean",
        "Same next<br>token",
        "L0<br>per layer",
        "Tokens<br>counted",
    )
    return model_table(
        heads,
        (
            (
                name,
                (
                    f"{found.kl:.4f}",
                    f"{found.lm_loss:.4f}",
                    f"{found.mean_nmse:.4f}",
                    percent(found.agreement),
                    l0_cell(found.mean_l0, report.num_features),
                    f"{found.num_counted:,}",
                ),
            )
            for name, found in report.faithfulness.items()
        ),
    )


def _details(report: FaithfulnessReport) -> str:
    blocks = (
        ("Text", report.data, True),
        ("Adapters and models", report.adapter, True),
        ("Settings", report.settings, False),
        ("Machine, versions, backends", report.environment, False),
    )
    return folded(
        (title, yaml.safe_dump(plain(content), sort_keys=False, allow_unicode=True), is_open)
        for title, content, is_open in blocks
    )

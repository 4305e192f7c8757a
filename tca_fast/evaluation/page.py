"""The report as one HTML page that loads nothing from anywhere.

All text that comes from models or files is escaped; the charts are inline SVG.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

import yaml

from tca_fast.evaluation.faithfulness import Faithfulness
from tca_fast.evaluation.figures import chart_svg
from tca_fast.evaluation.report import ModelName, ModelResult, RunReport
from tca_fast.pages.document import cards, document, folded

_DESCRIPTIONS = {
    "base": "the MLP donor, before tuning",
    "hybrid": "target with the base’s MLPs",
    "adapter": "base’s MLPs and sparse adapters",
    "target": "the fine-tuned model",
}

_CSS = """
.problem { padding: 18px 20px 20px; margin-bottom: 16px; }
.problem > p { margin: 0 0 12px; }
.problem code { font-size: 15px; }
.responses { display: grid; grid-template-columns: repeat(4, 1fr); gap: 14px; }
.responses h3 { font-size: 14px; margin: 0 0 6px; display: flex; gap: 8px; align-items: baseline; }
.responses h3 span { font-weight: 400; color: var(--soft); }
.responses pre { background: var(--wash); border-radius: 8px; padding: 10px 12px;
  border-left: 3px solid; max-height: 340px; overflow-y: auto; }
.right { color: #0a7a54; } .wrong { color: #b3382c; }
@media (max-width: 860px) { .responses { grid-template-columns: 1fr 1fr; } }
"""


def render_page(report: RunReport) -> str:
    """The whole page as text."""
    body = f"""<p class="lead">{_summary(report)}</p>
{_cards(report)}
<h2>Four models, same text, same problems</h2>
{_model_table(report)}
<p class="note">{_table_note(report)}</p>
<h2>Charts</h2>
{_charts(report)}
<h2>Residual stream error, state by state</h2>
{nmse_table(report.faithfulness)}
{_samples(report)}
<h2>How it was made</h2>
{_details(report)}"""
    return document(report.title, body, _CSS)


def _summary(report: RunReport) -> str:
    base, adapter, target = (
        report.model(name).reasoning.accuracy for name in ("base", "adapter", "target")
    )
    share = report.active_share
    sparse = "" if share is None else f" with {percent(share, 2)} of features active per token"
    return (
        f"The target solves {percent(target)} of the problems, the base {percent(base)}. "
        f"Sparse adapters beside the base’s frozen MLPs{sparse} solve {percent(adapter)}."
    )


def _cards(report: RunReport) -> str:
    adapter = report.model("adapter")
    mean_l0, share = adapter.faithfulness.mean_l0, report.active_share
    active = "–" if mean_l0 is None else f"{mean_l0:.1f} <small>of {report.num_features:,}</small>"
    return cards(
        (
            (
                f"{percent(report.accuracy_recovered)} "
                f"<small>± {percent(report.accuracy_recovered_se())}</small>",
                "of the accuracy gain recovered",
            ),
            (active, f"features active per token and layer ({percent(share or 0, 2)})"),
            (f"{adapter.faithfulness.kl:.4f}", "KL to the target, nats per token"),
            (f"{report.length_ratio:.2f} ×", "the target’s mean response length"),
        )
    )


def _model_table(report: RunReport) -> str:
    heads = (
        "Model",
        "KL to target<br>nats/token",
        "NMSE,<br>mean",
        "Next token<br>agreement",
        "L0<br>per layer",
        "Task<br>accuracy",
        "Response<br>length, tokens",
        "“wait” per<br>response",
        "Cut at<br>the limit",
    )
    rows = ((model.name, _model_cells(model, report.num_features)) for model in report.models)
    return model_table(heads, rows)


def _model_cells(model: ModelResult, num_features: int) -> Sequence[str]:
    faithfulness, reasoning = model.faithfulness, model.reasoning
    return (
        f"{faithfulness.kl:.4f}",
        f"{faithfulness.mean_nmse:.4f}",
        percent(faithfulness.agreement),
        l0_cell(faithfulness.mean_l0, num_features),
        f"{percent(reasoning.accuracy)} <small>± {percent(reasoning.accuracy_se)}</small>",
        f"{reasoning.mean_length:.1f} <small>± {reasoning.mean_length_se:.1f}</small>",
        f"{reasoning.waits_per_response:.2f}",
        percent(reasoning.truncated_share),
    )


def model_table(heads: Sequence[str], rows: Iterable[tuple[ModelName, Sequence[str]]]) -> str:
    """A table with one row for each model; headings and cells are HTML."""
    head = "".join(f"<th>{text}</th>" for text in heads)
    body = "".join(
        f'<tr class="{name}"><th><i style="background:var(--{name})"></i>{name}'
        f"<small>{_DESCRIPTIONS[name]}</small></th>"
        + "".join(f"<td>{cell}</td>" for cell in cells)
        + "</tr>"
        for name, cells in rows
    )
    return (
        f'<div class="panel scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def l0_cell(mean_l0: float | None, num_features: int) -> str:
    """Active features and their share of all; a dash for a model without adapters."""
    if mean_l0 is None:
        return "–"
    return f"{mean_l0:.1f} <small>{percent(mean_l0 / num_features, 2)}</small>"


def _table_note(report: RunReport) -> str:
    faithfulness = report.model("adapter").faithfulness
    return (
        f"KL(target || model), NMSE and agreement on {faithfulness.num_counted:,} held-out tokens; "
        f"accuracy by greedy generation on {len(report.prompts):,} held-out problems, ± one "
        "standard error. L0 is the mean number of active features per token and layer, with its "
        "share of all features. Accuracy recovered is (adapter − base) / (target − base), its "
        "error from a paired bootstrap over problems."
    )


def _charts(report: RunReport) -> str:
    names = ["accuracy", "nmse"]
    if report.model("adapter").faithfulness.l0:
        names.append("l0")
    names += [
        f"{key}_curve"
        for key in ("kl", "nmse", "l0")
        if any(row.get(key) is not None for row in report.history)
    ]
    figures = "".join(f'<figure class="panel">{chart_svg(name, report)}</figure>' for name in names)
    return f'<div class="charts">{figures}</div>'


def nmse_table(faithfulness: Mapping[ModelName, Faithfulness]) -> str:
    """NMSE of every model but the target at every residual state."""
    num_states = len(next(iter(faithfulness.values())).nmse)
    heads = ("NMSE to target", *(f"h{state}" for state in range(num_states)))
    return model_table(
        heads,
        (
            (name, [f"{value:.4f}" for value in found.nmse])
            for name, found in faithfulness.items()
            if name != "target"
        ),
    )


def _samples(report: RunReport) -> str:
    if not report.samples:
        return ""
    problems = "".join(_sample(report, index) for index in report.samples)
    note = f'<p class="note gap">{escape(report.samples_note)}</p>' if report.samples_note else ""
    return f"<h2>What they write</h2>{note}{problems}"


def _sample(report: RunReport, index: int) -> str:
    columns = []
    for model in report.models:
        response = model.reasoning.responses[index]
        verdict = "right" if response.correct else "wrong"
        cut = ", cut" if response.truncated else ""
        columns.append(
            f'<div><h3>{model.name} <b class="{verdict}">{verdict}{cut}</b> '
            f"<span>{response.num_tokens} tokens</span></h3>"
            f'<pre style="border-color:var(--{model.name})">{escape(response.text) or "∅"}</pre>'
            "</div>"
        )
    return (
        f'<div class="panel problem"><p><code>{escape(report.prompts[index])}</code> → '
        f"<code><b>{escape(report.answers[index])}</b></code></p>"
        f'<div class="responses">{"".join(columns)}</div></div>'
    )


def _details(report: RunReport) -> str:
    environment = "\n".join(f"{key}: {value}" for key, value in report.environment.items())
    seconds = "\n".join(f"{key}: {value:.1f} s" for key, value in report.seconds.items())
    config = yaml.safe_dump(dict(report.config), sort_keys=False, allow_unicode=True)
    return folded(
        (
            ("Time taken", seconds, True),
            ("Machine, versions, backends", environment, True),
            ("Configuration", config if report.config else "", False),
        )
    )


def percent(share: float, digits: int = 1) -> str:
    """A share as text; a dash where it is not finite."""
    return f"{100 * share:.{digits}f} %" if math.isfinite(share) else "–"

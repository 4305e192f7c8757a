"""The report as one HTML page that loads nothing from anywhere.

All text that comes from models or files is escaped; the charts are inline SVG.
"""

from __future__ import annotations

import math
from html import escape

import yaml

from tca_fast.evaluation.figures import chart_svg
from tca_fast.evaluation.report import ModelResult, RunReport

_DESCRIPTIONS = {
    "base": "the MLP donor, before tuning",
    "hybrid": "target with the base’s MLPs",
    "adapter": "hybrid plus sparse adapters",
    "target": "the reasoning-tuned model",
}

_CSS = """
:root { --ink: #1f2430; --soft: #626a7a; --line: #e4e7ec; --paper: #fff; --wash: #f7f8fa;
  --base: #8b93a1; --hybrid: #e0863a; --adapter: #0b8f87; --target: #3b3f8f; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--wash); color: var(--ink); font: 16px/1.55 system-ui,
  -apple-system, "Segoe UI", "Helvetica Neue", "Liberation Sans", Arial, sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 48px 28px 72px; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -.015em; margin: 0 0 10px; }
h2 { font-size: 19px; letter-spacing: -.005em; margin: 52px 0 14px; }
.lead { font-size: 18px; color: #3d4453; max-width: 780px; margin: 0; }
.note { color: var(--soft); font-size: 14px; max-width: 860px; margin: 10px 0 0; }
.gap { margin: -6px 0 16px; }
.cards { display: grid; grid-template-columns: repeat(4, 1fr); gap: 16px; margin-top: 30px; }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 12px;
  padding: 18px 20px; }
.card b { display: block; font-size: 28px; font-weight: 650; letter-spacing: -.02em;
  line-height: 1.2; font-variant-numeric: tabular-nums; }
.card b small { font-size: 15px; font-weight: 500; color: var(--soft); letter-spacing: 0; }
.card span { color: var(--soft); font-size: 14px; }
.panel { background: var(--paper); border: 1px solid var(--line); border-radius: 12px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 11px 12px; font-size: 15px; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
tr:last-child td, tr:last-child th { border-bottom: 0; }
th:first-child { padding-left: 20px; } td:last-child, th:last-child { padding-right: 20px; }
thead th { font-size: 13px; line-height: 1.35; font-weight: 600; color: var(--soft);
  vertical-align: bottom; }
th:first-child { text-align: left; }
tbody th { font-weight: 600; }
tbody th small { display: block; font-weight: 400; color: var(--soft); font-size: 13px; }
tbody th i { display: inline-block; width: 10px; height: 10px; border-radius: 3px;
  margin-right: 8px; }
tr.adapter { background: #f0faf9; }
td small { color: var(--soft); }
.charts { display: grid; grid-template-columns: repeat(3, 1fr); gap: 16px; }
.charts figure { margin: 0; padding: 14px 12px 8px; }
.charts svg { display: block; width: 100%; height: auto; }
.problem { padding: 18px 20px 20px; margin-bottom: 16px; }
.problem > p { margin: 0 0 12px; }
.problem code { font-size: 15px; }
.responses { display: grid; grid-template-columns: repeat(4, 1fr); gap: 14px; }
.responses h3 { font-size: 14px; margin: 0 0 6px; display: flex; gap: 8px; align-items: baseline; }
.responses h3 span { font-weight: 400; color: var(--soft); }
pre, code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { font-size: 12.5px; line-height: 1.5; margin: 0; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.responses pre { background: var(--wash); border-radius: 8px; padding: 10px 12px;
  border-left: 3px solid; max-height: 340px; overflow-y: auto; }
.right { color: #0a7a54; } .wrong { color: #b3382c; }
details { padding: 14px 20px; margin-bottom: 12px; }
summary { cursor: pointer; font-weight: 600; }
details pre { margin-top: 12px; }
@media (max-width: 860px) { .cards, .responses { grid-template-columns: 1fr 1fr; }
  .charts { grid-template-columns: 1fr; } }
"""


def render_page(report: RunReport) -> str:
    """The whole page as text."""
    title = escape(report.title)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{_CSS}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p class="lead">{_summary(report)}</p>
{_cards(report)}
<h2>Four models, same text, same problems</h2>
{_model_table(report)}
<p class="note">{_table_note(report)}</p>
<h2>Charts</h2>
{_charts(report)}
<h2>Residual stream error, state by state</h2>
{_nmse_table(report)}
{_samples(report)}
<h2>How it was made</h2>
{_details(report)}
</main>
</body>
</html>
"""


def _summary(report: RunReport) -> str:
    base, adapter, target = (
        report.model(name).reasoning.accuracy for name in ("base", "adapter", "target")
    )
    share = report.active_share
    sparse = "" if share is None else f" with {_percent(share, 2)} of features active per token"
    return (
        f"The target solves {_percent(target)} of the problems, the base {_percent(base)}. "
        f"Sparse adapters beside the base’s frozen MLPs{sparse} solve {_percent(adapter)}."
    )


def _cards(report: RunReport) -> str:
    adapter = report.model("adapter")
    mean_l0, share = adapter.faithfulness.mean_l0, report.active_share
    active = "–" if mean_l0 is None else f"{mean_l0:.1f} <small>of {report.num_features:,}</small>"
    cards = (
        (
            f"{_percent(report.accuracy_recovered)} "
            f"<small>± {_percent(report.accuracy_recovered_se())}</small>",
            "of the accuracy gain recovered",
        ),
        (active, f"features active per token and layer ({_percent(share or 0, 2)})"),
        (f"{adapter.faithfulness.kl:.4f}", "KL to the target, nats per token"),
        (f"{report.length_ratio:.2f} ×", "the target’s mean response length"),
    )
    return "".join(
        [
            '<div class="cards">',
            *(
                f'<div class="card"><b>{value}</b><span>{what}</span></div>'
                for value, what in cards
            ),
            "</div>",
        ]
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
    rows = "".join(_model_row(model, report.num_features) for model in report.models)
    head = "".join(f"<th>{text}</th>" for text in heads)
    return (
        f'<div class="panel scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _model_row(model: ModelResult, num_features: int) -> str:
    faithfulness, reasoning = model.faithfulness, model.reasoning
    l0 = faithfulness.mean_l0
    share = "" if l0 is None else f" <small>{_percent(l0 / num_features, 2)}</small>"
    cells = (
        f"{faithfulness.kl:.4f}",
        f"{faithfulness.mean_nmse:.4f}",
        _percent(faithfulness.agreement),
        "–" if l0 is None else f"{l0:.1f}{share}",
        f"{_percent(reasoning.accuracy)} <small>± {_percent(reasoning.accuracy_se)}</small>",
        f"{reasoning.mean_length:.1f} <small>± {reasoning.mean_length_se:.1f}</small>",
        f"{reasoning.waits_per_response:.2f}",
        _percent(reasoning.truncated_share),
    )
    return (
        f'<tr class="{model.name}"><th><i style="background:var(--{model.name})"></i>{model.name}'
        f"<small>{_DESCRIPTIONS[model.name]}</small></th>"
        + "".join(f"<td>{cell}</td>" for cell in cells)
        + "</tr>"
    )


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


def _nmse_table(report: RunReport) -> str:
    num_states = len(report.models[0].faithfulness.nmse)
    head = "".join(f"<th>h{state}</th>" for state in range(num_states))
    rows = "".join(
        f'<tr class="{model.name}"><th><i style="background:var(--{model.name})"></i>'
        f"{model.name}</th>"
        + "".join(f"<td>{value:.4f}</td>" for value in model.faithfulness.nmse)
        + "</tr>"
        for model in report.models
        if model.name != "target"
    )
    return (
        f'<div class="panel scroll"><table><thead><tr><th>NMSE to target</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
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
    blocks = (
        ("Time taken", seconds, " open"),
        ("Machine, versions, backends", environment, " open"),
        ("Configuration", config if report.config else "", ""),
    )
    return "".join(
        f'<details class="panel"{state}><summary>{title}</summary>'
        f"<pre>{escape(text)}</pre></details>"
        for title, text, state in blocks
        if text
    )


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %" if math.isfinite(share) else "–"

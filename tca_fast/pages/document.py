"""One HTML page that loads nothing from anywhere. Text from files has to be escaped by callers."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

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
pre, code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { font-size: 12.5px; line-height: 1.5; margin: 0; white-space: pre-wrap;
  overflow-wrap: anywhere; }
details { padding: 14px 20px; margin-bottom: 12px; }
summary { cursor: pointer; font-weight: 600; }
details pre { margin-top: 12px; }
@media (max-width: 860px) { .cards { grid-template-columns: 1fr 1fr; }
  .charts { grid-template-columns: 1fr; } }
"""


def document(title: str, body: str, css: str = "") -> str:
    """A whole page.

    Args:
        title: text; escaped here.
        body: HTML inside `<main>`, below the heading.
        css: rules beyond the shared ones.
    """
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_CSS}{css}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
{body}
</main>
</body>
</html>
"""


def cards(items: Iterable[tuple[str, str]]) -> str:
    """Large figures side by side, each (value, what it is), both HTML."""
    shown = "".join(
        f'<div class="card"><b>{value}</b><span>{what}</span></div>' for value, what in items
    )
    return f'<div class="cards">{shown}</div>'


def folded(blocks: Iterable[tuple[str, str, bool]]) -> str:
    """Texts that open at a click: (title, text, whether it is open); empty ones are left out."""
    return "".join(
        f'<details class="panel"{" open" if is_open else ""}><summary>{escape(title)}</summary>'
        f"<pre>{escape(text)}</pre></details>"
        for title, text, is_open in blocks
        if text
    )

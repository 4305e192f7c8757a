"""A run's log as one HTML page that loads nothing from anywhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tca_fast.durable import Replacement
from tca_fast.pages.charts import COLOURS, integer_ticks, log_scale, smooth, svg
from tca_fast.pages.document import cards, document, folded
from tca_fast.training.history import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAGE_NAME = "training.html"
_PALETTE = ("#0b8f87", "#e0863a", "#3b3f8f", "#b3382c", "#8b93a1", "#7a5ea8", "#5d8a2f", "#2b2f38")
_TERMS = ("kl", "nmse", "bridge", "lm")
# Points of a curve beyond which a page would grow without showing more.
_MOST_POINTS = 1500


def write_training_page(history: History, directory: Path) -> Path:
    """Write `training.html` whole or not at all; returns its path.

    Raises:
        UserError: it cannot be written.
    """
    text = render(history)
    with Replacement(directory) as files:
        files.write(PAGE_NAME, lambda path: _write(path, text))
        files.commit()
    return directory / PAGE_NAME


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def render(history: History) -> str:
    """The whole page as text."""
    charts = "".join(
        f'<figure class="panel">{svg(draw, salt=name)}</figure>' for name, draw in _charts(history)
    )
    body = f"""<p class="lead">{escape(_state(history))}</p>
{_cards(history)}
<h2>Over the run</h2>
<p class="note gap">Training as it was logged, and smoothed; validation as dots.</p>
<div class="charts">{charts}</div>
<h2>How it was made</h2>
{folded((("Ranks", _ranks(history), False), ("Configuration", history.config, False)))}"""
    return document(f"Training of {history.directory.name}", body)


def _state(history: History) -> str:
    last = history.records[-1]
    left = [row["seconds_left"] for row in history.of("train") if "seconds_left" in row]
    remaining = f", {_duration(left[-1])} left" if left and left[-1] > 0 else ""
    seen = (history.directory / "log.jsonl").stat().st_mtime
    written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seen))
    return f"{last['step']:,} steps done{remaining}; log last written {written}."


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes else f"{seconds:.0f} s"


def _cards(history: History) -> str:
    newest = history.of("train")[-1] if history.of("train") else history.records[-1]
    items = [
        ("loss", "{:.4g}", "loss"),
        ("kl", "{:.4g}", "KL to the target, nats per token"),
        ("nmse", "{:.4g}", "NMSE, mean over residual states"),
        ("l0", "{:.4g}", "active features per token and layer"),
        ("dead_features", "{:,.0f}", "dead features, all layers"),
        ("tokens_per_second", "{:,.0f}", "tokens per second"),
        ("memory/peak_bytes", "{:.2f} <small>GiB</small>", "most memory of rank 0"),
        ("grad_norm", "{:.4g}", "gradient norm before clipping"),
    ]
    scale = {"memory/peak_bytes": 2**-30}
    return cards(
        (form.format(newest[name] * scale.get(name, 1)), what)
        for name, form, what in items
        if newest.get(name) is not None
    )


def _charts(history: History) -> list[tuple[str, Callable[[Axes], None]]]:
    """Charts of what was logged, by a name that is also their salt."""
    curves = [
        ("loss", ("loss",), "Loss as optimised", ""),
        ("terms", _TERMS, "Terms of the loss", "unweighted"),
        ("l1", ("l1", "auxk"), "Sparsity terms", "unweighted"),
        ("l0", ("l0",), "Active features", "per token and layer"),
        ("dead_features", ("dead_features",), "Dead features", "all layers"),
        ("tokens_per_second", ("tokens_per_second",), "Throughput", "tokens per second"),
        ("learning_rate", ("learning_rate",), "Learning rate", ""),
        ("grad_norm", ("grad_norm",), "Gradient norm before clipping", ""),
    ]
    charts: list[tuple[str, Callable[[Axes], None]]] = [
        (name, partial(_draw_curves, history=history, names=names, title=title, unit=unit))
        for name, names, title, unit in curves
        if any(history.series("train", one)[1] for one in names)
    ]
    bars = [
        ("nmse/state", "NMSE by residual state", "state (0 is the embedding)", ""),
        ("l0/layer", "L0 by layer", "layer", "active features per token"),
        ("dead_features/layer", "Dead features by layer", "layer", ""),
    ]
    for name, title, over, unit in bars:
        values = history.by_depth(name)
        if values:
            draw = partial(_draw_bars, values=values, title=f"{title}, now", over=over, unit=unit)
            charts.append((name.replace("/", "_"), draw))
    at_least = history.by_depth("l0_at_least/bits")
    if at_least:
        charts.append(("histogram", partial(_draw_histogram, shares=l0_histogram(at_least))))
    times = time_by_phase(history)
    if times:
        charts.append(("time", partial(_draw_time, shares=times)))
    return charts


def _draw_curves(
    axes: Axes, *, history: History, names: Sequence[str], title: str, unit: str
) -> None:
    shown: list[float] = []
    for name, colour in zip(names, _PALETTE, strict=False):
        steps, values = history.series("train", name)
        if not values:
            continue
        steps, values = _thinned(steps), _thinned(values)
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
        axes.plot(steps, smooth(values), color=colour, label=name)
        checked, found = history.series("validation", name)
        axes.plot(checked, found, "o", color=colour, markersize=4)
        shown += values + found
    _scale(axes, shown)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(unit)
    axes.set_title(title)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend()


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """Log scale for what spans more than a factor of four; else from zero, where none is below."""
    if values and min(values) > 0 and max(values) > 4 * min(values):
        log_scale(axes, values)
    elif values and min(values) >= 0:
        axes.set_ylim(bottom=0, top=None if max(values) > 0 else 1)


def _thinned(values: list[Any]) -> list[Any]:
    """At most `_MOST_POINTS` of them, evenly, with the last."""
    every = -(-len(values) // _MOST_POINTS)
    return values[::-1][::every][::-1]


def _draw_bars(axes: Axes, *, values: Sequence[float], title: str, over: str, unit: str) -> None:
    axes.bar(range(len(values)), values, width=0.62, color=COLOURS["adapter"])
    integer_ticks(axes)
    axes.set_xlabel(over)
    axes.set_ylabel(unit)
    axes.grid(axis="x", visible=False)
    if not any(values):
        axes.set_ylim(0, 1)
    axes.set_title(title)


def l0_histogram(at_least: Sequence[float]) -> list[tuple[str, float]]:
    """Share of (token, layer) pairs in each class of L0: 0, 1, 2-3, 4-7 and so on.

    Args:
        at_least: share with at least 1, 2, 4, … active features.
    """
    edges = [2**power for power in range(len(at_least))]
    shares = [("0", 1 - at_least[0])]
    for index, edge in enumerate(edges):
        following = at_least[index + 1] if index + 1 < len(edges) else 0.0
        last = 2 * edge - 1
        shares.append(
            (f"{edge}" if edge == last else f"{edge}-{last}", at_least[index] - following)
        )
    while len(shares) > 1 and shares[-1][1] <= 0:
        shares.pop()
    return shares


def time_by_phase(history: History) -> dict[str, float]:
    """Share of the time in each phase, the mean over the logged lines, smallest first."""
    rows = history.of("train")
    sums: dict[str, float] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith("time/"):
                phase = name.removeprefix("time/")
                sums[phase] = sums.get(phase, 0.0) + value
    return {phase: sums[phase] / len(rows) for phase in sorted(sums, key=lambda name: sums[name])}


def _draw_histogram(axes: Axes, *, shares: Sequence[tuple[str, float]]) -> None:
    axes.bar(range(len(shares)), [100 * share for _, share in shares], color=COLOURS["adapter"])
    axes.set_xticks(range(len(shares)), [name for name, _ in shares], rotation=45, ha="right")
    axes.set_xlabel("active features of a token in a layer")
    axes.set_ylabel("% of tokens and layers")
    axes.grid(axis="x", visible=False)
    axes.set_title("Histogram of L0, now")


def _draw_time(axes: Axes, *, shares: Mapping[str, float]) -> None:
    axes.barh(list(shares), [100 * share for share in shares.values()], color=COLOURS["target"])
    axes.set_xlabel("% of the time, mean over the logged steps")
    axes.grid(axis="y", visible=False)
    axes.set_title("Where the time goes")


def _ranks(history: History) -> str:
    return "\n".join(
        f"rank {beat.rank}: {beat.step} steps, {beat.phase} since "
        f"{time.strftime('%H:%M:%S', time.localtime(beat.time))} (pid {beat.pid} on {beat.host})"
        for beat in history.beats
    )

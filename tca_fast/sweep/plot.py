"""The trade-off curve (the paper's main one): KL and NMSE against active features."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from tca_fast.durable import replace_files
from tca_fast.pages.charts import COLOURS, STYLE, log_scale, new_figure
from tca_fast.sweep.runs import Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(axes: Axes, points: Sequence[Point], quantity: str, label: str) -> None:
    """One curve over L0, logarithmic where it spans a factor of four; points with their weights."""
    ordered = sorted(points, key=lambda point: point.l0)
    l0 = [point.l0 for point in ordered]
    values = [getattr(point, quantity) for point in ordered]
    axes.plot(l0, values, marker="o", color=COLOURS["adapter"])
    for point, value in zip(ordered, values, strict=True):
        axes.annotate(
            f"{point.l1_weight:g}",
            (point.l0, value),
            xytext=(6, 5),
            textcoords="offset points",
            fontsize=9,
        )
    log_scale(axes, l0, "x")
    if max(values) > 4 * min(values):
        log_scale(axes, values)
    axes.margins(x=0.12)
    axes.set_xlabel("L0: active features per token and layer")
    axes.set_ylabel(label)


def picture(points: Sequence[Point]) -> bytes:
    """Both curves side by side, as PNG."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = new_figure((9.2, 3.7))
        left, right = figure.subplots(1, 2)
        draw(left, points, "kl", "KL to target, nats per token")
        draw(right, points, "nmse", "NMSE, mean over residual states")
        left.set_title("L1 weight at each point")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160, facecolor="white")
    return buffer.getvalue()


def write_curve(points: Sequence[Point], directory: Path) -> list[Path]:
    """Write `tradeoff.json` and `tradeoff.png`; returns their paths."""
    text = json.dumps([asdict(point) for point in points], indent=1) + "\n"
    contents = {"tradeoff.json": text.encode(), "tradeoff.png": picture(points)}
    return list(replace_files(directory, contents).values())

"""The report's charts, drawn with matplotlib (imported only when one is drawn).

Colours are fixed per model across all charts, see `pages.charts`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from tca_fast.pages.charts import (
    COLOURS,
    INK,
    STYLE,
    integer_ticks,
    log_scale,
    new_figure,
    smooth,
    svg,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from tca_fast.evaluation.faithfulness import Faithfulness
    from tca_fast.evaluation.report import ModelName, RunReport

Draw = Callable[["Axes", "RunReport"], None]


def draw_accuracy(axes: Axes, report: RunReport) -> None:
    """Bars: task accuracy of the four models in percent, with one binomial standard error."""
    for index, model in enumerate(report.models):
        accuracy, error = 100 * model.reasoning.accuracy, 100 * model.reasoning.accuracy_se
        axes.bar(index, accuracy, width=0.62, color=COLOURS[model.name])
        axes.errorbar(index, accuracy, yerr=error, color=INK, capsize=4, linewidth=1.2)
        axes.annotate(
            f"{accuracy:.1f} %",
            (index, accuracy + error),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
        )
    axes.set_xticks(range(len(report.models)), [model.name for model in report.models])
    axes.set_ylim(0, 112)
    axes.set_yticks(range(0, 101, 25))
    axes.set_ylabel("problems solved, %")
    axes.grid(axis="x", visible=False)
    axes.set_title("Task accuracy")


def draw_nmse(axes: Axes, faithfulness: Mapping[ModelName, Faithfulness]) -> None:
    """Lines: NMSE against the target at every residual state, of every model but the target."""
    shown: list[float] = []
    for name, found in faithfulness.items():
        if name == "target":
            continue
        nmse = [value if value > 0 else float("nan") for value in found.nmse]
        axes.plot(nmse, marker="o", markersize=4, color=COLOURS[name], label=name)
        shown += (value for value in nmse if value > 0)
    log_scale(axes, shown)
    integer_ticks(axes)
    axes.set_xlabel("residual state (0 is the embedding)")
    axes.set_ylabel("NMSE to target")
    axes.set_title("Residual stream error by depth")
    axes.legend()


def draw_l0(axes: Axes, l0: Sequence[float], num_features: int) -> None:
    """Bars: active features per token in each layer of the adapter model."""
    axes.bar(range(len(l0)), l0, width=0.62, color=COLOURS["adapter"])
    for layer, value in enumerate(l0):
        if len(l0) <= 12:
            axes.annotate(
                f"{value:.1f}\n({100 * value / num_features:.2f} %)",
                (layer, value),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
    axes.set_ylim(0, 1.28 * max(l0, default=1) or 1)
    integer_ticks(axes)
    axes.set_xlabel("layer")
    axes.set_ylabel(f"of {num_features:,} features")
    axes.grid(axis="x", visible=False)
    axes.set_title("Active features per token")


def _draw_nmse(axes: Axes, report: RunReport) -> None:
    draw_nmse(axes, report.faithfulness)


def _draw_l0(axes: Axes, report: RunReport) -> None:
    draw_l0(axes, report.faithfulness["adapter"].l0 or (), report.num_features)


def draw_curve(key: str, title: str, unit: str) -> Draw:
    """A chart of one logged metric over optimizer steps: training raw and smoothed, validation."""

    def draw(axes: Axes, report: RunReport) -> None:
        steps, values = _logged(report, "train", key)
        axes.plot(steps, values, color=COLOURS["adapter"], alpha=0.25, linewidth=1)
        axes.plot(steps, smooth(values), color=COLOURS["adapter"], label="training")
        checked, found = _logged(report, "validation", key)
        if found:
            axes.plot(
                checked, found, "o", color=COLOURS["target"], markersize=4.5, label="validation"
            )
            axes.legend()
        log_scale(axes, values + found)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(unit)
        axes.set_title(title)

    return draw


def _logged(report: RunReport, split: str, key: str) -> tuple[list[int], list[float]]:
    rows = [
        (row["step"], row[key])
        for row in report.history
        if row["split"] == split and row.get(key) is not None
    ]
    return [step for step, _ in rows], [value for _, value in rows]


CHARTS: Mapping[str, Draw] = {
    "accuracy": draw_accuracy,
    "nmse": _draw_nmse,
    "l0": _draw_l0,
    "kl_curve": draw_curve("kl", "KL to target over training", "nats per token"),
    "nmse_curve": draw_curve("nmse", "Residual error over training", "NMSE, mean over states"),
    "l0_curve": draw_curve("l0", "Active features over training", "per token and layer"),
}


def chart_svg(name: str, report: RunReport) -> str:
    """One chart of `CHARTS` as an `<svg>` element that needs nothing from outside the page."""
    return svg(lambda axes: CHARTS[name](axes, report), salt=name)


def figure_files(report: RunReport) -> dict[str, bytes]:
    """The one picture for a README: accuracy, residual error and active features side by side.

    Returns:
        Contents of `figure.png` and `figure.svg` by file name.
    """
    import matplotlib

    contents = {}
    padding = {"figure.constrained_layout.w_pad": 0.15, "figure.constrained_layout.h_pad": 0.1}
    with matplotlib.rc_context({**STYLE, **padding, "svg.hashsalt": "figure"}):
        figure = new_figure((13.2, 3.7))
        draws = (draw_accuracy, _draw_nmse, _draw_l0)
        for axes, draw in zip(figure.subplots(1, 3), draws, strict=True):
            draw(axes, report)
        for kind, metadata in (("png", None), ("svg", {"Date": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=160, facecolor="white", metadata=metadata)
            contents[f"figure.{kind}"] = buffer.getvalue()
    return contents

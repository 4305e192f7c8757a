"""The report's charts, drawn with matplotlib (imported only when one is drawn).

Colours are fixed per model across all charts and stay apart for colour-blind readers.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tca_fast.evaluation.report import RunReport

COLOURS = {"base": "#8b93a1", "hybrid": "#e0863a", "adapter": "#0b8f87", "target": "#3b3f8f"}
_INK, _FAINT = "#2b2f38", "#d9dde4"
_STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#aeb4bf",
    "axes.grid": True,
    "axes.labelcolor": _INK,
    "axes.labelsize": 10,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "grid.color": "#eceff3",
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.8,
    "text.color": _INK,
    "xtick.color": "#5b6270",
    "ytick.color": "#5b6270",
}
Draw = Callable[["Axes", "RunReport"], None]


def draw_accuracy(axes: Axes, report: RunReport) -> None:
    """Bars: task accuracy of the four models in percent, with one binomial standard error."""
    for index, model in enumerate(report.models):
        accuracy, error = 100 * model.reasoning.accuracy, 100 * model.reasoning.accuracy_se
        axes.bar(index, accuracy, width=0.62, color=COLOURS[model.name])
        axes.errorbar(index, accuracy, yerr=error, color=_INK, capsize=4, linewidth=1.2)
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


def draw_nmse(axes: Axes, report: RunReport) -> None:
    """Lines: NMSE against the target at every residual state, base, hybrid and adapter."""
    shown: list[float] = []
    for model in report.models:
        if model.name == "target":
            continue
        nmse = [value if value > 0 else float("nan") for value in model.faithfulness.nmse]
        axes.plot(nmse, marker="o", markersize=4, color=COLOURS[model.name], label=model.name)
        shown += (value for value in nmse if value > 0)
    _log_scale(axes, shown)
    _integer_ticks(axes)
    axes.set_xlabel("residual state (0 is the embedding)")
    axes.set_ylabel("NMSE to target")
    axes.set_title("Residual stream error by depth")
    axes.legend()


def draw_l0(axes: Axes, report: RunReport) -> None:
    """Bars: active features per token in each layer of the adapter model."""
    l0 = report.model("adapter").faithfulness.l0 or ()
    axes.bar(range(len(l0)), l0, width=0.62, color=COLOURS["adapter"])
    for layer, value in enumerate(l0):
        if len(l0) <= 12:
            axes.annotate(
                f"{value:.1f}\n({100 * value / report.num_features:.2f} %)",
                (layer, value),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
    axes.set_ylim(0, 1.28 * max(l0, default=1) or 1)
    _integer_ticks(axes)
    axes.set_xlabel("layer")
    axes.set_ylabel(f"of {report.num_features:,} features")
    axes.grid(axis="x", visible=False)
    axes.set_title("Active features per token")


def draw_curve(key: str, title: str, unit: str) -> Draw:
    """A chart of one logged metric over optimizer steps: training raw and smoothed, validation."""

    def draw(axes: Axes, report: RunReport) -> None:
        steps, values = _logged(report, "train", key)
        axes.plot(steps, values, color=COLOURS["adapter"], alpha=0.25, linewidth=1)
        axes.plot(steps, _smooth(values), color=COLOURS["adapter"], label="training")
        checked, found = _logged(report, "validation", key)
        if found:
            axes.plot(
                checked, found, "o", color=COLOURS["target"], markersize=4.5, label="validation"
            )
            axes.legend()
        _log_scale(axes, values + found)
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
    "nmse": draw_nmse,
    "l0": draw_l0,
    "kl_curve": draw_curve("kl", "KL to target over training", "nats per token"),
    "nmse_curve": draw_curve("nmse", "Residual error over training", "NMSE, mean over states"),
    "l0_curve": draw_curve("l0", "Active features over training", "per token and layer"),
}


def chart_svg(name: str, report: RunReport) -> str:
    """One chart of `CHARTS` as an `<svg>` element that needs nothing from outside the page."""
    import matplotlib

    # Text stays text, so that the page's own font shows and can be searched.
    with matplotlib.rc_context({**_STYLE, "svg.fonttype": "none", "svg.hashsalt": name}):
        figure = _new_figure((4.4, 3.3))
        CHARTS[name](figure.subplots(), report)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    return _inline(buffer.getvalue())


def figure_files(report: RunReport) -> dict[str, bytes]:
    """The one picture for a README: accuracy, residual error and active features side by side.

    Returns:
        Contents of `figure.png` and `figure.svg` by file name.
    """
    import matplotlib

    contents = {}
    padding = {"figure.constrained_layout.w_pad": 0.15, "figure.constrained_layout.h_pad": 0.1}
    with matplotlib.rc_context({**_STYLE, **padding, "svg.hashsalt": "figure"}):
        figure = _new_figure((13.2, 3.7))
        draws = (draw_accuracy, draw_nmse, draw_l0)
        for axes, draw in zip(figure.subplots(1, 3), draws, strict=True):
            draw(axes, report)
        for kind, metadata in (("png", None), ("svg", {"Date": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=160, facecolor="white", metadata=metadata)
            contents[f"figure.{kind}"] = buffer.getvalue()
    return contents


def _log_scale(axes: Axes, values: Sequence[float]) -> None:
    """Log scale with plain numbers on the axis; a linear one where values are not all positive."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    if not values or min(values) <= 0:
        return
    axes.set_yscale("log")
    steps = (1.0, 2.0, 5.0) if max(values) < 100 * min(values) else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _integer_ticks(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _new_figure(size: tuple[float, float]) -> Figure:
    # Not pyplot: no global state, no display, nothing to close.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    FigureCanvasAgg(figure)
    return figure


def _inline(svg: str) -> str:
    """Strip what only a stand-alone file needs; use the page's font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", svg)


def _smooth(values: Sequence[float]) -> list[float]:
    """Centred running mean over about a thirtieth of the run, shorter at the ends."""
    reach = len(values) // 60
    smoothed = []
    for index in range(len(values)):
        near = min(reach, index, len(values) - 1 - index)
        window = values[index - near : index + near + 1]
        smoothed.append(sum(window) / len(window))
    return smoothed

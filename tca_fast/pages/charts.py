"""Charts drawn with matplotlib (imported only when one is drawn), as SVG for a page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Fixed for what they mean on every page, and apart for colour-blind readers.
COLOURS = {"base": "#8b93a1", "hybrid": "#e0863a", "adapter": "#0b8f87", "target": "#3b3f8f"}
INK = "#2b2f38"
STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#aeb4bf",
    "axes.grid": True,
    "axes.labelcolor": INK,
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
    "text.color": INK,
    "xtick.color": "#5b6270",
    "ytick.color": "#5b6270",
}


def svg(draw: Callable[[Axes], None], salt: str, size: tuple[float, float] = (4.4, 3.3)) -> str:
    """One chart as an `<svg>` element that needs nothing from outside the page.

    Args:
        draw: called with the axes.
        salt: makes the ids inside differ from those of other charts of the page.
        size: inches.
    """
    import matplotlib

    # Text stays text, so that the page's own font shows and can be searched.
    with matplotlib.rc_context({**STYLE, "svg.fonttype": "none", "svg.hashsalt": salt}):
        figure = new_figure(size)
        draw(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    return _inline(buffer.getvalue())


def new_figure(size: tuple[float, float]) -> Figure:
    """An empty figure of so many inches."""
    # Not pyplot: no global state, no display, nothing to close.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    FigureCanvasAgg(figure)
    return figure


def log_scale(axes: Axes, values: Sequence[float], which: Literal["x", "y"] = "y") -> None:
    """Log scale with plain numbers on the axis; a linear one where values are not all positive."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    if not values or min(values) <= 0:
        return
    axes.set(**{f"{which}scale": "log"})
    axis = axes.yaxis if which == "y" else axes.xaxis
    steps = (1.0, 2.0, 5.0) if max(values) < 100 * min(values) else (1.0,)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def integer_ticks(axes: Axes) -> None:
    """Whole numbers on the horizontal axis."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def smooth(values: Sequence[float]) -> list[float]:
    """Centred running mean over about a thirtieth of the run, shorter at the ends."""
    reach = len(values) // 60
    smoothed = []
    for index in range(len(values)):
        near = min(reach, index, len(values) - 1 - index)
        window = values[index - near : index + near + 1]
        smoothed.append(sum(window) / len(window))
    return smoothed


def _inline(svg: str) -> str:
    """Strip what only a stand-alone file needs; use the page's font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", svg)

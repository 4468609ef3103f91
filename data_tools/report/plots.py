"""Draw bar plots with matplotlib as SVG for an HTML page. Equal numbers give equal SVG; labels remain text."""

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

COLORS = (  # Okabe and Ito's palette, which colorblind people can tell apart, and gray
    *("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442"),
    "#999999",
)
# all lengths are in inches
WIDTH, MIN_BARS_WIDTH = 6.0, 3.6  # of a plot, and at least of its part with the bars
ROW, COLUMNS_HEIGHT, LEGEND_ROW, AXIS = 0.27, 2.1, 0.22, 0.5
LETTER = 0.074  # width of a letter, roughly
LABEL_LETTERS, LEGEND_LETTERS = 58, 78  # limits of a label, and of a row of the legend
STYLE: dict[Any, object] = {  # Any: matplotlib's own type of the keys is a Literal of hundreds
    "font.size": 9,
    "text.parse_math": False,  # a file's name may contain a dollar sign
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "xtick.color": "#888888",
    "xtick.labelcolor": "#333333",
    "ytick.color": "#888888",
    "ytick.labelcolor": "#333333",
}
LEGEND = {"frameon": False, "handlelength": 1.0, "handleheight": 1.0}

Series = Mapping[str, Sequence[float]]
"""Stacked bars: the name of each color -> its value in each bar."""
Format = Callable[[float], str]


def bars(what: str, labels: Sequence[str], series: Series, shown: Format) -> str:
    """Horizontal bars, one per label from the top, each with its sum at the end. `what` identifies the plot in ids."""
    labels = [without_middle(label, LABEL_LETTERS) for label in labels]
    widest = max(map(len, labels))
    height = ROW * len(labels) + 0.1

    def draw(axes: Axes) -> None:
        places = range(len(labels))
        ends = [0.0] * len(labels)
        for (name, values), color in zip(series.items(), COLORS, strict=False):
            axes.barh(places, values, left=ends, height=0.72, color=color, label=name)
            ends = [end + value for end, value in zip(ends, values, strict=True)]
        for place, end in zip(places, ends, strict=True):
            axes.annotate(shown(end), (end, place), (3, 0), textcoords="offset points", va="center", color="#333333")
        axes.set_yticks(places, labels)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.set_xlim(0, (max(ends) or 1.0) * 1.17)  # room for the sums
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=all(end == int(end) for end in ends)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value)))

    return _svg(what, draw, series, height, left=widest * LETTER + 0.15)


def columns(what: str, edges: Sequence[str], series: Series) -> str:
    """Return a histogram: columns between consecutive edges, of which there is one more than there are values."""
    n = len(edges) - 1

    def draw(axes: Axes) -> None:
        ends = [0.0] * n
        for (name, values), color in zip(series.items(), COLORS, strict=False):
            axes.bar(range(n), values, bottom=ends, width=1, align="edge", color=color, edgecolor="white", label=name)
            ends = [end + value for end, value in zip(ends, values, strict=True)]
        every = -(-len(edges) // 9)
        axes.set_xticks(range(0, len(edges), every), edges[::every])
        axes.set_xlim(-0.2, n + 0.2)
        axes.grid(axis="x", visible=False)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))

    return _svg(what, draw, series, COLUMNS_HEIGHT, left=0.7)


def printable(text: str) -> str:
    """Text with unprintable characters, among them those that change the writing direction, as escape sequences."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def without_middle(text: str, most: int) -> str:
    """Printable text of at most `most` characters; a longer one loses its middle."""
    text = printable(text)
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-(most - most // 2) :]}"


def _svg(what: str, draw: Callable[[Axes], None], series: Series, height: float, left: float) -> str:
    """Draw one plot. The axes are placed by hand, because matplotlib's layouts would draw everything twice."""
    # each has a mark and a gap, of about 5 letters
    per_row = max(1, min(len(series), LEGEND_LETTERS // (min(max(map(len, series)), LEGEND_LETTERS // 2) + 5)))
    legend_rows = -(-len(series) // per_row) if len(series) > 1 else 0
    legend = legend_rows * LEGEND_ROW + (0.1 if legend_rows else 0.0)
    total, width = height + legend + AXIS, max(WIDTH, left + MIN_BARS_WIDTH)
    buffer = io.StringIO()
    with rc_context(STYLE | {"svg.hashsalt": what}), warnings.catch_warnings():
        # matplotlib warns of characters that its font lacks; the browser has them
        warnings.filterwarnings("ignore", message="Glyph")
        figure = Figure(figsize=(width, total))
        canvas = FigureCanvasSVG(figure)
        axes = figure.add_axes((left / width, (AXIS - 0.1) / total, (width - left - 0.3) / width, height / total))
        draw(axes)
        if legend_rows:
            handles, names = axes.get_legend_handles_labels()
            names = [without_middle(name, LEGEND_LETTERS // per_row - 5) for name in names]
            figure.legend(handles, names, loc="upper left", ncols=per_row, **LEGEND)
        canvas.print_svg(buffer, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = buffer.getvalue()
    # these ids are the same in every plot, and a page may contain an id only once
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg[svg.index("<svg") :])
    return svg.replace("<svg ", '<svg role="img" ', 1)

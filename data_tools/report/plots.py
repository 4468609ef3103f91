"""Draw the bar plots of a build's page."""

from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megagpt.html_parts import without_middle
from megagpt.svg_plots import COLORS, LEGEND, LEGEND_ROW, LETTER, legend_label, svg

# all lengths are in inches
WIDTH, MIN_BARS_WIDTH = 6.0, 3.6  # of a plot, and at least of its part with the bars
ROW, COLUMNS_HEIGHT, AXIS = 0.27, 2.1, 0.5
LABEL_LETTERS, LEGEND_LETTERS = 58, 78  # limits of a label, and of a row of the legend
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
            axes.barh(places, values, left=ends, height=0.72, color=color, label=legend_label(name))
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
            axes.bar(
                range(n),
                values,
                bottom=ends,
                width=1,
                align="edge",
                color=color,
                edgecolor="white",
                label=legend_label(name),
            )
            ends = [end + value for end, value in zip(ends, values, strict=True)]
        every = -(-len(edges) // 9)
        axes.set_xticks(range(0, len(edges), every), edges[::every])
        axes.set_xlim(-0.2, n + 0.2)
        axes.grid(axis="x", visible=False)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))

    return _svg(what, draw, series, COLUMNS_HEIGHT, left=0.7)


def _svg(what: str, draw: Callable[[Axes], None], series: Series, height: float, left: float) -> str:
    """Draw one plot. The axes are placed by hand, because matplotlib's layouts would draw everything twice."""
    # each has a mark and a gap, of about 5 letters
    per_row = max(1, min(len(series), LEGEND_LETTERS // (min(max(map(len, series)), LEGEND_LETTERS // 2) + 5)))
    legend_rows = -(-len(series) // per_row) if len(series) > 1 else 0
    legend = legend_rows * LEGEND_ROW + (0.1 if legend_rows else 0.0)
    total, width = height + legend + AXIS, max(WIDTH, left + MIN_BARS_WIDTH)

    def draw_on(figure: Figure) -> None:
        axes = figure.add_axes((left / width, (AXIS - 0.1) / total, (width - left - 0.3) / width, height / total))
        draw(axes)
        if legend_rows:
            handles, names = axes.get_legend_handles_labels()
            names = [without_middle(name, LEGEND_LETTERS // per_row - 5) for name in names]
            figure.legend(handles, names, loc="upper left", ncols=per_row, **LEGEND)

    return svg(what, width, total, draw_on)

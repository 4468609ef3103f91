"""Draw a metric of several runs over steps or tokens. A long curve is thinned so that no spike is lost."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from megagpt.html_parts import without_middle
from megagpt.report.run_record import RunReport
from megagpt.svg_plots import COLORS, LEGEND, LEGEND_ROW, LETTER, legend_label, svg

WIDTH, HEIGHT = 5.0, 2.4  # of a plot and of its axes, in inches
LEFT, RIGHT, BELOW, ABOVE = 0.62, 0.12, 0.45, 0.12
LABEL_LETTERS = 40
SPANS = 400  # of a thinned curve
LOG_RATIO = 30.0  # of the largest to the smallest value, from which the axis is logarithmic
STYLES = ("-", "--", ":", "-.")  # of runs beyond the colors

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """One metric of one run; a value that was not finite is NaN, which interrupts the line."""

    label: str  # empty: not in the legend
    points: list[Point]
    color: str
    style: str = "-"
    is_sparse: bool = False  # few points, which are marked
    is_pale: bool = False


@dataclass(frozen=True)
class Marks:
    """Holds the places of the x axis at which a run was saved, resumed and rolled back."""

    color: str
    saves: list[float] = field(default_factory=list)
    restarts: list[float] = field(default_factory=list)
    roll_backs: list[float] = field(default_factory=list)


def points(run: RunReport, name: str, *, by_tokens: bool) -> list[Point]:
    """Return a metric's points in the order of steps."""
    axis = "tokens_seen" if by_tokens else "step"
    rows = sorted((row for row in run.rows if name in row and row.get(axis) is not None), key=lambda row: row["step"])
    return [(float(row[axis]), math.nan if row[name] is None else float(row[name])) for row in rows]


def marks(run: RunReport, color: str, *, by_tokens: bool) -> Marks:
    """Return where a run was saved, resumed and rolled back."""
    places = sorted((row["step"], row.get("tokens_seen") or 0) for row in run.rows)

    def at(steps: Sequence[int]) -> list[float]:
        reached = [step for step in steps if step <= run.last_step]  # what a crash or a roll-back undid comes again
        if not by_tokens:
            return [float(step) for step in reached]
        return [float(places[i - 1][1]) for step in reached if (i := bisect_right(places, (step, math.inf)))]

    return Marks(
        color,
        saves=at(run.steps_with("perf/save_seconds")),
        restarts=at([start.step for start in run.starts if start.step]),
        roll_backs=at([back.from_step for back in run.roll_backs]),
    )


def thinned(drawn: list[Point]) -> list[Point]:
    """Return at most three points of each of SPANS spans: the lowest, the highest, one that was not finite.

    A curve of few points stays as it is, and its last point is always there.
    """
    if len(drawn) <= 3 * SPANS:
        return drawn
    kept: list[Point] = []
    for span in range(SPANS):
        part = drawn[span * len(drawn) // SPANS : (span + 1) * len(drawn) // SPANS]
        numbers = [point for point in part if not math.isnan(point[1])]
        extremes = {min(numbers, key=lambda p: p[1]), max(numbers, key=lambda p: p[1])} if numbers else set()
        broken = [point for point in part if math.isnan(point[1])][:1]
        kept += sorted([*extremes, *broken], key=lambda p: p[0])
    return kept if kept[-1] == drawn[-1] else [*kept, drawn[-1]]


def plot(what: str, curves: Sequence[Curve], marked: Sequence[Marks], x_label: str) -> str:
    """Return the SVG of curves with a legend above them. `what` identifies the plot in ids."""
    labels = [legend_label(without_middle(curve.label, LABEL_LETTERS)) for curve in curves if curve.label]
    per_row = max(1, int(WIDTH / LETTER) // (max(map(len, labels)) + 5))
    legend = -(-len(labels) // per_row) * LEGEND_ROW + 0.1 if len(labels) > 1 else 0.0
    total = HEIGHT + BELOW + ABOVE + legend

    def draw(figure: Figure) -> None:
        axes = figure.add_axes((LEFT / WIDTH, BELOW / total, (WIDTH - LEFT - RIGHT) / WIDTH, HEIGHT / total))
        handles = [line for curve in curves if (line := _draw_curve(axes, curve)) and curve.label]
        _scale(axes, [y for curve in curves for _, y in curve.points if not math.isnan(y)])
        axes.set_xlabel(x_label)
        for one in marked:
            _draw_marks(axes, one)
        if legend:
            figure.legend(handles, labels, loc="upper left", ncols=per_row, **LEGEND)

    return svg(what, WIDTH, total, draw)


def _draw_curve(axes: Axes, curve: Curve) -> Line2D:
    drawn = thinned(curve.points)
    [line] = axes.plot(
        [x for x, _ in drawn],
        [y for _, y in drawn],
        color=curve.color,
        linestyle=curve.style,
        linewidth=0.9 if curve.is_pale else 1.4,
        alpha=0.7 if curve.is_pale else 1.0,
        marker="o" if curve.is_sparse or len(drawn) == 1 else None,
        markersize=3.5,
    )
    return line


def _draw_marks(axes: Axes, marked: Marks) -> None:
    for x in marked.restarts:
        axes.axvline(x, color=marked.color, linestyle="--", linewidth=0.8)
    for x in marked.roll_backs:
        axes.axvline(x, color=marked.color, linestyle=":", linewidth=1.4)
    bottom = axes.get_xaxis_transform()
    zeros = [0.0] * len(marked.saves)
    axes.plot(marked.saves, zeros, "^", color=marked.color, markersize=4, transform=bottom, clip_on=False)


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """Choose the axes' ticks, and a logarithmic axis for values of different orders of magnitude."""
    if values and min(values) > 0 and max(values) > LOG_RATIO * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=7))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))


def color_of(index: int) -> tuple[str, str]:
    """Return color and line style of the run, or metric, of this number."""
    return COLORS[index % len(COLORS)], STYLES[index // len(COLORS) % len(STYLES)]


def short_number(value: float) -> str:
    """Return "0.0025", "12.5", "1.2k", "3M", "4B", "5T": for the ticks of axes."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"

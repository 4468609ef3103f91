"""Draw plots with matplotlib as SVG for an HTML page. Equal numbers give equal SVG; labels remain text."""

import io
import re
import warnings
from collections.abc import Callable
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from megagpt.html_parts import printable

COLORS = (  # Okabe and Ito's palette, which colorblind people can tell apart, and gray
    *("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442"),
    "#999999",
)
# all lengths are in inches
LETTER, LEGEND_ROW = 0.074, 0.22  # width of a letter, roughly; height of a row of the legend
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
LEGEND: dict[str, Any] = {"frameon": False, "handlelength": 1.0, "handleheight": 1.0}


def legend_label(name: str) -> str:
    """Return a name as a legend shows it: matplotlib leaves out one that begins with an underscore."""
    return f" {name}" if name.startswith("_") else name


def svg(what: str, width: float, height: float, draw: Callable[[Figure], None]) -> str:
    """Return what `draw` draws on a figure of this size. `what` identifies the plot in ids."""
    buffer = io.StringIO()
    with rc_context(STYLE | {"svg.hashsalt": printable(what)}), warnings.catch_warnings():
        # matplotlib warns of characters that its font lacks; the browser has them
        warnings.filterwarnings("ignore", message="Glyph")
        figure = Figure(figsize=(width, height))
        canvas = FigureCanvasSVG(figure)
        draw(figure)
        canvas.print_svg(buffer, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    drawn = buffer.getvalue()
    # these ids are the same in every plot, and a page may contain an id only once
    drawn = re.sub(r'<g id="[^"]*">', "<g>", drawn[drawn.index("<svg") :])
    return drawn.replace("<svg ", '<svg role="img" ', 1)

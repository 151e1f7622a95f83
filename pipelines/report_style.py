"""How the report's pictures look: one colour a policy throughout, readable without colour.

Each picture is drawn once and saved twice: as PNG on white for slides, and as SVG whose ink takes
the page's own colours, so that it follows a dark page and prints black.
"""

import io
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import matplotlib
import numpy as np
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure

from driftline.platform.artefacts import whole_file
from driftline.platform.bootstrap import Interval

LABELS: Final = {
    "refreshed": "refreshed student",
    "never": "same student, never refreshed",
    "arms_only": "only the arms refreshed",
    "mlp_hourly": "MLP, re-trained hourly",
    "mlp_never": "MLP, never re-trained",
    "lightgbm_hourly": "LightGBM, re-trained hourly",
    "oracle": "true click probability",
}
INK, SOFT, LINE, PAPER = "#1b1f24", "#5b6570", "#d9dee4", "#fefefe"
COLOURS: Final = {  # Okabe and Ito, told apart by all common kinds of colour blindness
    "refreshed": "#0072b2",
    "never": "#d55e00",
    "arms_only": "#e69f00",
    "mlp_hourly": "#cc79a7",
    "mlp_never": "#b08a9e",
    "lightgbm_hourly": "#009e73",
    "oracle": SOFT,
}
DASHES: Final = {"never": (0, (5, 2)), "mlp_never": (0, (5, 2)), "oracle": (0, (1, 1.5))}
REFUSED: Final = "#d55e00"
ARMS: Final = "#e69f00"
STYLE: Final = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": LINE,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "legend.frameon": False,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "svg.fonttype": "none",
    "svg.hashsalt": "driftline",
}
PAGE_COLOURS: Final = {
    INK: "var(--ink)",
    SOFT: "var(--soft)",
    LINE: "var(--line)",
    PAPER: "none",
    COLOURS["refreshed"]: "var(--refreshed)",  # brighter on a dark page
}


class Picture:
    """A finished drawing, as PNG and as SVG for the page."""

    def __init__(self, name: str, draw: Callable[[], Figure]) -> None:
        self.name = name
        with matplotlib.rc_context(STYLE):
            figure = draw()
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
            image = io.BytesIO()
            figure.savefig(image, format="png", dpi=130, metadata={"Software": None})
        self.png = image.getvalue()
        self.svg = _for_the_page(buffer.getvalue(), name)

    def write_png(self, folder: Path) -> Path:
        """Save ``NAME.png`` in a folder."""
        destination = folder / f"{self.name}.png"
        with whole_file(destination) as scratch:
            scratch.write_bytes(self.png)
        return destination


def _for_the_page(svg: str, name: str) -> str:
    """The drawing alone: page colours for ink, no prolog, identifiers of its own."""
    svg = svg[svg.index("<svg") :]
    for drawn, page in PAGE_COLOURS.items():
        svg = svg.replace(drawn, page)
    for mark in ('id="', "url(#", 'href="#'):
        svg = svg.replace(mark, f"{mark}{name}-")
    start, end = svg.find("<metadata>"), svg.find("</metadata>")
    return svg if start < 0 else svg[:start] + svg[end + len("</metadata>") :]


# --- strokes ------------------------------------------------------------------------------


def minus(text: str) -> str:
    """The same with a true minus sign."""
    return text.replace("-", "\N{MINUS SIGN}")


def scaled(interval: Interval, factor: float) -> Interval:
    """The interval in other units; a negative factor turns it round."""
    low, high = sorted((interval.low * factor, interval.high * factor))
    return Interval(interval.value * factor, low, high)


def band(
    axes: Any, places: Sequence[float | datetime], intervals: Sequence[Interval], colour: str
) -> None:
    """A pale area between the bounds."""
    low, high = [i.low for i in intervals], [i.high for i in intervals]
    axes.fill_between(places, low, high, color=colour, alpha=0.17, lw=0)


def whisker(axes: Any, place: float, interval: Interval, colour: str, marker: str) -> None:
    """One point with its bounds."""
    axes.plot([place, place], [interval.low, interval.high], color=colour, lw=2)
    axes.plot(place, interval.value, marker, color=colour, ms=7)


def limit(axes: Any, lines: Sequence[Sequence[Interval]], *, keep: float | None) -> None:
    """Show the lines; a single hour far outside must not flatten all others."""
    values = np.array([interval.value for line in lines for interval in line])
    values = values[np.isfinite(values)]
    if not len(values):
        return
    low, high = np.quantile(values, [0.01, 0.99])
    if keep is not None:
        low, high = min(low, keep), max(high, keep)
    margin = 0.25 * (high - low) or 0.05
    axes.set_ylim(low - margin, high + margin)


def dates(axes: Any) -> None:
    """Days and hours along the bottom, as few as needed."""
    locator = AutoDateLocator(minticks=4, maxticks=10)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))

"""The picture of a study: every variant with its interval, readable without the table."""

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import Any, Final

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from driftline.pipelines.report_style import INK, SOFT, Picture, band, minus
from driftline.pipelines.study_results import StudyResults
from driftline.pipelines.study_table import Entry, entry_of
from driftline.platform.bootstrap import Interval
from driftline.platform.study_measures import MEASURES
from driftline.platform.study_parts import StudyColumn
from driftline.platform.study_settings import StudyCell, StudySettings

LINES: Final = (  # Okabe and Ito, as in the report
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1b1f24",
)  # fmt: skip
MARKERS: Final = "osD^vPX"
MAX_LABEL: Final = 46


@dataclass(frozen=True)
class _Point:
    cell: StudyCell
    interval: Interval
    x: float


def draw_study(study: StudySettings, results: StudyResults) -> Picture | None:
    """The study's plot; None while nothing of it was measured."""
    column = StudyColumn(measure=study.plot.measure, show=study.plot.show)
    points = [
        _Point(cell, found, _place(study, results, cell))
        for cell in study.cells.values()
        if (found := _shown(column, entry_of(study, results, cell, column))) is not None
    ]
    if not points:
        return None
    draw = _draw_lines if study.plot.kind == "line" else _draw_bars
    return Picture(study.name, lambda: draw(study, column, points))


def _shown(column: StudyColumn, entry: Entry) -> Interval | None:
    if not column.is_delta:
        return None if entry.value is None else entry.value.interval
    if entry.is_baseline and entry.value is not None:
        return Interval(0.0, 0.0, 0.0)
    return None if entry.delta is None else entry.delta.interval


def _place(study: StudySettings, results: StudyResults, cell: StudyCell) -> float:
    if study.plot.x_measure is None:
        return np.nan if cell.x is None else cell.x
    found = results.sample(cell.name, study.plot.x_measure)
    return np.nan if found is None else float(found.values.mean())


def _draw_bars(study: StudySettings, column: StudyColumn, points: Sequence[_Point]) -> Figure:
    figure = Figure(figsize=(9.5, 1.5 + 0.36 * len(points)), layout="constrained")
    axes = figure.subplots()
    text = "%+.2f" if column.is_delta else f"%.{MEASURES[column.measure].digits}f"
    for row, point in enumerate(points):
        interval = point.interval
        colour = _colour(study, point.cell)
        if column.is_delta:
            axes.plot(
                [0, interval.value],
                [row, row],
                color=colour,
                lw=6,
                alpha=0.25,
                solid_capstyle="butt",
            )
        if interval.is_known:
            axes.plot([interval.low, interval.high], [row, row], color=colour, lw=2)
        axes.plot(interval.value, row, "o", color=colour, ms=7)
        right = interval.high if interval.is_known else interval.value
        axes.annotate(
            minus(text % interval.value),
            (max(right, interval.value), row),
            xytext=(7, -3),
            textcoords="offset points",
            fontsize=9,
            color=SOFT,
        )
    if column.is_delta:
        axes.axvline(0, color=SOFT, lw=1.2)
    labels = [fill(point.cell.label, MAX_LABEL) for point in points]
    axes.set_yticks(range(len(points)), labels)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set_ylim(len(points) - 0.4, -0.6)
    axes.margins(x=0.12)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    if study.plot.log_x:
        axes.set_xscale("log")
    axes.set_xlabel(_axis_words(study, column))
    _title(figure, study)
    return figure


def _draw_lines(study: StudySettings, column: StudyColumn, points: Sequence[_Point]) -> Figure:
    figure = Figure(figsize=(9.5, 5.2), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[_Point]] = {}
    for point in points:
        lines.setdefault(_line_name(study, point.cell), []).append(point)
    for number, (name, line) in enumerate(lines.items()):
        colour, marker = LINES[number % len(LINES)], MARKERS[number % len(MARKERS)]
        label = study.variants[name].label or name if name in study.variants else "all"
        placed = sorted((p for p in line if np.isfinite(p.x)), key=lambda point: point.x)
        if placed:
            _draw_line(axes, placed, label=label, colour=colour, marker=marker)
        for point in (p for p in line if not np.isfinite(p.x)):  # a reference without a place
            axes.axhline(point.interval.value, color=colour, lw=1.4, ls=(0, (5, 2)), label=label)
    if column.is_delta:
        axes.axhline(0, color=SOFT, lw=1)
    _scale(axes, study, [p.x for p in points if np.isfinite(p.x)])
    axes.set_xlabel(study.plot.x_label or _measure_label(study.plot.x_measure))
    axes.set_ylabel(_axis_words(study, column))
    if len(lines) > 1:
        figure.legend(loc="outside lower center", ncols=min(4, len(lines)), fontsize=9.5)
    _title(figure, study)
    return figure


def _draw_line(
    axes: Any, points: Sequence[_Point], *, label: str, colour: str, marker: str
) -> None:
    places = [point.x for point in points]
    known = [point for point in points if point.interval.is_known]
    band(axes, [p.x for p in known], [p.interval for p in known], colour)
    values = [point.interval.value for point in points]
    axes.plot(places, values, f"{marker}-", color=colour, ms=6, lw=2, label=label)


def _line_name(study: StudySettings, cell: StudyCell) -> str:
    """Variants of a grid are lines; without a grid, all placed variants are one line."""
    return cell.variant if study.each or cell.x is None else ""


def _scale(axes: Any, study: StudySettings, places: Sequence[float]) -> None:
    if study.plot.log_y:
        axes.set_yscale("log")
    if study.plot.log_x:
        axes.set_xscale("log")
    if 0 < len(set(places)) <= 8:
        axes.set_xticks(sorted(set(places)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
        axes.xaxis.set_minor_locator(NullLocator())


def _axis_words(study: StudySettings, column: StudyColumn) -> str:
    measure = MEASURES[column.measure]
    if not column.is_delta:
        return f"{measure.label} ({measure.better} is better)"
    name = study.baseline.partition("@")[0]
    return f"{measure.label}, % over “{study.variants[name].label or name}”"


def _measure_label(name: str | None) -> str:
    return MEASURES[name].label if name is not None else ""


def _colour(study: StudySettings, cell: StudyCell) -> str:
    """One colour a variant in a grid, else one for the baseline and one for the others."""
    names = list(study.variants)
    if study.each:
        return LINES[names.index(cell.variant) % len(LINES)]
    return SOFT if cell.name == study.baseline else LINES[0]


def _title(figure: Figure, study: StudySettings) -> None:
    seeds = f"{len(study.seeds)} seeds" if len(study.seeds) > 1 else "one seed"
    figure.suptitle(f"{study.title}\n", x=0.01, ha="left", size=12, weight="bold", linespacing=1.5)
    note = f"means and 95 % intervals over {seeds} and test requests"
    figure.text(0.01, 0.985, f"\n{note}", ha="left", va="top", size=9, color=SOFT, linespacing=2.2)

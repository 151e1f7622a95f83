"""The replay report: what freshness was worth, on one page that needs nothing else.

``report.html`` holds its style and pictures; beside it lie the pictures as PNG, the numbers as
``report.json`` and the headline with its table as ``report.md``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from driftline.pipelines.gate_page import templates
from driftline.pipelines.report_figures import ReplayFigures, measure_replay
from driftline.pipelines.report_plots import (
    draw_hours,
    draw_oracle,
    draw_policies,
    draw_refreshes,
    draw_staleness,
)
from driftline.pipelines.report_rows import moment
from driftline.pipelines.report_style import COLOURS, LABELS, PAGE_COLOURS, Picture
from driftline.pipelines.report_words import (
    describe_absent,
    describe_findings,
    describe_headline,
    describe_tiles,
    every_words,
    flipped,
    signed,
    window_words,
)
from driftline.platform.artefacts import whole_file, write_json
from driftline.platform.bootstrap import Interval, json_number
from driftline.platform.windows import Window, format_time


@dataclass(frozen=True)
class ReportPaths:
    """What was written."""

    html: Path
    json: Path
    markdown: Path
    pictures: tuple[Path, ...]


def build_report(
    replay: Mapping[str, Any],
    scores: pa.Table,
    destination: Path,
    *,
    made_at: datetime | None = None,
) -> ReportPaths:
    """Measure, draw and write the report of a replay.

    Args:
        replay: What the replay says beside the scores: ``name``, ``last_hours``, ``seed``,
            ``refreshes``, ``peers`` and where it ran.
        scores: One row an impression: ``event_time``, ``clicked``, a floating column of
            probabilities for each policy (``refreshed`` is needed, all others may be absent) and
            boolean columns for parts to look at, such as ``new_item``. ``request_id`` makes
            requests the unit of the bootstrap.
        destination: A folder.
        made_at: Date of the report, for its foot.

    Raises:
        ContractError: a needed column is missing.
        EmptyWindowError: the scores hold no row.
    """
    figures = measure_replay(replay, scores)
    pictures = {picture.name: picture for picture in draw_all(figures, replay)}
    words = {
        "headline": describe_headline(figures.policies, figures.verdict_window),
        "findings": describe_findings(figures),
    }
    context = words | {
        "figures": figures,
        "replay": replay,
        "tiles": describe_tiles(figures),
        "pictures": pictures,
        "refreshes": [dict(r, when=moment(r["as_of"])) for r in replay.get("refreshes", ())],
        "made_at": made_at,
        "labels": LABELS,
        "colours": {name: PAGE_COLOURS.get(each, each) for name, each in COLOURS.items()},
        "every": every_words(figures.costs),
        "absent": describe_absent(figures.absent),
        "window": window_words(figures.verdict_window),
        "flipped": flipped,
        "signed": signed,
    }
    written = tuple(picture.write_png(destination) for picture in pictures.values())
    paths = ReportPaths(
        html=destination / "report.html",
        json=destination / "report.json",
        markdown=destination / "report.md",
        pictures=written,
    )
    made = {"made_at": format_time(made_at) if made_at else None}
    write_json(paths.json, words | made | {"replay": plain(replay), "figures": plain(figures)})
    _render("report.md.j2", context, paths.markdown)
    _render("report.html.j2", context, paths.html)
    return paths


def draw_all(figures: ReplayFigures, replay: Mapping[str, Any]) -> list[Picture]:
    """The pictures for which there are numbers."""
    refreshes = replay.get("refreshes", ())
    staleness, gap = figures.staleness, figures.oracle_gap
    pictures = []
    if staleness is not None:
        every = every_words(figures.costs)
        pictures.append(Picture("staleness", lambda: draw_staleness(staleness, every=every)))
    if len(figures.policies) > 1:
        pictures.append(Picture("policies", lambda: draw_policies(figures.policies)))
    if gap is not None:
        pictures.append(Picture("oracle", lambda: draw_oracle(gap)))
    hours = Picture(
        "hours", lambda: draw_hours(figures.pooled, figures.single, refreshes=refreshes)
    )
    pictures.append(hours)
    if refreshes:
        pictures.append(Picture("refreshes", lambda: draw_refreshes(refreshes)))
    return pictures


def plain(value: Any) -> Any:
    """Dataclasses, intervals, times and NaN as plain JSON; six decimals are enough."""
    match value:
        case Interval():
            return {name: plain(each) for name, each in value.to_json().items()}
        case (Interval(), *_):  # a series: three lists are easier to plot than many triples
            return {name: [plain(getattr(i, name)) for i in value] for name in vars(value[0])}
        case Window():
            return [format_time(value.start), format_time(value.end)]
        case datetime():
            return format_time(value)
        case Mapping():
            return {str(key): plain(each) for key, each in value.items()}
        case list() | tuple():
            return [plain(each) for each in value]
        case float():
            number = json_number(value)
            return None if number is None else round(number, 6)
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    return value


def _render(template: str, context: Mapping[str, Any], destination: Path) -> None:
    text = templates().get_template(template).render(context)
    with whole_file(destination) as scratch:
        scratch.write_text(text)

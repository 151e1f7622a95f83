"""The gate's page: why this bundle was, or was not, promoted."""

from functools import cache
from pathlib import Path

import jinja2

from driftline.pipelines.judge import describe_window
from driftline.pipelines.verdict import Check, GateVerdict, verdict_json
from driftline.platform.artefacts import whole_file, write_json


def write_gate_page(verdict: GateVerdict, destination: Path, *, title: str | None = None) -> Path:
    """One HTML page that explains the decision by itself, and the same as JSON.

    Args:
        verdict: From ``judge``.
        destination: The page, ``NAME.html``; the JSON is ``verdicts/NAME.json`` beside it.
        title: What was judged, for the top line.
    """
    page = (
        templates()
        .get_template("gate.html.j2")
        .render(
            verdict=verdict,
            title=title,
            where=describe_window(verdict.window) if verdict.window else None,
            scales={
                c.name: _scale(c) for c in verdict.checks if c.interval and c.interval.is_known
            },
        )
    )
    write_json(destination.parent / "verdicts" / f"{destination.stem}.json", verdict_json(verdict))
    with whole_file(destination) as scratch:
        scratch.write_text(page)
    return destination


def _scale(check: Check) -> dict[str, float]:
    """Where the marks of a check's picture lie, in percent of its width."""
    assert check.interval is not None
    marks = dict(vars(check.interval), neutral=1.0 if check.name == "calibration" else 0.0)
    marks |= {f"bound_{i}": bound for i, bound in enumerate(check.bounds) if bound is not None}
    left, right = min(marks.values()), max(marks.values())
    width = (right - left) or 1.0
    return {name: 6 + 88 * (mark - left) / width for name, mark in marks.items()}


@cache
def templates() -> jinja2.Environment:
    """The pages' templates; values are escaped, unknown names are errors."""
    folder = Path(__file__).parent / "templates"
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

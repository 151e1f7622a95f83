"""The table of a study, like the papers' tables: Markdown for people, JSON for everything else.

Deltas are in percent of the baseline's value, paired by seed (papers.md S0.28); brackets are 95 %
intervals over seeds and test requests (see ``study_statistics``). What was not measured is a dash.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from driftline.pipelines.report_style import scaled
from driftline.pipelines.study_orderings import Verdict, count_outcomes, judge_orderings
from driftline.pipelines.study_results import StudyResults
from driftline.pipelines.study_statistics import Estimate, estimate
from driftline.platform.bootstrap import Interval
from driftline.platform.study_measures import MEASURES, Measure
from driftline.platform.study_parts import StudyColumn
from driftline.platform.study_settings import StudyCell, StudySettings

DASH: Final = "\N{EN DASH}"
MARKS: Final = {
    "held": "**held**",
    "not shown": "not shown",
    "reversed": "**reversed**",
    "not measured": "not measured",
}


@dataclass(frozen=True)
class Entry:
    """One cell of the table."""

    value: Estimate | None
    """As measured; None if it was not."""
    delta: Estimate | None
    """In percent of the baseline; None where there is no baseline to compare with."""
    is_baseline: bool
    share: Estimate | None = None
    """Percent of the way between two other cells, where the column asks for it."""


@dataclass(frozen=True)
class StudyTable:
    """Everything a study says, as numbers."""

    study: StudySettings
    entries: Mapping[str, tuple[Entry, ...]]
    """By cell, in the order of the study's columns."""
    verdicts: tuple[Verdict, ...]
    num_trials: int

    @classmethod
    def of(cls, study: StudySettings, results: StudyResults) -> "StudyTable":
        """Summarise the trials there are."""
        return cls(
            study,
            {
                name: tuple(entry_of(study, results, cell, column) for column in study.columns)
                for name, cell in study.cells.items()
            },
            judge_orderings(study, results),
            len(results.trials),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values; NaN becomes null."""
        rows = [
            {
                "name": name,
                "label": self.study.cells[name].label,
                "measures": {
                    column.name: _entry_json(entry)
                    for column, entry in zip(self.study.columns, entries, strict=True)
                },
            }
            for name, entries in self.entries.items()
        ]
        return {
            "name": self.study.name,
            "title": self.study.title,
            "source": list(self.study.source),
            "seeds": list(self.study.seeds),
            "baseline": self.study.baseline,
            "num_trials": self.num_trials,
            "rows": rows,
            "outcomes": dict(count_outcomes(self.verdicts)),
            "orderings": [verdict.to_json() for verdict in self.verdicts],
        }


def entry_of(
    study: StudySettings, results: StudyResults, cell: StudyCell, column: StudyColumn
) -> Entry:
    """One measure of one cell, and its delta to the baseline."""
    sample = results.sample(cell.name, column.measure)
    exact = MEASURES[column.measure].exact
    baseline = study.baseline_of(cell, column)
    delta = None
    if baseline is not None and baseline != cell.name:
        delta = results.delta(cell.name, baseline, column.measure)
    share = None
    if (ends := study.ends_of(cell, column)) is not None:
        share = results.share(cell.name, ends, column.measure)
    return Entry(
        share=None if share is None else estimate(share),
        value=None if sample is None else estimate(sample, exact=exact),
        delta=None if delta is None else estimate(delta, exact=exact),
        is_baseline=baseline == cell.name,
    )


# --- Markdown -----------------------------------------------------------------------------


def markdown(table: StudyTable, *, origin: Sequence[str] = (), picture: str | None = None) -> str:
    """The whole result as one page.

    Args:
        table: Numbers.
        origin: Lines that say when, where and by which command they were measured.
        picture: File name of the plot beside the page.
    """
    study = table.study
    sources = f" (papers.md {', '.join(study.source)})" if study.source else ""
    parts = [f"# {study.title}{sources}", study.about.strip(), "\n".join(origin)]
    parts.append(_lines(_header(study), [_row(table, name) for name in table.entries]))
    parts.append(_reading(study))
    if picture is not None:
        parts.append(f"![{study.title}]({picture})")
    parts += _ordering_parts(table)
    absolute = [name for name in table.entries if _absolute_row(table, name)]
    if absolute:
        heads = ["", *(MEASURES[c.measure].label for c in study.columns if c.is_delta)]
        parts.append("## Absolute values: mean, median, range over seeds")
        parts.append(_lines(heads, [_absolute_row(table, name) for name in absolute]))
    return "\n\n".join(part for part in parts if part) + "\n"


def _header(study: StudySettings) -> list[str]:
    heads = [""]
    for column in study.columns:
        label = MEASURES[column.measure].label
        if column.between is not None:
            first, last = (study.variants[name.partition("@")[0]] for name in column.between)
            label += f", % of the way from “{first.label}” to “{last.label}”"
        heads.append(f"{label}, Δ %" if column.is_delta else label)
    return heads


def _row(table: StudyTable, name: str) -> list[str]:
    pairs = zip(table.study.columns, table.entries[name], strict=True)
    label = table.study.cells[name].label
    return [label, *(entry_text(column, entry) for column, entry in pairs)]


def entry_text(column: StudyColumn, entry: Entry) -> str:
    """One cell of the table as people read it."""
    measure = MEASURES[column.measure]
    if column.between is not None:
        return DASH if entry.share is None else interval_text(entry.share.interval, digits=0)
    if not column.is_delta:
        return _value_text(entry.value, measure)
    if entry.is_baseline and entry.value is not None:
        return f"0 ({entry.value.mean:.{measure.digits}f})"
    if entry.delta is None:
        return DASH
    return interval_text(entry.delta.interval, digits=2, sign=True)


def _value_text(value: Estimate | None, measure: Measure) -> str:
    if value is None:
        return DASH
    if measure.exact or value.interval.low == value.interval.high:
        return f"{value.mean:,.{measure.digits}f}"
    return interval_text(value.interval, digits=measure.digits)


def interval_text(interval: Interval, *, digits: int, sign: bool = False) -> str:
    """``+1.83 [+1.20, +2.40]``, without brackets where nothing is known of them."""
    form = f"{'+' if sign else ''},.{digits}f"
    text = f"{interval.value:{form}}"
    if interval.is_known:
        text += f" [{interval.low:{form}}, {interval.high:{form}}]"
    return text.replace("-", "\N{MINUS SIGN}")


def _absolute_row(table: StudyTable, name: str) -> list[str]:
    columns = table.study.columns
    pairs = [
        (column, entry.value)
        for column, entry in zip(columns, table.entries[name], strict=True)
        if column.is_delta
    ]
    if all(value is None for _, value in pairs):
        return []
    texts = []
    for column, value in pairs:
        digits = MEASURES[column.measure].digits
        if value is None:
            texts.append(DASH)
            continue
        numbers = (value.mean, value.median, value.lowest, value.highest)
        mean, median, low, high = (f"{number:,.{digits}f}" for number in numbers)
        texts.append(f"{mean}, {median}, {low}{DASH}{high}")
    return [table.study.cells[name].label, *texts]


def _reading(study: StudySettings) -> str:
    base = study.variants[study.baseline.partition("@")[0]].label or study.baseline
    others = [
        f"{MEASURES[c.measure].label}: “{study.variants[c.baseline.partition('@')[0]].label}”"
        for c in study.columns
        if c.is_delta and c.baseline is not None
    ]
    words = f"Δ % is relative to “{base}”" + (f" ({'; '.join(others)})" if others else "")
    seeds = f"{len(study.seeds)} seed{'s' if len(study.seeds) > 1 else ''}"
    over = "seeds and test requests"
    if len(study.seeds) == 1:
        over = "test requests alone, so that no claim can be called held"
    return (
        f"{words}, whose own value stands in brackets; means over {seeds}, with 95 % intervals "
        f"over {over}."
    )


def _ordering_parts(table: StudyTable) -> list[str]:
    if not table.verdicts:
        return []
    counts = count_outcomes(table.verdicts)
    said = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)
    rows = [
        [verdict.claim, verdict.source, MARKS[verdict.outcome] + _hint(verdict), _numbers(verdict)]
        for verdict in table.verdicts
    ]
    return [
        f"## What the papers claim: {said}",
        _lines(["claim", "source", "found", "differences, positive speaks for the claim"], rows),
    ]


def _hint(verdict: Verdict) -> str:
    if verdict.outcome != "not shown":
        return ""
    return "; means agree" if verdict.agrees_in_mean else "; means disagree"


def _numbers(verdict: Verdict) -> str:
    """AUC in points, everything else in its own unit."""
    points = verdict.measure.relative
    texts = []
    for step in verdict.steps:
        difference = scaled(step.difference, 100) if points else step.difference
        digits = 2 if points else 1 if abs(difference.value) >= 1 else 4
        numbers = interval_text(difference, digits=digits, sign=True)
        known = step.outcome != "not measured"
        texts.append(f"{step.statement}: {numbers if known else DASH}")
    unit = f"{verdict.measure.label} points" if points else verdict.measure.label
    return f"{unit}: " + "; ".join(texts)


def _lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def _entry_json(entry: Entry) -> dict[str, Any]:
    return {
        "is_baseline": entry.is_baseline,
        "value": _estimate_json(entry.value),
        "delta_percent": _estimate_json(entry.delta),
        **({"share_percent": _estimate_json(entry.share)} if entry.share else {}),
    }


def _estimate_json(value: Estimate | None) -> dict[str, Any] | None:
    if value is None:
        return None
    bounds = value.interval.to_json()
    return {
        "mean": bounds["value"],
        "low": bounds["low"],
        "high": bounds["high"],
        "median": value.median,
        "lowest": value.lowest,
        "highest": value.highest,
        "num_seeds": value.num_seeds,
    }

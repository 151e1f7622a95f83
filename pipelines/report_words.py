"""The report's sentences: what the numbers mean, and how sure one may be."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC
from typing import Final

from driftline.pipelines.report_figures import ReplayFigures
from driftline.pipelines.report_numbers import PolicyFigures, RefreshCost
from driftline.pipelines.report_rows import NEVER
from driftline.pipelines.report_style import LABELS, minus
from driftline.platform.bootstrap import Interval
from driftline.platform.windows import Window

UNKNOWN: Final = "\N{EN DASH}"
RIVALS: Final = ("arms_only", "mlp_hourly", "lightgbm_hourly")
ABSENT: Final = {
    "never": "the never-refreshed student, so the worth of refreshing is not measured",
    "arms_only": "the student with refreshed arms and a stale head",
    "mlp_hourly": "the MLP re-trained hourly",
    "mlp_never": "the MLP never re-trained",
    "lightgbm_hourly": "LightGBM re-trained hourly",
    "oracle": "the true click probabilities (only a simulated market knows them)",
    "stale": "students of some hours ago, so the staleness cost curve is not measured",
    "parts": "marks of new or rare items, so parts of the traffic are not told apart",
}


def describe_headline(policies: Sequence[PolicyFigures], window: Window) -> str:
    """The verdict in one sentence, number first."""
    hours = f"the last {window.num_hours:g} hours"
    never = next((figures for figures in policies if figures.policy == NEVER), None)
    if never is None:
        auc = policies[0].measures["auc"]
        return f"The refreshed student ranked with AUC {bracketed(auc, 4)} over {hours}"
    gain = flipped(never.to_refreshed["auc"])
    if not gain.is_known:
        return f"Too few clicks in {hours} to say what refreshing was worth"
    if gain.low > 0:
        return f"Refreshing was worth {points(gain)} AUC points over {hours}"
    if gain.high < 0:
        return f"Refreshing cost {points(flipped(gain))} AUC points over {hours}: staying put won"
    return f"Refreshing made no difference that {hours} can show: {signed(gain)} AUC points"


def describe_findings(figures: ReplayFigures) -> list[str]:
    """What else one should know, a sentence each."""
    said = []
    staleness = figures.staleness
    if staleness is not None and staleness.points[-1].auc_lost.is_known:
        chosen = [p for p in staleness.points if p.hours in (1, 6, 24)] or [staleness.points[-1]]
        losses = [f"{hours_words(p.hours)} old loses {points(p.auc_lost)}" for p in chosen]
        said.append(f"In AUC points, a student that is {'; '.join(losses)}.")
    for rival in _known_rivals(figures.policies):
        said.append(_against(rival))
    gap = figures.oracle_gap
    if gap is not None:
        said.append(
            f"Of the AUC between never refreshing and the true click probabilities, "
            f"{percent(gap.recovered)} was recovered."
        )
    head, arms = figures.costs.get("head"), figures.costs.get("arms")
    if head is not None:
        cost = f"A head refresh takes {head.median_seconds:.1f} s"
        cost += f" ({head.median_core_seconds:,.1f} core-seconds)"
        if arms is not None and head.median_core_seconds > 0:
            ratio = arms.median_core_seconds / head.median_core_seconds
            cost += f"; an arms refresh costs {ratio:,.0f} times as much"
        said.append(cost + ".")
    if figures.costs:
        count = sum(cost.count for cost in figures.costs.values())
        refused = sum(cost.num_refused for cost in figures.costs.values())
        said.append(f"The gate refused {refused or 'none'} of {count} refreshes.")
    return said


def _known_rivals(policies: Sequence[PolicyFigures]) -> list[PolicyFigures]:
    rivals = [each for each in policies if each.policy in RIVALS]
    return [rival for rival in rivals if rival.to_refreshed["auc"].is_known]


def _against(rival: PolicyFigures) -> str:
    lead, name = flipped(rival.to_refreshed["auc"]), LABELS[rival.policy]
    if lead.low > 0:
        return f"The refreshed student leads “{name}” by {points(lead)} AUC points."
    if lead.high < 0:
        return f"“{name}” leads the refreshed student by {points(flipped(lead))} AUC points."
    return f"No difference to “{name}” can be shown: {signed(lead)} AUC points."


def describe_tiles(figures: ReplayFigures) -> list[tuple[str, str]]:
    """Number and caption of up to four tiles."""
    tiles = []
    never = next((each for each in figures.policies if each.policy == NEVER), None)
    if never is not None and never.to_refreshed["auc"].is_known:
        gain = flipped(never.to_refreshed["auc"])
        tiles.append(
            (minus(f"{100 * gain.value:+.2f}"), f"AUC points by refreshing {_range(gain)}")
        )
    if figures.staleness is not None and figures.staleness.points[-1].auc_lost.is_known:
        by_hours = {point.hours: point for point in figures.staleness.points}
        point = by_hours.get(24, figures.staleness.points[-1])
        lost = flipped(point.auc_lost)
        label = f"AUC points after {hours_words(point.hours)} without a refresh {_range(lost)}"
        tiles.append((minus(f"{100 * lost.value:+.2f}"), label))
    if figures.oracle_gap is not None:
        share = figures.oracle_gap.recovered
        label = f"of what could be won was won [{100 * share.low:.0f}, {100 * share.high:.0f}]"
        tiles.append((f"{100 * share.value:.0f} %", label))
    head, arms = figures.costs.get("head"), figures.costs.get("arms")
    if head is not None:
        label = "for one head refresh"
        if arms is not None and head.median_core_seconds > 0:
            label += f", 1/{arms.median_core_seconds / head.median_core_seconds:,.0f} of the arms"
        tiles.append((f"{head.median_core_seconds:,.1f} core-s", label))
    return tiles


def describe_absent(names: Iterable[str]) -> list[str]:
    """What the scores lack, and what follows."""
    return [ABSENT[name] for name in names]


# --- numbers in words ---------------------------------------------------------------------


def flipped(interval: Interval) -> Interval:
    """The difference seen from the other side."""
    return Interval(-interval.value, -interval.high, -interval.low)


def points(interval: Interval) -> str:
    """AUC as points: ``8.13 [7.52, 8.75]``."""
    return bracketed(Interval(*(100 * each for each in vars(interval).values())), 2)


def signed(interval: Interval) -> str:
    """The same with signs: ``+0.10 [-0.20, +0.40]``."""
    if not interval.is_known:
        return UNKNOWN
    value, low, high = (f"{100 * each:+.2f}" for each in vars(interval).values())
    return minus(f"{value} [{low}, {high}]")


def bracketed(interval: Interval, digits: int) -> str:
    """Value and interval; a dash for what is not known."""
    if not interval.is_known:
        return f"{interval.value:.{digits}f}" if interval.value == interval.value else UNKNOWN
    value, low, high = (f"{each:.{digits}f}" for each in vars(interval).values())
    return f"{value} [{low}, {high}]"


def percent(interval: Interval) -> str:
    """A share: ``83 % [81, 86]``."""
    return f"{100 * interval.value:.0f} % [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"


def hours_words(hours: float) -> str:
    """``1 hour``, ``6 hours``."""
    return f"{hours:g} hour" if hours == 1 else f"{hours:g} hours"


def window_words(window: Window) -> str:
    """``2026-01-06 00:00 to 2026-01-09 00:00 UTC``."""
    start, end = (each.astimezone(UTC) for each in (window.start, window.end))
    return f"{start:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M} UTC"


def every_words(costs: Mapping[str, RefreshCost]) -> str:
    """How often the head was refreshed, as a noun."""
    every = costs["head"].every_hours if "head" in costs else None
    if every is None or every == 1:
        return "an hourly refresh"
    return f"a refresh every {every:g} h"


def _range(interval: Interval) -> str:
    return (
        minus(f"[{100 * interval.low:+.2f}, {100 * interval.high:+.2f}]")
        if interval.is_known
        else ""
    )

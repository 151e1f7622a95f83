"""Every number of the replay report, measured from the scores; no picture, no prose.

All policies scored the same impressions, so all comparisons are paired: the same resamples of
requests, the same rows. Where a policy has no score for some rows (a champion of 24 hours ago
does not exist in the first 24 hours), the comparison is made on the rows that have one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from statistics import median
from typing import Any, Final

import numpy as np

from driftline.pipelines.report_rows import NEVER, REFRESHED, Paired, Rows, moment, present
from driftline.platform.bootstrap import Interval, Metric, percentile_interval
from driftline.platform.metrics import FloatArray
from driftline.platform.windows import HOUR

METRICS: Final[tuple[Metric, ...]] = ("auc", "mean_auc", "ne", "calibration")
HOURLY_METRICS: Final[tuple[Metric, ...]] = ("auc", "ne", "calibration")
CADENCES: Final = (1, 3, 6, 12, 24, 48, 168)
SMOOTHINGS: Final = (1, 3, 6, 12, 24)
CLICKS_PER_POINT: Final = 200
"""An hourly point should rest on about so many clicks, else it pools several hours."""
HOURLY_SAMPLES: Final = 200


# --- the last hours: who is better --------------------------------------------------------


@dataclass(frozen=True)
class PolicyFigures:
    """One policy over the hours of the verdict."""

    policy: str
    share_scored: float
    """Below 1 when the policy began later; all its figures are then of those rows."""
    measures: Mapping[Metric, Interval]
    to_refreshed: Mapping[Metric, Interval]
    """This policy minus ``refreshed`` on the same rows; empty for ``refreshed`` itself."""


def measure_policies(rows: Rows, *, num_samples: int, seed: int) -> tuple[PolicyFigures, ...]:
    """AUC, mean AUC per request, NE and calibration of every policy that is there."""
    everywhere = Paired(rows, num_samples=num_samples, seed=seed)
    found = []
    for policy in present(rows):
        share = rows.share_known(policy)
        paired = everywhere
        if share < 1:
            paired = Paired(rows.having([policy]), num_samples=num_samples, seed=seed)
        compared = METRICS if policy != REFRESHED else ()
        found.append(
            PolicyFigures(
                policy=policy,
                share_scored=share,
                measures={metric: paired.interval(metric, policy) for metric in METRICS},
                to_refreshed={m: paired.difference(m, policy, REFRESHED) for m in compared},
            )
        )
    return tuple(found)


@dataclass(frozen=True)
class PartFigures:
    """Refreshed and never refreshed on part of the rows (papers.md S0.37)."""

    part: str
    num_rows: int
    num_clicks: int
    auc: Interval
    gain: Interval | None
    """AUC of ``refreshed`` minus ``never``."""


def measure_parts(rows: Rows, *, num_samples: int, seed: int) -> tuple[PartFigures, ...]:
    """Each boolean column of the scores, and the rows outside it."""
    found = []
    for name, mask in rows.parts.items():
        for label, chosen in ((name, mask), (f"not {name}", ~mask)):
            part = rows.where(chosen)
            paired = Paired(part, num_samples=num_samples, seed=seed)
            compared = NEVER in part.predictions and part.share_known(NEVER) == 1
            gain = paired.difference("auc", REFRESHED, NEVER) if compared else None
            auc = paired.interval("auc", REFRESHED)
            found.append(PartFigures(label, len(part.labels), part.num_clicks, auc, gain))
    return tuple(found)


@dataclass(frozen=True)
class OracleGap:
    """How much of what could be won was won."""

    never: float
    refreshed: float
    oracle: float
    recovered: Interval
    """(AUC refreshed - never) / (AUC oracle - never)."""


def measure_oracle_gap(rows: Rows, *, num_samples: int, seed: int) -> OracleGap | None:
    """``None`` unless the true click probabilities and a never-refreshed student are there."""
    policies = (REFRESHED, NEVER, "oracle")
    if not set(policies) <= set(rows.predictions):
        return None
    paired = Paired(rows.having(policies), num_samples=num_samples, seed=seed)
    refreshed, never, oracle = (paired.value("auc", policy) for policy in policies)
    if not oracle > never:
        return None
    drawn = [paired.samples("auc", policy) for policy in policies]
    shares = (drawn[0] - drawn[1]) / np.where(drawn[2] > drawn[1], drawn[2] - drawn[1], np.nan)
    recovered = percentile_interval((refreshed - never) / (oracle - never), shares)
    return OracleGap(never, refreshed, oracle, recovered)


# --- hour by hour -------------------------------------------------------------------------


@dataclass(frozen=True)
class HourlyFigures:
    """Each hour with its 95 % interval; a point may pool the hours before it."""

    pooled_hours: int
    """A point covers this many hours, up to and including its own."""
    hours: tuple[datetime, ...]
    """Beginning of each point's own hour."""
    num_rows: tuple[int, ...]
    """In the point's own hour."""
    num_clicks: tuple[int, ...]
    measures: Mapping[str, Mapping[Metric, tuple[Interval, ...]]]
    """By policy and measure, one interval a point."""
    gain: tuple[Interval, ...]
    """AUC of ``refreshed`` minus ``never``; empty without ``never``."""


def measure_hours(rows: Rows, *, pooled_hours: int, seed: int) -> HourlyFigures:
    """Follow every policy through the replay."""
    num_hours = int(rows.hours[-1]) + 1
    clicks = np.bincount(rows.hours, weights=rows.labels, minlength=num_hours).astype(np.float64)
    policies = [name for name in present(rows) if rows.share_known(name) == 1]
    cuts = np.searchsorted(rows.hours, np.arange(num_hours + 1))
    points = [hour for hour in range(num_hours) if cuts[hour + 1] > cuts[hour]]
    measured: dict[str, dict[Metric, list[Interval]]] = {
        policy: {metric: [] for metric in HOURLY_METRICS} for policy in policies
    }
    gain = []
    for hour in points:
        window = rows.where(slice(cuts[max(0, hour - pooled_hours + 1)], cuts[hour + 1]))
        paired = Paired(window, num_samples=HOURLY_SAMPLES, seed=seed)
        for policy in policies:
            for metric in HOURLY_METRICS:
                measured[policy][metric].append(paired.interval(metric, policy))
        if NEVER in policies:
            gain.append(paired.difference("auc", REFRESHED, NEVER))
    return HourlyFigures(
        pooled_hours=pooled_hours,
        hours=tuple(rows.start + timedelta(hours=hour) for hour in points),
        num_rows=tuple(int(cuts[hour + 1] - cuts[hour]) for hour in points),
        num_clicks=tuple(int(clicks[hour]) for hour in points),
        measures={p: {m: tuple(v) for m, v in by.items()} for p, by in measured.items()},
        gain=tuple(gain),
    )


def choose_pooling(rows: Rows) -> int:
    """The fewest hours that usually hold enough clicks for a point that one can read."""
    clicks = np.bincount(rows.hours, weights=rows.labels)
    usual = float(np.median(clicks[clicks > 0])) if (clicks > 0).any() else 0.0
    fitting = [hours for hours in SMOOTHINGS if hours * usual >= CLICKS_PER_POINT]
    return fitting[0] if fitting else SMOOTHINGS[-1]


# --- what staleness costs -----------------------------------------------------------------


@dataclass(frozen=True)
class StalePoint:
    """What a student of some hours ago loses against the refreshed one."""

    hours: int
    auc_lost: Interval
    """AUC of ``refreshed`` minus the stale one: positive is a loss."""
    ne_lost: Interval
    """NE of the stale one minus ``refreshed``: positive is a loss."""


@dataclass(frozen=True)
class Cadence:
    """Refreshing the head every so many hours: what it costs and what it keeps."""

    every_hours: float
    refreshes_per_day: float
    core_seconds_per_day: float | None
    auc_lost: Interval
    """Mean over the hours between two refreshes, against the replayed cadence."""


@dataclass(frozen=True)
class StalenessFigures:
    """The staleness cost curve and the choice of a cadence."""

    num_rows: int
    points: tuple[StalePoint, ...]
    never: StalePoint | None
    """The never-refreshed student on the same rows; its hours are its mean age."""
    cadences: tuple[Cadence, ...]
    too_short: tuple[int, ...]
    """Hours of staleness that the replay is too short to measure."""


def measure_staleness(
    rows: Rows, *, head_core_seconds: float | None, head_every: float, num_samples: int, seed: int
) -> StalenessFigures | None:
    """Compare the student of k hours ago with the refreshed one, on the rows all of them scored.

    Args:
        rows: The hours of the verdict.
        head_core_seconds: Cost of one head refresh.
        head_every: Hours between head refreshes in the replay, the shortest cadence measured.
        num_samples: Resamples.
        seed: Of the resamples.
    """
    names = {int(n[6:-1]): n for n in rows.predictions if n.startswith("stale_") and n[-1] == "h"}
    kept = {hours: name for hours, name in sorted(names.items()) if rows.share_known(name) >= 0.5}
    if not kept:
        return None
    common = rows.having(kept.values())
    paired = Paired(common, num_samples=num_samples, seed=seed)
    points = tuple(_stale_point(paired, name, hours) for hours, name in kept.items())
    never = None
    if NEVER in rows.predictions and common.share_known(NEVER) == 1:
        never = _stale_point(paired, NEVER, round(float(common.hours.mean())))
    fresh_value, fresh = paired.value("auc", REFRESHED), paired.samples("auc", REFRESHED)
    ages = [0, *kept]
    values = [0.0, *(fresh_value - paired.value("auc", name) for name in kept.values())]
    samples = [0 * fresh, *(fresh - paired.samples("auc", name) for name in kept.values())]
    cadences = []
    for every in (head_every, *(c for c in CADENCES if head_every < c <= ages[-1] + head_every)):
        weights_A = _weights_of_ages(ages, every, head_every)
        per_day = 24 / every
        cost = None if head_core_seconds is None else per_day * head_core_seconds
        lost = percentile_interval(float(weights_A @ values), weights_A @ np.array(samples))
        cadences.append(Cadence(every, per_day, cost, lost))
    too_short = tuple(sorted(set(names) - set(kept)))
    return StalenessFigures(len(common.labels), points, never, tuple(cadences), too_short)


def _stale_point(paired: Paired, policy: str, hours: int) -> StalePoint:
    return StalePoint(
        hours=hours,
        auc_lost=paired.difference("auc", REFRESHED, policy),
        ne_lost=paired.difference("ne", policy, REFRESHED),
    )


def _weights_of_ages(ages: Sequence[int], every: float, head_every: float) -> FloatArray:
    """How much each measured age counts under a cadence; straight lines between measured ages.

    A head refreshed every 6 hours is, when the replay refreshed it hourly, 0 to 5 hours older
    than the replayed one.
    """
    occurring = np.arange(0, every, head_every)
    each = [np.interp(occurring, ages, column).mean() for column in np.eye(len(ages))]
    return np.array(each)


# --- what refreshing costs ----------------------------------------------------------------


@dataclass(frozen=True)
class RefreshCost:
    """Refreshes of one kind."""

    kind: str
    count: int
    num_promoted: int
    num_refused: int
    median_seconds: float
    median_core_seconds: float
    every_hours: float | None
    """Median distance in event time."""


def measure_costs(refreshes: Sequence[Mapping[str, Any]]) -> dict[str, RefreshCost]:
    """Head and arms refreshes, and what each took."""
    found = {}
    for kind in ("head", "arms"):
        chosen = [refresh for refresh in refreshes if refresh["kind"] == kind]
        if not chosen:
            continue
        times = sorted(moment(refresh["as_of"]) for refresh in chosen)
        gaps = [(b - a) / HOUR for a, b in pairwise(times)]
        found[kind] = RefreshCost(
            kind=kind,
            count=len(chosen),
            num_promoted=sum(refresh["decision"] == "promoted" for refresh in chosen),
            num_refused=sum(refresh["decision"] == "refused" for refresh in chosen),
            median_seconds=median(float(refresh["seconds"]) for refresh in chosen),
            median_core_seconds=median(float(refresh["core_seconds"]) for refresh in chosen),
            every_hours=median(gaps) if gaps else None,
        )
    return found

"""All numbers of the replay report in one value."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

import pyarrow as pa

from driftline.pipelines.report_numbers import (
    HourlyFigures,
    OracleGap,
    PartFigures,
    PolicyFigures,
    RefreshCost,
    StalenessFigures,
    choose_pooling,
    measure_costs,
    measure_hours,
    measure_oracle_gap,
    measure_parts,
    measure_policies,
    measure_staleness,
)
from driftline.pipelines.report_rows import POLICIES, Rows, present, read_rows
from driftline.platform.windows import HOUR, Window

DEFAULT_SAMPLES: Final = 500


@dataclass(frozen=True)
class ReplayFigures:
    """Everything the report says, as numbers."""

    verdict_window: Window
    """The last hours, on which policies are compared."""
    num_rows: int
    num_clicks: int
    num_requests: int
    policies: tuple[PolicyFigures, ...]
    parts: tuple[PartFigures, ...]
    oracle_gap: OracleGap | None
    staleness: StalenessFigures | None
    costs: Mapping[str, RefreshCost]
    peers: Mapping[str, float]
    """Median seconds of one re-training, by policy."""
    pooled: HourlyFigures
    single: HourlyFigures
    absent: tuple[str, ...]
    """What the scores did not hold: policies, ``stale`` students, ``parts``."""


def measure_replay(replay: Mapping[str, Any], scores: pa.Table) -> ReplayFigures:
    """All numbers of the report."""
    rows = read_rows(scores)
    seed = int(replay.get("seed", 0))
    resamples = {"num_samples": int(replay.get("num_bootstrap", DEFAULT_SAMPLES)), "seed": seed}
    last = last_rows(rows, int(replay["last_hours"]))
    refreshes = replay.get("refreshes", ())
    costs = measure_costs(refreshes)
    head = costs.get("head")
    return ReplayFigures(
        verdict_window=_window(last),
        num_rows=len(last.labels),
        num_clicks=last.num_clicks,
        num_requests=last.num_requests,
        policies=measure_policies(last, **resamples),
        parts=measure_parts(last, **resamples),
        oracle_gap=measure_oracle_gap(last, **resamples),
        staleness=measure_staleness(
            last,
            head_core_seconds=head.median_core_seconds if head else None,
            head_every=(head.every_hours if head else None) or 1.0,
            **resamples,
        ),
        costs=costs,
        peers=_peer_seconds(replay.get("peers", ())),
        pooled=measure_hours(rows, pooled_hours=choose_pooling(rows), seed=seed),
        single=measure_hours(rows, pooled_hours=1, seed=seed),
        absent=_absent(rows),
    )


def _absent(rows: Rows) -> tuple[str, ...]:
    names = [policy for policy in POLICIES if policy not in present(rows)]
    names += [] if any(name.startswith("stale_") for name in rows.predictions) else ["stale"]
    return (*names, *([] if rows.parts else ["parts"]))


def last_rows(rows: Rows, num_hours: int) -> Rows:
    """The rows of the last so many hours; all of a shorter replay."""
    return rows.where(rows.hours > rows.hours[-1] - num_hours)


def _window(rows: Rows) -> Window:
    first, last = (rows.start + int(rows.hours[i]) * HOUR for i in (0, -1))
    return Window(first, last + HOUR)


def _peer_seconds(peers: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    seconds: dict[str, list[float]] = {}
    for fit in peers:
        seconds.setdefault(fit["policy"], []).append(float(fit["seconds"]))
    return {policy: median(each) for policy, each in seconds.items()}

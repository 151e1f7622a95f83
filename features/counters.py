"""Hourly counters of products, categories and category pairs, from outcomes known at the time.

At boundary h a window of w hours holds the impressions whose outcome became known in (h - w, h],
that is whose ``event_time + maturity`` lies there. A row of boundary h has ``event_time`` =
``created_time`` = h: requests from h on may see it.

Shape suffixes: P keys, N boundaries, R rows that are written.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from driftline.features.counter_events import (
    NEVER,
    CounterEvents,
    Group,
    HourCounts,
    open_events,
)
from driftline.features.log import ImpressionLog
from driftline.features.maturity import HOUR_MICROS
from driftline.features.sources import ensure_source, write_hours
from driftline.features.views import View, feature_views
from driftline.platform.settings import CounterSettings, DriftlineSettings
from driftline.platform.windows import HOUR, Window, floor_time
from driftline.platform.workspace import Workspace

logger = logging.getLogger(__name__)

MAX_CELLS: Final = 2_000_000
"""Keys times boundaries that are worked on at once; bounds the memory."""
DAYS_AT_ONCE: Final = 7
"""Days aggregated by one pass over the log."""

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class CounterReport:
    """What :func:`compute_counters` wrote."""

    num_boundaries: int
    num_rows: Mapping[str, int]
    """Rows by view."""


def compute_counters(
    settings: DriftlineSettings,
    *,
    window: Window,
    progress: Callable[[int, int], None] | None = None,
) -> CounterReport:
    """Write the rows of every hour boundary in ``(window.start, window.end]``.

    Rows of these boundaries replace what was there; other boundaries stay. Hence a repeated or
    interrupted call ends in the same files.

    Raises:
        MissingArtefactError: there is no clean log.
    """
    log = ImpressionLog.open(Workspace.of(settings).clean, settings)
    views = {v.entity: v for v in feature_views(settings) if v.origin == "derived"}
    for view in views.values():
        ensure_source(view, settings, key=log.key_type)
    first = _hour_number(floor_time(window.start, HOUR)) + 1
    last = _hour_number(floor_time(window.end, HOUR))
    longest = max(settings.counters.windows_hours)
    num_rows = dict.fromkeys((view.name for view in views.values()), 0)
    for block in _day_blocks(first, last):
        reach = block[0][0] - longest + 1
        with open_events(log, settings, first_hour=reach, last_hour=block[-1][1]) as events:
            for start, end in block:
                for view in views.values():
                    rows = _day_rows(events, view, settings, first=start, last=end)
                    write_hours(view, rows, settings)
                    num_rows[view.name] += sum(table.num_rows for table in rows.values())
                if progress is not None:
                    progress(end - first + 1, last - first + 1)
    logger.info("wrote counters of %d hours: %s rows", max(0, last - first + 1), num_rows)
    return CounterReport(max(0, last - first + 1), num_rows)


def windowed_sums(
    counts: HourCounts, values: Numbers, *, hours: int, first: int, last: int
) -> Numbers:
    """Sum of ``values`` by key over the ``hours`` up to each boundary. ``[P, N]``.

    Each entry is added where it enters the window and taken off where it leaves; one running sum
    gives all boundaries ``first`` .. ``last``.
    """
    num = last - first + 1
    enter = np.maximum(counts.hour - first, 0)
    leave = counts.hour + hours - first
    inside = (leave > 0) & (enter < num)
    cell = counts.code[inside] * (num + 1)
    size = len(counts.keys) * (num + 1)
    change = np.zeros(size)
    change += np.bincount(cell + enter[inside], weights=values[inside], minlength=size)
    gone = np.minimum(leave[inside], num)
    change -= np.bincount(cell + gone, weights=values[inside], minlength=size)
    sums: Numbers = np.cumsum(change.reshape(-1, num + 1), axis=1)[:, :num]
    return sums


def smoothed_rate(
    clicks: Numbers, impressions: Numbers, *, prior: Numbers, strength: float
) -> Numbers:
    """Click rate pulled towards the overall rate: ``(c + prior * s) / (n + s)``. ``[P, N]``."""
    rate: Numbers = (clicks + prior * strength) / (impressions + strength)
    return rate


def _day_rows(
    events: CounterEvents, view: View, settings: DriftlineSettings, *, first: int, last: int
) -> dict[datetime, pa.Table]:
    """Rows by boundary; the boundaries are taken in pieces when there are very many keys."""
    counters = settings.counters
    reach = first - max(counters.windows_hours) + 1
    group: Group = "ad" if view.entity == "product" else view.entity
    counts = {group: events.counts(group, first_hour=reach, last_hour=last)}
    if view.entity == "product":
        counts["page"] = events.counts("page", first_hour=reach, last_hour=last)
        counts = _share_keys(counts)
    num_keys = max(1, len(counts[group].keys))
    step = max(1, MAX_CELLS // num_keys)
    rows: dict[datetime, pa.Table] = {}
    for start in range(first, last + 1, step):
        end = min(start + step - 1, last)
        prior = _prior(events, counters, first=start, last=end)
        columns = _group_columns(counts[group], counters, prior=prior, first=start, last=end)
        if view.entity == "product":
            columns |= _page_columns(counts["page"], counters, prior=prior, first=start, last=end)
            columns |= _recency_columns(events, counts["ad"], first=start, last=end)
        active = columns[f"impressions_{max(counters.windows_hours)}h"] > 0
        if view.entity == "product":
            active |= columns[f"page_impressions_{max(counters.windows_hours)}h"] > 0
        for index, hour in enumerate(range(start, end + 1)):
            rows[_hour_time(hour)] = _table(
                view, counts[group].keys, columns, active[:, index], index, hour
            )
    return rows


def _table(
    view: View,
    keys: pa.Array,
    columns: Mapping[str, Numbers],
    active: NDArray[np.bool_],
    index: int,
    hour: int,
) -> pa.Table:
    rows = np.flatnonzero(active)
    chosen = keys.take(pa.array(rows))
    order = pc.sort_indices(chosen)
    rows = rows[np.asarray(order)]
    time = pa.array(np.full(len(rows), hour * HOUR_MICROS), pa.timestamp("us", tz="UTC"))
    values = {
        name: pa.array(columns[name][rows, index].astype(np.float32), from_pandas=True)
        for name in view.features.names
    }
    key = chosen.take(order)
    arrays = {view.join_key: key, "event_time": time, "created_time": time, **values}
    return pa.table(arrays, schema=view.schema(key=keys.type))


def _group_columns(
    counts: HourCounts, counters: CounterSettings, *, prior: Numbers, first: int, last: int
) -> dict[str, Numbers]:
    columns = {}
    for hours in counters.windows_hours:
        shown = windowed_sums(counts, counts.impressions, hours=hours, first=first, last=last)
        clicked = windowed_sums(counts, counts.clicks, hours=hours, first=first, last=last)
        columns[f"impressions_{hours}h"] = shown
        columns[f"clicks_{hours}h"] = clicked
        columns[f"ctr_{hours}h"] = smoothed_rate(
            clicked, shown, prior=prior, strength=counters.prior_strength
        )
    return columns


def _page_columns(
    counts: HourCounts, counters: CounterSettings, *, prior: Numbers, first: int, last: int
) -> dict[str, Numbers]:
    group = _group_columns(counts, counters, prior=prior, first=first, last=last)
    return {f"page_{name}": column for name, column in group.items()}


def _recency_columns(
    events: CounterEvents, counts: HourCounts, *, first: int, last: int
) -> dict[str, Numbers]:
    """Hours since the first, the last and the last clicked impression as the ad; NaN if never."""
    shape = (len(counts.keys), last - first + 1)
    start, shown, clicked = (np.full(shape, NEVER) for _ in range(3))
    past = events.history(counts.keys, before_hour=first)
    code = np.asarray(pc.index_in(past.keys, value_set=counts.keys)).astype(np.int64)[past.code]
    inside = (counts.hour >= first) & (counts.hour <= last)
    cell = (counts.code[inside], counts.hour[inside] - first)
    # Negated, the first impression is a running maximum like the others.
    for grid, name, sign in ((start, "first", -1), (shown, "last", 1), (clicked, "last_click", 1)):
        grid[cell] = sign * getattr(counts, name)[inside]
        grid[code, 0] = np.maximum(grid[code, 0], sign * getattr(past, name)[...])
        np.maximum.accumulate(grid, axis=1, out=grid)
    now = np.arange(first, last + 1) * HOUR_MICROS
    return {
        "hours_since_first": _hours(now + np.where(start == NEVER, 0, start), start),
        "hours_since_shown": _hours(now - np.where(shown == NEVER, 0, shown), shown),
        "hours_since_click": _hours(now - np.where(clicked == NEVER, 0, clicked), clicked),
    }


def _hours(micros: NDArray[np.int64], moment: NDArray[np.int64]) -> Numbers:
    return np.where(moment == NEVER, np.nan, micros / HOUR_MICROS)


def _prior(events: CounterEvents, counters: CounterSettings, *, first: int, last: int) -> Numbers:
    """Known click rate of the whole log over the longest window, at each boundary. ``[N]``."""
    longest = max(counters.windows_hours)
    shown, clicked = events.totals(first_hour=first - longest + 1, last_hour=last)
    ends = np.arange(longest, longest + last - first + 1)
    sums = [np.concatenate([[0.0], np.cumsum(values)]) for values in (shown, clicked)]
    num, hits = (total[ends] - total[ends - longest] for total in sums)
    return np.divide(hits, num, out=np.zeros_like(hits), where=num > 0)


def _share_keys(counts: Mapping[Group, HourCounts]) -> dict[Group, HourCounts]:
    """The same counts with codes into one common list of keys."""
    keys = pa.concat_arrays([count.keys for count in counts.values()]).unique()
    shared: dict[Group, HourCounts] = {}
    for name, count in counts.items():
        place = np.asarray(pc.index_in(count.keys, value_set=keys)).astype(np.int64)
        fields: dict[str, Any] = {**vars(count), "keys": keys, "code": place[count.code]}
        shared[name] = HourCounts(**fields)
    return shared


def _day_blocks(first: int, last: int) -> list[list[tuple[int, int]]]:
    """First and last boundary of each UTC day, in blocks of days."""
    days = [
        (max(first, day * 24), min(last, day * 24 + 23))
        for day in range(first // 24, last // 24 + 1)
    ]
    days = [day for day in days if day[0] <= day[1]]
    return [days[n : n + DAYS_AT_ONCE] for n in range(0, len(days), DAYS_AT_ONCE)]


def _hour_number(moment: datetime) -> int:
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // HOUR


def _hour_time(hour: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(hours=hour)

"""Point-in-time joins of an entity table with feature views, in slices of time.

DuckDB reads the feature rows of a slice's time range and its products; ``asof.Versions`` finds the
row of every entity row; Arrow gathers the values. The entity columns themselves are never touched:
one row in is one row out, in its place, by construction. This module knows nothing of Feast.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field

import duckdb
import numpy as np
import pyarrow as pa

from driftline.features.feast_plugins.asof import Int64s
from driftline.features.feast_plugins.errors import FeatureStoreError
from driftline.features.feast_plugins.history import FOLD_ROWS, History
from driftline.features.feast_plugins.keys import as_key_type
from driftline.features.feast_plugins.scan import (
    UNKNOWN_US,
    DuckDbSettings,
    FeatureSource,
    connect,
)

Rows = slice | Int64s
"""A slice of the entity table: a range, or row numbers where the table is not in time order."""


@dataclass(frozen=True)
class ViewJoin:
    """One feature view under one name, joined through one column of the entity table."""

    label: str
    source: FeatureSource
    entity_key: str
    columns: tuple[tuple[str, str], ...]
    """``(column of the source, column of the result)`` pairs."""
    ttl_us: int = 0
    """Oldest age that still counts, its edge included; 0 is no limit."""


@dataclass(frozen=True)
class JoinPlan:
    """What to join and what it may take of the machine; pickles, so that a Ray task can run it."""

    views: tuple[ViewJoin, ...]
    as_known: bool = False
    """Hide values until they were written (``created``)."""
    duckdb: DuckDbSettings = field(default_factory=DuckDbSettings)
    slice_rows: int = 500_000
    """Entity rows joined at a time; a slice is a stretch of time."""
    fold_rows: int = FOLD_ROWS
    """Feature rows held before superseded ones are dropped."""


def join_features(entities: pa.Table, at_us: Int64s, plan: JoinPlan) -> pa.Table:
    """Features of each entity row as of its own moment, row for row.

    Args:
        entities: Holds at least the key columns that ``plan`` names.
        at_us: Moment of each row in microseconds; ``UNKNOWN_US`` finds nothing. ``[N]``.
        plan: Views to join.

    Returns:
        The feature columns alone, ``[N]`` rows in the order of ``entities``.

    Raises:
        FeatureStoreError: a column or a file is missing, or keys are of different kinds.
    """
    keys = key_columns(entities, plan)
    slices = list(time_slices(at_us, plan.slice_rows))
    with connect(plan.duckdb) as connection, ThreadPoolExecutor(plan.duckdb.threads) as threads:
        join = _Join(connection, threads, keys, plan)
        parts = [join.rows(rows, at_us[rows]) for rows in slices]
    return in_entity_order(parts, slices)


def key_columns(entities: pa.Table, plan: JoinPlan) -> dict[str, pa.Array]:
    """The key columns that ``plan`` needs, each in one piece.

    Raises:
        FeatureStoreError: the entity table lacks one.
    """
    columns: dict[str, pa.Array] = {}
    for view in plan.views:
        if view.entity_key not in entities.column_names:
            raise FeatureStoreError(
                f"feature view {view.label} joins on {view.entity_key}, which the entity table "
                f"lacks; it has {', '.join(entities.column_names)}"
            )
        columns[view.entity_key] = entities.column(view.entity_key).combine_chunks()
    return columns


def time_slices(at_us: Int64s, slice_rows: int) -> Iterator[Rows]:
    """Cut the rows into stretches of time of at most ``slice_rows`` rows; at least one."""
    in_order = len(at_us) <= slice_rows or bool(np.all(at_us[1:] >= at_us[:-1]))
    order = None if in_order else np.argsort(at_us, kind="stable")
    for start in range(0, max(len(at_us), 1), slice_rows):
        rows = slice(start, min(start + slice_rows, len(at_us)))
        yield rows if order is None else order[rows]


def in_entity_order(parts: list[pa.Table], slices: list[Rows]) -> pa.Table:
    """Put the joined slices back where their rows came from."""
    joined = pa.concat_tables(parts)
    orders = [rows for rows in slices if not isinstance(rows, slice)]
    if not orders:
        return joined
    place = np.empty(joined.num_rows, np.int64)
    place[np.concatenate(orders)] = np.arange(joined.num_rows)
    return joined.take(pa.array(place))


class _Join:
    """The open sources of one plan; views and aliases over the same files share one scan."""

    def __init__(
        self,
        connection: duckdb.DuckDBPyConnection,
        threads: Executor,
        keys: Mapping[str, pa.Array],
        plan: JoinPlan,
    ) -> None:
        self._threads = threads
        self._groups: dict[FeatureSource, tuple[History, list[ViewJoin]]] = {}
        views_of: dict[FeatureSource, list[ViewJoin]] = {}
        for view in plan.views:
            views_of.setdefault(view.source, []).append(view)
        self._keys: dict[ViewJoin, pa.Array] = {}
        for source, views in views_of.items():
            columns = [column for view in views for column, _ in view.columns]
            history = History(
                connection, source, columns, as_known=plan.as_known, fold_rows=plan.fold_rows
            )
            for view in views:
                what = f"{view.entity_key} of the entity table ({view.label})"
                self._keys[view] = as_key_type(keys[view.entity_key], history.key_type, what)
            history.want(self._keys[view] for view in views)
            self._groups[source] = (history, views)

    def rows(self, rows: Rows, at_us: Int64s) -> pa.Table:
        """Join one slice; slices come in the order of time."""
        known = at_us[at_us != UNKNOWN_US]
        found: dict[str, tuple[pa.ChunkedArray, pa.Array]] = {}
        for history, views in self._groups.values():
            if len(known):
                first_us, limits = int(known.min()), [view.ttl_us for view in views]
                since_us = first_us - max(limits) if all(limits) else None
                history.advance(first_us, int(known.max()), since_us=since_us)
            versions, event_us = history.versions(), history.event_us
            for view in views:
                newest = versions.newest(_part(self._keys[view], rows), at_us)
                if view.ttl_us and len(event_us):
                    newest[at_us - event_us[newest] > view.ttl_us] = -1
                chosen = pa.array(newest, mask=newest < 0)
                found |= {name: (history.table.column(of), chosen) for of, name in view.columns}
        gathered = self._threads.map(lambda pair: pair[0].take(pair[1]), found.values())
        return pa.table(dict(zip(found, gathered, strict=True)))


def _part(keys: pa.Array, rows: Rows) -> pa.Array:
    if isinstance(rows, slice):
        return keys.slice(rows.start, rows.stop - rows.start)
    return keys.take(pa.array(rows))

"""The feature rows of one source that a moving window of moments can still see."""

from collections.abc import Iterable, Iterator, Sequence

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from driftline.features.feast_plugins.asof import Int64s, Versions
from driftline.features.feast_plugins.keys import as_key_type, key_type
from driftline.features.feast_plugins.scan import (
    CREATED_US,
    EVENT_US,
    UNKNOWN_US,
    DuckDbSettings,
    FeatureSource,
    SourceScan,
    TimeRange,
    connect,
)

FOLD_ROWS = 4_000_000
"""Rows that are held before those that a newer one hides are dropped."""


class History:
    """Rows of one source, read forward in time.

    What a later window may still need of the rows already read (each product's newest version, and
    versions that were not yet known) is carried along. So each row is read once, even when values
    never expire, and a long history costs the memory of its newest rows.
    """

    def __init__(
        self,
        connection: duckdb.DuckDBPyConnection,
        source: FeatureSource,
        columns: Sequence[str],
        *,
        as_known: bool = False,
        fold_rows: int = FOLD_ROWS,
    ) -> None:
        """Open ``source``; nothing is read yet.

        Args:
            connection: A DuckDB that nobody else uses.
            source: Where the rows are.
            columns: Feature columns to read.
            as_known: Hide a row until it was written; a row without that time is never seen.
            fold_rows: Rows to hold before superseded ones are dropped.
        """
        self._scan = SourceScan(connection, source.location, event_column=source.event_column)
        self._source = source
        self._columns = list(dict.fromkeys([source.key_column, *columns]))
        self._times = [(source.event_column, EVENT_US)]
        if source.created_column is not None:
            self._times.append((source.created_column, CREATED_US))
        self._as_known = as_known and source.created_column is not None
        self._fold_rows = fold_rows
        self._wanted: tuple[str, pa.Array] | None = None
        self._read_until: int | None = None
        schema = self._scan.schema(self._columns)
        self.key_type = key_type(
            schema.field(source.key_column).type, f"{source.key_column} of {source.location}"
        )
        for _, name in self._times:
            schema = schema.append(pa.field(name, pa.int64()))
        self.table: pa.Table = schema.empty_table()

    def want(self, keys: Iterable[pa.Array]) -> None:
        """Read the rows of these products only."""
        distinct = pa.chunked_array([pc.unique(part) for part in keys], self.key_type).unique()
        self._wanted = (self._source.key_column, distinct.drop_null())

    def advance(self, first_us: int, last_us: int, *, since_us: int | None = None) -> None:
        """Hold what moments from ``first_us`` to ``last_us`` can see; windows go forward only.

        Args:
            first_us: Earliest moment that will be asked for.
            last_us: Latest moment that will be asked for.
            since_us: Event times before this one are too old to count; none is without it.
        """
        unread = TimeRange(since_us, last_us)
        if self._read_until is not None:
            self.fold(first_us, since_us=since_us)
            if since_us is None or since_us <= self._read_until:
                unread = TimeRange(self._read_until, last_us, open_start=True)
        self._read_until = last_us
        parts, num_rows, limit = [self.table], self.table.num_rows, self._fold_rows
        for batch in self._batches(unread):
            parts.append(batch)
            num_rows += batch.num_rows
            if num_rows > limit:
                self.table = pa.concat_tables(parts).combine_chunks()
                self.fold(first_us, since_us=since_us)
                parts, num_rows = [self.table], self.table.num_rows
                limit = max(self._fold_rows, 2 * num_rows)
        self.table = pa.concat_tables(parts).combine_chunks()

    def fold(self, first_us: int, *, since_us: int | None = None) -> None:
        """Drop the rows that no moment from ``first_us`` on can find."""
        rows = self.versions().kept_from(first_us)
        if since_us is not None:
            rows = rows[self.event_us[rows] >= since_us]
        self.table = self.table.take(pa.array(rows))

    def versions(self) -> Versions:
        """Index the rows now held."""
        return Versions(
            as_key_type(self.table.column(self._source.key_column), self.key_type, "the source"),
            self.event_us,
            self.table.column(CREATED_US).to_numpy() if len(self._times) > 1 else None,
            as_known=self._as_known,
        )

    @property
    def event_us(self) -> Int64s:
        """Event time of the rows now held."""
        return np.asarray(self.table.column(EVENT_US).to_numpy(), np.int64)

    def _batches(self, within: TimeRange) -> Iterator[pa.Table]:
        reader = self._scan.read(
            self._columns, times=self._times, within=within, wanted=self._wanted
        )
        for batch in reader:
            table = pa.Table.from_batches([batch])
            if len(self._times) > 1:
                if self._as_known:
                    table = table.filter(pc.is_valid(table.column(CREATED_US)))
                created = table.column(CREATED_US).fill_null(UNKNOWN_US)
                table = table.set_column(table.num_columns - 1, CREATED_US, created)
            yield table.cast(self.table.schema)


def newest_rows(
    source: FeatureSource,
    columns: Sequence[str],
    within: tuple[int, int],
    settings: DuckDbSettings,
    *,
    as_known: bool = False,
) -> pa.Table:
    """Newest row of each product in a closed range of event time, by (event, created).

    Args:
        source: Where the rows are.
        columns: Feature columns to read.
        within: First and last event time, in microseconds.
        settings: What DuckDB may take.
        as_known: Leave out rows that were written after the end of the range.

    Returns:
        The key, ``columns`` and the times in microseconds (``EVENT_US``, ``CREATED_US``); rows
        without a product are left out.
    """
    start_us, end_us = within
    with connect(settings) as connection:
        history = History(connection, source, columns, as_known=as_known)
        history.advance(end_us, end_us, since_us=start_us)
        history.fold(end_us)
        if not (as_known and source.created_column is not None):
            return history.table
        return history.table.filter(pc.less_equal(history.table.column(CREATED_US), end_us))

"""From impressions to counts per key and hour, in DuckDB, within a memory limit.

The *known hour* of an impression is the first hour boundary at which its outcome is known; hours
are numbered since the epoch. No later step looks at single impressions.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from driftline.features.log import ImpressionLog
from driftline.features.maturity import HOUR_MICROS, known_hour_sql, known_label_sql, to_micros
from driftline.platform.settings import DriftlineSettings

Group = Literal["ad", "page", "category", "category_pair"]


@dataclass(frozen=True)
class HourCounts:
    """Counts of one grouping by key and known hour; all arrays have one entry a row."""

    keys: pa.Array
    """Distinct keys; ``code`` points into them. ``[P]``."""
    code: NDArray[np.int64]
    hour: NDArray[np.int64]
    impressions: NDArray[np.float64]
    clicks: NDArray[np.float64]
    first: NDArray[np.int64]
    """Microseconds since the epoch of the first impression of the key in the hour."""
    last: NDArray[np.int64]
    last_click: NDArray[np.int64]
    """Of the last impression that was clicked; ``NEVER`` when none was."""


NEVER = np.iinfo(np.int64).min


class CounterEvents:
    """Aggregates of one stretch of the log; get one by :func:`open_events`."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, groups: Sequence[Group]) -> None:
        self._connection = connection
        self.groups = tuple(groups)

    def counts(self, group: Group, *, first_hour: int, last_hour: int) -> HourCounts:
        """Counts of the known hours ``first_hour`` .. ``last_hour``, both included."""
        return self._fetch(
            f"SELECT key, hour, impressions, clicks, first, last, last_click FROM {group}_hours "
            f"WHERE hour BETWEEN {first_hour} AND {last_hour}"
        )

    def totals(self, *, first_hour: int, last_hour: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Impressions and clicks of all ads by known hour, both ``[last - first + 1]``."""
        found = self._connection.sql(
            f"SELECT hour, sum(impressions) AS n, sum(clicks) AS c FROM ad_hours "
            f"WHERE hour BETWEEN {first_hour} AND {last_hour} GROUP BY hour"
        ).fetchnumpy()
        impressions = np.zeros(last_hour - first_hour + 1)
        clicks = np.zeros_like(impressions)
        impressions[found["hour"] - first_hour] = found["n"]
        clicks[found["hour"] - first_hour] = found["c"]
        return impressions, clicks

    def history(self, keys: pa.Array, *, before_hour: int) -> HourCounts:
        """First, last and last clicked impression as the ad, all known before an hour."""
        self._connection.register("wanted", pa.table({"key": keys}))
        found = self._fetch(
            f"SELECT key, 0 AS hour, 0 AS impressions, 0 AS clicks, min(first) AS first, "
            f"max(last) AS last, max(last_click) AS last_click FROM ("
            f"SELECT key, first, last, last_click FROM ad_hours WHERE hour < {before_hour} "
            f"UNION ALL SELECT key, first, last, last_click FROM ad_past) "
            f"WHERE key IN (SELECT key FROM wanted) GROUP BY key"
        )
        self._connection.unregister("wanted")
        return found

    def _fetch(self, query: str) -> HourCounts:
        table = self._connection.sql(query).to_arrow_table()
        encoded = table.column("key").combine_chunks().dictionary_encode()
        numbers = {name: np.asarray(table.column(name)) for name in table.column_names[1:]}
        return HourCounts(
            keys=encoded.dictionary,
            code=np.asarray(encoded.indices).astype(np.int64),
            hour=numbers["hour"].astype(np.int64),
            impressions=numbers["impressions"].astype(np.float64),
            clicks=numbers["clicks"].astype(np.float64),
            first=numbers["first"],
            last=numbers["last"],
            last_click=numbers["last_click"],
        )


@contextmanager
def open_events(
    log: ImpressionLog, settings: DriftlineSettings, *, first_hour: int, last_hour: int
) -> Iterator[CounterEvents]:
    """Aggregate the impressions known in ``first_hour`` .. ``last_hour``, both included.

    Of the log before that, only each ad's first, last and last clicked impression is kept.
    """
    category = settings.counters.category
    config = {"threads": settings.store.threads, "memory_limit": settings.store.memory_limit}
    with duckdb.connect(config=config) as connection:
        connection.execute("SET TimeZone = 'UTC'")
        connection.execute("SET preserve_insertion_order = false")
        maturity = settings.labels.maturity
        files = _file_list(log.impression_files())
        past = (first_hour - 1) * HOUR_MICROS - to_micros(maturity)
        end = last_hour * HOUR_MICROS - to_micros(maturity)
        # Time limits in whole microseconds, as plain predicates: they skip row groups.
        connection.execute(
            f"""
            CREATE VIEW events AS SELECT page_product_id AS page, ad_product_id AS ad,
                event_time, epoch_us(event_time) AS moment, {known_hour_sql(maturity)} AS hour,
                {known_label_sql(maturity)} AS label
            FROM read_parquet({files}) WHERE event_time <= make_timestamptz({end})"""
        )
        connection.execute(
            f"CREATE TEMP TABLE ad_past AS SELECT ad AS key, {_MOMENTS} FROM events "
            f"WHERE event_time <= make_timestamptz({past}) GROUP BY ad"
        )
        recent = f"event_time > make_timestamptz({past})"
        for group in ("ad", "page"):
            connection.execute(_aggregate(group, group, f"events WHERE {recent}"))
        if category is None:
            yield CounterEvents(connection, ("ad", "page"))
            return
        connection.register("catalogue", _categories(log, category))
        connection.execute(
            f"""
            CREATE TEMP TABLE labelled AS
            SELECT e.moment, e.hour, e.label, a.category AS ad_category,
                p.category AS page_category
            FROM (FROM events WHERE {recent}) e
            ASOF LEFT JOIN catalogue a ON e.ad = a.product_id AND e.event_time >= a.event_time
            ASOF LEFT JOIN catalogue p ON e.page = p.product_id AND e.event_time >= p.event_time"""
        )
        pair = "page_category || '|' || ad_category"
        for group, key in (("category", "ad_category"), ("category_pair", pair)):
            connection.execute(_aggregate(group, key, f"labelled WHERE ({key}) IS NOT NULL"))
        yield CounterEvents(connection, ("ad", "page", "category", "category_pair"))


_MOMENTS = (
    f"min(moment) AS first, max(moment) AS last, "
    f"coalesce(max(moment) FILTER (label), {NEVER + 1} - 1) AS last_click"
)


def _aggregate(group: str, key: str, rows: str) -> str:
    return (
        f"CREATE TEMP TABLE {group}_hours AS SELECT {key} AS key, hour, "
        f"count(*) AS impressions, count(*) FILTER (label) AS clicks, {_MOMENTS} "
        f"FROM {rows} GROUP BY ALL"
    )


def _categories(log: ImpressionLog, category: str) -> pa.Table:
    """Key, time and category of every catalogue version; of ties the last row."""
    catalogue = log.catalogue().select(["product_id", "event_time", category])
    numbered = catalogue.append_column("row", pa.array(np.arange(catalogue.num_rows)))
    chosen = numbered.group_by(["product_id", "event_time"]).aggregate([("row", "max")])
    rows = catalogue.take(chosen.column("row_max"))
    return rows.rename_columns(["product_id", "event_time", "category"])


def _file_list(paths: Sequence[Path]) -> str:
    quoted = ["'" + str(path).replace("'", "''") + "'" for path in paths]
    return f"[{', '.join(quoted)}]"

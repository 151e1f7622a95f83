"""From impressions to counts per key and hour, in DuckDB, within a memory limit.

The *known hour* of an impression is the first hour boundary at which its outcome is known; hours
are numbered since the epoch. No later step looks at single impressions.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
from numpy.typing import NDArray

from driftline.features.feast_plugins.asof import Versions
from driftline.features.feast_plugins.scan import DuckDbSettings, connect
from driftline.features.log import ImpressionLog
from driftline.features.maturity import HOUR_MICROS, known_hour_sql, known_label_sql, to_micros
from driftline.platform.settings import DriftlineSettings

Group = Literal["ad", "page", "category", "category_pair"]

NEVER: Final = np.iinfo(np.int64).min
BATCH_ROWS: Final = 500_000
"""Impressions that are given their categories at a time."""


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
    maturity = settings.labels.maturity
    past = (first_hour - 1) * HOUR_MICROS - to_micros(maturity)
    end = last_hour * HOUR_MICROS - to_micros(maturity)
    # Time limits in whole microseconds, as plain predicates: they skip row groups.
    recent = f"event_time > make_timestamptz({past})"
    with connect(DuckDbSettings(settings.store.threads, settings.store.memory_limit)) as connection:
        connection.execute("SET preserve_insertion_order = false")
        connection.execute(
            f"""
            CREATE VIEW events AS SELECT page_product_id AS page, ad_product_id AS ad,
                event_time, epoch_us(event_time) AS moment, {known_hour_sql(maturity)} AS hour,
                {known_label_sql(maturity)} AS label
            FROM read_parquet({_file_list(log.impression_files())})
            WHERE event_time <= make_timestamptz({end})"""
        )
        connection.execute(
            f"CREATE TEMP TABLE ad_past AS SELECT ad AS key, {_MOMENTS} FROM events "
            f"WHERE event_time <= make_timestamptz({past}) GROUP BY ad"
        )
        for group in ("ad", "page"):
            connection.execute(
                f"CREATE TEMP TABLE {group}_hours AS SELECT {group} AS key, hour, "
                f"count(*) AS impressions, count(*) FILTER (label) AS clicks, {_MOMENTS} "
                f"FROM events WHERE {recent} GROUP BY ALL"
            )
        if settings.counters.category is None:
            yield CounterEvents(connection, ("ad", "page"))
            return
        counted = _count_categories(
            connection, _Categories(log, settings.counters.category), recent
        )
        connection.register("counted", counted)
        for group, key in (("category", "ad"), ("category_pair", "page || '|' || ad")):
            connection.execute(
                f"CREATE TEMP TABLE {group}_hours AS SELECT {key} AS key, hour, "
                f"sum(impressions) AS impressions, sum(clicks) AS clicks, "
                f"0 AS first, 0 AS last, 0 AS last_click "
                f"FROM counted WHERE ({key}) IS NOT NULL GROUP BY ALL"
            )
        yield CounterEvents(connection, ("ad", "page", "category", "category_pair"))


_MOMENTS = (
    f"min(moment) AS first, max(moment) AS last, "
    f"coalesce(max(moment) FILTER (label), {NEVER + 1} - 1) AS last_click"
)


class _Categories:
    """Category of a product at a moment: that of its latest catalogue version by then."""

    def __init__(self, log: ImpressionLog, category: str) -> None:
        columns = ["product_id", "event_time", category]
        files = sorted((log.root / "catalogue").glob("*.parquet"))
        table = (
            ds.dataset(files, format="parquet").to_table(columns=columns)  # not the texts
            if files
            else log.catalogue().select(columns)
        )
        moments = np.asarray(table.column("event_time").cast(pa.int64()))
        self._versions = Versions(table.column("product_id"), moments)
        encoded = table.column(category).combine_chunks().dictionary_encode()
        self.names = encoded.dictionary
        # The last entry answers for products that have no version yet.
        self._code = np.append(np.asarray(encoded.indices.fill_null(-1)), -1)

    def codes(self, products: pa.Array, moments: NDArray[np.int64]) -> NDArray[np.int64]:
        """Place of the category in ``names``, -1 when it is not known. ``[B]``."""
        found: NDArray[np.int64] = self._code[self._versions.newest(products, moments)]
        return found


def _count_categories(
    connection: duckdb.DuckDBPyConnection, categories: _Categories, recent: str
) -> pa.Table:
    """Impressions and clicks by known hour, page category and ad category."""
    reader = connection.sql(
        f"SELECT moment, hour, page, ad, label::INTEGER AS clicks FROM events WHERE {recent}"
    ).to_arrow_reader(BATCH_ROWS)
    parts = []
    for batch in reader:
        moments = np.asarray(batch.column("moment"))
        codes = {name: categories.codes(batch.column(name), moments) for name in ("page", "ad")}
        rows = pa.table({"hour": batch.column("hour"), "clicks": batch.column("clicks"), **codes})
        grouped = rows.group_by(["hour", "page", "ad"])
        parts.append(grouped.aggregate([("clicks", "sum"), ([], "count_all")]))
    if not parts:
        parts = [pa.table({name: pa.array([], pa.int64()) for name in _COUNTED})]
    table = pa.concat_tables(parts)
    return pa.table(
        {
            "hour": table.column("hour"),
            "page": _names(categories, table.column("page")),
            "ad": _names(categories, table.column("ad")),
            "clicks": table.column("clicks_sum"),
            "impressions": table.column("count_all"),
        }
    )


_COUNTED = ("hour", "page", "ad", "clicks_sum", "count_all")


def _names(categories: _Categories, codes: pa.ChunkedArray) -> pa.Array:
    places = np.asarray(codes)
    return categories.names.take(pa.array(places, mask=places < 0))


def _file_list(paths: Sequence[Path]) -> str:
    quoted = ["'" + str(path).replace("'", "''") + "'" for path in paths]
    return f"[{', '.join(quoted)}]"

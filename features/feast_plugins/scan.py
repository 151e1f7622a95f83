"""Reading feature rows from Parquet with DuckDB: a connection of one's own, time ranges, keys.

Times are read as microseconds since 1970 in UTC, whatever the file holds: zone-aware or naive
(taken as UTC), seconds to nanoseconds. DuckDB 2.0 types nanoseconds with a zone as
``TIMESTAMPTZ_NS``, for which it has no cast; ``epoch_ns`` works for all of them.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import duckdb
import pyarrow as pa

from driftline.features.feast_plugins.errors import FeatureStoreError

KEY, EVENT_US, CREATED_US = "__key", "__event_us", "__created_us"
UNKNOWN_US = -(2**63)
"""Stands for a missing time: older than any other."""

_EPOCH = datetime(1970, 1, 1)
_BATCH_ROWS = 250_000


@dataclass(frozen=True)
class DuckDbSettings:
    """What one call may take of the machine."""

    threads: int | None = None
    memory_limit: str | None = None
    temp_directory: str | None = None


@dataclass(frozen=True)
class FeatureSource:
    """Rows of features in Parquet; the names are those in the files."""

    location: str
    """A file or a glob, absolute."""
    key_column: str
    event_column: str
    created_column: str | None = None


@dataclass(frozen=True)
class TimeRange:
    """Event times from ``start_us`` to ``end_us``; ``None`` is open, the end belongs to it."""

    start_us: int | None = None
    end_us: int | None = None
    open_start: bool = False
    """Leave out rows at exactly ``start_us``: an earlier range held them."""


@contextmanager
def connect(settings: DuckDbSettings) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open a private in-memory DuckDB; two threads never share one."""
    spill = settings.temp_directory or str(Path(tempfile.gettempdir()) / "driftline-duckdb")
    config: dict[str, str | int] = {"temp_directory": spill}
    if settings.threads is not None:
        config["threads"] = settings.threads
    if settings.memory_limit is not None:
        config["memory_limit"] = settings.memory_limit
    connection = duckdb.connect(":memory:", config=config)
    try:
        connection.execute("SET TimeZone = 'UTC'")
        connection.execute("SET parquet_metadata_cache = true")
        connection.execute("SET enable_progress_bar = false")  # it would go to stdout
        yield connection
    finally:
        connection.close()


class SourceScan:
    """One Parquet source seen through one connection."""

    def __init__(
        self, connection: duckdb.DuckDBPyConnection, location: str, *, event_column: str
    ) -> None:
        self._connection = connection
        self._location = location
        self._event_column = event_column
        self._from = f"read_parquet({_text(location)}, union_by_name = true)"
        try:
            described = connection.execute(f"DESCRIBE SELECT * FROM {self._from}").fetchall()
        except duckdb.IOException as error:
            raise FeatureStoreError(
                f"feature source {location} cannot be read: {error}; "
                "check the path, or write the first file before asking for features"
            ) from error
        self._types = {str(row[0]): str(row[1]) for row in described}

    def schema(self, columns: Sequence[str]) -> pa.Schema:
        """Arrow types of ``columns``, in that order."""
        query = f"SELECT {self._list(columns)} FROM {self._from} LIMIT 0"
        return self._connection.sql(query).to_arrow_table().schema

    def read(
        self,
        columns: Sequence[str],
        *,
        times: Sequence[tuple[str, str]],
        within: TimeRange,
        wanted: tuple[str, pa.Array] | None = None,
    ) -> pa.RecordBatchReader:
        """Stream the rows of a time range, in the order of the files.

        Args:
            columns: Columns of the files, returned under their own names.
            times: ``(column, name)`` pairs returned as microseconds under ``name``.
            within: Range of event time, pushed down to the row groups.
            wanted: A key column and the keys to keep; rows with other or null keys are left out.

        Raises:
            FeatureStoreError: a column is not in the source.
        """
        where = self._within(within)
        if wanted is not None:
            column, keys = wanted
            # The relation refers to the registered name until the last batch is read.
            self._connection.register("wanted_keys", pa.table({"key": keys}))
            where.append(f"{self._name(column)} IN (SELECT key FROM wanted_keys)")
        listed = ", ".join(
            [self._list(columns)] * bool(columns)
            + [f"{self._microseconds(column)} AS {_name(name)}" for column, name in times]
        )
        condition = " AND ".join(where) or "true"
        query = f"SELECT {listed} FROM {self._from} WHERE {condition}"
        return self._connection.sql(query).to_arrow_reader(_BATCH_ROWS)

    def _within(self, within: TimeRange) -> list[str]:
        column, kind = self._name(self._event_column), self._types[self._event_column]
        parts = []
        if within.start_us is not None and (moment := _literal(within.start_us, kind)):
            parts.append(f"{column} {'>' if within.open_start else '>='} {moment}")
        if within.end_us is not None and (moment := _literal(within.end_us, kind)):
            parts.append(f"{column} <= {moment}")
        return parts

    def _microseconds(self, column: str) -> str:
        name, kind = self._name(column), self._types[column]
        if not kind.startswith(("TIMESTAMP", "DATE")):
            raise FeatureStoreError(
                f"column {column} of {self._location} must be a timestamp, got {kind}; "
                "write it as timestamp[us, tz=UTC]"
            )
        return f"epoch_ns({name}) // 1000" if kind.endswith("_NS") else f"epoch_us({name})"

    def _list(self, columns: Sequence[str]) -> str:
        return ", ".join(self._name(column) for column in columns)

    def _name(self, column: str) -> str:
        if column not in self._types:
            raise FeatureStoreError(
                f"column {column} is not in feature source {self._location}, which has "
                f"{', '.join(self._types)}; correct the view or its field_mapping"
            )
        return _name(column)


def locate(path: str, *, repo_path: Path | None) -> str:
    """Make a source's path one that DuckDB reads: absolute, and a glob for a directory."""
    if "://" in path:
        return path
    local = Path(path) if repo_path is None else repo_path / path
    local = local.absolute()
    return f"{local}/**/*.parquet" if local.is_dir() else str(local)


def to_us(moment: datetime) -> int:
    """Microseconds since 1970; a naive time is taken as UTC."""
    if moment.tzinfo is not None:
        moment = moment.astimezone(UTC).replace(tzinfo=None)
    return (moment - _EPOCH) // timedelta(microseconds=1)


def _literal(us: int, kind: str) -> str | None:
    """Write a moment so that it is compared without a cast of the column; none if unreachable."""
    try:
        moment = (_EPOCH + timedelta(microseconds=us)).isoformat(sep=" ")
    except OverflowError:
        return None
    zoned = kind == "TIMESTAMP WITH TIME ZONE"
    return f"TIMESTAMPTZ '{moment}+00'" if zoned else f"TIMESTAMP '{moment}'"


def _name(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _text(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"

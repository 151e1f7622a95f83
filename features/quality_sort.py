"""Sort and de-duplicate more rows than fit into memory: by day on disk, then DuckDB a day.

Rows that passed are staged as one small Parquet file after the other in a folder a UTC day, with
their *ordinal* (row number over all files of the table). Repeated keys are found by DuckDB over the
whole stage, spilling to disk; then one day at a time is sorted and written in contract form.
"""

import shutil
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from driftline.features.log import ROWS_PER_GROUP, day_name, day_numbers

ORDINAL: Final = "__ordinal"
MAX_OPEN_FILES: Final = 48


class Stage:
    """Rows waiting to be sorted, by day; at most ``MAX_OPEN_FILES`` files are open at a time."""

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        self.folder = folder
        self.schema = pa.schema([*schema, pa.field(ORDINAL, pa.int64())])
        self._open: OrderedDict[int, pq.ParquetWriter] = OrderedDict()
        self._num_parts = 0

    def add(self, rows: pa.Table, ordinals: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        """Append rows that have an ``event_time``, and their ordinals."""
        if rows.num_rows == 0:
            return
        table = rows.append_column(ORDINAL, pa.array(ordinals)).cast(self.schema)
        days = day_numbers(table.column("event_time"))
        for day in np.unique(days):
            part = table if (days == day).all() else table.filter(pa.array(days == day))
            self._writer(int(day)).write_table(part)

    def close(self) -> None:
        """Finish all files."""
        while self._open:
            self._open.popitem()[1].close()

    def days(self) -> list[Path]:
        """One folder a day, in order."""
        return sorted(self.folder.glob("*")) if self.folder.exists() else []

    def pattern(self) -> str:
        """All files, for DuckDB."""
        return read_files(self.folder / "*" / "*.parquet")

    def _writer(self, day: int) -> pq.ParquetWriter:
        if day not in self._open:
            if len(self._open) >= MAX_OPEN_FILES:
                self._open.popitem(last=False)[1].close()
            folder = self.folder / day_name(day)
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{self._num_parts:06d}.parquet"
            self._num_parts += 1
            self._open[day] = pq.ParquetWriter(path, self.schema, compression="lz4")
        self._open.move_to_end(day)
        return self._open[day]


def connect(*, memory_limit: str, threads: int, spill: Path) -> duckdb.DuckDBPyConnection:
    """A private in-memory database that spills to a folder beyond its memory limit."""
    connection = duckdb.connect(
        config={
            "memory_limit": memory_limit,
            "threads": threads,
            "temp_directory": str(spill),
            "preserve_insertion_order": False,
        }
    )
    connection.execute("SET TimeZone = 'UTC'")
    connection.execute("SET enable_progress_bar = false")  # else long queries draw one on stdout
    return connection


def read_files(*patterns: Path) -> str:
    """SQL that reads Parquet files given as paths or patterns."""
    quoted = ", ".join("'" + str(pattern).replace("'", "''") + "'" for pattern in patterns)
    return f"read_parquet([{quoted}])"


def find_repeats(
    connection: duckdb.DuckDBPyConnection,
    stage: Stage,
    *,
    keys: Sequence[str],
    keep: str,
) -> int:
    """Fill table ``repeats`` with ordinals of rows in whose place another of the same key is kept.

    Hashes of all keys are grouped first, and only rows whose hash occurs twice are compared by
    their real keys: a log without repeats costs eight bytes a row.

    Args:
        connection: Where the table ``repeats`` is created.
        stage: Rows with ordinals.
        keys: Columns that must be unique together.
        keep: ``first`` or ``last`` by ordinal.
    """
    connection.execute(f"CREATE OR REPLACE TABLE repeats ({ORDINAL} BIGINT)")
    if not stage.days():
        return 0
    order = "ASC" if keep == "first" else "DESC"
    columns = ", ".join(f'"{key}"' for key in keys)
    rows = stage.pattern()
    connection.execute(
        f"""
        CREATE OR REPLACE TABLE suspects AS
        SELECT hash({columns}) AS h FROM {rows} GROUP BY h HAVING count(*) > 1
        """
    )
    connection.execute(
        f"""
        INSERT INTO repeats
        SELECT {ORDINAL} FROM (
            SELECT {ORDINAL},
                   row_number() OVER (PARTITION BY {columns} ORDER BY {ORDINAL} {order}) AS n
            FROM {rows}
            WHERE hash({columns}) IN (SELECT h FROM suspects)
        ) WHERE n > 1
        """
    )
    connection.execute("DROP TABLE suspects")
    [(count,)] = connection.sql("SELECT count(*) FROM repeats").fetchall()
    return int(count)


def read_repeats(connection: duckdb.DuckDBPyConnection, stage: Stage) -> Iterator[pa.RecordBatch]:
    """The repeated rows themselves, with their ordinals, in order of these."""
    query = f"""
        SELECT s.* FROM {stage.pattern()} AS s
        SEMI JOIN repeats USING ({ORDINAL}) ORDER BY {ORDINAL}
    """
    yield from connection.sql(query).to_arrow_reader(ROWS_PER_GROUP)


def write_sorted(
    connection: duckdb.DuckDBPyConnection,
    day: Path,
    destination: Path,
    *,
    schema: pa.Schema,
    order: Sequence[str],
    any_repeats: bool,
) -> int:
    """Write one staged day without its repeats in order, in contract form; give its row count."""
    columns = ", ".join(f's."{name}"' for name in schema.names)
    dropped = f"ANTI JOIN repeats USING ({ORDINAL})" if any_repeats else ""
    ordering = ", ".join(f's."{name}"' for name in (*order, ORDINAL))
    query = f"""
        SELECT {columns} FROM {read_files(day / "*.parquet")} AS s {dropped} ORDER BY {ordering}
    """
    reader = connection.sql(query).to_arrow_reader(ROWS_PER_GROUP)
    num_rows = 0
    writer: pq.ParquetWriter | None = None
    try:
        for rows in regroup(reader):
            if writer is None:
                destination.parent.mkdir(parents=True, exist_ok=True)
                writer = pq.ParquetWriter(destination, schema)
            writer.write_table(rows.cast(schema), row_group_size=ROWS_PER_GROUP)
            num_rows += rows.num_rows
    finally:
        if writer is not None:
            writer.close()
    shutil.rmtree(day)
    return num_rows


def regroup(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.Table]:
    """The same rows in tables of ``ROWS_PER_GROUP`` rows: equal logs then give equal files."""
    waiting: list[pa.Table] = []
    num_waiting = 0
    for batch in batches:
        waiting.append(pa.Table.from_batches([batch]))
        num_waiting += batch.num_rows
        while num_waiting >= ROWS_PER_GROUP:
            table = pa.concat_tables(waiting)
            yield table.slice(0, ROWS_PER_GROUP)
            waiting = [table.slice(ROWS_PER_GROUP)]
            num_waiting -= ROWS_PER_GROUP
    if num_waiting:
        yield pa.concat_tables(waiting)

"""Files of a view's rows, and what is known of each hour's rows without reading them.

A day's rows lie in ``YYYY-MM-DD.parquet``; hours of a day that is still under way may lie in
``YYYY-MM-DDTHH.parquet`` until the day's last hour arrives, so that one more hour costs one hour.
Every file's footer holds the view's version and a fingerprint of the rows that became known in
each hour: a frame needs no more to see whether it is stale.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from driftline.features.maturity import HOUR_MICROS
from driftline.features.views import View
from driftline.platform.artefacts import whole_file
from driftline.platform.contract import TIME
from driftline.platform.settings import DriftlineSettings

Int64s = NDArray[np.int64]

logger = logging.getLogger(__name__)

ROWS_PER_GROUP: Final = 32_768
EMPTY: Final = "empty.parquet"
"""A file without rows in each folder, so that a source always has its columns."""
VERSION_KEY: Final = b"driftline.view_version"
HOURS_KEY: Final = b"driftline.hours"
_PLAIN: Final = {TIME: pa.int64()}


def ensure_source(view: View, settings: DriftlineSettings, *, key: pa.DataType) -> None:
    """Make the folder of a view, and drop files that were written under another definition."""
    folder = view.folder(settings)
    schema = view.schema(key=key)
    for path in sorted(folder.glob("*.parquet")):
        if not _fits(path, view, schema):
            logger.info("dropping %s: written under another definition of %s", path, view.name)
            path.unlink()
    if not (folder / EMPTY).exists():
        _write(folder / EMPTY, schema.empty_table(), view)


def replace_source(
    view: View, rows: pa.Table, settings: DriftlineSettings, *, key: pa.DataType
) -> None:
    """Make ``rows`` the whole content of a view; files that would not change are left alone."""
    ensure_source(view, settings, key=key)
    folder = view.folder(settings)
    rows = rows.cast(view.schema(key=key)).sort_by(
        [("event_time", "ascending"), (view.join_key, "ascending"), ("created_time", "ascending")]
    )
    names = {EMPTY}
    for day, table in _by_day(rows):
        path = folder / f"{day}.parquet"
        names.add(path.name)
        if not path.exists() or _read_hours(path) != fingerprint_hours(table):
            _write(path, table, view)
    for path in sorted(folder.glob("*.parquet")):
        if path.name not in names:
            path.unlink()


def write_hours(
    view: View, hours: Mapping[datetime, pa.Table], settings: DriftlineSettings
) -> None:
    """Put the rows of whole hours of one UTC day in place of what these hours held before.

    Args:
        view: A view whose rows all have ``event_time`` = ``created_time`` = the hour.
        hours: Rows by hour; all hours of the same UTC day. An empty table clears the hour.
        settings: Where the workspace is.
    """
    folder = view.folder(settings)
    day = min(hours).astimezone(UTC).date()
    pieces = sorted(folder.glob(f"{day}T*.parquet"))
    whole = folder / f"{day}.parquet"
    closing = any(hour.astimezone(UTC).hour == 23 for hour in hours)
    if not closing and not whole.exists():
        for hour, table in hours.items():
            _write(folder / f"{hour.astimezone(UTC):%Y-%m-%dT%H}.parquet", table, view)
        return
    merged = dict(hours)
    for path in [*pieces, *([whole] if whole.exists() else [])]:
        for hour, table in _by_hour(pq.read_table(path)):
            merged.setdefault(hour, table)
    _write(whole, pa.concat_tables([merged[hour] for hour in sorted(merged)]), view)
    for path in pieces:
        path.unlink()


def hour_fingerprints(view: View, settings: DriftlineSettings) -> dict[int, str]:
    """What became known in each hour (hours since the epoch), from the footers alone."""
    merged: dict[int, list[str]] = {}
    for path in sorted(view.folder(settings).glob("*.parquet")):
        for hour, fingerprint in _read_hours(path).items():
            merged.setdefault(hour, []).append(fingerprint)
    # A crash between closing a day and dropping its pieces leaves the same hour twice.
    return {hour: "+".join(sorted(set(merged[hour]))) for hour in sorted(merged)}


def fingerprint_hours(rows: pa.Table) -> dict[int, str]:
    """Hash of the rows that became known in each hour, whatever the file that holds them."""
    if rows.num_rows == 0:
        return {}
    event, created = (_micros(rows.column(name)) for name in ("event_time", "created_time"))
    known = np.maximum(event, created) // HOUR_MICROS
    order = np.argsort(known, kind="stable")
    rows = rows if (np.diff(known) >= 0).all() else rows.take(pa.array(order))
    rows = rows.replace_schema_metadata(None).combine_chunks()
    return {hour: _hash_rows(table) for hour, table in _runs(known[order], rows)}


def _hash_rows(rows: pa.Table) -> str:
    """Equal for equal rows: neither what lies under a null nor what lies around them counts."""
    digest = hashlib.blake2b(digest_size=8)
    for column in rows.combine_chunks().itercolumns():
        if column.null_count:
            digest.update(np.asarray(column.is_null()).tobytes())
            column = column.fill_null("" if pa.types.is_string(column.type) else 0)
        for chunk in column.chunks:
            _hash_values(digest, chunk)
    return digest.hexdigest()


def _hash_values(digest: hashlib.blake2b, values: pa.Array) -> None:
    if not pa.types.is_string(values.type):
        digest.update(np.asarray(values.view(_PLAIN.get(values.type, values.type))).tobytes())
        return
    offsets = np.frombuffer(values.buffers()[1], np.int32)[values.offset :][: len(values) + 1]
    digest.update(np.diff(offsets).tobytes())
    if len(values) and offsets[-1] > offsets[0]:
        digest.update(memoryview(values.buffers()[2])[offsets[0] : offsets[-1]])


def _fits(path: Path, view: View, schema: pa.Schema) -> bool:
    found = pq.read_schema(path)
    version = (found.metadata or {}).get(VERSION_KEY, b"").decode()
    return version == view.version and found.equals(schema, check_metadata=False)


def _read_hours(path: Path) -> dict[int, str]:
    metadata = pq.read_schema(path).metadata or {}
    return {int(hour): value for hour, value in json.loads(metadata.get(HOURS_KEY, b"{}")).items()}


def _write(path: Path, rows: pa.Table, view: View) -> None:
    metadata = {
        VERSION_KEY: view.version.encode(),
        HOURS_KEY: json.dumps(fingerprint_hours(rows)).encode(),
    }
    keys = [field.name for field in rows.schema if not pa.types.is_floating(field.type)]
    with whole_file(path) as scratch:
        pq.write_table(
            rows.replace_schema_metadata(metadata),
            scratch,
            row_group_size=ROWS_PER_GROUP,
            use_dictionary=keys,
            compression="lz4",
        )


def _by_day(rows: pa.Table) -> Iterator[tuple[date, pa.Table]]:
    yield from (
        ((datetime(1970, 1, 1, tzinfo=UTC) + timedelta(days=int(day))).date(), table)
        for day, table in _split(rows, 24 * HOUR_MICROS)
    )


def _by_hour(rows: pa.Table) -> Iterator[tuple[datetime, pa.Table]]:
    yield from (
        (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(hours=int(hour)), table)
        for hour, table in _split(rows, HOUR_MICROS)
    )


def _split(rows: pa.Table, micros: int) -> Iterator[tuple[int, pa.Table]]:
    """Pieces of equal ``event_time // micros``; the rows ascend by time."""
    yield from _runs(_micros(rows.column("event_time")) // micros, rows)


def _runs(ascending: Int64s, rows: pa.Table) -> Iterator[tuple[int, pa.Table]]:
    """Pieces of equal number, for numbers that ascend with the rows."""
    numbers, starts, lengths = np.unique(ascending, return_index=True, return_counts=True)
    for number, start, length in zip(numbers, starts, lengths, strict=True):
        yield int(number), rows.slice(int(start), int(length))


def _micros(times: pa.ChunkedArray) -> Int64s:
    return np.asarray(pc.cast(times, pa.int64()))

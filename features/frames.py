"""Impressions with all their features as known at their own moment, one Parquet file an hour.

Feast joins in two steps: first what the products tell (page and ad), then what their categories
tell, because the category is itself a feature. One row in is one row out. A file's footer holds a
key of everything its rows were made from; a file whose key no longer fits is made anew.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from feast import FeatureStore

from driftline.features.definitions import (
    ENTITY_KEYS,
    HEAD_CATEGORIES,
    HEAD_PRODUCTS,
    feast_column,
    frame_sources,
)
from driftline.features.frame_keys import frame_keys
from driftline.features.log import ImpressionLog
from driftline.features.maturity import known_label
from driftline.features.store import open_store
from driftline.features.views import NO_TEXT
from driftline.platform.artefacts import whole_file
from driftline.platform.columns import TEXT_ID_COLUMNS, head_columns
from driftline.platform.contract import TIME
from driftline.platform.errors import DriftlineError, MissingArtefactError
from driftline.platform.settings import DriftlineSettings
from driftline.platform.windows import DAY, HOUR, Window, floor_time
from driftline.platform.workspace import Workspace

logger = logging.getLogger(__name__)

KEY: Final = b"driftline.frame_key"
ROWS_AT_ONCE: Final = 500_000
"""Rows joined at a time; a chunk ends with a UTC day."""


class JoinError(DriftlineError):
    """A point-in-time join gave other rows than it was asked for."""


def frame_schema(settings: DriftlineSettings, *, key: pa.DataType) -> pa.Schema:
    """Columns of a frame: the impression, both text ids, then all that the head reads.

    ``clicked`` is the matured label: a click later than ``labels.maturity_minutes`` after the
    impression is lost. ``clicked_ever`` is the click as logged. Further labels are as logged.
    """
    types = {"categorical": pa.string(), "numeric": pa.float32()}
    return pa.schema(
        [
            pa.field("impression_id", pa.string(), nullable=False),
            pa.field("request_id", pa.string()),
            pa.field("event_time", TIME, nullable=False),
            pa.field("page_product_id", key, nullable=False),
            pa.field("ad_product_id", key, nullable=False),
            pa.field("clicked", pa.bool_(), nullable=False),
            pa.field("clicked_ever", pa.bool_(), nullable=False),
            pa.field("click_time", TIME),
            *(pa.field(label.name, pa.float32()) for label in settings.select(kind="label")),
            *(pa.field(name, pa.int64()) for name in TEXT_ID_COLUMNS),
            *(pa.field(column.name, types[column.kind]) for column in head_columns(settings)),
        ]
    )


def build_frames(
    settings: DriftlineSettings,
    *,
    window: Window,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the frame of every hour that touches ``window`` and is missing or stale.

    Raises:
        MissingArtefactError: there is no clean log, or a feature source was never written.
    """
    log = ImpressionLog.open(Workspace.of(settings).clean, settings)
    hours = [Window(floor_time(hour.start, HOUR), hour.end) for hour in window.hours()]
    hours = [Window(hour.start, hour.start + HOUR) for hour in hours]
    keys = frame_keys(log, settings, hours=[hour.start for hour in hours])
    stale = [hour for hour in hours if _stored_key(settings, hour.start) != keys[hour.start]]
    if not stale:
        return
    store = open_store(settings)
    num_done = len(hours) - len(stale)
    for chunk, rows in _chunks(log, stale):
        frame = _join(store, rows, settings, key=log.key_type)
        for hour, table in _split_hours(frame, chunk):
            _write(_path(settings, hour.start), table, key=keys[hour.start])
            num_done += 1
            if progress is not None:
                progress(num_done, len(hours))
    logger.info("built frames of %d of %d hours in %s", len(stale), len(hours), window)


def read_frames(
    settings: DriftlineSettings, window: Window, *, columns: Sequence[str] | None = None
) -> pa.Table:
    """Rows of a window, sorted by (event_time, impression_id).

    Raises:
        MissingArtefactError: the frame of an hour of the window has not been built.
    """
    paths = [_path(settings, floor_time(hour.start, HOUR)) for hour in window.hours()]
    if missing := [path for path in paths if not path.exists()]:
        raise MissingArtefactError(
            f"{len(missing)} frames are missing, the first is {missing[0]}; "
            "run `driftline features frames` for this window first"
        )
    wanted = None if columns is None else list(dict.fromkeys([*columns, "event_time"]))
    tables = [pq.read_table(path, columns=wanted) for path in paths]
    clipped = (floor_time(window.start, HOUR), floor_time(window.end, HOUR))
    if tables and clipped != (window.start, window.end):
        ends = sorted({0, len(tables) - 1})
        for place in ends:
            tables[place] = _inside(tables[place], window)
    if not tables:
        log = ImpressionLog.open(Workspace.of(settings).clean, settings)
        tables = [frame_schema(settings, key=log.key_type).empty_table()]
    table = pa.concat_tables(tables).replace_schema_metadata(None)
    return table if columns is None else table.select(list(columns))


def join_features(
    store: FeatureStore, entities: pa.Table, settings: DriftlineSettings
) -> dict[str, pa.ChunkedArray]:
    """Feature columns of a frame for rows of keys and moments, in the order of the rows.

    Args:
        store: Feast, from ``open_store``.
        entities: ``event_timestamp``, ``page_product_id``, ``ad_product_id``. ``[N]``.
        settings: Decides the columns.

    Raises:
        JoinError: the join lost or invented rows.
    """
    sources = frame_sources(settings)
    found: dict[str, pa.ChunkedArray] = {}
    asked = entities
    for service, of_products in ((HEAD_PRODUCTS, True), (HEAD_CATEGORIES, False)):
        wanted = [source for source in sources if (source[2].entity == "product") == of_products]
        if not wanted:
            continue
        if not of_products:
            asked = _category_keys(entities, found, settings)
        joined = store.get_historical_features(
            entity_df=asked,
            features=store.get_feature_service(service, allow_cache=True),
            full_feature_names=True,
            filter_by_created_timestamp=True,
        ).to_arrow()
        if joined.num_rows != entities.num_rows:
            raise JoinError(
                f"the join of {service} gave {joined.num_rows} rows for {entities.num_rows}; "
                "an offline store must keep every row, check `offline_store` of the Feast settings"
            )
        for column, alias, view in wanted:
            found[column] = joined.column(feast_column(column, alias, view))
            if column in TEXT_ID_COLUMNS:
                is_text = pc.not_equal(found[column], NO_TEXT)
                found[column] = pc.if_else(is_text, found[column], pa.scalar(None, pa.int64()))
    return found


def category_keys(
    page: pa.Array | pa.ChunkedArray, ad: pa.Array | pa.ChunkedArray
) -> dict[str, pa.Array | pa.ChunkedArray]:
    """Keys of the category views by alias; null where a category is not known. ``[N]`` each."""
    pair = pc.binary_join_element_wise(page, ad, "|", null_handling="emit_null")
    return {"ad_category": ad, "category_pair": pair}


def _category_keys(
    entities: pa.Table, found: Mapping[str, pa.ChunkedArray], settings: DriftlineSettings
) -> pa.Table:
    name = settings.counters.category
    keys = category_keys(found[f"page__{name}"], found[f"ad__{name}"])
    columns = {"event_timestamp": entities.column("event_timestamp")}
    return pa.table(columns | {ENTITY_KEYS[alias]: values for alias, values in keys.items()})


def _join(
    store: FeatureStore, rows: pa.Table, settings: DriftlineSettings, *, key: pa.DataType
) -> pa.Table:
    schema = frame_schema(settings, key=key)
    entities = pa.table(
        {
            "event_timestamp": rows.column("event_time"),
            "page_product_id": rows.column("page_product_id"),
            "ad_product_id": rows.column("ad_product_id"),
        }
    )
    columns: dict[str, pa.ChunkedArray] = {name: rows.column(name) for name in rows.column_names}
    columns["clicked_ever"] = rows.column("clicked")
    columns["clicked"] = known_label(rows, maturity=settings.labels.maturity)
    columns |= join_features(store, entities, settings)
    nothing = pa.chunked_array([pa.nulls(rows.num_rows, pa.int64())])
    arrays = [
        columns.get(field.name, nothing).cast(field.type, safe=not pa.types.is_floating(field.type))
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def _chunks(log: ImpressionLog, hours: Sequence[Window]) -> Iterator[tuple[list[Window], pa.Table]]:
    """Whole UTC days of hours, joined to chunks of about ``ROWS_AT_ONCE`` rows."""
    chunk: list[Window] = []
    tables: list[pa.Table] = []
    for place, hour in enumerate(hours):
        chunk.append(hour)
        last = place + 1 == len(hours)
        if last or floor_time(hours[place + 1].start, DAY) != floor_time(hour.start, DAY):
            day = [window for window in chunk if window.start >= floor_time(hour.start, DAY)]
            tables.append(_rows_of(log, day))
            if last or sum(table.num_rows for table in tables) >= ROWS_AT_ONCE:
                yield chunk, pa.concat_tables(tables).combine_chunks()
                chunk, tables = [], []


def _rows_of(log: ImpressionLog, hours: Sequence[Window]) -> pa.Table:
    rows = log.impressions(Window(hours[0].start, hours[-1].end))
    wanted = {hour.start for hour in hours}
    if len(wanted) == int(Window(hours[0].start, hours[-1].end).num_hours):
        return rows
    return pa.concat_tables([rows.slice(0, 0), *(_inside(rows, hour) for hour in hours)])


def _split_hours(frame: pa.Table, hours: Sequence[Window]) -> Iterator[tuple[Window, pa.Table]]:
    """The rows of each hour; the rows ascend by time and lie in these hours only."""
    times = np.asarray(pc.cast(frame.column("event_time"), pa.int64()))
    bounds = np.array([_micros(hour.start) for hour in hours] + [_micros(hours[-1].end)])
    starts = np.searchsorted(times, bounds)
    for place, hour in enumerate(hours):
        yield hour, frame.slice(int(starts[place]), int(starts[place + 1] - starts[place]))


def _inside(table: pa.Table, window: Window) -> pa.Table:
    time = table.column("event_time")
    after = pc.greater_equal(time, pa.scalar(window.start, TIME))
    return table.filter(pc.and_(after, pc.less(time, pa.scalar(window.end, TIME))))


def _write(path: Path, rows: pa.Table, *, key: str) -> None:
    with whole_file(path) as scratch:
        names = [field.name for field in rows.schema if pa.types.is_string(field.type)]
        pq.write_table(
            rows.replace_schema_metadata({KEY: key.encode()}),
            scratch,
            use_dictionary=[name for name in names if name != "impression_id"],
            write_statistics=["event_time"],
            compression="lz4",
        )


def _path(settings: DriftlineSettings, hour: datetime) -> Path:
    return Workspace.of(settings).frames / f"{hour.astimezone(UTC):%Y-%m-%dT%H}.parquet"


def _stored_key(settings: DriftlineSettings, hour: datetime) -> str | None:
    path = _path(settings, hour)
    if not path.exists():
        return None
    return (pq.read_schema(path).metadata or {}).get(KEY, b"").decode()


def _micros(moment: datetime) -> int:
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // HOUR * 3_600_000_000

"""Impressions with all their features as known at their own moment, one Parquet file an hour.

Feast joins in two steps: first what the products tell (page and ad), then what their categories
tell, because the category is itself a feature. One row in is one row out. A file's footer holds a
key of everything its rows were made from; a file whose key no longer fits is made anew.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from feast import FeatureStore

from driftline.features.definitions import (
    ENTITY_KEYS,
    HEAD_CATEGORIES,
    HEAD_PRODUCTS,
    feast_column,
    frame_sources,
)
from driftline.features.frame_files import (
    frame_path,
    frame_schema,
    rows_inside,
    stored_key,
    write_frame,
)
from driftline.features.frame_keys import frame_keys
from driftline.features.log import ImpressionLog
from driftline.features.maturity import known_label
from driftline.features.store import open_store
from driftline.features.views import NO_TEXT
from driftline.platform.columns import TEXT_ID_COLUMNS
from driftline.platform.errors import DriftlineError
from driftline.platform.settings import DriftlineSettings
from driftline.platform.windows import DAY, HOUR, Window, floor_time
from driftline.platform.workspace import Workspace

logger = logging.getLogger(__name__)

ROWS_AT_ONCE: Final = 500_000
"""Rows joined at a time; a chunk ends with a UTC day."""


class JoinError(DriftlineError):
    """A point-in-time join gave other rows than it was asked for."""


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
    stale = [hour for hour in hours if stored_key(settings, hour.start) != keys[hour.start]]
    if not stale:
        return
    store = open_store(settings)
    num_done = len(hours) - len(stale)
    for chunk, rows in _chunks(log, stale):
        frame = _join(store, rows, settings, key=log.key_type)
        for hour, table in _split_hours(frame, chunk):
            write_frame(frame_path(settings, hour.start), table, key=keys[hour.start])
            num_done += 1
            if progress is not None:
                progress(num_done, len(hours))
    logger.info("built frames of %d of %d hours in %s", len(stale), len(hours), window)


def join_features(
    store: FeatureStore, entities: pa.Table, settings: DriftlineSettings, *, as_known: bool = True
) -> dict[str, pa.ChunkedArray]:
    """Feature columns of a frame for rows of keys and moments, in the order of the rows.

    Args:
        store: Feast, from ``open_store``.
        entities: ``event_timestamp``, ``page_product_id``, ``ad_product_id``. ``[N]``.
        settings: Decides the columns.
        as_known: Only values that were known at the moment; else also those that became known
            later, which no training row may see.

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
            filter_by_created_timestamp=as_known,
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
    return pa.concat_tables([rows.slice(0, 0), *(rows_inside(rows, hour) for hour in hours)])


def _split_hours(frame: pa.Table, hours: Sequence[Window]) -> Iterator[tuple[Window, pa.Table]]:
    """The rows of each hour; the rows ascend by time and lie in these hours only."""
    times = np.asarray(pc.cast(frame.column("event_time"), pa.int64()))
    bounds = np.array([_micros(hour.start) for hour in hours] + [_micros(hours[-1].end)])
    starts = np.searchsorted(times, bounds)
    for place, hour in enumerate(hours):
        yield hour, frame.slice(int(starts[place]), int(starts[place + 1] - starts[place]))


def _micros(moment: datetime) -> int:
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // HOUR * 3_600_000_000

"""Merging online rows: per product the newest (event, created) wins, whatever came first.

A table of online rows has the columns ``KEY``, ``EVENT_US``, ``CREATED_US`` (``UNKNOWN_US`` where a
source has none) and then the features.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from driftline.features.feast_plugins.columns import arrow_rows, plain_numbers
from driftline.features.feast_plugins.errors import FeatureStoreError
from driftline.features.feast_plugins.keys import as_key_type, fixed_bytes, key_type
from driftline.features.feast_plugins.scan import CREATED_US, EVENT_US, KEY, UNKNOWN_US

RESERVED = (KEY, EVENT_US, CREATED_US)


def online_rows(
    table: pa.Table,
    *,
    key: str,
    event_column: str,
    created_column: str | None,
    features: Sequence[pa.Field],
) -> pa.Table:
    """Bring any table of feature rows into the layout of online rows.

    Rows without a product or an event time cannot be looked up and are left out.

    Raises:
        FeatureStoreError: a column is missing or cannot become what the view declares.
    """
    needed = [key, event_column, *([created_column] if created_column else [])]
    for name in [*needed, *(feature.name for feature in features)]:
        if name not in table.column_names:
            raise FeatureStoreError(
                f"column {name} is missing among {', '.join(table.column_names)}"
            )
    created = pa.chunked_array([pa.repeat(UNKNOWN_US, len(table))])
    if created_column:
        created = _microseconds(table.column(created_column)).fill_null(UNKNOWN_US)
    schema = pa.schema([pa.field(feature.name, feature.type) for feature in features])
    columns = {
        KEY: _key_column(table.column(key), key),
        EVENT_US: _microseconds(table.column(event_column)),
        CREATED_US: created,
    }
    columns |= {name: _cast(table.column(name), schema.field(name)) for name in schema.names}
    rows = pa.table(columns)
    usable = pc.and_(pc.is_valid(rows.column(KEY)), pc.is_valid(rows.column(EVENT_US)))
    return rows if pc.all(usable).as_py() in (True, None) else rows.filter(usable)


def newest_by_key(parts: Sequence[pa.Table]) -> pa.Table:
    """Newest row of each product over all parts, in order of the products.

    Of rows with equal (event, created) the one that came last wins, so a repeated write is
    harmless and a corrected one counts. The features are those of the last part: what it lacks is
    dropped, what the others lack is null.
    """
    rows = pa.concat_tables([align(part, parts[-1].schema) for part in parts]).combine_chunks()
    keys = rows.column(KEY).combine_chunks()
    if keys.type == pa.int64():
        codes = plain_numbers(keys)
    else:
        codes = np.unique(fixed_bytes(keys), return_inverse=True)[1]
    event_us = plain_numbers(rows.column(EVENT_US))
    order = np.lexsort((plain_numbers(rows.column(CREATED_US)), event_us, codes))
    ordered = codes[order]
    last = np.append(ordered[1:] != ordered[:-1], True)[: len(order)]
    if bool(last.all()) and bool(np.all(order[1:] > order[:-1])):
        return rows
    return rows.take(arrow_rows(order[last])).combine_chunks()


def align(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """Online rows with the features of ``schema``.

    Raises:
        FeatureStoreError: a feature or the key has become something else.
    """
    if rows.schema.equals(schema):
        return rows
    return pa.table(
        {
            part.name: _cast(rows.column(part.name), part)
            if part.name in rows.column_names
            else pa.nulls(len(rows), part.type)
            for part in schema
        }
    )


def _cast(column: pa.ChunkedArray, wanted: pa.Field) -> pa.ChunkedArray:
    if column.type == wanted.type:
        return column
    try:
        return column.cast(wanted.type, safe=not pa.types.is_floating(wanted.type))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        what = "the key" if wanted.name == KEY else f"feature {wanted.name}"
        raise FeatureStoreError(
            f"{what} is {column.type} but should be {wanted.type}: {error}; correct the view's "
            "schema, or remove the view's online folder and materialise it again"
        ) from error


def _key_column(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    return as_key_type(column, key_type(column.type, f"key {name}"), f"key {name}")


def _microseconds(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.timestamp("us", column.type.tz), safe=False)
    return column.cast(pa.int64())

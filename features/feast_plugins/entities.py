"""The table of entity rows that a caller brings: one row per impression, with its own moment."""

from datetime import datetime

import numpy as np
import pandas as pd
import pyarrow as pa

from driftline.features.feast_plugins.asof import Int64s
from driftline.features.feast_plugins.errors import FeatureStoreError
from driftline.features.feast_plugins.scan import UNKNOWN_US

EVENT_TIMESTAMP = "event_timestamp"


def to_arrow(entities: pd.DataFrame | pa.Table) -> pa.Table:
    """The entity table as Arrow; an Arrow table as it is."""
    if isinstance(entities, pa.Table):
        return entities
    return pa.Table.from_pandas(entities, preserve_index=False)


def time_column(schema: pa.Schema) -> str:
    """Name of the column with each row's moment.

    Raises:
        FeatureStoreError: there is none, or several could be meant.
    """
    if EVENT_TIMESTAMP in schema.names:
        return EVENT_TIMESTAMP
    times = [name for name in schema.names if pa.types.is_timestamp(schema.field(name).type)]
    if len(times) != 1:
        raise FeatureStoreError(
            f"entity table must have a column {EVENT_TIMESTAMP} or exactly one timestamp, "
            f"got {', '.join(times) or 'no timestamp'} among {', '.join(schema.names)}"
        )
    return times[0]


def event_microseconds(column: pa.ChunkedArray, name: str) -> Int64s:
    """Moments of a column in microseconds; ``UNKNOWN_US`` where it has none. ``[N]``."""
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        parsed = pd.to_datetime(column.to_pandas(), utc=True)
        column = pa.chunked_array([pa.Array.from_pandas(parsed)])
    if not pa.types.is_timestamp(column.type):
        raise FeatureStoreError(f"column {name} must hold timestamps, got {column.type}")
    # A naive time is UTC, and a zone is only a way of writing: the stored number is the same.
    whole = column.cast(pa.timestamp("us", column.type.tz), safe=False).cast(pa.int64())
    return np.asarray(whole.fill_null(UNKNOWN_US), np.int64)


def moment(us: int) -> datetime:
    """The moment ``us`` microseconds after 1970."""
    return pd.Timestamp(us, unit="us", tz="UTC").to_pydatetime()

"""Frames on disk, one Parquet file an hour; ``frames`` builds them.

Reading them needs no Feast, whose import takes seconds.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from driftline.features.log import ImpressionLog
from driftline.platform.artefacts import whole_file
from driftline.platform.columns import TEXT_ID_COLUMNS, head_columns
from driftline.platform.contract import TIME
from driftline.platform.errors import MissingArtefactError
from driftline.platform.settings import DriftlineSettings
from driftline.platform.windows import HOUR, Window, floor_time
from driftline.platform.workspace import Workspace

KEY: Final = b"driftline.frame_key"


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


def read_frames(
    settings: DriftlineSettings, window: Window, *, columns: Sequence[str] | None = None
) -> pa.Table:
    """Rows of a window, sorted by (event_time, impression_id).

    Raises:
        MissingArtefactError: the frame of an hour of the window has not been built.
    """
    paths = [frame_path(settings, floor_time(hour.start, HOUR)) for hour in window.hours()]
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
            tables[place] = rows_inside(tables[place], window)
    if not tables:
        log = ImpressionLog.open(Workspace.of(settings).clean, settings)
        tables = [frame_schema(settings, key=log.key_type).empty_table()]
    table = pa.concat_tables(tables).replace_schema_metadata(None)
    return table if columns is None else table.select(list(columns))


def write_frame(path: Path, rows: pa.Table, *, key: str) -> None:
    """Write one hour, whole or not at all, with the key of what it was built from."""
    with whole_file(path) as scratch:
        names = [field.name for field in rows.schema if pa.types.is_string(field.type)]
        pq.write_table(
            rows.replace_schema_metadata({KEY: key.encode()}),
            scratch,
            use_dictionary=[name for name in names if name != "impression_id"],
            write_statistics=["event_time"],
            compression="lz4",
        )


def frame_path(settings: DriftlineSettings, hour: datetime) -> Path:
    """Where the frame of an hour lies."""
    return Workspace.of(settings).frames / f"{hour.astimezone(UTC):%Y-%m-%dT%H}.parquet"


def stored_key(settings: DriftlineSettings, hour: datetime) -> str | None:
    """Key of the frame of an hour; None where there is no frame."""
    path = frame_path(settings, hour)
    if not path.exists():
        return None
    return (pq.read_schema(path).metadata or {}).get(KEY, b"").decode()


def rows_inside(table: pa.Table, window: Window) -> pa.Table:
    """Rows of a window."""
    time = table.column("event_time")
    after = pc.greater_equal(time, pa.scalar(window.start, TIME))
    return table.filter(pc.and_(after, pc.less(time, pa.scalar(window.end, TIME))))

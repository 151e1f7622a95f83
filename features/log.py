"""A log on disk: ``impressions/``, ``catalogue/`` and ``counters/`` in the form of the contract.

Two folders of a workspace have this form: the log as ingested and the log after the quality check.
The readers here serve both; only the clean one promises one file a UTC day, in order of time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from driftline.platform.contract import (
    catalogue_schema,
    counters_schema,
    impressions_schema,
)
from driftline.platform.errors import MissingArtefactError
from driftline.platform.settings import DriftlineSettings
from driftline.platform.windows import (
    HOUR,
    Split,
    Window,
    ceil_time,
    floor_time,
    format_time,
    split_span,
)

ROWS_PER_GROUP: Final = 32_768
"""Row-group size of every table we write: small enough to skip by hour, large enough to scan."""

ORDER: Final = ("event_time", "impression_id")

WEEKDAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


@dataclass(frozen=True)
class IngestReport:
    """What an adapter wrote, and what it put aside."""

    kind: str
    num_impressions: int
    num_clicks: int
    num_products: int
    """Rows of the catalogue (versions of products)."""
    num_counter_rows: int
    span: Window
    put_aside: Mapping[str, int]
    """Reason: number of input rows that are not in the log, but in its ``quarantine/``."""
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The same as JSON-able values."""
        return asdict(self) | {
            "span": [format_time(self.span.start), format_time(self.span.end)],
            "put_aside": dict(self.put_aside),
        }


@dataclass(frozen=True)
class ImpressionLog:
    """Reads the three tables of one log. Get one by :meth:`open`."""

    root: Path
    settings: DriftlineSettings
    key_type: pa.DataType
    """``int64`` or ``string``, the same in all tables."""
    span: Window
    """From the first event, floored to the hour, to just after the last, ceiled to the hour."""
    num_rows: int

    @classmethod
    def open(cls, root: Path, settings: DriftlineSettings) -> "ImpressionLog":
        """Look at the files' footers; reads no rows.

        Raises:
            MissingArtefactError: there is no log here.
        """
        files = sorted((root / "impressions").glob("*.parquet"))
        if not files:
            raise MissingArtefactError(
                f"{root} holds no log (no impressions/*.parquet); "
                "run `driftline ingest` or `driftline simulate`, then `driftline check` first"
            )
        bounds = [_time_bounds(path) for path in files]
        present = [bound for bound in bounds if bound is not None]
        if not present:
            raise MissingArtefactError(
                f"{root} holds a log without a single impression; "
                "run `driftline ingest` or `driftline simulate` again"
            )
        first = min(low for low, _ in present)
        last = max(high for _, high in present)
        return cls(
            root=root,
            settings=settings,
            key_type=pq.read_schema(files[0]).field("page_product_id").type,
            span=span_of(first, last),
            num_rows=sum(pq.read_metadata(path).num_rows for path in files),
        )

    @property
    def split(self) -> Split:
        """The stale part (OOD) and the recent part (ID), as the settings cut them.

        Raises:
            SettingsError: the cut leaves one side empty.
        """
        shares = self.settings.split
        return split_span(self.span, ood_share=shares.ood_share, ood_end=shares.ood_end)

    def impression_files(self) -> list[Path]:
        """Files of impressions, by name; in a clean log by day."""
        return sorted((self.root / "impressions").glob("*.parquet"))

    def impressions(
        self, window: Window | None = None, *, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """Rows of a window (all when not given), sorted by (event_time, impression_id).

        Args:
            window: Half-open; only row groups that touch it are read.
            columns: Subset of the contract's columns, in this order.
        """
        schema = impressions_schema(self.settings, key=self.key_type)
        wanted = schema.names if columns is None else list(columns)
        time = ds.field("event_time")
        inside = (
            None
            if window is None
            else (time >= pa.scalar(window.start, pa.timestamp("us", tz="UTC")))
            & (time < pa.scalar(window.end, pa.timestamp("us", tz="UTC")))
        )
        source = ds.dataset(self._files_of(window), schema=schema, format="parquet")
        table = source.to_table(columns=list(dict.fromkeys([*wanted, *ORDER])), filter=inside)
        if not _is_in_order(table):
            table = table.sort_by([(name, "ascending") for name in ORDER])
        return table.select(wanted)

    def catalogue(self) -> pa.Table:
        """All versions of all products; no rows when the log came without a catalogue."""
        schema = catalogue_schema(self.settings, key=self.key_type)
        table = _read_folder(self.root / "catalogue", schema)
        return schema.empty_table() if table is None else table

    def counters(self) -> pa.Table | None:
        """The user's own numbers by product-hour; ``None`` when the log came without."""
        return _read_folder(
            self.root / "counters", counters_schema(self.settings, key=self.key_type)
        )

    def _files_of(self, window: Window | None) -> list[Path]:
        """Files that may hold rows of the window; decided by name where the name is a day."""
        files = self.impression_files()
        if window is None:
            return files
        return [path for path in files if _may_touch(path, window)]


def span_of(first: datetime, last: datetime) -> Window:
    """Whole hours that hold both moments."""
    just_after = last + timedelta(microseconds=1)
    return Window(floor_time(first, HOUR), ceil_time(just_after, HOUR))


def nullable(schema: pa.Schema) -> pa.Schema:
    """The same columns, all of them allowed to be null: the form before the quality check."""
    return pa.schema([field.with_nullable(True) for field in schema])


def day_numbers(times: pa.ChunkedArray | pa.Array) -> np.ndarray[Any, np.dtype[np.int64]]:
    """UTC days since the epoch of non-null contract times."""
    micros = np.asarray(pc.cast(times, pa.int64()))
    return micros // 86_400_000_000


def day_name(day: int) -> str:
    """``YYYY-MM-DD`` of a day since the epoch."""
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(days=day)).strftime("%Y-%m-%d")


def hour_columns(hours: np.ndarray[Any, np.dtype[np.int64]]) -> dict[str, pa.Array]:
    """``hour_of_week`` (``sat-07``) and ``hour_of_day`` (``07``) of hours since the epoch, UTC."""
    of_day = hours % 24
    weekday = (hours // 24 + 3) % 7  # 1970-01-01 was a Thursday
    weeks = pa.array([f"{day}-{hour:02d}" for day in WEEKDAYS for hour in range(24)])
    days = pa.array([f"{hour:02d}" for hour in range(24)])
    return {
        "hour_of_week": weeks.take(pa.array(weekday * 24 + of_day)),
        "hour_of_day": days.take(pa.array(of_day)),
    }


def _time_bounds(path: Path) -> tuple[datetime, datetime] | None:
    metadata = pq.read_metadata(path)
    if metadata.num_rows == 0:
        return None
    column = metadata.schema.names.index("event_time")
    stats = [
        metadata.row_group(group).column(column).statistics
        for group in range(metadata.num_row_groups)
        if metadata.row_group(group).num_rows
    ]
    if all(stat is not None and stat.has_min_max for stat in stats):
        return min(stat.min for stat in stats), max(stat.max for stat in stats)
    limits = pc.min_max(pq.read_table(path, columns=["event_time"]).column(0))
    low, high = limits["min"].as_py(), limits["max"].as_py()
    return None if low is None else (low, high)


def _may_touch(path: Path, window: Window) -> bool:
    try:
        start = datetime.strptime(path.stem, "%Y-%m-%d").replace(tzinfo=UTC)
    except ValueError:
        return True
    return start < window.end and window.start < start + timedelta(days=1)


def _is_in_order(table: pa.Table) -> bool:
    """Whether rows ascend by (event_time, impression_id); a scan is cheaper than a sort."""
    if table.num_rows < 2:
        return True
    times = np.asarray(pc.cast(table.column("event_time"), pa.int64()))
    steps = np.diff(times)
    if (steps < 0).any():
        return False
    ties = np.flatnonzero(steps == 0)
    if ties.size == 0:
        return True
    names = table.column("impression_id").combine_chunks()
    return bool(
        pc.all(pc.less_equal(names.take(pa.array(ties)), names.take(pa.array(ties + 1)))).as_py()
    )


def _read_folder(folder: Path, schema: pa.Schema) -> pa.Table | None:
    files = sorted(folder.glob("*.parquet"))
    if not files:
        return None
    return ds.dataset(files, schema=schema, format="parquet").to_table()

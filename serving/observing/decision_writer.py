"""Decisions on their way to disk: gathered, written whole, bounded in memory and on disk.

A write that fails (disk full, folder gone, not allowed) is counted, logged once for each cause and
tried again later; meanwhile rows wait in memory up to a bound, and beyond it the oldest are
dropped and counted. Nothing here knows of requests, and no request waits for it.
"""

import errno
import logging
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from driftline.features.decisions import hour_folder
from driftline.platform.artefacts import whole_file
from driftline.platform.observation_settings import DecisionLogSettings
from driftline.platform.windows import HOUR, floor_time
from driftline.serving.observing.bounded_folder import bound_folder

logger = logging.getLogger(__name__)

SUFFIX: Final = ".parquet"

Write = Callable[[pa.Table, Path], None]


@dataclass
class WriterCounts:
    """What became of the rows so far; written by one thread, read by any."""

    rows_written: int = 0
    files_written: int = 0
    failed_writes: int = 0
    rows_dropped: int = 0
    """Rows that could not wait any longer."""
    rows_waiting: int = 0
    bytes_on_disk: int = 0
    """Of all replicas together."""
    last_failure: str | None = None


class DecisionWriter:
    """Writes batches of rows to ``ROOT/HOUR/REPLICA-NUMBER.parquet``. Belongs to one thread.

    Args:
        root: Folder of the log.
        replica: Name that no other writer has.
        settings: When to write, and how much to keep.
        write: How a table becomes a file.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        root: Path,
        *,
        replica: str,
        settings: DecisionLogSettings,
        write: Write | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.counts = WriterCounts()
        self._root = root
        self._replica = replica
        self._settings = settings
        self._write = write or write_parquet
        self._clock = clock
        self._waiting: deque[tuple[datetime, pa.RecordBatch]] = deque()
        self._number = 0
        self._next_write = clock() + settings.flush_seconds
        self._is_failing = False
        self._known_causes: set[str] = set()

    def add(self, event_time: datetime, batch: pa.RecordBatch) -> None:
        """Take rows of one hour of event time; the oldest rows go when there is no room."""
        self._waiting.append((floor_time(event_time, HOUR), batch))
        self.counts.rows_waiting += batch.num_rows
        while self.counts.rows_waiting > self._settings.max_waiting_rows and self._waiting:
            _, oldest = self._waiting.popleft()
            self.counts.rows_waiting -= oldest.num_rows
            self.counts.rows_dropped += oldest.num_rows

    @property
    def is_due(self) -> bool:
        """Whether it is time to write, whatever waits."""
        return self._clock() >= self._next_write

    def flush_if_due(self) -> None:
        """Write when it is time, or when enough rows wait and the last write went well."""
        full = self.counts.rows_waiting >= self._settings.flush_rows and not self._is_failing
        if full or self.is_due:
            self.flush()

    def flush(self) -> None:
        """Write what waits, one file an hour of event time; then delete what is too old."""
        self._next_write = self._clock() + self._settings.flush_seconds
        self._is_failing = False
        groups: dict[tuple[datetime, pa.Schema], list[pa.RecordBatch]] = {}
        for hour, batch in self._waiting:
            groups.setdefault((hour, batch.schema), []).append(batch)
        self._waiting.clear()
        for (hour, _), batches in groups.items():
            if not self._write_hour(hour, batches):
                self._waiting.extend((hour, batch) for batch in batches)
        self.counts.rows_waiting = sum(batch.num_rows for _, batch in self._waiting)
        self.counts.bytes_on_disk = bound_folder(
            self._root,
            suffix=SUFFIX,
            keep_seconds=self._settings.keep_hours * 3_600.0,
            max_bytes=self._settings.max_bytes,
        )

    def close(self) -> None:
        """A last attempt; rows that cannot be written then are dropped."""
        self.flush()
        self.counts.rows_dropped += self.counts.rows_waiting
        self.counts.rows_waiting = 0
        self._waiting.clear()

    def _write_hour(self, hour: datetime, batches: list[pa.RecordBatch]) -> bool:
        table = pa.Table.from_batches(batches)
        self._number += 1
        path = hour_folder(self._root, hour) / f"{self._replica}-{self._number:06d}{SUFFIX}"
        try:
            with whole_file(path) as scratch:
                self._write(table, scratch)
        except (OSError, pa.ArrowException) as error:
            self._fail(error)
            return False
        self.counts.rows_written += table.num_rows
        self.counts.files_written += 1
        return True

    def _fail(self, error: Exception) -> None:
        self._is_failing = True
        self.counts.failed_writes += 1
        number = error.errno if isinstance(error, OSError) else None
        cause = errno.errorcode.get(number, str(number)) if number else type(error).__name__
        self.counts.last_failure = f"{cause}: {error}"
        if cause not in self._known_causes:
            self._known_causes.add(cause)
            why = os.strerror(number) if number else str(error)
            logger.warning(
                "decision log: cannot write to %s (%s); up to %d rows wait in memory, then the "
                "oldest are dropped; requests are answered as before. Free the disk or correct "
                "the folder, or set serving.decision_log.sample_rate to 0",
                self._root,
                why,
                self._settings.max_waiting_rows,
            )


def write_parquet(table: pa.Table, path: Path) -> None:
    """Small and quick to read by hour; Arrow does this without the interpreter's lock."""
    texts = [f.name for f in table.schema if pa.types.is_string(f.type)]
    dictionaries = [name for name in texts if name != "impression_id"]
    pq.write_table(table, path, compression="zstd", use_dictionary=dictionaries)

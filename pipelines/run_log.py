"""The record of scheduled runs: one row each, in SQLite, readable while nothing runs."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from driftline.platform.windows import format_time

Outcome = Literal["running", "done", "failed", "interrupted"]

CREATE = """
CREATE TABLE IF NOT EXISTS runs (
    run_id INTEGER PRIMARY KEY, kind TEXT NOT NULL, as_of TEXT NOT NULL, started TEXT NOT NULL,
    ended TEXT, outcome TEXT NOT NULL, message TEXT NOT NULL, log TEXT NOT NULL)
"""
COLUMNS = "run_id, kind, as_of, started, ended, outcome, message, log"


@dataclass(frozen=True)
class Run:
    """One scheduled run."""

    run_id: int
    kind: str
    as_of: str
    started: str
    ended: str | None
    outcome: Outcome
    message: str
    log: str


class RunLog:
    """Rows of one market's runs.

    Args:
        path: SQLite file; created by the first write.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def begin(self, kind: str, *, as_of: datetime, now: datetime, log: Path) -> int:
        """Write that a run has started; gives its number."""
        row = (kind, format_time(as_of), format_time(now), "running", "", str(log))
        with self._write() as connection:
            cursor = connection.execute(
                "INSERT INTO runs (kind, as_of, started, outcome, message, log) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                row,
            )
            assert cursor.lastrowid is not None
            return cursor.lastrowid

    def end(self, run_id: int, outcome: Outcome, message: str, *, now: datetime) -> None:
        """Write how a run ended."""
        with self._write() as connection:
            connection.execute(
                "UPDATE runs SET outcome = ?, message = ?, ended = ? WHERE run_id = ?",
                (outcome, message, format_time(now), run_id),
            )

    def interrupt_unfinished(self, *, now: datetime) -> int:
        """Mark what a killed service left running; gives how many there were."""
        with self._write() as connection:
            return connection.execute(
                "UPDATE runs SET outcome = 'interrupted', ended = ?, "
                "message = 'the service was stopped' WHERE outcome = 'running'",
                (format_time(now),),
            ).rowcount

    def last(self, kind: str) -> Run | None:
        """The newest run of a kind."""
        runs = self._read("WHERE kind = ? ORDER BY run_id DESC LIMIT 1", kind)
        return runs[0] if runs else None

    def runs(self, *, limit: int = 50) -> list[Run]:
        """The newest runs, newest first."""
        return self._read(f"ORDER BY run_id DESC LIMIT {limit:d}")

    def _read(self, clause: str, *values: str) -> list[Run]:
        if not self._path.exists():
            return []
        with self._connect() as connection:
            return [
                Run(*row)
                for row in connection.execute(f"SELECT {COLUMNS} FROM runs {clause}", values)
            ]

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._connect() as connection:
            connection.execute(CREATE)
            yield connection
            connection.commit()

    @contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self._path, timeout=30)
        try:
            yield connection
        finally:
            connection.close()

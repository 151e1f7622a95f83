"""The way to disk: whole files, bounds in memory and on disk, and failures that harm nobody."""

import errno
import logging
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from driftline.platform.observation_settings import DecisionLogSettings
from driftline.serving.observing.bounded_folder import bound_folder
from driftline.serving.observing.decision_writer import DecisionWriter, write_parquet
from driftline.serving.observing.repeating import Repeating

HOUR = datetime(2026, 1, 2, 12, tzinfo=UTC)


def rows(first: int, number: int = 10) -> pa.RecordBatch:
    return pa.record_batch({"number": list(range(first, first + number))})


def numbers(root: Path) -> list[int]:
    found: list[int] = []
    for path in root.rglob("*.parquet"):
        found += pq.read_table(path)["number"].to_pylist()
    return sorted(found)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def writer(root: Path, *, write: Any = write_parquet, **changes: Any) -> DecisionWriter:
    settings = DecisionLogSettings.model_validate({"flush_seconds": 10, **changes})
    return DecisionWriter(root, replica="r", settings=settings, write=write, clock=Clock())


def pass_time(writer: DecisionWriter, seconds: float) -> None:
    clock = writer._clock
    assert isinstance(clock, Clock)
    clock.now += seconds
    writer.flush_if_due()


def test_every_row_is_written_once_in_the_folder_of_its_hour(tmp_path: Path) -> None:
    made = writer(tmp_path)
    made.add(HOUR + timedelta(minutes=59), rows(0))
    made.add(HOUR + timedelta(minutes=60), rows(10))
    made.add(HOUR, rows(20))
    made.flush()
    made.flush()

    assert sorted(path.name for path in tmp_path.iterdir()) == ["2026-01-02T12", "2026-01-02T13"]
    assert numbers(tmp_path / "2026-01-02T13") == list(range(10, 20))
    assert numbers(tmp_path) == list(range(30))
    assert (made.counts.rows_written, made.counts.files_written) == (30, 2)
    assert made.counts.bytes_on_disk == sum(p.stat().st_size for p in tmp_path.rglob("*.parquet"))


def test_a_file_comes_after_so_many_seconds_or_so_many_rows(tmp_path: Path) -> None:
    made = writer(tmp_path, flush_rows=25)
    made.add(HOUR, rows(0))
    pass_time(made, 9)
    assert numbers(tmp_path) == []
    pass_time(made, 1)
    assert len(numbers(tmp_path)) == 10
    for first in (10, 20, 30):
        made.add(HOUR, rows(first))
        pass_time(made, 0)
    assert len(numbers(tmp_path)) == 40


class FullDisk:
    """Fails until told otherwise, as a disk does: after a few bytes."""

    def __init__(self) -> None:
        self.is_full = True
        self.num_tries = 0

    def __call__(self, table: pa.Table, path: Path) -> None:
        self.num_tries += 1
        if self.is_full:
            path.write_bytes(b"PAR1 and then no room")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_parquet(table, path)


def test_a_full_disk_keeps_the_newest_rows_in_memory_until_there_is_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk = FullDisk()
    made = writer(tmp_path, write=disk, max_waiting_rows=30, flush_rows=20)
    for first in range(0, 60, 10):
        made.add(HOUR, rows(first))
        pass_time(made, 1)
    tries = disk.num_tries
    assert tries == 1  # rows alone do not bring a failing disk another try, time does
    pass_time(made, 10)
    assert disk.num_tries == 2
    assert made.counts.failed_writes == 2
    assert list(tmp_path.rglob("*.p*")) == []
    assert (made.counts.rows_waiting, made.counts.rows_dropped) == (30, 30)
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "No space left on device" in warnings[0].getMessage()

    disk.is_full = False
    pass_time(made, 10)
    assert numbers(tmp_path) == list(range(30, 60))
    assert made.counts.rows_waiting == 0
    assert made.counts.last_failure is not None
    assert "ENOSPC" in made.counts.last_failure


def test_a_folder_that_cannot_be_made_is_counted_and_rows_are_dropped_at_close(
    tmp_path: Path,
) -> None:
    (tmp_path / "decisions").write_text("a file where the folder should be")
    made = writer(tmp_path / "decisions")
    made.add(HOUR, rows(0))
    made.close()

    assert (made.counts.failed_writes, made.counts.rows_dropped) == (1, 10)
    assert made.counts.rows_waiting == 0


FILE_SIZE_LIMIT = """
import resource, signal, sys
from datetime import UTC, datetime
from pathlib import Path
import numpy as np
import pyarrow as pa
from driftline.platform.observation_settings import DecisionLogSettings
from driftline.serving.observing.decision_writer import DecisionWriter

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
made = DecisionWriter(Path(sys.argv[1]), replica="r", settings=DecisionLogSettings())
noise = np.random.default_rng(0).uniform(size=10_000)
made.add(datetime(2026, 1, 2, tzinfo=UTC), pa.record_batch({"number": noise}))
made.flush()
print(made.counts.failed_writes, made.counts.rows_waiting)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
made.flush()
print(made.counts.rows_written, made.counts.rows_waiting)
"""


def in_a_process(code: str, *arguments: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_write_that_the_system_cuts_off_leaves_no_file_and_is_done_again(tmp_path: Path) -> None:
    out, _ = in_a_process(FILE_SIZE_LIMIT, tmp_path).communicate()

    assert out.split("\n")[:2] == ["1 10000", "10000 0"]
    assert len(numbers(tmp_path)) == 10_000
    assert len(list(tmp_path.rglob("*.p*"))) == 1


WRITE_FOR_EVER = """
import sys
from datetime import UTC, datetime
from pathlib import Path
import numpy as np
import pyarrow as pa
from driftline.platform.observation_settings import DecisionLogSettings
from driftline.serving.observing.decision_writer import DecisionWriter

made = DecisionWriter(Path(sys.argv[1]), replica="r", settings=DecisionLogSettings())
batch = pa.record_batch({"number": np.random.default_rng(0).uniform(size=20_000)})
print("ready", flush=True)
while True:
    made.add(datetime(2026, 1, 2, tzinfo=UTC), batch)
    made.flush()
"""


def test_a_kill_leaves_no_half_file(tmp_path: Path) -> None:
    process = in_a_process(WRITE_FOR_EVER, tmp_path)
    assert process.stdout is not None
    process.stdout.readline()
    while not list(tmp_path.rglob("*.parquet")):
        time.sleep(0.001)
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()

    files = list(tmp_path.rglob("*.parquet"))
    assert files
    assert all(pq.read_table(path).num_rows == 20_000 for path in files)


def test_the_folder_stays_within_its_size_and_age(tmp_path: Path) -> None:
    now = time.time()
    for age, name in enumerate(("new", "old", "older", "oldest")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "a.parquet").write_bytes(b"x" * 100)
        os.utime(folder / "a.parquet", (now - age * 7_200, now - age * 7_200))
    (tmp_path / "new/.b.parquet.0.partial").write_bytes(b"x")
    (tmp_path / "new/.c.parquet.0.partial").write_bytes(b"x")
    os.utime(tmp_path / "new/.c.parquet.0.partial", (now - 7_200, now - 7_200))

    left = bound_folder(
        tmp_path, suffix=".parquet", keep_seconds=3 * 7_200 - 1, max_bytes=250, now=now
    )

    assert left == 200
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.p*")) == [
        "new/.b.parquet.0.partial",
        "new/a.parquet",
        "old/a.parquet",
    ]
    for name in ("older", "oldest"):
        os.utime(tmp_path / name, (now - 7_200, now - 7_200))
    bound_folder(tmp_path, suffix=".parquet", keep_seconds=7_201, max_bytes=250, now=now)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]


def test_a_smaller_old_file_does_not_outlive_a_larger_new_one(tmp_path: Path) -> None:
    now = time.time()
    for age, size in enumerate((50, 100, 10)):
        path = tmp_path / f"{age}.parquet"
        path.write_bytes(b"x" * size)
        os.utime(path, (now - age, now - age))

    bound_folder(tmp_path, suffix=".parquet", keep_seconds=1e6, max_bytes=100, now=now)

    assert [path.name for path in tmp_path.iterdir()] == ["0.parquet"]


def test_the_log_of_a_long_run_stays_bounded(tmp_path: Path) -> None:
    write_parquet(pa.Table.from_batches([rows(0)]), tmp_path / "one.parquet")
    size = (tmp_path / "one.parquet").stat().st_size
    made = writer(tmp_path / "log", max_bytes=5 * size + size // 2)
    for number in range(40):
        made.add(HOUR + timedelta(hours=number), rows(number))
        made.flush()
        files = list((tmp_path / "log").rglob("*.parquet"))
        assert sum(path.stat().st_size for path in files) <= 5 * size + size // 2

    assert len(files) == 5
    assert numbers(tmp_path / "log") == sorted(n + i for n in range(35, 40) for i in range(10))


def test_a_thread_outlives_an_action_that_raises_and_acts_once_more_at_the_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls: list[int] = []

    def act() -> None:
        calls.append(len(calls))
        raise ValueError("bad")

    thread = Repeating("test", seconds=0.001, action=act)
    thread.start()
    while len(calls) < 3:
        time.sleep(0.001)
    thread.close()

    assert thread.num_errors == len(calls) >= 4
    assert len(caplog.records) == 1

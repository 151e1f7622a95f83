"""Online snapshots: the newest row wins in any order of arrival, and readers see whole versions."""

import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driftline.features.feast_plugins.errors import FeatureStoreError
from driftline.features.feast_plugins.merging import online_rows
from driftline.features.feast_plugins.scan import UNKNOWN_US
from driftline.features.feast_plugins.snapshot import Snapshot, SnapshotReader, current_version
from driftline.features.feast_plugins.snapshot_writer import SnapshotWriter

UTC_US = pa.timestamp("us", tz="UTC")
FEATURES = [pa.field("clicks", pa.float32()), pa.field("title", pa.string())]


@dataclass(frozen=True)
class Row:
    product: int
    event: int
    created: int | None
    value: int


def key(product: int, *, texts: bool, spread: int = 1) -> int | str:
    return f"product-{product}-{'ü' * product}" if texts else product * spread


def table_of(rows: Sequence[Row], *, texts: bool = False, spread: int = 1) -> pa.Table:
    kind = pa.string() if texts else pa.int64()
    ids = [key(row.product, texts=texts, spread=spread) for row in rows]
    return online_rows(
        pa.table(
            {
                "id": pa.array(ids, kind),
                "event": pa.array([row.event for row in rows], UTC_US),
                "created": pa.array([row.created for row in rows], UTC_US),
                "clicks": pa.array([float(row.value) for row in rows], pa.float32()),
                "title": pa.array([None if row.value % 5 == 0 else str(row.value) for row in rows]),
            }
        ),
        key="id",
        event_column="event",
        created_column="created",
        features=FEATURES,
    )


def writer_of(folder: Path) -> SnapshotWriter:
    return SnapshotWriter(folder, durable=False)


rows_of_products = st.builds(
    Row, st.integers(0, 6), st.integers(0, 5), st.none() | st.integers(0, 5), st.integers(0, 99)
)


@settings(max_examples=60)
@given(
    writes=st.lists(st.lists(rows_of_products, max_size=8), min_size=1, max_size=45),
    texts=st.booleans(),
    spread=st.sampled_from([1, 10**12 + 7]),
    seed=st.integers(0, 999),
)
def test_the_newest_row_wins_whatever_the_order_of_arrival(
    writes: list[list[Row]], texts: bool, spread: int, seed: int
) -> None:
    arrived: dict[int, Row] = {}
    for row in itertools.chain.from_iterable(writes):
        known = arrived.get(row.product)
        age = (row.event, -1 if row.created is None else row.created)
        if known is None or age >= (known.event, -1 if known.created is None else known.created):
            arrived[row.product] = row
    reads = random.Random(seed)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "view"
        reader = SnapshotReader(folder)
        for rows in writes:
            writer_of(folder).write(table_of(rows, texts=texts, spread=spread))
            if reads.random() < 0.3:
                reader.current()
        for snapshot in (reader.current(), Snapshot.open(folder)):
            assert snapshot is not None
            asked = [key(product, texts=texts, spread=spread) for product in range(9)]
            found = snapshot.read(asked, ["clicks"])
            titles = snapshot.read(asked, ["title"]).column("title")
            assert found.matrix is not None
            for product in range(9):
                newest = arrived.get(product)
                assert found.missing[product] == (newest is None)
                if newest is None:
                    assert np.isnan(found.matrix[product, 0])
                    assert found.event_time_us[product] == UNKNOWN_US
                    assert titles[product] is None
                else:
                    assert found.matrix[product, 0] == newest.value
                    assert found.event_time_us[product] == newest.event
                    title = None if newest.value % 5 == 0 else str(newest.value)
                    assert titles[product] == title
            assert len(snapshot) == len(arrived)
            assert len(snapshot.keys()) == len(set(snapshot.keys().to_pylist())) == len(arrived)
            slots = snapshot.rows(asked)
            assert np.array_equal(
                snapshot.column("clicks")[slots[slots >= 0]],
                snapshot.matrix(["clicks"])[slots[slots >= 0], 0],
            )


def rows_with(value: int, *, products: int = 50) -> pa.Table:
    return table_of([Row(product, value, None, value) for product in range(products)])


def test_a_small_write_leaves_the_large_file_alone(tmp_path: Path) -> None:
    writer = writer_of(tmp_path / "view")
    writer.write(rows_with(1, products=20_000))
    (base,) = (tmp_path / "view").glob("*base.arrow")
    written = base.stat()
    for value in range(2, 80):
        writer.write(table_of([Row(value, value, None, value)]))
    assert base.stat() == written
    assert len(list((tmp_path / "view").iterdir())) < 70
    snapshot = Snapshot.open(tmp_path / "view")
    assert snapshot.read(list(range(1, 80)), ["clicks"]).column("clicks").tolist() == [
        1.0,
        *map(float, range(2, 80)),
    ]


def test_deltas_are_merged_into_the_base_before_they_outgrow_it(tmp_path: Path) -> None:
    writer = writer_of(tmp_path / "view")
    writer.write(rows_with(0, products=4_000))
    for value in range(1, 9):
        writer.write(rows_with(value, products=300))
    assert len(list((tmp_path / "view").glob("*base.arrow"))) <= 2
    assert len(list((tmp_path / "view").glob("*delta.arrow"))) < 8
    assert Snapshot.open(tmp_path / "view").read([299, 300], ["clicks"]).column(
        "clicks"
    ).tolist() == [8.0, 0.0]


def test_an_open_snapshot_outlives_its_files(tmp_path: Path) -> None:
    writer = writer_of(tmp_path / "view")
    writer.write(rows_with(1))
    old = Snapshot.open(tmp_path / "view")
    for value in range(2, 60):
        writer.write(rows_with(value, products=2_000))
    assert old.column("clicks").tolist() == [1.0] * 50
    assert old.version != current_version(tmp_path / "view")
    writer.remove()
    assert old.read([3, 4], ["title"]).column("title").tolist() == ["1", "1"]
    assert current_version(tmp_path / "view") is None
    with pytest.raises(FeatureStoreError, match="materialise the feature view or push to it"):
        Snapshot.open(tmp_path / "view")


def test_a_reader_sees_whole_versions_and_never_goes_back(tmp_path: Path) -> None:
    folder = tmp_path / "view"
    writer_of(folder).write(rows_with(0))
    stop = threading.Event()
    failures: list[str] = []
    seen: set[float] = set()

    def read() -> None:
        reader, last = SnapshotReader(folder), -1.0
        while not stop.is_set():
            snapshot = reader.current()
            assert snapshot is not None
            values = snapshot.read(list(range(50)), ["clicks"]).column("clicks")
            if len(set(values.tolist())) != 1 or values[0] < last:
                failures.append(f"{snapshot.version}: {values.tolist()} after {last}")
            seen.add(values[0])
            last = values[0]

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for value in range(1, 100):
        # Large and small writes, so that bases and deltas both rotate under the readers.
        writer_of(folder).write(rows_with(value, products=50 if value % 7 else 1_500))
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(seen) > 5


WRITE_FOREVER = """
import sys, time
from pathlib import Path
import pyarrow as pa
from driftline.features.feast_plugins.merging import online_rows
from driftline.features.feast_plugins.snapshot_writer import SnapshotWriter

folder, first, products, times = Path(sys.argv[1]), *map(int, sys.argv[2:])
print("ready", flush=True)
for value in range(times):
    ids = list(range(first, first + products))
    rows = pa.table({"id": ids, "event": pa.array([value] * products, pa.timestamp("us")),
                     "clicks": pa.array([float(value)] * products, pa.float32())})
    rows = online_rows(rows, key="id", event_column="event", created_column=None,
                       features=[pa.field("clicks", pa.float32())])
    SnapshotWriter(folder).write(rows)
"""


def start_writer(folder: Path, *, first: int, products: int, times: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    arguments = [str(folder), str(first), str(products), str(times)]
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE_FOREVER, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_killed_writer_leaves_a_whole_version_and_no_lock(tmp_path: Path) -> None:
    folder = tmp_path / "view"
    for delay_s in (0.05, 0.11, 0.17, 0.23):
        with start_writer(folder, first=0, products=3_000, times=10**6) as process:
            while current_version(folder) is None:
                time.sleep(0.01)
            time.sleep(delay_s)
            process.send_signal(signal.SIGKILL)
        values = Snapshot.open(folder).column("clicks")
        assert len(values) == 3_000
        assert len(set(values.tolist())) == 1
    version = SnapshotWriter(folder, lock_timeout_s=1).write(
        online_rows(
            pa.table({"id": [5], "event": pa.array([10**9], UTC_US), "clicks": [7.0]}),
            key="id",
            event_column="event",
            created_column=None,
            features=FEATURES[:1],
        )
    )
    assert Snapshot.open(folder).read([5]).column("clicks").tolist() == [7.0]
    assert not list(folder.glob("*.partial"))
    assert current_version(folder) == version


def test_writers_in_several_processes_lose_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "view"
    processes = [start_writer(folder, first=first, products=1, times=40) for first in (0, 1, 2)]
    for process in processes:
        with process:
            assert process.wait(timeout=600) == 0
    snapshot = Snapshot.open(folder)
    assert snapshot.read([0, 1, 2]).column("clicks").tolist() == [39.0] * 3
    assert int(snapshot.version.split("-")[0]) == 120


def test_a_stuck_writer_is_named(tmp_path: Path) -> None:
    from filelock import FileLock

    with (
        FileLock(tmp_path / ".view.lock"),
        pytest.raises(FeatureStoreError, match=r"another writer has held .*\.view\.lock"),
    ):
        SnapshotWriter(tmp_path / "view", lock_timeout_s=0.1).write(rows_with(1))


def test_a_new_feature_is_null_for_products_written_before_it(tmp_path: Path) -> None:
    writer = writer_of(tmp_path / "view")
    writer.write(rows_with(1, products=3))
    wider = table_of([Row(1, 2, None, 2)]).append_column("price", pa.array([9.5]))
    writer.write(wider)
    snapshot = Snapshot.open(tmp_path / "view")
    assert snapshot.names == ("clicks", "title", "price")
    assert snapshot.arrow("price", snapshot.rows([0, 1, 2, 77])).to_pylist() == [
        None,
        9.5,
        None,
        None,
    ]
    assert snapshot.matrix(["clicks", "price"]).dtype == np.float64
    with pytest.raises(FeatureStoreError, match="feature discount is not in snapshot"):
        snapshot.column("discount")
    with pytest.raises(FeatureStoreError, match="feature title is string, not a number"):
        snapshot.matrix(["title"])


def test_vectors_come_back_as_a_matrix(tmp_path: Path) -> None:
    rows = online_rows(
        pa.table(
            {
                "id": ["b", "a"],
                "event": pa.array([1, 2], UTC_US),
                "vector": pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float32())),
            }
        ),
        key="id",
        event_column="event",
        created_column=None,
        features=[pa.field("vector", pa.list_(pa.float32()))],
    )
    writer_of(tmp_path / "view").write(rows)
    snapshot = Snapshot.open(tmp_path / "view")
    assert snapshot.column("vector").tolist() == [[3.0, 4.0], [1.0, 2.0]]
    assert snapshot.read(["a"]).column("vector").tolist() == [[3.0, 4.0]]


def test_keys_of_the_other_kind_are_refused(tmp_path: Path) -> None:
    writer_of(tmp_path / "numbers").write(table_of([Row(1, 1, 1, 1)]))
    writer_of(tmp_path / "texts").write(table_of([Row(1, 1, 1, 1)], texts=True))
    with pytest.raises(FeatureStoreError, match=r"keys of this view are integers, got .*'1'"):
        Snapshot.open(tmp_path / "numbers").rows(["1"])
    with pytest.raises(FeatureStoreError, match="keys of this view are strings, got int such as 1"):
        Snapshot.open(tmp_path / "texts").rows([1])
    with pytest.raises(FeatureStoreError, match="are int64, got string; remove the folder"):
        writer_of(tmp_path / "numbers").write(table_of([Row(1, 1, 1, 1)], texts=True))


def test_requested_keys_may_be_null_repeated_longer_or_numpy(tmp_path: Path) -> None:
    writer_of(tmp_path / "numbers").write(table_of([Row(1, 1, 1, 1), Row(4, 1, 1, 4)]))
    writer_of(tmp_path / "texts").write(table_of([Row(0, 1, 1, 1), Row(2, 1, 1, 4)], texts=True))
    numbers = Snapshot.open(tmp_path / "numbers")
    extremes = np.array([-1, 4, np.iinfo(np.int64).max, np.iinfo(np.int64).min])
    assert (numbers.rows([1, None, 4, 4, 2]) >= 0).tolist() == [True, False, True, True, False]
    assert (numbers.rows(extremes) >= 0).tolist() == [False, True, False, False]
    assert (numbers.rows(pa.array([4, None], pa.int32())) >= 0).tolist() == [True, False]
    assert numbers.rows([]).tolist() == []
    texts = Snapshot.open(tmp_path / "texts")
    known, longer = "product-2-üü", "product-2-üü and more"
    assert (texts.rows([known, longer, None, "", known]) >= 0).tolist() == [
        True,
        False,
        False,
        False,
        True,
    ]
    assert (texts.rows(np.array([known, "x"])) >= 0).tolist() == [True, False]
    assert (texts.rows(pa.array([None, known])) >= 0).tolist() == [False, True]


def test_an_empty_first_write_makes_an_empty_snapshot(tmp_path: Path) -> None:
    writer_of(tmp_path / "view").write(table_of([]))
    snapshot = Snapshot.open(tmp_path / "view")
    assert len(snapshot) == 0
    assert snapshot.read([1, 2]).missing.tolist() == [True, True]
    assert snapshot.read([1], ["clicks"]).age_us(5).tolist() == [np.iinfo(np.int64).max]
    writer_of(tmp_path / "view").write(rows_with(3, products=2))
    refreshed = Snapshot.open(tmp_path / "view", since=snapshot)
    assert refreshed.read([1], ["clicks"]).column("clicks").tolist() == [3.0]

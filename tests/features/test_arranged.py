"""Arranged columns and key indexes in files against the same made in memory from the Arrow rows."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driftline.features.feast_plugins.arranged import Arranged
from driftline.features.feast_plugins.keys import (
    build_key_index,
    fixed_bytes,
    open_key_index,
    save_key_index,
)
from driftline.features.feast_plugins.merging import online_rows
from driftline.features.feast_plugins.snapshot import Snapshot
from driftline.features.feast_plugins.snapshot_writer import SnapshotWriter
from driftline.platform.key_directory import KeyDirectory, hash_bytes, hash_integers

FEATURES = [
    pa.field("clicks", pa.float32()),
    pa.field("sales", pa.float32()),
    pa.field("text_id", pa.int64()),
    pa.field("brand", pa.string()),
    pa.field("title", pa.string()),
]

values = st.tuples(
    st.integers(0, 9),
    st.none() | st.integers(0, 5),
    st.none() | st.sampled_from(["red", "blue", "", "ü"]),
)


def rows_of(rows: list[tuple[int, Any, Any]], event: int, *, texts: bool) -> pa.Table:
    ids = [f"p{product}" if texts else product * 10**13 for product, _, _ in rows]
    numbers = [number for _, number, _ in rows]
    strings = [text for _, _, text in rows]
    return online_rows(
        pa.table(
            {
                "id": pa.array(ids, pa.string() if texts else pa.int64()),
                "event": pa.array([event] * len(rows), pa.timestamp("us", tz="UTC")),
                "clicks": pa.array(numbers, pa.float32()),
                "sales": pa.array(numbers[::-1], pa.float32()),
                "text_id": pa.array(numbers, pa.int64()),
                "brand": pa.array(strings, pa.string()),
                "title": pa.array(strings[::-1], pa.string()),
            }
        ),
        key="id",
        event_column="event",
        created_column=None,
        features=FEATURES,
    )


def assert_same(found: Arranged, expected: Arranged) -> None:
    names = list(expected.layout.numbers)
    assert found.event_us.tolist() == expected.event_us.tolist()
    np.testing.assert_array_equal(found.side_by_side(names), expected.side_by_side(names))
    for name, integers in expected.integers.items():
        assert found.integers[name].tolist() == integers.tolist()
    for name, (codes, strings) in expected.categories.items():
        mine, own = found.categories[name]
        assert own[mine].tolist() == strings[codes].tolist()
        assert len(set(own.tolist())) == len(own)


@settings(max_examples=40)
@given(
    writes=st.lists(st.lists(values, max_size=6), min_size=1, max_size=5),
    texts=st.booleans(),
)
def test_mapped_columns_equal_those_made_from_the_rows_of_all_writes(
    writes: list[list[tuple[int, Any, Any]]], texts: bool
) -> None:
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "view"
        writer = SnapshotWriter(folder, durable=False, categories=["brand"])
        snapshot = None
        held = []
        for event, rows in enumerate(writes):
            writer.write(rows_of(rows, event, texts=texts))
            snapshot = Snapshot.open(folder, since=snapshot)
            mapped = snapshot.arranged(["clicks", "sales", "text_id", "brand"])
            held.append((mapped, [column.copy() for column in (mapped.numbers, mapped.event_us)]))
            for arranged in folder.glob("*-base"):
                arranged.rename(arranged.with_suffix(".aside"))
            plain = Snapshot.open(folder)  # as if an older version had written it
            for arranged in folder.glob("*.aside"):
                arranged.rename(arranged.with_suffix(""))
            assert_same(mapped, plain.arranged(["clicks", "sales", "text_id", "brand"]))
            keys = plain.keys().to_pylist()
            assert snapshot.rows(keys).tolist() == list(range(len(keys)))
        for mapped, (numbers, event_us) in held:  # later versions are other arrays
            np.testing.assert_array_equal(mapped.numbers, numbers)
            np.testing.assert_array_equal(mapped.event_us, event_us)
            with pytest.raises(ValueError, match="read-only"):
                mapped.numbers[0] = 1


def test_a_string_feature_that_was_not_arranged_is_coded_when_it_is_asked_for(
    tmp_path: Path,
) -> None:
    SnapshotWriter(tmp_path / "view", durable=False).write(
        rows_of([(1, 2, "red"), (2, 3, None)], 1, texts=False)
    )
    codes, strings = Snapshot.open(tmp_path / "view").arranged(["brand"]).categories["brand"]
    assert strings[codes].tolist() == ["red", None, None]


def test_reading_goes_on_when_the_arranged_columns_are_removed(tmp_path: Path) -> None:
    writer = SnapshotWriter(tmp_path / "view", durable=False, categories=["brand"])
    writer.write(rows_of([(1, 2, "red")], 1, texts=True))
    opened = Snapshot.open(tmp_path / "view").arranged(["clicks", "brand"])
    for arranged in (tmp_path / "view").glob("*-base"):
        shutil.rmtree(arranged)
    assert_same(opened, Snapshot.open(tmp_path / "view").arranged(["clicks", "brand"]))


integers = st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 40), unique=True)
strings = st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=9))


@settings(max_examples=60)
@given(known=integers, asked=st.lists(st.none() | st.integers(-(2**63), 2**63 - 1)))
def test_an_index_of_integers_in_a_file_finds_what_one_in_memory_finds(
    known: list[int], asked: list[int | None]
) -> None:
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as folder:
        patch.setattr("driftline.platform.key_directory.WORTH_IT", 3)
        keys = pa.array(sorted(known), pa.int64())
        save_key_index(keys, Path(folder))
        opened = open_key_index(keys, Path(folder))
        wanted = [*asked, *known]
        assert opened.rows(wanted).tolist() == build_key_index(keys).rows(wanted).tolist()
        if known:
            assert opened.rows(known).tolist() == np.argsort(np.argsort(known)).tolist()


@settings(max_examples=60)
@given(known=strings, asked=st.lists(st.none() | st.text(max_size=12)), directory=st.booleans())
def test_an_index_of_strings_in_a_file_finds_what_one_in_memory_finds(
    known: list[str], asked: list[str | None], directory: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as folder:
        patch.setattr("driftline.features.feast_plugins.keys.WORTH_IT", 1 if directory else 10**9)
        keys = pa.array(sorted(set(known), key=str.encode), pa.string())
        save_key_index(keys, Path(folder))
        opened = open_key_index(keys, Path(folder))
        wanted = [text for text in asked if text is None or "\0" not in text] + known
        places = {key: place for place, key in enumerate(keys.to_pylist())}
        assert opened.rows(wanted).tolist() == [places.get(key, -1) for key in wanted]


def test_a_directory_of_many_keys_finds_all_of_them_and_nothing_else() -> None:
    random = np.random.default_rng(3)
    for keys in (
        np.unique(random.integers(-(2**62), 2**62, 300_000)),
        np.arange(300_000) * 2**40,
        np.arange(-150_000, 150_000),
    ):
        directory = KeyDirectory.of(keys)
        assert directory is not None
        assert directory.width < 20
        asked = random.permutation(len(keys))[:5_000]
        assert directory.find(keys[asked]).tolist() == asked.tolist()
        others = np.setdiff1d(random.integers(-(2**62), 2**62, 5_000), keys)
        assert (directory.find(others) == -1).all()
        again = KeyDirectory.from_arrays(directory.to_arrays())
        assert again.find(keys[asked]).tolist() == asked.tolist()


def test_equal_hashes_give_no_directory() -> None:
    hashes = hash_integers(np.arange(1_000))
    assert KeyDirectory.of_hashes(hashes) is not None
    assert KeyDirectory.of_hashes(np.append(hashes, hashes[7])) is None
    assert KeyDirectory.of_hashes(np.arange(1_000, dtype=np.uint64)) is None  # one full bucket
    texts = fixed_bytes(pa.array(["a", "ab", "abcdefgh", "abcdefghi"]))
    wide = texts.astype("S40")
    assert hash_bytes(texts, num_bytes=9).tolist() == hash_bytes(wide, num_bytes=9).tolist()


READ = """
import sys
from pathlib import Path
from driftline.features.feast_plugins.snapshot import Snapshot

snapshot = Snapshot.open(Path(sys.argv[1]))
assert snapshot.arranged(["clicks", "brand"]).numbers[snapshot.rows([10**13])].tolist() == [[9, 9]]
print(sorted({"pandas", "feast"} & set(sys.modules)))
"""


def test_a_reader_needs_neither_pandas_nor_feast(tmp_path: Path) -> None:
    # Each takes seconds to import, and memory of every replica's own.
    writer = SnapshotWriter(tmp_path / "view", durable=False, categories=["brand"])
    writer.write(rows_of([(1, 2, "red"), (2, 3, None)], 1, texts=False))
    writer.write(rows_of([(1, 9, "blue")], 2, texts=False))
    command = [sys.executable, "-c", READ, str(tmp_path / "view")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")

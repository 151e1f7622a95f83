"""The label store finds what any process wrote, in any hour."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from driftline.platform.errors import ArtefactError
from driftline.platform.label_store import HashIndex, LabelStore

Batch = list[tuple[int, float]]


def columns(batch: Batch) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    hashes = np.array([hash_ for hash_, _ in batch], np.int64)
    values = np.array([value for _, value in batch], np.float32)
    return hashes, np.column_stack([values, -values]).astype(np.float32)


@given(
    batches=st.lists(
        st.lists(st.tuples(st.integers(-20, 20), st.floats(-9, 9, width=32)), max_size=8),
        max_size=12,
    )
)
def test_an_index_is_a_dictionary_that_keeps_what_came_first(batches: list[Batch]) -> None:
    index, known = HashIndex(), dict[int, float]()
    for batch in batches:
        index.add(*columns(batch))
        known = dict(reversed(batch)) | known
    found = index.find(np.arange(-20, 21))
    for hash_, (no_click, click) in zip(range(-20, 21), found, strict=True):
        if hash_ in known:
            assert (no_click, click) == (known[hash_], -known[hash_])
        else:
            assert np.isnan(no_click)
            assert np.isnan(click)


def test_labels_of_one_hour_are_found_from_another_and_by_other_processes(tmp_path: Path) -> None:
    mine, other = LabelStore(tmp_path / "labels"), LabelStore(tmp_path / "labels")
    with mine.exclusive():
        mine.add(490_896, *columns([(5, 1.0), (3, 2.0)]))
    with other.exclusive():
        assert other.find(np.array([3, 4]))[:, 0] == pytest.approx([2.0, np.nan], nan_ok=True)
        other.add(490_896, *columns([(4, 3.0)]))
        other.add(490_897, *columns([(9, 4.0)]))
    assert np.isnan(mine.find(np.array([4, 9]))).all()
    mine.refresh()
    np.testing.assert_array_equal(mine.find(np.array([9, 3, 4])), [[4, -4], [2, -2], [3, -3]])
    files = sorted(path.name for path in (tmp_path / "labels").glob("*.parquet"))
    assert files == ["2026-01-01T00.parquet", "2026-01-01T01.parquet"]
    first = pq.read_table(tmp_path / "labels" / files[0])
    assert first["input_hash"].to_pylist() == [5, 3, 4]


def test_a_changed_hour_is_read_again(tmp_path: Path) -> None:
    mine = LabelStore(tmp_path)
    with mine.exclusive():
        mine.add(1, *columns([(1, 1.0)]))
    other = LabelStore(tmp_path)
    other.refresh()
    with mine.exclusive():
        mine.add(1, *columns([(2, 2.0)]))
    other.refresh()
    assert other.find(np.array([2, 1]))[:, 0].tolist() == [2.0, 1.0]


@pytest.mark.parametrize("kept", [0, 40])
def test_a_damaged_hour_is_named_and_can_be_removed(tmp_path: Path, kept: int) -> None:
    store = LabelStore(tmp_path)
    with store.exclusive():
        for hour in (490_000, 490_001):
            store.add(hour, np.array([hour]), np.zeros((1, 2), np.float32))
    (first, _) = sorted(tmp_path.glob("*.parquet"))
    first.write_bytes(first.read_bytes()[:kept])
    with pytest.raises(ArtefactError, match=rf"(?s){first.name}.*remove the damaged file"):
        LabelStore(tmp_path).refresh()
    first.unlink()
    again = LabelStore(tmp_path)
    again.refresh()
    assert np.isnan(again.find(np.array([490_000, 490_001]))).all(axis=1).tolist() == [True, False]

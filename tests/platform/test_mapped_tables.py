"""Mapped and grown tables against copies of the same rows."""

import gc
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driftline.platform.mapped_tables import grow_table, map_table


@settings(max_examples=30)
@given(
    num_rows=st.integers(0, 3_000),
    more=st.integers(0, 2_000),
    columns=st.sampled_from([None, 0, 1, 7]),
    kind=st.sampled_from(["<f4", "<i8", "S5"]),
    seed=st.integers(0, 99),
)
def test_a_grown_table_is_the_file_with_rows_behind_it_and_the_file_stays(
    num_rows: int, more: int, columns: int | None, kind: str, seed: int
) -> None:
    random = np.random.default_rng(seed)
    shape = (num_rows,) if columns is None else (num_rows, columns)
    rows = random.integers(0, 99, shape).astype(kind)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "rows.npy"
        np.save(path, rows)
        grown = grow_table(path, more)
        expected = np.concatenate([rows, np.zeros((more, *shape[1:]), kind)])
        assert grown.dtype == rows.dtype
        np.testing.assert_array_equal(grown, expected)
        for row in random.integers(0, num_rows + more, 20) if num_rows + more else ():
            grown[row] = expected[row] = random.integers(0, 99)
        other = grow_table(path, more)
        np.testing.assert_array_equal(grown, expected)
        np.testing.assert_array_equal(other[:num_rows], rows)
        np.testing.assert_array_equal(map_table(path), rows)
        np.testing.assert_array_equal(np.load(path), rows)


def test_a_mapped_table_cannot_be_written_and_is_no_memmap(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.arange(2_000))
    table = map_table(tmp_path / "rows.npy")
    assert type(table) is np.ndarray
    with pytest.raises(ValueError, match="read-only"):
        table[0] = 1


def test_memory_goes_back_with_the_last_view_of_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.npy"
    np.save(path, np.arange(50_000.0))
    grown = grow_table(path, 1_000)
    part = grown[10:20]
    del grown
    gc.collect()
    assert part.tolist() == list(range(10, 20))  # still there
    path.unlink()
    assert part.tolist() == list(range(10, 20))
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert maps.read_text().count(str(path)) == 1
        del part
        gc.collect()
        assert maps.read_text().count(str(path)) == 0

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from driftline.features.log import ImpressionLog, span_of
from driftline.platform.contract import catalogue_schema, counters_schema, impressions_schema
from driftline.platform.errors import MissingArtefactError
from driftline.platform.settings import DriftlineSettings, parse_settings
from driftline.platform.windows import Window

START = datetime(2026, 1, 1, tzinfo=UTC)
SETTINGS: DriftlineSettings = parse_settings(
    {
        "name": "test",
        "workspace": "runs/test",
        "source": {"kind": "parquet", "impressions": "x"},
        "features": [
            {"name": "device", "kind": "categorical", "entity": "impression", "tier": "medium"}
        ],
    },
    origin="test",
)
SCHEMA = impressions_schema(SETTINGS, key=pa.int64())


def write(root: Path, name: str, rows: list[tuple[int, str]]) -> None:
    """Rows are (minutes after the start, impression_id)."""
    (root / "impressions").mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(
        [
            {
                "impression_id": key,
                "event_time": START + timedelta(minutes=minutes),
                "page_product_id": 1,
                "ad_product_id": 2,
                "clicked": False,
            }
            for minutes, key in rows
        ],
        schema=SCHEMA,
    )
    pq.write_table(table, root / "impressions" / f"{name}.parquet")


def keys(table: pa.Table) -> list[str]:
    return list(table.column("impression_id").to_pylist())


def test_the_span_is_whole_hours_around_all_events(tmp_path: Path) -> None:
    write(tmp_path, "2026-01-01", [(30, "a"), (61, "b")])
    log = ImpressionLog.open(tmp_path, SETTINGS)
    assert log.span == Window(START, START + timedelta(hours=2))
    assert log.num_rows == 2
    assert log.key_type == pa.int64()


def test_an_event_at_the_full_hour_lies_inside_the_span() -> None:
    span = span_of(START, START + timedelta(hours=1))
    assert START + timedelta(hours=1) in span
    assert span.end == START + timedelta(hours=2)


@given(
    rows=st.lists(
        st.tuples(st.integers(0, 3000), st.text("abc", min_size=1, max_size=3)),
        min_size=1,
        max_size=30,
    ),
    cut=st.integers(0, 30),
    bounds=st.tuples(st.integers(0, 3000), st.integers(0, 3000)),
)
def test_rows_of_a_window_are_those_of_a_scan_in_order(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[int, str]],
    cut: int,
    bounds: tuple[int, int],
) -> None:
    root = tmp_path_factory.mktemp("log")
    write(root, "b", rows[:cut])
    write(root, "a", rows[cut:])
    low, high = sorted(bounds)
    window = Window(START + timedelta(minutes=low), START + timedelta(minutes=high))
    found = ImpressionLog.open(root, SETTINGS).impressions(window)
    assert keys(found) == [key for minutes, key in sorted(rows) if low <= minutes < high]
    assert found.schema.names == SCHEMA.names


def test_columns_come_in_the_order_asked_for_and_sorted_all_the_same(tmp_path: Path) -> None:
    write(tmp_path, "x", [(2, "b"), (1, "c"), (1, "a")])
    table = ImpressionLog.open(tmp_path, SETTINGS).impressions(columns=["clicked", "impression_id"])
    assert table.column_names == ["clicked", "impression_id"]
    assert keys(table) == ["a", "c", "b"]


def test_files_named_by_day_outside_the_window_are_not_opened(tmp_path: Path) -> None:
    write(tmp_path, "2026-01-01", [(1, "a")])
    write(tmp_path, "2026-01-02", [(1441, "b")])
    log = ImpressionLog.open(tmp_path, SETTINGS)
    (tmp_path / "impressions" / "2026-01-02.parquet").write_bytes(b"broken")
    first_day = Window(START, START + timedelta(days=1))
    assert keys(log.impressions(first_day)) == ["a"]


def test_a_log_without_the_other_tables_has_no_products_and_no_counters(tmp_path: Path) -> None:
    write(tmp_path, "x", [(1, "a")])
    log = ImpressionLog.open(tmp_path, SETTINGS)
    assert log.catalogue().schema == catalogue_schema(SETTINGS, key=pa.int64())
    assert log.catalogue().num_rows == 0
    assert log.counters() is None


def test_tables_are_read_in_contract_form(tmp_path: Path) -> None:
    write(tmp_path, "x", [(1, "a")])
    for name, schema in (
        ("catalogue", catalogue_schema(SETTINGS, key=pa.int64())),
        ("counters", counters_schema(SETTINGS, key=pa.int64())),
    ):
        (tmp_path / name).mkdir()
        row = {"product_id": 5, "event_time": START, "created_time": START}
        table = pa.Table.from_pylist([{key: row[key] for key in schema.names}], schema=schema)
        pq.write_table(table, tmp_path / name / "a.parquet")
    log = ImpressionLog.open(tmp_path, SETTINGS)
    counters = log.counters()
    assert counters is not None
    assert counters.num_rows == log.catalogue().num_rows == 1


def test_a_missing_log_names_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(MissingArtefactError, match=r"holds no log .*driftline ingest"):
        ImpressionLog.open(tmp_path, SETTINGS)


def test_a_log_without_rows_is_no_log(tmp_path: Path) -> None:
    write(tmp_path, "x", [])
    with pytest.raises(MissingArtefactError, match="without a single impression"):
        ImpressionLog.open(tmp_path, SETTINGS)

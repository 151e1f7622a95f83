from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from driftline.features.log import ImpressionLog
from driftline.features.parquet_log import ingest_parquet
from driftline.features.quality import check_log
from driftline.platform.errors import ContractError, SettingsError
from driftline.platform.settings import DriftlineSettings, ParquetSource, parse_settings

START = datetime(2026, 3, 1, 12, tzinfo=UTC)
TIMES = [START + timedelta(minutes=n) for n in range(4)]
FEATURES = [
    {"name": "title", "kind": "text", "entity": "product", "tier": "long"},
    {"name": "device", "kind": "categorical", "entity": "impression", "tier": "medium"},
    {"name": "depth", "kind": "numeric", "entity": "impression", "tier": "medium"},
]


def make_settings(features: list[dict[str, str]] = FEATURES) -> DriftlineSettings:
    return parse_settings(
        {
            "name": "test",
            "workspace": "runs/test",
            "source": {"kind": "parquet", "impressions": "x"},
            "features": features,
        },
        origin="test",
    )


SETTINGS = make_settings()


def columns(**changes: Any) -> dict[str, Any]:
    return {
        "impression_id": pa.array([f"i{n}" for n in range(4)]),
        "event_time": pa.array(TIMES, pa.timestamp("us", tz="UTC")),
        "page_product_id": pa.array([1, 1, 2, 2]),
        "ad_product_id": pa.array([3, 4, 3, 4]),
        "device": pa.array(["phone", "desk", None, "phone"]),
        "depth": pa.array([1.0, 2.0, 3.0, None]),
        "clicked": pa.array([True, False, False, True]),
    } | changes


def write(path: Path, table: Mapping[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(dict(table)), path)
    return path


def source(path: Path, **changes: Any) -> ParquetSource:
    return ParquetSource(kind="parquet", impressions=path, **changes)


def ingest(given: ParquetSource, root: Path) -> ImpressionLog:
    ingest_parquet(given, root / "log", settings=SETTINGS)
    return ImpressionLog.open(root / "log", SETTINGS)


def test_columns_are_renamed_and_undeclared_ones_left_out_with_a_note(tmp_path: Path) -> None:
    table = columns(secret=pa.array([1, 2, 3, 4]))
    table["ts"] = table.pop("event_time")
    table["label"] = table.pop("clicked")
    path = write(tmp_path / "in.parquet", table)
    given = source(path, columns={"event_time": "ts", "clicked": "label"})
    report = ingest_parquet(given, tmp_path / "log", settings=SETTINGS)
    log = ImpressionLog.open(tmp_path / "log", SETTINGS)
    assert log.impressions().column("event_time").to_pylist() == TIMES
    assert "secret" not in pq.read_schema(log.impression_files()[0]).names
    assert (report.num_impressions, report.num_clicks) == (4, 2)
    assert "impressions: columns left out: secret" in report.notes
    assert report.span == log.span


NAIVE = [time.replace(tzinfo=None) for time in TIMES]
EPOCH = [int(time.timestamp()) for time in TIMES]
TIME_FORMS = {
    "seconds": pa.array(NAIVE, pa.timestamp("s")),
    "milliseconds": pa.array(NAIVE, pa.timestamp("ms")),
    "nanoseconds": pa.array(NAIVE, pa.timestamp("ns")),
    "another zone": pa.array(TIMES, pa.timestamp("us", tz="Asia/Tokyo")),
    "ISO with Z": pa.array([f"{time:%Y-%m-%dT%H:%M:%SZ}" for time in TIMES]),
    "ISO with offset": pa.array([f"{time:%Y-%m-%d %H:%M:%S}+00:00" for time in TIMES]),
    "ISO without": pa.array([f"{time:%Y-%m-%d %H:%M}" for time in TIMES]),
    "epoch seconds": pa.array(EPOCH),
    "epoch milliseconds": pa.array([1_000 * n for n in EPOCH]),
    "epoch microseconds": pa.array([1_000_000 * n for n in EPOCH]),
    "epoch nanoseconds": pa.array([1_000_000_000 * n for n in EPOCH]),
    "dictionary of texts": pa.array(
        [f"{time:%Y-%m-%dT%H:%M:%SZ}" for time in TIMES]
    ).dictionary_encode(),
}


@pytest.mark.parametrize("form", TIME_FORMS)
def test_times_of_every_usual_form_become_the_same_moment(tmp_path: Path, form: str) -> None:
    path = write(tmp_path / "in.parquet", columns(event_time=TIME_FORMS[form]))
    assert ingest(source(path), tmp_path).impressions().column("event_time").to_pylist() == TIMES


@pytest.mark.parametrize("form", ["seconds", "ISO without"])
def test_times_without_a_zone_are_read_in_the_declared_one(tmp_path: Path, form: str) -> None:
    path = write(tmp_path / "in.parquet", columns(event_time=TIME_FORMS[form]))
    log = ingest(source(path, time_zone="Europe/Berlin"), tmp_path)
    found = log.impressions().column("event_time").to_pylist()
    assert found == [time - timedelta(hours=1) for time in TIMES]


def test_dates_are_midnight_and_texts_may_mix_zones(tmp_path: Path) -> None:
    path = write(
        tmp_path / "in.parquet",
        columns(
            event_time=pa.array(["2026-03-01", "2026-03-01T02:00+01:00", "2026-03-01T02:00Z", None])
        ),
    )
    versions = {"product_id": [1], "event_time": pa.array([date(2026, 1, 1)]), "title": ["a"]}
    given = source(path, catalogue=write(tmp_path / "c.parquet", versions))
    ingest(given, tmp_path)
    rows = pq.read_table(tmp_path / "log" / "impressions").column("event_time").to_pylist()
    assert rows == [*(datetime(2026, 3, 1, hour, tzinfo=UTC) for hour in (0, 1, 2)), None]
    log = ImpressionLog.open(tmp_path / "log", SETTINGS)
    assert log.catalogue().column("event_time").to_pylist() == [datetime(2026, 1, 1, tzinfo=UTC)]


LABEL_FORMS = {
    "whole numbers": pa.array([1, 0, None, 1], pa.int8()),
    "floats with NaN": pa.array([1.0, 0.0, float("nan"), 1.0]),
    "texts": pa.array(["True", "false", "", "1"]),
}


@pytest.mark.parametrize("form", LABEL_FORMS)
def test_labels_of_every_usual_form_are_read(tmp_path: Path, form: str) -> None:
    path = write(tmp_path / "in.parquet", columns(clicked=LABEL_FORMS[form]))
    ingest(source(path), tmp_path)
    rows = pq.read_table(tmp_path / "log" / "impressions").column("clicked").to_pylist()
    assert rows == [True, False, None, True]


def test_categories_may_be_numbers_and_keys_small_integers(tmp_path: Path) -> None:
    path = write(
        tmp_path / "in.parquet",
        columns(
            device=pa.array([7, 8, None, 7], pa.int16()),
            page_product_id=pa.array([1, 1, 2, 2], pa.int32()),
            impression_id=pa.array([10, 11, 12, 13]),
        ),
    )
    log = ingest(source(path), tmp_path)
    table = log.impressions()
    assert table.column("device").to_pylist() == ["7", "8", None, "7"]
    assert table.column("impression_id").to_pylist() == ["10", "11", "12", "13"]
    assert log.key_type == pa.int64()


def test_folders_and_patterns_are_read_in_order_of_name(tmp_path: Path) -> None:
    for day, offset in (("b", 0), ("a", 4)):
        ids = pa.array([f"i{offset + n}" for n in range(4)])
        write(tmp_path / "in" / f"day={day}" / "part.parquet", columns(impression_id=ids))
    by_folder = ingest(source(tmp_path / "in"), tmp_path / "x")
    by_pattern = ingest(source(tmp_path / "in" / "*" / "*.parquet"), tmp_path / "y")
    assert by_folder.num_rows == by_pattern.num_rows == 8
    first = pq.read_table(by_folder.impression_files()[0]).column("impression_id").to_pylist()
    assert first == ["i4", "i5", "i6", "i7"]


def test_a_column_may_be_called_differently_in_each_table(tmp_path: Path) -> None:
    table = columns()
    table["ts"] = table.pop("event_time")
    counters = {"product_id": [1], "ts": TIMES[:1], "sold": [2]}
    catalogue = {"id": ["1"], "since": TIMES[:1], "title": ["a"]}
    given = source(
        write(
            tmp_path / "i.parquet",
            table | {"page_product_id": ["1"] * 4, "ad_product_id": ["2"] * 4},
        ),
        catalogue=write(tmp_path / "c.parquet", catalogue),
        counters=write(tmp_path / "n.parquet", counters | {"product_id": ["1"]}),
        columns={
            "event_time": "ts",
            "catalogue.event_time": "since",
            "catalogue.product_id": "id",
            "created_time": "ts",
            "sales": "sold",
        },
    )
    settings = make_settings(
        [*FEATURES, {"name": "sales", "kind": "numeric", "entity": "product", "tier": "short"}]
    )
    ingest_parquet(given, tmp_path / "log", settings=settings)
    log = ImpressionLog.open(tmp_path / "log", settings)
    counters_read = log.counters()
    assert counters_read is not None
    assert counters_read.column("created_time").to_pylist() == TIMES[:1]
    assert log.catalogue().to_pylist() == [
        {"product_id": "1", "event_time": TIMES[0], "title": "a"}
    ]


def test_nulls_pass_to_the_quality_check_which_puts_them_aside(tmp_path: Path) -> None:
    path = write(tmp_path / "in.parquet", columns(clicked=pa.array([True, None, False, None])))
    ingest(source(path), tmp_path)
    loose = parse_settings(
        SETTINGS.model_dump(mode="json") | {"quality": {"max_quarantine_share": 0.9}}, origin="test"
    )
    verdict = check_log(
        tmp_path / "log", tmp_path / "clean", settings=loose, now=START + timedelta(days=1)
    )
    assert verdict.impressions.reasons == {"clicked is missing": 2}


def test_a_mapping_of_an_unknown_column_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "in.parquet", columns())
    with pytest.raises(SettingsError, match=r"'label', 'catalogue.clicked' is no column"):
        ingest(source(path, columns={"label": "y", "catalogue.clicked": "z"}), tmp_path)


def test_a_value_that_cannot_be_converted_is_named_with_its_row(tmp_path: Path) -> None:
    moments = [f"{time:%Y-%m-%dT%H:%M:%SZ}" for time in TIMES]
    path = write(tmp_path / "in.parquet", columns(event_time=[*moments[:2], "soon", moments[3]]))
    with pytest.raises(ContractError, match=r"in\.parquet: column 'event_time', row 2: got 'soon'"):
        ingest(source(path), tmp_path)
    assert not (tmp_path / "log").exists()

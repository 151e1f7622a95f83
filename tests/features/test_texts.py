"""Text ids, and the sources that come from the catalogue and the user's numbers."""

import hashlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from driftline.features.maturity import known_label
from driftline.features.sources import hour_fingerprints
from driftline.features.texts import read_texts, text_ids, texts_path, write_product_sources
from driftline.features.views import feature_views
from driftline.platform.errors import MissingArtefactError
from driftline.platform.settings import DriftlineSettings

MakeSettings = Callable[..., DriftlineSettings]
WriteLog = Callable[..., None]
Row = dict[str, Any]

START = datetime(2026, 3, 1, 20, tzinfo=UTC)
SHOWN: Row = {
    "impression_id": "i",
    "event_time": START,
    "page_product_id": "a",
    "ad_product_id": "b",
    "clicked": False,
}
words = st.one_of(st.none(), st.text("ab:1 ", max_size=4))


def ids_of(rows: list[tuple[str | None, str | None]]) -> list[int | None]:
    table = pa.table(
        {
            "title": pa.array([row[0] for row in rows], pa.string()),
            "about": pa.array([row[1] for row in rows], pa.string()),
        }
    )
    found: list[int | None] = text_ids(table, names=["title", "about"]).to_pylist()
    return found


def version(product: Any, hours: int, title: str | None, **rest: Any) -> Row:
    time = START + timedelta(hours=hours)
    return {"product_id": product, "event_time": time, "title": title, **rest}


@given(st.lists(st.tuples(words, words), max_size=12))
def test_ids_are_equal_exactly_where_the_texts_are(rows: list[tuple[str, str]]) -> None:
    ids = ids_of(list(rows))
    shown = [tuple(text if text and text.strip() else None for text in row) for row in rows]
    for first, left in zip(ids, shown, strict=True):
        assert (first is None) == (left == (None, None))
        assert first is None or 0 < first < 1 << 63
        for second, right in zip(ids, shown, strict=True):
            assert (first == second) == (left == right)


def test_an_id_is_the_hash_of_names_lengths_and_values() -> None:
    # Caches and soft labels on users' disks are known by these numbers: they may never change.
    digest = hashlib.md5(b"title:8:Red shoeabout:9:Very red.").digest()
    number = int.from_bytes(digest[8:], "little") & (1 << 63) - 1
    assert ids_of([("Red shoe", "Very red.")]) == [number]


def test_the_name_of_a_field_belongs_to_its_text() -> None:
    assert len(set(ids_of([("red", None), (None, "red")]))) == 2


def test_texts_are_appended_and_never_removed(
    tmp_path: Path, handmade_settings: MakeSettings, clean_log: WriteLog
) -> None:
    settings = handmade_settings(tmp_path)
    first = [version("a", 0, "red"), version("b", 0, "red"), version("c", 0, "")]
    clean_log(settings, impressions=[SHOWN], catalogue=first)
    report = write_product_sources(settings)
    assert (report.num_versions, report.num_texts, report.num_new_texts) == (3, 1, 1)
    before = read_texts(settings)
    clean_log(settings, impressions=[SHOWN], catalogue=[version("a", 5, "blue")])
    report = write_product_sources(settings)
    assert (report.num_versions, report.num_texts, report.num_new_texts) == (1, 2, 1)
    after = read_texts(settings)
    assert after.slice(0, 1).equals(before)
    assert after.column("title").to_pylist() == ["red", "blue"]
    assert after.column_names == ["text_id", "title", "about"]


def test_a_second_call_touches_no_file(
    tmp_path: Path, handmade_settings: MakeSettings, clean_log: WriteLog
) -> None:
    settings = handmade_settings(tmp_path)
    catalogue = [version("a", n, f"red {n}", category="toys") for n in (0, 3, 30)]
    counters = [
        {"product_id": "a", "event_time": START, "created_time": START, "sales": 1.0},
    ]
    clean_log(settings, impressions=[SHOWN], catalogue=catalogue, counters=counters)
    write_product_sources(settings)
    folder = texts_path(settings).parent
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}
    write_product_sources(settings)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")} == before


def test_of_two_versions_of_one_moment_the_last_counts(
    tmp_path: Path, handmade_settings: MakeSettings, clean_log: WriteLog
) -> None:
    settings = handmade_settings(tmp_path)
    catalogue = [version("a", 0, "red"), version("b", 0, "green"), version("a", 0, "blue")]
    clean_log(settings, impressions=[SHOWN], catalogue=catalogue)
    assert write_product_sources(settings).num_versions == 2
    view = next(view for view in feature_views(settings) if view.name == "product_long")
    rows = pq.read_table(view.folder(settings)).to_pylist()
    assert {row["product_id"]: row["title"] for row in rows} == {"a": "blue", "b": "green"}
    assert {row["created_time"] for row in rows} == {START}


def test_rows_that_vanish_from_the_log_vanish_from_the_source(
    tmp_path: Path, handmade_settings: MakeSettings, clean_log: WriteLog
) -> None:
    settings = handmade_settings(tmp_path)
    clean_log(
        settings, impressions=[SHOWN], catalogue=[version("a", 0, "red"), version("a", 40, "blue")]
    )
    write_product_sources(settings)
    view = next(view for view in feature_views(settings) if view.name == "product_long")
    assert len(hour_fingerprints(view, settings)) == 2
    clean_log(settings, impressions=[SHOWN], catalogue=[version("a", 0, "red")])
    write_product_sources(settings)
    assert len(hour_fingerprints(view, settings)) == 1


def test_a_log_without_catalogue_and_counters_gives_empty_sources(
    tmp_path: Path, handmade_settings: MakeSettings, clean_log: WriteLog
) -> None:
    settings = handmade_settings(tmp_path)
    clean_log(settings, impressions=[SHOWN])
    report = write_product_sources(settings)
    assert (report.num_versions, report.num_texts, report.num_counter_rows) == (0, 0, 0)
    assert read_texts(settings).num_rows == 0


def test_texts_that_were_never_written_are_named(
    tmp_path: Path, handmade_settings: MakeSettings
) -> None:
    with pytest.raises(MissingArtefactError, match=r"texts\.parquet.*features prepare"):
        read_texts(handmade_settings(tmp_path))


def test_a_click_counts_up_to_the_moment_of_maturity_and_without_a_time() -> None:
    maturity = timedelta(minutes=10)
    times = [START + maturity, START + maturity + timedelta(microseconds=1), None, None]
    table = pa.table(
        {
            "event_time": pa.array([START] * 4, pa.timestamp("us", tz="UTC")),
            "clicked": [True, True, True, False],
            "click_time": pa.array(times, pa.timestamp("us", tz="UTC")),
        }
    )
    assert known_label(table, maturity=maturity).to_pylist() == [True, False, True, False]

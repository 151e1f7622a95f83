"""Counters against a version that walks over the impressions, one boundary at a time."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from driftline.features.counters import compute_counters
from driftline.features.sources import hour_fingerprints
from driftline.features.views import feature_views
from driftline.platform.errors import MissingArtefactError
from driftline.platform.settings import DriftlineSettings
from driftline.platform.windows import HOUR, Window

MakeSettings = Callable[..., DriftlineSettings]
WriteLog = Callable[..., None]
Market = Callable[..., DriftlineSettings]
Row = dict[str, Any]

KEYS = {
    "product_short": "ad_product_id",
    "category_short": "category",
    "category_pair_short": "pair",
}
START = datetime(2026, 3, 1, 20, tzinfo=UTC)
SPAN = Window(START, START + timedelta(hours=9))


def read_view(settings: DriftlineSettings, name: str) -> dict[tuple[Any, datetime], Row]:
    view = next(view for view in feature_views(settings) if view.name == name)
    rows = pq.read_table(view.folder(settings)).to_pylist()
    found = {(row[view.join_key], row["event_time"]): row for row in rows}
    assert len(found) == len(rows), "a key has one row a boundary"
    assert all(row["created_time"] == row["event_time"] for row in rows)
    return found


def slow_label(row: Row, maturity: timedelta) -> bool:
    late = row["click_time"] is not None and row["click_time"] > row["event_time"] + maturity
    return row["clicked"] and not late


def slow_category(catalogue: Sequence[Row], product: Any, moment: datetime) -> str | None:
    known = [
        (row["event_time"], index, row["category"])
        for index, row in enumerate(catalogue)
        if row["product_id"] == product and row["event_time"] <= moment
    ]
    return max(known)[2] if known else None


def slow_group(
    events: Sequence[Row], key: Callable[[Row], Any], boundary: datetime, hours: int
) -> dict[Any, tuple[int, int]]:
    counts: dict[Any, tuple[int, int]] = {}
    for row in events:
        if boundary - hours * HOUR < row["known"] <= boundary and key(row) is not None:
            shown, clicked = counts.get(key(row), (0, 0))
            counts[key(row)] = (shown + 1, clicked + row["label"])
    return counts


def slow_counters(
    settings: DriftlineSettings, impressions: Sequence[Row], catalogue: Sequence[Row]
) -> Mapping[str, dict[tuple[Any, datetime], Row]]:
    maturity = settings.labels.maturity
    windows = settings.counters.windows_hours
    strength = settings.counters.prior_strength
    events = []
    for row in impressions:
        ad, page = (
            slow_category(catalogue, row[name], row["event_time"])
            for name in ("ad_product_id", "page_product_id")
        )
        pair = None if ad is None or page is None else f"{page}|{ad}"
        known = row["event_time"] + maturity
        label = slow_label(row, maturity)
        events.append({**row, "known": known, "label": label, "category": ad, "pair": pair})
    views: dict[str, dict[tuple[Any, datetime], Row]] = {name: {} for name in KEYS}
    boundary = SPAN.start + HOUR
    while boundary <= SPAN.end:
        overall = slow_group(events, lambda row: "all", boundary, max(windows)).get("all", (0, 0))
        prior = overall[1] / overall[0] if overall[0] else 0.0

        def rate(counts: tuple[int, int], prior: float = prior) -> float:
            return (counts[1] + prior * strength) / (counts[0] + strength)

        for name, column in KEYS.items():
            key = itemgetter(column)
            groups = {w: slow_group(events, key, boundary, w) for w in windows}
            pages = {
                w: slow_group(events, lambda row: row["page_product_id"], boundary, w)
                for w in windows
            }
            members = set(groups[max(windows)])
            members |= set(pages[max(windows)]) if name == "product_short" else set()
            for member in members:
                found: Row = {}
                for w in windows:
                    counts = groups[w].get(member, (0, 0))
                    found[f"impressions_{w}h"], found[f"clicks_{w}h"] = counts
                    found[f"ctr_{w}h"] = rate(counts)
                    if name == "product_short":
                        counts = pages[w].get(member, (0, 0))
                        found[f"page_impressions_{w}h"] = counts[0]
                        found[f"page_ctr_{w}h"] = rate(counts)
                if name == "product_short":
                    mine = [e for e in events if e["known"] <= boundary and key(e) == member]
                    times = [e["event_time"] for e in mine]
                    clicks = [e["event_time"] for e in mine if e["label"]]
                    for recency, moment in (
                        ("hours_since_first", min(times, default=None)),
                        ("hours_since_shown", max(times, default=None)),
                        ("hours_since_click", max(clicks, default=None)),
                    ):
                        found[recency] = None if moment is None else (boundary - moment) / HOUR
                views[name][(member, boundary)] = found
        boundary += HOUR
    return views


def assert_same(settings: DriftlineSettings, expected: Mapping[str, Any]) -> None:
    for name, rows in expected.items():
        found = read_view(settings, name)
        assert found.keys() == rows.keys(), name
        for key, row in rows.items():
            for column, value in row.items():
                close = value if value is None else pytest.approx(value, rel=1e-6)
                assert found[key][column] == close, (name, key, column)


PRODUCTS = ["a", "b", "c", "d"]
minutes = st.integers(-30 * 60, 9 * 60 - 1)


@st.composite
def logs(draw: st.DrawFn) -> tuple[list[Row], list[Row]]:
    impressions = []
    for number in range(draw(st.integers(1, 30))):
        moment = START + timedelta(minutes=draw(minutes))
        clicked = draw(st.booleans())
        delay = draw(st.one_of(st.none(), st.integers(0, 40)))
        click_time = None if delay is None else moment + timedelta(minutes=delay)
        impressions.append(
            {
                "impression_id": f"i{number:03d}",
                "event_time": moment,
                "page_product_id": draw(st.sampled_from(PRODUCTS)),
                "ad_product_id": draw(st.sampled_from(PRODUCTS)),
                "clicked": clicked,
                "click_time": click_time if clicked else None,
            }
        )
    catalogue = [
        {
            "product_id": draw(st.sampled_from(PRODUCTS[:3])),
            "event_time": START + timedelta(minutes=draw(minutes)),
            "category": draw(st.sampled_from(["toys", "books", None])),
        }
        for _ in range(draw(st.integers(0, 6)))
    ]
    return impressions, catalogue


@given(log=logs(), maturity=st.sampled_from([0, 20, 60, 90]))
@hypothesis_settings(max_examples=25)
def test_counters_equal_a_walk_over_all_impressions(
    log: tuple[list[Row], list[Row]],
    maturity: int,
    handmade_settings: MakeSettings,
    clean_log: WriteLog,
) -> None:
    impressions, catalogue = log
    with tempfile.TemporaryDirectory() as folder:
        settings = handmade_settings(Path(folder), labels={"maturity_minutes": maturity})
        clean_log(settings, impressions=impressions, catalogue=catalogue)
        compute_counters(settings, window=SPAN)
        assert_same(settings, slow_counters(settings, impressions, catalogue))


@given(log=logs(), cuts=st.lists(st.integers(0, 9), max_size=4))
@hypothesis_settings(max_examples=10)
def test_hour_by_hour_gives_the_rows_of_one_call(
    log: tuple[list[Row], list[Row]],
    cuts: list[int],
    handmade_settings: MakeSettings,
    clean_log: WriteLog,
) -> None:
    impressions, catalogue = log
    with tempfile.TemporaryDirectory() as folder:
        pieces = handmade_settings(Path(folder) / "pieces")
        whole = handmade_settings(Path(folder) / "whole")
        for settings in (pieces, whole):
            clean_log(settings, impressions=impressions, catalogue=catalogue)
        bounds = [0, *sorted(cuts), 9]
        for start, end in pairwise(bounds):
            window = Window(START + start * HOUR, START + end * HOUR)
            compute_counters(pieces, window=window)
        compute_counters(whole, window=SPAN)
        compute_counters(whole, window=Window(START + 2 * HOUR, START + 5 * HOUR))  # repeated
        for view in feature_views(whole):
            if view.origin == "derived":
                assert read_view(pieces, view.name) == read_view(whole, view.name)
                assert hour_fingerprints(view, pieces) == hour_fingerprints(view, whole)


@pytest.fixture
def market(tmp_path: Path, handmade_settings: MakeSettings, clean_log: WriteLog) -> Market:
    def build(impressions: Sequence[Row], **changes: Any) -> DriftlineSettings:
        settings = handmade_settings(tmp_path, **changes)
        clean_log(settings, impressions=impressions)
        return settings

    return build


def shown(number: int, moment: datetime, *, ad: Any = "a", page: Any = "p", **rest: Any) -> Row:
    row = {"impression_id": f"i{number}", "event_time": moment, "page_product_id": page}
    return {**row, "ad_product_id": ad, "clicked": False, **rest}


def test_an_outcome_known_exactly_at_the_boundary_counts_there(market: Market) -> None:
    settings = market([shown(1, START + timedelta(minutes=40))])
    compute_counters(settings, window=SPAN)
    rows = read_view(settings, "product_short")
    assert [rows["a", START + n * HOUR]["impressions_1h"] for n in (1, 2)] == [1, 0]


def test_an_outcome_known_a_moment_after_the_boundary_waits_for_the_next(market: Market) -> None:
    settings = market([shown(1, START + timedelta(minutes=40, microseconds=1))])
    compute_counters(settings, window=SPAN)
    rows = read_view(settings, "product_short")
    assert ("a", START + HOUR) not in rows
    assert rows["a", START + 2 * HOUR]["impressions_1h"] == 1


def test_a_click_after_its_label_matured_is_lost(market: Market) -> None:
    late = START + timedelta(minutes=21)
    settings = market(
        [
            shown(1, START, clicked=True, click_time=late),
            shown(2, START, ad="b", clicked=True, click_time=late - timedelta(minutes=1)),
            shown(3, START, ad="c", clicked=True),
        ]
    )
    compute_counters(settings, window=SPAN)
    rows = read_view(settings, "product_short")
    assert [rows[ad, START + HOUR]["clicks_1h"] for ad in "abc"] == [0, 1, 1]


def test_recency_looks_back_beyond_the_longest_window(market: Market) -> None:
    long_ago = START - timedelta(days=30)
    settings = market([shown(1, long_ago, clicked=True), shown(2, START)])
    compute_counters(settings, window=SPAN)
    row = read_view(settings, "product_short")["a", START + HOUR]
    assert row["hours_since_first"] == row["hours_since_click"] == 30 * 24 + 1
    assert row["hours_since_shown"] == 1


def test_integer_products_without_a_category_have_product_counters_only(
    tmp_path: Path, handmade_settings: MakeSettings, clean_log: WriteLog
) -> None:
    features = [{"name": "depth", "kind": "numeric", "entity": "impression", "tier": "short"}]
    settings = handmade_settings(
        tmp_path, features=features, counters={"windows_hours": [2], "category": None}
    )
    clean_log(settings, impressions=[shown(1, START, ad=7, page=9)], key=pa.int64())
    report = compute_counters(settings, window=SPAN)
    rows = read_view(settings, "product_short")
    assert report.num_rows == {"product_short": 4}
    assert {key for key, _ in rows} == {7, 9}
    assert rows[9, START + HOUR]["page_impressions_2h"] == 1
    assert rows[9, START + HOUR]["hours_since_first"] is None


def test_counters_of_other_settings_are_dropped_not_mixed(market: Market) -> None:
    settings = market([shown(1, START)])
    compute_counters(settings, window=SPAN)
    changed = market([shown(1, START)], labels={"maturity_minutes": 50})
    compute_counters(changed, window=Window(SPAN.end - HOUR, SPAN.end))
    assert {hour for _, hour in read_view(changed, "product_short")} == {SPAN.end}


def test_many_keys_are_worked_on_in_pieces_with_the_same_result(
    tmp_path: Path,
    handmade_settings: MakeSettings,
    clean_log: WriteLog,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [shown(n, START + timedelta(minutes=7 * n), ad=f"a{n % 11}") for n in range(60)]
    found = []
    for name, cells in (("one", 2_000_000), ("many", 25)):
        monkeypatch.setattr("driftline.features.counters.MAX_CELLS", cells)
        settings = handmade_settings(tmp_path / name)
        clean_log(settings, impressions=rows)
        compute_counters(settings, window=SPAN)
        found.append(read_view(settings, "product_short"))
    assert found[0] == found[1]


def test_a_log_that_was_never_checked_is_named(
    tmp_path: Path, handmade_settings: MakeSettings
) -> None:
    with pytest.raises(MissingArtefactError, match="driftline check"):
        compute_counters(handmade_settings(tmp_path), window=SPAN)

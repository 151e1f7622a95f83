"""Online reads against the offline frame of the same rows and moments."""

import shutil
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tests.feast_lookup import feast_lookup

from driftline.features.counters import compute_counters
from driftline.features.frame_files import read_frames
from driftline.features.frames import build_frames
from driftline.features.online import OnlineFeatures
from driftline.features.online_views import SnapshotLookup, SnapshotVersion
from driftline.features.paths import online_folder
from driftline.features.store import apply, materialize, open_store
from driftline.features.texts import write_product_sources
from driftline.features.views import feature_views
from driftline.platform.columns import TEXT_ID_COLUMNS, head_columns
from driftline.platform.settings import DriftlineSettings
from driftline.platform.windows import HOUR, Window

MakeSettings = Callable[..., DriftlineSettings]
WriteLog = Callable[..., None]
MarketOf = Callable[..., dict[str, Any]]

START = datetime(2026, 3, 1, 20, tzinfo=UTC)
SPAN = Window(START, START + 9 * HOUR)
STRICT_TIERS = {
    "medium": {"value_freshness_hours": 3, "parameter_freshness_hours": 1, "on_stale": "default"},
}


def prepare(settings: DriftlineSettings, market: dict[str, Any], key: pa.DataType) -> pa.Table:
    write_product_sources(settings)
    compute_counters(settings, window=SPAN)
    apply(settings, key_type=key)
    build_frames(settings, window=SPAN)
    return read_frames(settings, SPAN)


def plain(value: Any) -> Any:
    """None for what is missing, else a Python value."""
    if value is None or (isinstance(value, float | np.floating) and np.isnan(value)):
        return None
    return value.item() if isinstance(value, np.generic) else value


def assert_same_row(
    features: OnlineFeatures, row: dict[str, Any], settings: DriftlineSettings
) -> None:
    context = {c.name: row[c.name] for c in head_columns(settings) if c.alias is None}
    read = features.read(
        row["page_product_id"],
        [row["ad_product_id"], row["page_product_id"], row["ad_product_id"]],
        context=context,
        now=row["event_time"],
    )
    names = [*TEXT_ID_COLUMNS, *(column.name for column in head_columns(settings))]
    assert sorted(read.columns) == sorted(names)
    for name in names:
        column = read.columns[name]
        assert len(column) == 3
        for found in (column[0], column[2]):
            missing = name in TEXT_ID_COLUMNS and found == 0
            assert (None if missing else plain(found)) == plain(row[name]), name


@given(seed=st.integers(0, 10_000), strict=st.booleans(), integers=st.booleans())
@hypothesis_settings(max_examples=3, phases=[Phase.generate])  # an example takes seconds
def test_an_online_read_equals_the_frame_of_that_moment(
    seed: int,
    strict: bool,
    integers: bool,
    handmade_settings: MakeSettings,
    clean_log: WriteLog,
    market_of: MarketOf,
) -> None:
    key = pa.int64() if integers else pa.string()
    market = market_of(seed, num_rows=40, integer_keys=integers)
    with tempfile.TemporaryDirectory() as folder:
        settings = handmade_settings(Path(folder), tiers=STRICT_TIERS if strict else {})
        clean_log(settings, **market, key=key)
        rows = prepare(settings, market, key).to_pylist()
        features = OnlineFeatures.open(settings)
        moments = sorted({row["event_time"] for row in rows})
        # Catalogue and the user's counters change within the hour, so any moment will do.
        for moment in moments[seed % 7 :: 7]:
            materialize(settings, as_of=moment)
            features.refresh()
            assert features.as_of == moment
            for row in rows:
                if row["event_time"] == moment:
                    assert_same_row(features, row, settings)


@pytest.fixture(scope="module")
def market(
    tmp_path_factory: pytest.TempPathFactory,
    handmade_settings: MakeSettings,
    clean_log: WriteLog,
    market_of: MarketOf,
) -> DriftlineSettings:
    settings = handmade_settings(tmp_path_factory.mktemp("online"))
    rows = market_of(5, num_rows=60)
    clean_log(settings, **rows)
    prepare(settings, rows, pa.string())
    materialize(settings, as_of=SPAN.end)
    return settings


def test_a_product_in_no_table_is_unknown_and_all_its_features_are_missing(
    market: DriftlineSettings,
) -> None:
    features = OnlineFeatures.open(market)
    read = features.read("nobody", ["p0", "nothing"], context={}, now=SPAN.end)
    assert read.unknown_page
    assert read.unknown_ads.tolist() == [False, True]
    for name, column in read.columns.items():
        if name.startswith(("page__", "ad__")):
            row = 0 if name.startswith("page__") else 1
            assert plain(column[row]) in (None, 0), name


def test_features_of_the_impression_come_from_the_context_and_may_be_missing(
    market: DriftlineSettings,
) -> None:
    features = OnlineFeatures.open(market)
    read = features.read("p0", ["p1", "p2"], context={"place": "top"}, now=SPAN.end)
    assert read.columns["place"].tolist() == ["top", "top"]
    assert np.isnan(read.columns["depth"]).all()


def test_no_ads_give_empty_columns(market: DriftlineSettings) -> None:
    read = OnlineFeatures.open(market).read("p0", [], context={}, now=SPAN.end)
    assert {len(column) for column in read.columns.values()} == {0}


def test_expired_counters_are_missing_and_their_tier_is_stale(market: DriftlineSettings) -> None:
    features = OnlineFeatures.open(market)
    fresh = features.read("p0", ["p1"], context={}, now=SPAN.end + 2 * HOUR)
    old = features.read("p0", ["p1"], context={}, now=SPAN.end + timedelta(hours=2, microseconds=1))
    assert not np.isnan(fresh.columns["ad__impressions_24h"]).any()
    assert fresh.tiers["short"] == (7200.0, False)
    assert np.isnan(old.columns["ad__impressions_24h"]).all()
    assert np.isnan(old.tiers["short"][0])
    assert old.tiers["short"][1]


def test_old_categories_are_used_and_flagged(market: DriftlineSettings) -> None:
    features = OnlineFeatures.open(market)
    later = SPAN.end + timedelta(hours=400)
    now = features.read("p0", ["p1"], context={}, now=SPAN.end)
    then = features.read("p0", ["p1"], context={}, now=later)
    assert then.columns["ad__category"].tolist() == now.columns["ad__category"].tolist()
    assert not now.tiers["medium"][1]
    assert then.tiers["medium"][1]
    assert then.tiers["medium"][0] == now.tiers["medium"][0] + 400 * 3600


def test_a_reader_keeps_its_version_until_it_refreshes(
    tmp_path: Path, handmade_settings: MakeSettings, clean_log: WriteLog, market_of: MarketOf
) -> None:
    settings = handmade_settings(tmp_path)
    features = OnlineFeatures.open(settings)
    assert features.as_of is None
    assert features.read(1, [2], context={}, now=START).unknown_page
    assert not features.refresh()
    rows = market_of(5, num_rows=60)
    clean_log(settings, **rows)
    prepare(settings, rows, pa.string())
    middle, end = START + 5 * HOUR, SPAN.end

    def shown() -> float:
        read = features.read("p0", ["p1"], context={}, now=end)
        return float(read.columns["ad__hours_since_first"][0])

    materialize(settings, as_of=end - HOUR)
    assert features.refresh()
    before = shown()
    materialize(settings, as_of=end)
    assert shown() == before
    assert features.refresh()
    assert shown() == before + 1
    assert not features.refresh()
    materialize(settings, as_of=middle)  # a clock may be set back: nothing later stays
    assert features.refresh()
    assert features.as_of == middle
    assert np.isnan(shown())


def test_status_names_every_view(market: DriftlineSettings) -> None:
    status = OnlineFeatures.open(market).status(now=SPAN.end + HOUR)
    assert status["seconds_behind"] == 3600
    assert set(status["views"]) >= {"product_long", "product_medium", "product_short"}
    assert all(view["version"] for view in status["views"].values())


def test_feast_gives_what_the_snapshot_gives(market: DriftlineSettings) -> None:
    store = open_store(market)
    features = OnlineFeatures.open(market)
    version = features._version
    assert isinstance(version, SnapshotVersion)
    for wanted, lookup in zip(features._wanted, version.lookups.values(), strict=True):
        assert isinstance(lookup, SnapshotLookup)
        assert lookup.snapshot is not None
        keys = [*lookup.snapshot.keys().to_pylist(), None, "nobody", None]
        fast, slow = lookup.find(keys), feast_lookup(wanted, keys, store=store)
        here, there = fast.slots, slow.slots
        known = here >= 0
        assert known.tolist() == (there >= 0).tolist()
        np.testing.assert_array_equal(
            fast.table.event_us[here[known]], slow.table.event_us[there[known]]
        )
        np.testing.assert_array_equal(fast.table.numbers[here], slow.table.numbers[there])
        for name, (codes, values) in fast.table.categories.items():
            other_codes, other_values = slow.table.categories[name]
            assert values[codes[here]].tolist() == other_values[other_codes[there]].tolist()
        if fast.table.text_id is not None and slow.table.text_id is not None:
            assert fast.table.text_id[here].tolist() == slow.table.text_id[there].tolist()


def test_hourly_materialisation_adds_only_what_is_new(
    tmp_path: Path,
    handmade_settings: MakeSettings,
    clean_log: WriteLog,
    market_of: MarketOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("driftline.features.store.MAX_INTERVALS", 2)
    settings = handmade_settings(tmp_path)
    rows = market_of(8, num_rows=60)
    clean_log(settings, **rows)
    prepare(settings, rows, pa.string())
    hours = [START + n * HOUR for n in range(4, 8)]
    kinds = [materialize(settings, as_of=hour).views["product_short"] for hour in hours]
    assert kinds == ["rebuilt", "added", "added", "added"]
    again = materialize(settings, as_of=hours[-1]).views
    assert set(again.values()) == {"unchanged"}
    views = open_store(settings).list_feature_views()
    assert {len(view.materialization_intervals) for view in views} <= {1, 2}
    short = next(view for view in views if view.name == "product_short")
    assert short.materialization_intervals[-1][1] == hours[-1]


def with_tier(settings: DriftlineSettings, name: str, **changes: object) -> DriftlineSettings:
    tier = settings.tiers.short.model_copy(update=changes)
    return settings.model_copy(update={"tiers": settings.tiers.model_copy(update={name: tier})})


def test_a_value_older_than_its_tier_is_used_defaulted_or_refused_and_counted(
    market: DriftlineSettings,
) -> None:
    limit = 30.0  # more than the oldest number of the log at its end
    late = SPAN.end + (limit + 1) * HOUR
    reads = {}
    for handling in ("use", "default", "refuse"):
        settings = with_tier(market, "short", on_stale=handling, value_freshness_hours=limit)
        features = OnlineFeatures.open(settings)
        before = features.read("p0", ["p1", "p2"], context={}, now=SPAN.end)
        assert before.refusal is None
        assert not any(features.counts()["stale"]["short"].values())
        reads[handling] = features, features.read("p0", ["p1", "p2"], context={}, now=late)
    counts = {name: features.counts()["stale"]["short"] for name, (features, _) in reads.items()}
    number = counts["use"]["used"]
    assert number >= 3  # the page and two ads, in each view of the tier
    assert counts == {
        "use": {"used": number, "defaulted": 0, "refused": 0},
        "default": {"used": 0, "defaulted": number, "refused": 0},
        "refuse": {"used": 0, "defaulted": 0, "refused": number},
    }
    used, defaulted, refused = (read for _, read in reads.values())
    oldest = used.tiers["short"][0]
    assert used.tiers["short"][1]
    assert oldest >= 3600 * (limit + 1)
    assert np.isnan(defaulted.tiers["short"][0])
    assert used.refusal is None
    assert defaulted.refusal is None
    assert refused.refusal is not None
    assert refused.refusal.tier == "short"
    assert refused.refusal.age_seconds == oldest
    assert refused.refusal.limit_seconds == 3600 * limit


@given(
    page=st.sampled_from(["p0", "p3", "p7", "nobody"]),
    ads=st.lists(st.sampled_from([*(f"p{n}" for n in range(12)), "nothing"]), max_size=12),
    hours=st.sampled_from([0, 1, 2, 3, 20, 31, 400]),
    handling=st.sampled_from(["use", "default", "refuse"]),
)
@hypothesis_settings(deadline=None, max_examples=40)
def test_a_catalogue_finds_what_the_views_find(
    market: DriftlineSettings, page: str, ads: list[str], hours: int, handling: str
) -> None:
    asked = with_tier(market, "short", on_stale=handling, value_freshness_hours=2)
    by_view = asked.serving.model_copy(update={"folded_megabytes": 0})
    readers = [
        OnlineFeatures.open(settings)
        for settings in (asked, asked.model_copy(update={"serving": by_view}))
    ]
    assert [reader.version.catalogue is None for reader in readers] == [False, True]
    now = SPAN.end + hours * HOUR
    fast, slow = (reader.read(page, ads, context={}, now=now) for reader in readers)
    if handling != "default":
        assert fast.places is not None
    assert str(fast.tiers) == str(slow.tiers)
    assert (fast.unknown_page, fast.refusal) == (slow.unknown_page, slow.refusal)
    assert fast.unknown_ads.tolist() == slow.unknown_ads.tolist()
    assert readers[0].counts() == readers[1].counts()
    assert list(fast.columns) == list(slow.columns)
    for name, column in fast.columns.items():
        assert list(map(plain, column)) == list(map(plain, slow.columns[name])), name


def test_a_view_that_was_never_materialised_is_empty(
    market: DriftlineSettings, tmp_path: Path
) -> None:
    copied = market.model_copy(update={"workspace": tmp_path / "copy"})
    shutil.copytree(market.workspace, copied.workspace)
    shutil.rmtree(online_folder(copied) / "product_short")
    features = OnlineFeatures.open(copied)
    assert features.version.catalogue is not None
    read = features.read("p0", ["p1", "nothing"], context={}, now=SPAN.end)
    assert read.unknown_ads.tolist() == [False, True]
    assert np.isnan(read.columns["ad__impressions_24h"]).all()
    assert read.columns["ad__category"][0] is not None


def test_refusing_is_no_other_feature_than_using(market: DriftlineSettings) -> None:
    # A bundle trained under one may be served under the other.
    using, refusing = (
        feature_views(with_tier(market, "short", on_stale=handling))
        for handling in ("use", "refuse")
    )
    assert [view.version for view in using] == [view.version for view in refusing]


def test_what_a_read_holds_stays_as_it_was_while_materialisations_go_on(
    tmp_path: Path, handmade_settings: MakeSettings, clean_log: WriteLog, market_of: MarketOf
) -> None:
    settings = handmade_settings(tmp_path)
    rows = market_of(5, num_rows=60)
    clean_log(settings, **rows)
    prepare(settings, rows, pa.string())
    features = OnlineFeatures.open(settings)
    held = []
    for hour in range(4, 10):
        materialize(settings, as_of=START + hour * HOUR)
        assert features.refresh()
        read = features.read("p0", ["p1", "p2"], context={}, now=SPAN.end)
        tables = [
            (table, table.event_us.copy(), table.numbers.copy())
            for table in (part.found.table for part in read.parts)
        ]
        held.append((read, {name: c.tolist() for name, c in read.columns.items()}, tables))
    for read, columns, tables in held:
        read.__dict__.pop("columns")  # put together anew from what the read holds
        for name, column in read.columns.items():
            assert repr(column.tolist()) == repr(columns[name]), name
        for table, event_us, numbers in tables:
            np.testing.assert_array_equal(table.event_us, event_us)
            np.testing.assert_array_equal(table.numbers, numbers)
            assert not table.numbers.flags.writeable
    assert len({id(read.parts[0].found.table) for read, _, _ in held}) > 1

"""Frames against a version that looks up every value by walking over all rows."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from driftline.features.counters import compute_counters
from driftline.features.frame_files import frame_schema, read_frames
from driftline.features.frames import build_frames
from driftline.features.store import apply
from driftline.features.texts import text_ids, write_product_sources
from driftline.features.views import View, feature_views
from driftline.platform.columns import head_columns
from driftline.platform.errors import MissingArtefactError
from driftline.platform.settings import DriftlineSettings
from driftline.platform.windows import HOUR, Window
from driftline.platform.workspace import Workspace

MakeSettings = Callable[..., DriftlineSettings]
WriteLog = Callable[..., None]
MarketOf = Callable[..., dict[str, Any]]
Row = dict[str, Any]

START = datetime(2026, 3, 1, 20, tzinfo=UTC)
SPAN = Window(START, START + 9 * HOUR)
STRICT_TIERS = {
    "medium": {"value_freshness_hours": 3, "parameter_freshness_hours": 1, "on_stale": "default"},
    "short": {"value_freshness_hours": 2, "parameter_freshness_hours": 1, "on_stale": "default"},
}


def prepare(settings: DriftlineSettings, key_type: pa.DataType | None = None) -> None:
    write_product_sources(settings)
    compute_counters(settings, window=SPAN)
    apply(settings, key_type=key_type or pa.string())


def slow_newest(rows: Sequence[Row], view: View, key: Any, moment: datetime) -> Row:
    known = [
        (row["event_time"], row["created_time"], index)
        for index, row in enumerate(rows)
        if key is not None
        and row[view.join_key] == key
        and max(row["event_time"], row["created_time"]) <= moment
    ]
    if not known:
        return {}
    newest = rows[max(known)[2]]
    if view.ttl is not None and newest["event_time"] + view.ttl < moment:
        return {}
    return newest


def slow_sources(
    settings: DriftlineSettings, market: Mapping[str, Sequence[Row]]
) -> dict[str, list[Row]]:
    """Rows of each view: of the user's tables as given, of the derived counters as written."""
    ids = text_ids(
        pa.Table.from_pylist(
            [dict(row) for row in market["catalogue"]],
            schema=pa.schema([("title", pa.string()), ("about", pa.string())]),
        ),
        names=["title", "about"],
    ).to_pylist()
    catalogue = [
        {**row, "text_id": text, "created_time": row["event_time"]}
        for row, text in zip(market["catalogue"], ids, strict=True)
    ]
    rows = {"catalogue": catalogue, "counters": [dict(row) for row in market["counters"]]}
    return {
        view.name: rows[view.origin]
        if view.origin != "derived"
        else pq.read_table(view.folder(settings)).to_pylist()
        for view in feature_views(settings)
    }


def slow_frame(settings: DriftlineSettings, market: Mapping[str, Sequence[Row]]) -> list[Row]:
    sources = slow_sources(settings, market)
    frame = []
    order = sorted(market["impressions"], key=lambda row: (row["event_time"], row["impression_id"]))
    for shown in order:
        late = shown["click_time"] and shown["click_time"] > (
            shown["event_time"] + settings.labels.maturity
        )
        row = {**shown, "clicked_ever": shown["clicked"], "clicked": shown["clicked"] and not late}
        for alias in ("page", "ad"):
            for view in feature_views(settings):
                if view.entity == "product":
                    key = shown[f"{alias}_product_id"]
                    found = slow_newest(sources[view.name], view, key, shown["event_time"])
                    row |= {f"{alias}__{name}": found.get(name) for name in view.features.names}
        page, ad = row["page__category"], row["ad__category"]
        pair = None if page is None or ad is None else f"{page}|{ad}"
        for view in feature_views(settings):
            for entity, alias, key in (
                ("category", "ad_category", ad),
                ("category_pair", "category_pair", pair),
            ):
                if view.entity == entity:
                    found = slow_newest(sources[view.name], view, key, shown["event_time"])
                    row |= {f"{alias}__{name}": found.get(name) for name in view.features.names}
        frame.append(row)
    return frame


def assert_equal_frames(found: pa.Table, expected: Sequence[Row]) -> None:
    rows = found.to_pylist()
    assert len(rows) == len(expected)
    for row, wanted in zip(rows, expected, strict=True):
        for name, value in row.items():
            close = pytest.approx(wanted[name], rel=1e-6) if isinstance(value, float) else value
            assert close == (value if isinstance(value, float) else wanted[name]), name


@given(seed=st.integers(0, 10_000), strict=st.booleans())
@hypothesis_settings(max_examples=6, phases=[Phase.generate])  # an example takes seconds
def test_frames_equal_a_walk_over_all_rows(
    seed: int,
    strict: bool,
    handmade_settings: MakeSettings,
    clean_log: WriteLog,
    market_of: MarketOf,
) -> None:
    market = market_of(seed, num_rows=40)
    with tempfile.TemporaryDirectory() as folder:
        settings = handmade_settings(Path(folder), tiers=STRICT_TIERS if strict else {})
        clean_log(settings, **market)
        prepare(settings)
        build_frames(settings, window=SPAN)
        frame = read_frames(settings, SPAN)
        assert frame.schema.equals(frame_schema(settings, key=pa.string()))
        assert_equal_frames(frame, slow_frame(settings, market))


def build_market(
    folder: Path, make: MakeSettings, clean_log: WriteLog, market_of: MarketOf
) -> DriftlineSettings:
    settings = make(folder)
    clean_log(settings, **market_of(3, num_rows=60))
    prepare(settings)
    build_frames(settings, window=SPAN)
    return settings


@pytest.fixture
def own(
    tmp_path: Path, handmade_settings: MakeSettings, clean_log: WriteLog, market_of: MarketOf
) -> DriftlineSettings:
    """Built frames that a test may spoil."""
    return build_market(tmp_path, handmade_settings, clean_log, market_of)


@pytest.fixture(scope="module")
def built(
    tmp_path_factory: pytest.TempPathFactory,
    handmade_settings: MakeSettings,
    clean_log: WriteLog,
    market_of: MarketOf,
) -> DriftlineSettings:
    """Built frames that tests leave as they are."""
    return build_market(tmp_path_factory.mktemp("built"), handmade_settings, clean_log, market_of)


def frame_times(settings: DriftlineSettings) -> dict[str, int]:
    frames = Workspace.of(settings).frames
    return {path.name: path.stat().st_mtime_ns for path in sorted(frames.glob("*.parquet"))}


def changed_frames(before: Mapping[str, int], after: Mapping[str, int]) -> set[int]:
    names = {name for name, time in after.items() if before.get(name) != time}
    return {
        int((datetime.strptime(name[:13], "%Y-%m-%dT%H").replace(tzinfo=UTC) - START) / HOUR)
        for name in names
    }


def test_a_frame_is_one_file_an_hour_even_for_an_hour_without_impressions(
    built: DriftlineSettings,
) -> None:
    assert len(frame_times(built)) == 9


def test_a_second_call_touches_nothing(built: DriftlineSettings) -> None:
    before = frame_times(built)
    build_frames(built, window=SPAN)
    assert frame_times(built) == before


def test_a_missing_hour_is_built_alone(built: DriftlineSettings) -> None:
    before = frame_times(built)
    path = Workspace.of(built).frames / "2026-03-02T01.parquet"
    table = pq.read_table(path)
    path.unlink()
    build_frames(built, window=SPAN)
    assert changed_frames(before, frame_times(built)) == {5}
    assert pq.read_table(path).equals(table)


def test_a_late_impression_rebuilds_its_hour_and_those_that_count_it(
    own: DriftlineSettings, clean_log: WriteLog, market_of: MarketOf
) -> None:
    before = frame_times(own)
    market = market_of(3, num_rows=60)
    late = {**market["impressions"][0], "impression_id": "late"}
    late["event_time"] = START + timedelta(hours=6, minutes=5)
    clean_log(own, **{**market, "impressions": [*market["impressions"], late]})
    build_frames(own, window=SPAN)
    assert changed_frames(before, frame_times(own)) == {6}
    compute_counters(own, window=SPAN)
    build_frames(own, window=SPAN)
    assert changed_frames(before, frame_times(own)) == {6, 7, 8}


def test_a_late_correction_rebuilds_from_the_hour_it_became_known(
    own: DriftlineSettings, clean_log: WriteLog, market_of: MarketOf
) -> None:
    before = frame_times(own)
    market = market_of(3, num_rows=60)
    correction = {"product_id": "p0", "event_time": START, "sales": 1000.0}
    correction["created_time"] = START + timedelta(hours=5, minutes=30)
    clean_log(own, **{**market, "counters": [*market["counters"], correction]})
    write_product_sources(own)
    build_frames(own, window=SPAN)
    assert changed_frames(before, frame_times(own)) == {5, 6, 7}  # then it has expired


def test_a_changed_definition_rebuilds_everything(
    own: DriftlineSettings, handmade_settings: MakeSettings
) -> None:
    before = frame_times(own)
    changed = handmade_settings(own.workspace, tiers=STRICT_TIERS)
    prepare(changed)
    build_frames(changed, window=SPAN)
    assert changed_frames(before, frame_times(changed)) == set(range(9))


def test_a_part_of_an_hour_is_read_as_asked(built: DriftlineSettings) -> None:
    whole = read_frames(built, SPAN)
    window = Window(START + timedelta(minutes=61), START + timedelta(minutes=250))
    part = read_frames(built, window, columns=["impression_id", "ad__ctr_3h"])
    inside = [
        row["impression_id"]
        for row in whole.to_pylist()
        if window.start <= row["event_time"] and row["event_time"] < window.end
    ]
    assert part.column_names == ["impression_id", "ad__ctr_3h"]
    assert part.column("impression_id").to_pylist() == inside


def test_an_hour_that_was_never_built_is_named(built: DriftlineSettings) -> None:
    with pytest.raises(MissingArtefactError, match=r"2026-03-02T05\.parquet.*features frames"):
        read_frames(built, Window(START, START + 12 * HOUR))


def test_integer_keys_without_text_category_or_numbers(
    tmp_path: Path, handmade_settings: MakeSettings, clean_log: WriteLog, market_of: MarketOf
) -> None:
    features = [{"name": "place", "kind": "categorical", "entity": "impression", "tier": "medium"}]
    settings = handmade_settings(tmp_path, features=features, counters={"windows_hours": [1, 2]})
    market = market_of(1, num_rows=30, integer_keys=True)
    for row in market["impressions"]:
        del row["depth"]
    clean_log(settings, impressions=market["impressions"], key=pa.int64())
    prepare(settings, pa.int64())
    build_frames(settings, window=SPAN)
    frame = read_frames(settings, SPAN)
    assert frame.num_rows == 30
    assert frame.column("ad__text_id").null_count == 30
    assert 0 < frame.column("ad__impressions_2h").null_count < 30
    assert [c.name for c in head_columns(settings)] == frame.column_names[10:]

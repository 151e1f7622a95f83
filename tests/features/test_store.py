"""Feast's registry and what is checked before anything is written to it."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from driftline.features.counters import compute_counters
from driftline.features.online import OnlineFeatures
from driftline.features.paths import materialized_path, online_folder
from driftline.features.store import apply, check_source, materialize, open_store
from driftline.features.texts import write_product_sources
from driftline.features.views import View, feature_views
from driftline.platform.errors import ContractError, MissingArtefactError
from driftline.platform.settings import DriftlineSettings
from driftline.platform.windows import HOUR, Window

MakeSettings = Callable[..., DriftlineSettings]
WriteLog = Callable[..., None]
MarketOf = Callable[..., dict[str, Any]]

START = datetime(2026, 3, 1, 20, tzinfo=UTC)
SPAN = Window(START, START + 9 * HOUR)
PLAIN = [{"name": "place", "kind": "categorical", "entity": "impression", "tier": "medium"}]


def write_sources(settings: DriftlineSettings) -> None:
    write_product_sources(settings)
    compute_counters(settings, window=SPAN)


@pytest.fixture
def market(
    tmp_path: Path, handmade_settings: MakeSettings, clean_log: WriteLog, market_of: MarketOf
) -> DriftlineSettings:
    settings = handmade_settings(tmp_path)
    clean_log(settings, **market_of(2, num_rows=50))
    write_sources(settings)
    return settings


def view_named(settings: DriftlineSettings, name: str) -> View:
    return next(view for view in feature_views(settings) if view.name == name)


def spoil(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(path)), path)


def test_a_column_that_is_missing_from_a_source_is_named(market: DriftlineSettings) -> None:
    view = view_named(market, "product_medium")
    path = next(view.folder(market).glob("2026*.parquet"))
    spoil(path, lambda table: table.drop_columns(["category"]))
    with pytest.raises(ContractError, match="'category' of feature view product_medium is missing"):
        apply(market, key_type=pa.string())
    assert open_store(market).list_feature_views() == []


def test_a_column_of_another_type_is_named(market: DriftlineSettings) -> None:
    view = view_named(market, "product_short")
    path = next(view.folder(market).glob("2026*.parquet"))
    index = pq.read_schema(path).get_field_index("ctr_1h")
    spoil(
        path,
        lambda table: table.set_column(index, "ctr_1h", table.column("ctr_1h").cast(pa.float64())),
    )
    with pytest.raises(ContractError, match=r"'ctr_1h'.*must be float, got double"):
        check_source(view, market, key_type=pa.string())


def test_keys_of_another_type_are_refused(market: DriftlineSettings) -> None:
    with pytest.raises(ContractError, match=r"'product_id'.*must be int64, got string"):
        apply(market, key_type=pa.int64())


def test_a_source_that_was_never_written_is_named(
    tmp_path: Path, handmade_settings: MakeSettings
) -> None:
    with pytest.raises(MissingArtefactError, match="product_long has no source files"):
        apply(handmade_settings(tmp_path), key_type=pa.string())


def test_views_that_the_settings_no_longer_declare_are_removed(
    market: DriftlineSettings, handmade_settings: MakeSettings
) -> None:
    store = apply(market, key_type=pa.string())
    assert len(store.list_feature_views(tags={"drift_tier": "short"})) == 4
    counters = {"windows_hours": [1, 3, 24]}
    plain = handmade_settings(market.workspace, features=PLAIN, counters=counters)
    write_sources(plain)
    store = apply(plain, key_type=pa.string())
    assert [view.name for view in store.list_feature_views()] == ["product_short"]
    assert [entity.name for entity in store.list_entities()] == ["product"]
    services = {service.name for service in store.list_feature_services()}
    assert services == {"head_input", "head_input_products", "teacher_input"}


def test_nothing_is_materialised_before_the_views_are_applied(market: DriftlineSettings) -> None:
    with pytest.raises(MissingArtefactError, match=r"product_long is not registered.*apply"):
        materialize(market, as_of=SPAN.end)


def test_a_changed_definition_must_be_applied_before_it_is_materialised(
    market: DriftlineSettings, handmade_settings: MakeSettings
) -> None:
    apply(market, key_type=pa.string())
    changed = handmade_settings(market.workspace, labels={"maturity_minutes": 45})
    with pytest.raises(MissingArtefactError, match="product_short is not registered"):
        materialize(changed, as_of=SPAN.end)
    write_sources(changed)
    apply(changed, key_type=pa.string())
    assert materialize(changed, as_of=SPAN.end).views["product_short"] == "rebuilt"


def test_a_changed_past_rebuilds_the_view_and_no_other(
    market: DriftlineSettings, clean_log: WriteLog, market_of: MarketOf
) -> None:
    apply(market, key_type=pa.string())
    materialize(market, as_of=SPAN.end)
    rows = market_of(2, num_rows=50)
    earlier = {**rows["catalogue"][0], "event_time": START, "category": "garden"}
    clean_log(market, **{**rows, "catalogue": [*rows["catalogue"], earlier]})
    write_product_sources(market)
    kinds = materialize(market, as_of=SPAN.end).views
    assert {name for name, kind in kinds.items() if kind == "rebuilt"} == {
        "product_long",
        "product_medium",
    }


def test_a_lost_snapshot_is_rebuilt(market: DriftlineSettings) -> None:
    apply(market, key_type=pa.string())
    materialize(market, as_of=SPAN.end)
    (online_folder(market) / "product_medium" / "CURRENT").unlink()
    kinds = materialize(market, as_of=SPAN.end).views
    assert {name for name, kind in kinds.items() if kind == "rebuilt"} == {"product_medium"}


def test_a_killed_materialisation_is_repeated_with_the_same_result(
    market: DriftlineSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply(market, key_type=pa.string())
    materialize(market, as_of=SPAN.end)
    wanted = read_all(market)
    materialize(market, as_of=SPAN.end - 2 * HOUR)

    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("driftline.features.store._trim_intervals", die)
        patched.setattr("driftline.features.store.MAX_INTERVALS", 0)
        with pytest.raises(KeyboardInterrupt):
            materialize(market, as_of=SPAN.end)
    materialize(market, as_of=SPAN.end)
    assert read_all(market) == wanted
    state = json.loads(materialized_path(market).read_text())
    assert {view["as_of"] for view in state.values()} == {"2026-03-02T05:00:00Z"}


def read_all(settings: DriftlineSettings) -> dict[str, list[Any]]:
    ads = [f"p{n}" for n in range(6)]
    read = OnlineFeatures.open(settings).read("p0", ads, context={}, now=SPAN.end)
    return {name: [str(value) for value in column] for name, column in read.columns.items()}

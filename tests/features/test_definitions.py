"""Views and Feast objects follow from the settings."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from feast import Entity, FeatureService, FeatureView

from driftline.features.definitions import feast_column, feast_objects, frame_sources
from driftline.features.views import feature_view_versions, feature_views
from driftline.platform.columns import TEXT_ID_COLUMNS, head_columns
from driftline.platform.errors import SettingsError
from driftline.platform.settings import DriftlineSettings

MakeSettings = Callable[..., DriftlineSettings]


def feature(name: str, kind: str, tier: str, entity: str = "product") -> dict[str, str]:
    return {"name": name, "kind": kind, "tier": tier, "entity": entity}


def test_every_feature_of_a_product_lives_in_one_view_of_its_tier(
    tmp_path: Path, handmade_settings: MakeSettings
) -> None:
    features = [
        feature("title", "text", "medium"),
        feature("about", "text", "long"),
        feature("brand", "categorical", "short"),
        feature("price", "numeric", "long"),
        feature("sales", "numeric", "short"),
        feature("place", "categorical", "medium", "impression"),
    ]
    settings = handmade_settings(tmp_path, features=features, counters={"windows_hours": [1]})
    found = {view.name: list(view.features.names) for view in feature_views(settings)}
    derived = found.pop("product_short")
    assert found == {
        "product_long": ["about", "text_id"],
        "product_medium": ["title"],
        "product_short_catalogue": ["brand"],
        "product_long_counters": ["price"],
        "product_short_counters": ["sales"],
    }
    assert {"impressions_1h", "page_ctr_1h", "hours_since_click"} <= set(derived)


def test_the_time_to_live_follows_the_tier(tmp_path: Path, handmade_settings: MakeSettings) -> None:
    settings = handmade_settings(tmp_path)
    objects = feast_objects(settings, key_type=pa.string())
    views = {item.name: item for item in objects if isinstance(item, FeatureView)}
    assert views["product_short"].ttl == timedelta(hours=2)
    assert not views["product_long"].ttl  # an old text is used and flagged
    assert views["product_short"].tags["drift_tier"] == "short"
    assert views["product_long"].tags["value_freshness_hours"] == "720"
    assert views["product_long"].tags["parameter_freshness_hours"] == "720"


def test_the_services_hold_every_column_of_a_frame_and_the_texts(
    tmp_path: Path, handmade_settings: MakeSettings
) -> None:
    settings = handmade_settings(tmp_path)
    objects = feast_objects(settings, key_type=pa.string())
    columns = {
        item.name: {
            f"{projection.name_to_use()}__{field.name}"
            for projection in item.feature_view_projections
            for field in projection.features
        }
        for item in objects
        if isinstance(item, FeatureService)
    }
    wanted = {feast_column(*source) for source in frame_sources(settings)}
    assert columns["head_input"] == wanted
    assert columns["head_input_products"] | columns["head_input_categories"] == wanted
    assert columns["arms_input"] == {
        f"{alias}_product_long__{name}"
        for alias in ("page", "ad")
        for name in ("title", "about", "text_id")
    }
    assert columns["teacher_input"] == wanted | columns["arms_input"]
    names = {source[0] for source in frame_sources(settings)}
    assert names == {c.name for c in head_columns(settings) if c.alias} | set(TEXT_ID_COLUMNS)


def test_integer_products_have_an_integer_entity_and_categories_do_not(
    tmp_path: Path, handmade_settings: MakeSettings
) -> None:
    objects = feast_objects(handmade_settings(tmp_path), key_type=pa.int64())
    kinds = {item.name: item.value_type.name for item in objects if isinstance(item, Entity)}
    assert kinds == {"product": "INT64", "category": "STRING", "category_pair": "STRING"}


@pytest.mark.parametrize(
    ("changes", "changed"),
    [
        ({"labels": {"maturity_minutes": 50}}, {"product_short", "category_short"}),
        ({"tiers": {"long": {"value_freshness_hours": 9, "parameter_freshness_hours": 9}}}, set()),
        (
            {
                "tiers": {
                    "short": {
                        "value_freshness_hours": 3,
                        "parameter_freshness_hours": 1,
                        "on_stale": "default",
                    }
                }
            },
            {"product_short", "category_short", "product_short_counters"},
        ),
        (
            {"features": [feature("title", "text", "long"), feature("category", "text", "long")]},
            {"product_long"},
        ),
    ],
)
def test_a_version_changes_with_what_its_values_mean(
    tmp_path: Path,
    handmade_settings: MakeSettings,
    changes: dict[str, Any],
    changed: set[str],
) -> None:
    if "features" in changes:
        changes = {**changes, "counters": {"windows_hours": [1, 3, 24]}}
        changed = changed | {"product_short"}  # no category is counted any more
    before = feature_view_versions(handmade_settings(tmp_path))
    after = feature_view_versions(handmade_settings(tmp_path, **changes))
    different = {name for name, version in after.items() if before.get(name) != version}
    assert different - {"category_pair_short"} == changed


@pytest.mark.parametrize(
    ("name", "kind"), [("impressions_24h", "numeric"), ("text_id", "categorical")]
)
def test_a_feature_may_not_take_a_derived_name(
    tmp_path: Path, handmade_settings: MakeSettings, name: str, kind: str
) -> None:
    settings = handmade_settings(
        tmp_path, features=[feature(name, kind, "short")], counters={"windows_hours": [24]}
    )
    with pytest.raises(SettingsError, match=f"{name}.*derives itself; rename"):
        feature_views(settings)


def test_an_unresolved_tier_is_named(tmp_path: Path, handmade_settings: MakeSettings) -> None:
    features = [feature("title", "text", "auto")]
    settings = handmade_settings(tmp_path, features=features, counters={"windows_hours": [1]})
    with pytest.raises(SettingsError, match="driftline scales"):
        feature_views(settings)

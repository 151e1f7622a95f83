"""The Feast objects of a market, made from its settings: entities, views, services.

Page and ad are two aliases of one entity. In a service each view appears under the name
``ALIAS_VIEW`` (``page_product_long``, ``ad_product_short``), so that Feast's full feature names
tell them apart; :func:`feast_column` gives that name for a column of a frame.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, TypeAlias

import pyarrow as pa
from feast import Entity, FeatureService, FeatureView, Field, FileSource, Project, ValueType
from feast.types import Float32, Int64, String

from driftline.features.paths import project_name
from driftline.features.views import JOIN_KEYS, TEXT_ID, View, feature_views
from driftline.platform.columns import PRODUCT_ALIASES, TEXT_ID_COLUMNS, head_columns
from driftline.platform.errors import SettingsError
from driftline.platform.settings import DriftlineSettings

ENTITY_KEYS: Final[Mapping[str, str]] = {
    "page": "page_product_id",
    "ad": "ad_product_id",
    "ad_category": "ad_category_key",
    "category_pair": "category_pair_key",
}
"""Column of the entity table that each alias is joined by."""

HEAD_PRODUCTS: Final = "head_input_products"
HEAD_CATEGORIES: Final = "head_input_categories"
HEAD_INPUT: Final = "head_input"
ARMS_INPUT: Final = "arms_input"
TEACHER_INPUT: Final = "teacher_input"

VERSION_TAG: Final = "driftline_version"

_TYPES: Final = {pa.string(): String, pa.int64(): Int64, pa.float32(): Float32}
_ALIASES: Final = {
    "product": PRODUCT_ALIASES,
    "category": ("ad_category",),
    "category_pair": ("category_pair",),
}

FeastObject: TypeAlias = "Entity | FeatureView | FeatureService"


def feast_objects(settings: DriftlineSettings, *, key_type: pa.DataType) -> list[FeastObject]:
    """Everything to apply: entities, one view per entity and tier, and five services.

    - ``head_input``: all that the fusion MLP reads, and both text ids; needs the keys of products
      and of categories. ``head_input_products`` and ``head_input_categories`` are its two halves:
      the second is asked with the categories that the first found.
    - ``arms_input``: the text ids and texts of both products.
    - ``teacher_input``: the union of both.

    Args:
        settings: Features and tiers, with no tier ``auto`` left.
        key_type: Arrow type of product keys.
    """
    views = feature_views(settings)
    entities = {view.entity: _entity(view, key_type) for view in views}
    made = {view.name: _feature_view(view, entities[view.entity], settings) for view in views}
    head = [column for column in frame_sources(settings) if column[0] not in TEXT_ID_COLUMNS]
    ids = [column for column in frame_sources(settings) if column[0] in TEXT_ID_COLUMNS]
    texts = [
        (f"{alias}__{feature.name}", alias, _view_of(views, "product", feature.name))
        for alias in PRODUCT_ALIASES
        for feature in settings.select(kind="text")
    ]
    of_products = [column for column in head if column[2].entity == "product"]
    chosen = {
        HEAD_INPUT: [*head, *ids],
        HEAD_PRODUCTS: [*of_products, *ids],
        HEAD_CATEGORIES: [column for column in head if column[2].entity != "product"],
        ARMS_INPUT: [*texts, *ids],
        TEACHER_INPUT: [*head, *texts, *ids],
    }
    services = [_service(name, columns, made=made) for name, columns in chosen.items() if columns]
    return [*entities.values(), *made.values(), *services]


def feast_project(settings: DriftlineSettings) -> Project:
    """The Feast project that the objects live in."""
    return Project(name=project_name(settings), description=f"Driftline market {settings.name}")


def frame_sources(settings: DriftlineSettings) -> list[tuple[str, str, View]]:
    """Column of a frame, alias and view, for each column that comes from a view."""
    views = feature_views(settings)
    sources = [
        (column.name, column.alias, _view_of(views, _entity_of(column.alias), column.feature))
        for column in head_columns(settings)
        if column.alias is not None
    ]
    if settings.select(kind="text"):
        holder = _view_of(views, "product", TEXT_ID)
        sources += [
            (name, alias, holder)
            for name, alias in zip(TEXT_ID_COLUMNS, PRODUCT_ALIASES, strict=True)
        ]
    return sources


def feast_column(column: str, alias: str, view: View) -> str:
    """Feast's full name of a frame's column in the services."""
    return f"{alias}_{view.name}__{column.split('__', 1)[1]}"


def _entity_of(alias: str) -> str:
    return next(entity for entity, aliases in _ALIASES.items() if alias in aliases)


def _view_of(views: Iterable[View], entity: str, feature: str) -> View:
    for view in views:
        if view.entity == entity and feature in view.features.names:
            return view
    raise SettingsError(
        f"no feature view of {entity} holds {feature!r}; it must be declared in `features:`"
    )


def _entity(view: View, key_type: pa.DataType) -> Entity:
    is_integer = view.entity == "product" and pa.types.is_integer(key_type)
    return Entity(
        name=view.entity,
        join_keys=[view.join_key],
        value_type=ValueType.INT64 if is_integer else ValueType.STRING,
        description=f"{view.entity.replace('_', ' ')}, known by {JOIN_KEYS[view.entity]}",
    )


def _feature_view(view: View, entity: Entity, settings: DriftlineSettings) -> FeatureView:
    source = FileSource(
        name=f"{view.name}_source",
        path=f"{view.folder(settings)}/*.parquet",
        timestamp_field="event_time",
        created_timestamp_column="created_time",
    )
    key = Int64 if entity.value_type == ValueType.INT64 else String
    categories = {feature.name for feature in settings.select(kind="categorical")}
    return FeatureView(
        name=view.name,
        entities=[entity],
        ttl=view.ttl,
        schema=[
            Field(name=view.join_key, dtype=key),
            *(
                Field(
                    name=field.name,
                    dtype=_TYPES[field.type],
                    tags={"arranged": "codes"} if field.name in categories else None,
                )
                for field in view.features
            ),
        ],
        source=source,
        tags={
            "drift_tier": view.tier,
            "value_freshness_hours": f"{view.value_freshness.total_seconds() / 3600:g}",
            "parameter_freshness_hours": f"{view.parameter_freshness.total_seconds() / 3600:g}",
            VERSION_TAG: view.version,
        },
    )


def _service(
    name: str,
    columns: Sequence[tuple[str, str, View]],
    *,
    made: Mapping[str, FeatureView],
) -> FeatureService:
    wanted: dict[tuple[str, str], list[str]] = {}
    for column, alias, view in columns:
        wanted.setdefault((alias, view.name), []).append(column.split("__", 1)[1])
    projections = []
    for (alias, view_name), features in wanted.items():
        view = made[view_name]
        key = view.entity_columns[0].name if view.entity_columns else view.join_keys[0]
        aliased = view.with_name(f"{alias}_{view_name}")
        projections.append(aliased.with_join_key_map({key: ENTITY_KEYS[alias]})[features])
    return FeatureService(name=name, features=projections)

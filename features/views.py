"""Which feature views exist: one for each entity, drift tier and origin. Needs no Feast.

A *view* is a table of versions: key, ``event_time`` (when the values hold from), ``created_time``
(when they became known) and the features. Its rows lie in ``sources/VIEW/*.parquet``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final, Literal

import pyarrow as pa

from driftline.platform.artefacts import hash_value
from driftline.platform.columns import (
    group_counter_names,
    head_columns,
    product_counter_names,
)
from driftline.platform.contract import TIME
from driftline.platform.errors import SettingsError
from driftline.platform.settings import DriftlineSettings, TierName
from driftline.platform.workspace import Workspace

Entity = Literal["product", "category", "category_pair"]
Origin = Literal["catalogue", "counters", "derived"]

JOIN_KEYS: Final[Mapping[Entity, str]] = {
    "product": "product_id",
    "category": "category_key",
    "category_pair": "category_pair_key",
}
TEXT_ID: Final = "text_id"
NO_TEXT: Final = 0
"""Stands for a missing text in sources and online stores, where a null would turn Feast's integers
into floats and so into other texts; in frames it is null."""
TIERS: Final[tuple[TierName, ...]] = ("long", "medium", "short")
FORMAT: Final = 2
"""Raise it when the meaning of a stored value changes; every view's version follows."""


@dataclass(frozen=True)
class View:
    """One table of versions and the two clocks of its tier."""

    name: str
    entity: Entity
    tier: TierName
    origin: Origin
    features: pa.Schema
    value_freshness: timedelta
    parameter_freshness: timedelta
    expires: bool
    """Whether a value older than ``value_freshness`` counts as missing; else it is flagged."""
    refuses: bool
    """Whether a request that would need such a value is refused."""
    version: str
    """Hash of all that decides what a stored value means."""

    @property
    def join_key(self) -> str:
        """Name of the key column."""
        return JOIN_KEYS[self.entity]

    @property
    def ttl(self) -> timedelta | None:
        """Age beyond which a value counts as missing; ``None`` when values never expire."""
        return self.value_freshness if self.expires else None

    def schema(self, *, key: pa.DataType) -> pa.Schema:
        """Columns of the source files. ``key`` is the type of product keys."""
        kind = key if self.entity == "product" else pa.string()
        return pa.schema(
            [
                pa.field(self.join_key, kind, nullable=False),
                pa.field("event_time", TIME, nullable=False),
                pa.field("created_time", TIME, nullable=False),
                *self.features,
            ]
        )

    def folder(self, settings: DriftlineSettings) -> Path:
        """Where its source files lie."""
        return Workspace.of(settings).features / "sources" / self.name


def feature_views(settings: DriftlineSettings) -> tuple[View, ...]:
    """Every view of a market: catalogue by tier, the user's counters by tier, derived counters.

    Text ids live with the slowest text. Names are ``ENTITY_TIER``; the user's numbers live in
    ``product_TIER_counters``, and because ``product_short`` holds the derived counters, catalogue
    features of tier short live in ``product_short_catalogue``.

    Raises:
        SettingsError: a declared feature has the name of a derived one.
    """
    _check_names(settings)
    views = [*_catalogue_views(settings), *_user_counter_views(settings)]
    counters = settings.counters
    identity = {"counters": counters.model_dump(), "labels": settings.labels.maturity_minutes}
    derived: dict[Entity, tuple[str, ...]] = {"product": product_counter_names(counters)}
    if counters.category is not None:
        group = group_counter_names(counters)
        derived |= {"category": group, "category_pair": group}
    for entity, names in derived.items():
        schema = pa.schema([(name, pa.float32()) for name in names])
        views.append(_view(settings, entity, "short", "derived", schema, identity=identity))
    return tuple(views)


def _catalogue_views(settings: DriftlineSettings) -> list[View]:
    texts = settings.select(kind="text")
    slowest = min((TIERS.index(_tier(f.tier)) for f in texts), default=None)
    views = []
    for index, tier in enumerate(TIERS):
        names = [
            feature.name
            for feature in settings.select(entity="product")
            if feature.kind != "numeric" and feature.tier == tier
        ]
        fields = [pa.field(name, pa.string()) for name in names]
        identity: dict[str, object] = {}
        if index == slowest:
            fields.append(pa.field(TEXT_ID, pa.int64()))
            identity = {"texts": [feature.name for feature in texts]}
        if fields:
            schema = pa.schema(fields)
            views.append(_view(settings, "product", tier, "catalogue", schema, identity=identity))
    return views


def _user_counter_views(settings: DriftlineSettings) -> list[View]:
    views = []
    for tier in TIERS:
        numeric = settings.select(kind="numeric", entity="product")
        fields = [(feature.name, pa.float32()) for feature in numeric if feature.tier == tier]
        if fields:
            views.append(_view(settings, "product", tier, "counters", pa.schema(fields)))
    return views


def _view(
    settings: DriftlineSettings,
    entity: Entity,
    tier: TierName,
    origin: Origin,
    features: pa.Schema,
    *,
    identity: Mapping[str, object] | None = None,
) -> View:
    suffix = {"catalogue": "_catalogue" if tier == "short" else "", "counters": "_counters"}
    name = f"{entity}_{tier}{suffix.get(origin, '')}"
    clocks = settings.tiers[tier]
    expires = clocks.on_stale == "default"
    columns = [[field.name, str(field.type)] for field in features]
    facts = [FORMAT, name, columns, expires and clocks.value_freshness_hours, identity]
    return View(
        name=name,
        entity=entity,
        tier=tier,
        origin=origin,
        features=features,
        value_freshness=timedelta(hours=clocks.value_freshness_hours),
        parameter_freshness=timedelta(hours=clocks.parameter_freshness_hours),
        expires=expires,
        refuses=clocks.on_stale == "refuse",
        version=hash_value(facts)[:16],
    )


def _tier(tier: str) -> TierName:
    for name in TIERS:
        if name == tier:
            return name
    raise SettingsError(
        f"a feature has tier {tier!r}; it must be one of {list(TIERS)} here: "
        "run `driftline scales` first, which resolves tier: auto"
    )


def _check_names(settings: DriftlineSettings) -> None:
    for feature in settings.features:
        _tier(feature.tier)
    names = [column.name for column in head_columns(settings)]
    reserved = {TEXT_ID, "event_time", "created_time", *JOIN_KEYS.values()}
    taken = sorted({name for name in names if names.count(name) > 1})
    taken += sorted(feature.name for feature in settings.features if feature.name in reserved)
    if taken:
        raise SettingsError(
            f"features {taken} have the names of columns that Driftline derives itself; "
            "rename them in `features:` (and map the columns in `source.columns`)"
        )


def feature_view_versions(settings: DriftlineSettings) -> dict[str, str]:
    """Hash of each view's definition, by name; part of a bundle's identity."""
    return {view.name: view.version for view in feature_views(settings)}

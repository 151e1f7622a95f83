"""What a frame's columns are called, which tier each belongs to, and who reads it.

A *frame* is a table of impressions with all features as known at their event time. Feature columns
are named ``ALIAS__FEATURE`` with the alias ``page``, ``ad``, ``ad_category`` or ``category_pair``;
features of the impression itself keep their bare name. Text does not travel in frames: the columns
``page__text_id`` and ``ad__text_id`` point to it.
"""

from dataclasses import dataclass
from typing import Final, Literal

from driftline.platform.settings import CounterSettings, DriftlineSettings, TierName

PRODUCT_ALIASES: Final = ("page", "ad")
TEXT_ID_COLUMNS: Final = ("page__text_id", "ad__text_id")

RECENCY: Final = ("hours_since_first", "hours_since_shown", "hours_since_click")


@dataclass(frozen=True)
class HeadColumn:
    """One input of the fusion MLP, as named in a frame."""

    name: str
    kind: Literal["categorical", "numeric"]
    tier: TierName
    feature: str
    """Name without the alias."""
    alias: str | None
    """``None`` for a column of the impression itself."""


def product_counter_names(counters: CounterSettings) -> tuple[str, ...]:
    """Derived counters of one product: as the ad, as the page, and recency as the ad."""
    windows = counters.windows_hours
    as_ad = [f"{kind}_{w}h" for w in windows for kind in ("impressions", "clicks", "ctr")]
    as_page = [f"page_{kind}_{w}h" for w in windows for kind in ("impressions", "ctr")]
    return (*as_ad, *as_page, *RECENCY)


def group_counter_names(counters: CounterSettings) -> tuple[str, ...]:
    """Derived counters of one category, or of one (page category, ad category) pair."""
    kinds = ("impressions", "clicks", "ctr")
    return tuple(f"{kind}_{w}h" for w in counters.windows_hours for kind in kinds)


def head_columns(settings: DriftlineSettings) -> tuple[HeadColumn, ...]:
    """Everything the head reads beside the two vectors, in the order in which it reads it.

    Text goes to the arms, whatever its tier; all else goes to the head (papers.md S0.2, A0.1).
    """
    columns: list[HeadColumn] = []
    for feature in settings.features:
        if feature.kind == "text" or feature.kind == "label":
            continue
        assert feature.tier != "auto", "resolve_tiers comes first"
        aliases = PRODUCT_ALIASES if feature.entity == "product" else (None,)
        columns += [
            HeadColumn(
                name=f"{alias}__{feature.name}" if alias else feature.name,
                kind=feature.kind,
                tier=feature.tier,
                feature=feature.name,
                alias=alias,
            )
            for alias in aliases
        ]
    counted = [(alias, product_counter_names(settings.counters)) for alias in PRODUCT_ALIASES]
    if settings.counters.category is not None:
        names = group_counter_names(settings.counters)
        counted += [("ad_category", names), ("category_pair", names)]
    columns += [
        HeadColumn(name=f"{alias}__{name}", kind="numeric", tier="short", feature=name, alias=alias)
        for alias, names in counted
        for name in names
    ]
    return tuple(columns)

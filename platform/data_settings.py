"""Settings of data: features, tiers, counters, labels, sources. Import from ``settings``."""

from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

TierName = Literal["long", "medium", "short"]
Share = Annotated[float, Field(gt=0, lt=1)]
SliceHours = Annotated[float, Field(gt=0, le=8_784)]
"""Length of a test slice: at most a year."""
FeatureName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9]*(_[a-z0-9]+)*$", max_length=60)]

CONTRACT_NAMES = frozenset(
    {
        "impression_id",
        "event_time",
        "page_product_id",
        "ad_product_id",
        "clicked",
        "click_time",
        "request_id",
        "position",
        "propensity",
        "product_id",
        "created_time",
    }
)
"""Columns that every log has; no feature may take their names."""


class Settings(BaseModel):
    """Base of all settings: frozen; unknown keys and numbers that are not finite refused."""

    # Defaults are validated so that 60 and 60.0 are one value however the settings were read:
    # hashes of settings name features and artefacts.
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
    )


class Feature(Settings):
    """One column of the log and the speed at which it drifts (papers.md S0.2)."""

    name: FeatureName
    kind: Literal["text", "categorical", "numeric", "label"]
    """A ``label`` is one more outcome beside the click, such as a purchase or dwell time, between
    0 and 1: something to be learned, which no model reads. Missing where not known."""
    entity: Literal["product", "impression"]
    """``product`` columns come from the catalogue (text, categorical) or from the counters table
    (numeric); ``impression`` columns stand in the impression itself."""
    tier: TierName | Literal["auto"]
    """A label has none; it is believed as long after the impression as the click."""

    @model_validator(mode="before")
    @classmethod
    def _labels_have_no_tier(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or raw.get("kind") != "label":
            return raw
        if raw.get("tier", "short") != "short":
            raise ValueError(f"a label has no tier, got {raw['tier']!r}; leave it out")
        return {**raw, "tier": "short"}

    @model_validator(mode="after")
    def _text_belongs_to_products(self) -> Self:
        if self.kind == "text" and self.entity == "impression":
            raise ValueError(
                f"feature {self.name!r}: text must have entity 'product', got 'impression'; "
                "the arms encode products"
            )
        if self.kind == "label" and self.entity == "product":
            raise ValueError(
                f"feature {self.name!r}: a label must have entity 'impression', got 'product'"
            )
        return self


class Tier(Settings):
    """One drift time scale with its two clocks."""

    value_freshness_hours: PositiveFloat
    """How old a served value may be; becomes Feast's TTL when stale values are not used."""
    parameter_freshness_hours: PositiveFloat
    """How old the weights that read these values may be; becomes a refresh cadence."""
    on_stale: Literal["use", "default", "refuse"] = "use"
    """``use`` serves an older value and flags it; ``default`` treats it as missing; ``refuse``
    answers no request that needs one (HTTP 503), so every product must be written that often.
    Training treats ``refuse`` as ``use``: no such value is ever served."""


class Tiers(Settings):
    """The three drift tiers. Defaults: month, week, hour (papers.md S0.2, S0.4)."""

    long: Tier = Tier(value_freshness_hours=720, parameter_freshness_hours=720)
    medium: Tier = Tier(value_freshness_hours=168, parameter_freshness_hours=1)
    short: Tier = Tier(value_freshness_hours=2, parameter_freshness_hours=1, on_stale="default")

    def __getitem__(self, name: TierName) -> Tier:
        """The tier of that name."""
        tier = getattr(self, name)
        assert isinstance(tier, Tier)
        return tier


class CounterSettings(Settings):
    """Hourly counters derived from the log itself."""

    windows_hours: tuple[PositiveInt, ...] = (1, 6, 24, 168)
    category: FeatureName | None = None
    """Categorical product feature that is counted beside the product, alone and as a
    (page, ad) pair; without one, only products are counted."""
    prior_strength: PositiveFloat = 20.0
    """Impressions' worth of the overall click rate mixed into each smoothed click rate."""


class SplitSettings(Settings):
    """Where the stale part of the log (OOD) ends and the replayed part (ID) begins."""

    ood_share: Share = 0.5
    ood_end: AwareDatetime | None = None
    """Overrides ``ood_share`` with a moment."""
    validation_share: Share = 0.1
    """Share of requests kept for early stopping and calibration, natural balance."""
    gate_share: Share = 0.1
    """Share of requests no student trains on, so that a refresh can be judged on its newest
    hours and still learn from them."""


class LabelSettings(Settings):
    """When the outcome of an impression counts as known, and how negatives are thinned."""

    maturity_minutes: NonNegativeFloat = 60
    """A label is believed this long after the impression; clicks after that are lost."""
    negative_keep_rate: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Share of non-clicks kept in training; undone exactly at inference (papers.md S0.25, T.2)."""
    soft_label_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of training rows, drawn by hash, that the teacher is asked about; the others are
    learned from their clicks alone."""

    @property
    def maturity(self) -> timedelta:
        """The same as a duration."""
        return timedelta(minutes=self.maturity_minutes)


class SimulateSource(Settings):
    """A drifting market with known click probabilities."""

    kind: Literal["simulate"]
    num_days: PositiveInt = 8
    impressions_per_day: PositiveInt = 24_000
    num_products: PositiveInt = 2_000
    """Products on the first day."""
    new_products_per_day: NonNegativeInt = 60
    num_categories: PositiveInt = 12
    num_advertisers: PositiveInt = 40
    num_applications: PositiveInt = 4
    ads_per_page: PositiveInt = 10
    click_rate: Share = 0.05
    campaign_days: PositiveFloat = 14.0
    """How long a campaign of an advertiser lasts on average; applications drift as fast."""
    purchase_rate: Share | None = None
    """Share of clicks that end in a purchase. With it the market has an impression column
    ``purchased`` (a label: 1 or 0 for clicks, missing for the rest), which drifts as clicks do."""
    start: AwareDatetime
    """First moment of the market."""


class MindSource(Settings):
    """The published MIND layout: ``behaviors.tsv`` and ``news.tsv``."""

    kind: Literal["mind"]
    path: Path | None = None
    """Folder with the two files; usually given as ``--set source.path=DIR``."""


class ParquetSource(Settings):
    """Anyone's own log, with a column mapping."""

    kind: Literal["parquet"]
    impressions: Path
    catalogue: Path | None = None
    counters: Path | None = None
    columns: dict[str, str] = {}
    """Contract column: column in the file. Columns of the same name need no entry."""
    time_zone: str = "UTC"
    """Zone of times written without one."""


Source = Annotated[SimulateSource | MindSource | ParquetSource, Field(discriminator="kind")]


class QualitySettings(Settings):
    """When a whole log is refused rather than some of its rows."""

    max_quarantine_share: Share = 0.2
    """Refuse the log when more of its impressions than this must be put aside."""
    max_future_minutes: NonNegativeFloat = 5
    """Rows further in the future than this, seen from the clock passed in, are put aside."""

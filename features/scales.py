"""How fast each feature drifts, measured from the log, and the tier that follows.

For product k let u_1 < ... < u_n be the times at which a feature takes a value different from the
one before (its first value counts). Then D(k) = (u_n - u_1) / (n - 1), and the time scale is the
mean of D over the products with n >= 2 (papers.md S0.3; macro average, fixture T.1). Products that
never change are dropped by that estimator, which makes long scales look short; so beside it stand
the censoring-aware figure, total observed time / total number of changes, and the number of dropped
products. The suggested tier follows the censoring-aware figure.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import duckdb

from driftline.features.log import ImpressionLog
from driftline.features.quality_sort import connect, read_files
from driftline.platform.artefacts import read_json, write_json
from driftline.platform.errors import MissingArtefactError
from driftline.platform.settings import DriftlineSettings, Feature, TierName
from driftline.platform.windows import Window, format_time, parse_time

SHORT_BELOW_HOURS: Final = math.sqrt(1 * 168)
"""13 h: halfway between an hour and a week on a log scale."""
MEDIUM_BELOW_HOURS: Final = math.sqrt(168 * 720)
"""348 h: halfway between a week and a month on a log scale."""

USUAL_TIERS: Final[dict[str, TierName]] = {
    "text": "long",
    "categorical": "medium",
    "numeric": "short",
}
"""For a feature without a single value in the log: the published tier of its kind (S0.2)."""


@dataclass(frozen=True)
class FeatureScale:
    """How fast one feature drifts."""

    name: str
    kind: str
    entity: str
    hours: float | None
    """The literal estimate; none when no product changes."""
    censored_hours: float | None
    """Observed time / number of changes; none when no product changes."""
    num_products: int
    """Products with at least one value."""
    num_censored: int
    """Of these, the products whose value never changes within the log."""
    num_changes: int
    tier: TierName
    """Suggested: the nearest of month, week and hour on a log scale."""


@dataclass(frozen=True)
class ScalesReport:
    """Time scales of all declared features, in declared order."""

    span: Window
    features: tuple[FeatureScale, ...]

    def __getitem__(self, name: str) -> FeatureScale:
        """The scale of one feature."""
        return next(scale for scale in self.features if scale.name == name)

    def to_json(self) -> dict[str, Any]:
        """The same as JSON-able values."""
        return {
            "span": [format_time(self.span.start), format_time(self.span.end)],
            "features": [asdict(scale) for scale in self.features],
        }

    def rows(self) -> list[tuple[str, str]]:
        """What a person wants to know, as (feature, text) pairs."""
        return [
            (
                scale.name,
                f"{_in_hours(scale.hours)} literal, {_in_hours(scale.censored_hours)} with "
                f"censoring; {scale.num_changes:,} changes, {scale.num_censored:,} of "
                f"{scale.num_products:,} products never change -> {scale.tier}, "
                f"read by the {'arms' if scale.kind == 'text' else 'head'}",
            )
            for scale in self.features
        ]


def _in_hours(hours: float | None) -> str:
    return "no change" if hours is None else f"{hours:,.1f} h"


def suggest_tier(hours: float) -> TierName:
    """The nearest of an hour, a week and a month on a log scale."""
    if hours < SHORT_BELOW_HOURS:
        return "short"
    return "medium" if hours < MEDIUM_BELOW_HOURS else "long"


def estimate_scales(log: ImpressionLog, settings: DriftlineSettings) -> ScalesReport:
    """Measure every declared feature but the labels.

    Text and categories of a product are observed from its first version to the end of the log;
    numbers from its first to its last counter row (of several rows for one hour the last known
    counts); a column of the impression on the ad product, from its first to its last impression.
    Missing values are no observations.
    """
    with (
        TemporaryDirectory(dir=log.root.parent, prefix=".spill-") as spill,
        connect(
            memory_limit=settings.store.memory_limit,
            threads=settings.store.threads,
            spill=Path(spill),
        ) as connection,
    ):
        scales = tuple(
            _estimate(connection, log, feature)
            for feature in settings.features
            if feature.kind != "label"
        )
    return ScalesReport(span=log.span, features=scales)


def write_scales(report: ScalesReport, destination: Path) -> None:
    """Write the report as JSON."""
    write_json(destination, report.to_json())


def read_scales(source: Path) -> ScalesReport:
    """Read what :func:`write_scales` wrote.

    Raises:
        MissingArtefactError: there is no such file.
    """
    if not source.exists():
        raise MissingArtefactError(f"{source} does not exist; run `driftline scales` first")
    value = read_json(source)
    start, end = (parse_time(text) for text in value["span"])
    return ScalesReport(
        span=Window(start, end),
        features=tuple(FeatureScale(**scale) for scale in value["features"]),
    )


def resolve_tiers(settings: DriftlineSettings, scales_path: Path) -> DriftlineSettings:
    """Settings in which every ``tier: auto`` is replaced by the measured tier.

    Raises:
        MissingArtefactError: tiers are to be measured and have not been.
    """
    waiting = [feature.name for feature in settings.features if feature.tier == "auto"]
    if not waiting:
        return settings
    if not scales_path.exists():
        raise MissingArtefactError(
            f"tier: auto is declared for {', '.join(waiting)}, but {scales_path} does not exist; "
            "run `driftline scales` first, or declare the tiers"
        )
    measured = {scale.name: scale.tier for scale in read_scales(scales_path).features}
    unmeasured = [name for name in waiting if name not in measured]
    if unmeasured:
        raise MissingArtefactError(
            f"{scales_path} says nothing about {', '.join(unmeasured)}; "
            "run `driftline scales` again"
        )
    features = tuple(
        feature.model_copy(update={"tier": measured[feature.name]})
        if feature.tier == "auto"
        else feature
        for feature in settings.features
    )
    return settings.model_copy(update={"features": features})


def _estimate(
    connection: duckdb.DuckDBPyConnection, log: ImpressionLog, feature: Feature
) -> FeatureScale:
    observed = _observations(log, feature)
    row: tuple[Any, ...] = (None, None, 0, 0, 0)
    if observed is not None:
        [row] = connection.sql(
            f"""
            WITH observed AS ({observed}),
            marked AS (
                SELECT k, t, until,
                       v IS DISTINCT FROM lag(v) OVER each_product
                       OR row_number() OVER each_product = 1 AS changed
                FROM observed
                WINDOW each_product AS (PARTITION BY k ORDER BY t, tie)
            ),
            products AS (
                SELECT k,
                       count(*) FILTER (WHERE changed) AS n,
                       min(t) AS first_time,
                       max(t) FILTER (WHERE changed) AS last_change,
                       greatest(max(t), max(until)) AS last_time
                FROM marked GROUP BY k
            )
            SELECT avg((last_change - first_time) / (n - 1)) FILTER (WHERE n > 1) / 3.6e9,
                   sum(last_time - first_time) / nullif(sum(n - 1), 0) / 3.6e9,
                   count(*), count(*) FILTER (WHERE n = 1), coalesce(sum(n - 1), 0)
            FROM products
            """
        ).fetchall()
    hours, censored_hours, num_products, num_censored, num_changes = row
    if num_products == 0:
        tier = USUAL_TIERS[feature.kind]
    elif censored_hours is None:
        tier = "long"
    else:
        tier = suggest_tier(censored_hours)
    return FeatureScale(
        name=feature.name,
        kind=feature.kind,
        entity=feature.entity,
        hours=hours,
        censored_hours=censored_hours,
        num_products=int(num_products),
        num_censored=int(num_censored),
        num_changes=int(num_changes),
        tier=tier,
    )


def _observations(log: ImpressionLog, feature: Feature) -> str | None:
    """SQL for (product k, microseconds t, order among equals, value v, end of observation)."""
    column = f'"{feature.name}"'
    if feature.entity == "impression":
        return f"""
            SELECT ad_product_id AS k, epoch_us(event_time) AS t, impression_id AS tie,
                   {column} AS v, epoch_us(event_time) AS until
            FROM {read_files(*log.impression_files())} WHERE {column} IS NOT NULL
        """
    table = "counters" if feature.kind == "numeric" else "catalogue"
    files = sorted((log.root / table).glob("*.parquet"))
    if not files:
        return None
    if table == "catalogue":
        end = round(log.span.end.timestamp() * 1e6)
        return f"""
            SELECT product_id AS k, epoch_us(event_time) AS t, 0 AS tie,
                   {column} AS v, {end} AS until
            FROM {read_files(*files)} WHERE {column} IS NOT NULL
        """
    return f"""
        SELECT product_id AS k, epoch_us(event_time) AS t, 0 AS tie,
               arg_max({column}, created_time) AS v, epoch_us(event_time) AS until
        FROM {read_files(*files)} WHERE {column} IS NOT NULL GROUP BY product_id, event_time
    """

"""Write the log of a simulated market whose click probabilities are known.

The tables are in contract form and hold what a real log would hold; beside them stand the
probability of each click (``oracle/``) and what the best possible model would score
(``oracle.json``). A day is written at a time, in slices of bounded size.
"""

import logging
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from driftline.features.log import ROWS_PER_GROUP, IngestReport, hour_columns, span_of
from driftline.features.simulate_market import HOURS_A_DAY, Day, Floats, Indices, Market, draw
from driftline.features.simulate_oracle import OracleTally
from driftline.features.simulate_purchases import Purchases
from driftline.features.simulate_sales import SalesLedger
from driftline.features.simulate_text import (
    Vocabulary,
    make_vocabulary,
    write_descriptions,
    write_titles,
)
from driftline.platform.artefacts import hash_value, whole_directory, write_json
from driftline.platform.contract import (
    TIME,
    catalogue_schema,
    counters_schema,
    impressions_schema,
)
from driftline.platform.errors import SettingsError
from driftline.platform.settings import DriftlineSettings, SimulateSource
from driftline.platform.windows import Window, format_time

logger = logging.getLogger(__name__)

FIRST_PRODUCT_ID: Final = 100_001
ROWS_PER_SLICE: Final = 262_144
HOUR_MICROS: Final = 3_600_000_000

PRODUCT_COLUMNS: Final = ("title", "description", "category", "advertiser")
CONTEXT_COLUMNS: Final = ("application", "hour_of_week", "hour_of_day")
PURCHASED: Final = "purchased"
SALES_COLUMN: Final = re.compile(r"sales_(\d+)h")
MAX_SALES_HOURS: Final = 168

CLICK_DELAY_MINUTES: Final = 4.0
"""Median; one click in 100 comes more than an hour after the impression."""
CLICK_DELAY_SPREAD: Final = 1.2
"""Standard deviation of the logarithm of the delay."""

ORACLE_SCHEMA: Final = pa.schema(
    [
        pa.field("impression_id", pa.string(), nullable=False),
        pa.field("event_time", TIME, nullable=False),
        pa.field("click_probability", pa.float64(), nullable=False),
    ]
)


@dataclass(frozen=True)
class SimulationReport:
    """What was written, and what the best possible model scores on it."""

    ingest: IngestReport
    auc: float
    """AUC of the true click probabilities."""
    log_loss: float
    click_rate: float

    @property
    def span(self) -> Window:
        """Event time that the log covers."""
        return self.ingest.span

    def to_json(self) -> dict[str, Any]:
        """The same as JSON-able values."""
        return asdict(self) | {"ingest": self.ingest.to_json()}


def simulate(
    settings: DriftlineSettings,
    destination: Path,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> SimulationReport:
    """Write ``impressions/``, ``catalogue/``, ``counters/``, ``oracle/`` and ``oracle.json``.

    The same settings and seed give the same files.

    Args:
        settings: ``source`` is the market; ``features`` say which columns are written.
        destination: Becomes the log; replaced if it exists.
        progress: Called with (days written, days in all).

    Raises:
        SettingsError: the source is not a simulation, or a declared feature it cannot give.
    """
    source = settings.source
    if not isinstance(source, SimulateSource):
        raise SettingsError(f"source.kind must be 'simulate' to simulate, got {source.kind!r}")
    check_columns(settings)
    writer = _LogWriter(settings, source)
    with whole_directory(destination) as scratch:
        for day in writer.market.days():
            writer.write_day(day, scratch)
            if progress is not None:
                progress(day.day + 1, source.num_days)
        report = writer.report()
        write_json(scratch / "oracle.json", writer.oracle_json(report))
        write_json(scratch / "ingest.json", report.ingest.to_json())
    logger.info("wrote %s (%d impressions)", destination, report.ingest.num_impressions)
    return report


def check_columns(settings: DriftlineSettings) -> None:
    """Refuse declared features that the market does not have.

    Raises:
        SettingsError: names every such feature and what is available.
    """
    missing = [
        f"{feature.name} ({feature.kind}, {feature.entity})"
        for feature in settings.features
        if not _has_column(feature.name, kind=feature.kind, entity=feature.entity)
        and not (feature.kind == "label" and _has_label(settings, feature.name))
    ]
    if missing:
        raise SettingsError(
            f"features: the simulated market has no {', '.join(missing)}; available are the "
            f"product columns {', '.join(PRODUCT_COLUMNS)} (text or categorical) and sales_Nh "
            f"(numeric, N from 1 to {MAX_SALES_HOURS}), and the impression columns "
            f"{', '.join(CONTEXT_COLUMNS)} (categorical) and, where source.purchase_rate is given, "
            f"{PURCHASED} (label)"
        )


def _has_label(settings: DriftlineSettings, name: str) -> bool:
    source = settings.source
    return (
        name == PURCHASED
        and isinstance(source, SimulateSource)
        and source.purchase_rate is not None
    )


def _has_column(name: str, *, kind: str, entity: str) -> bool:
    if entity == "impression" or kind == "label":
        return kind == "categorical" and name in CONTEXT_COLUMNS
    if kind == "numeric":
        hours = SALES_COLUMN.fullmatch(name)
        return hours is not None and 1 <= int(hours[1]) <= MAX_SALES_HOURS
    return name in PRODUCT_COLUMNS


class _LogWriter:
    """Turns days of the market into files; keeps what the reports need."""

    def __init__(self, settings: DriftlineSettings, source: SimulateSource) -> None:
        self.settings, self.source = settings, source
        self.start = source.start.astimezone(UTC)
        self.market = Market(
            source,
            seed=settings.seed,
            first_hour_of_week=self.start.weekday() * HOURS_A_DAY + self.start.hour,
        )
        self.vocabulary: Vocabulary = make_vocabulary(
            np.random.default_rng([settings.seed, 3]),
            num_topics=self.market.num_topics,
            num_categories=source.num_categories,
            num_advertisers=source.num_advertisers,
            num_applications=source.num_applications,
        )
        sales = [f.name for f in settings.select(kind="numeric", entity="product")]
        self.ledger = SalesLedger(
            {name: int(name.removeprefix("sales_").removesuffix("h")) for name in sales},
            num_products=self.market.num_products,
            seed=settings.seed,
        )
        key = pa.int64()
        self.impressions = impressions_schema(settings, key=key)
        self.catalogue = catalogue_schema(settings, key=key)
        self.counters = counters_schema(settings, key=key)
        self.purchases = None
        if any(label.name == PURCHASED for label in settings.select(kind="label")):
            assert source.purchase_rate is not None, "check_columns comes first"
            self.purchases = Purchases(self.market, seed=settings.seed, rate=source.purchase_rate)
        self.tally = OracleTally()
        self.num_versions = self.num_counter_rows = self.num_requests = 0
        self.first: datetime | None = None
        self.last = self.start
        names = (self.vocabulary.categories, self.vocabulary.advertisers)
        columns = (self.market.category, self.market.advertiser)
        self.product_names = dict(
            zip(("category", "advertiser"), zip(names, columns, strict=True), strict=True)
        )

    def write_day(self, day: Day, root: Path) -> None:
        """Write one day of all tables."""
        for name in ("impressions", "catalogue", "counters", "oracle"):
            (root / name).mkdir(exist_ok=True)
        stamp = f"{day.day:04d}"
        self._write_catalogue(day, root / "catalogue" / f"{stamp}.parquet")
        if self.ledger.columns:
            rows = self.ledger.rows(
                day, product_ids=self._ids(np.arange(self.market.num_products)),
                start_micros=self._micros(day.day * HOURS_A_DAY),
            )  # fmt: skip
            self.num_counter_rows += rows.num_rows
            _write(rows.cast(self.counters), root / "counters" / f"{stamp}.parquet")
        else:
            (root / "counters").rmdir()
        self._write_impressions(day, root, stamp)

    # --- catalogue --------------------------------------------------------------------------

    def _write_catalogue(self, day: Day, path: Path) -> None:
        first_hour = day.day * HOURS_A_DAY
        parts = [
            self._versions(products, words, np.full(products.size, first_hour + hour))
            for hour, products, words in day.versions
        ]
        table = pa.concat_tables([self.catalogue.empty_table(), *parts])
        self.num_versions += table.num_rows
        if table.num_rows:
            _write(table, path)

    def _versions(self, products: Indices, words: Indices, hours: Indices) -> pa.Table:
        """Catalogue rows of some products with these quality words, from these hours on."""
        market = self.market
        topic, filler = market.topic_words[products], market.filler_words[products]
        available = {
            "title": lambda: write_titles(self.vocabulary, words, topic),
            "description": lambda: write_descriptions(self.vocabulary, words, topic, filler),
            "category": lambda: self._names("category", products),
            "advertiser": lambda: self._names("advertiser", products),
        }
        times = pa.array(self._micros(0) + hours * HOUR_MICROS).cast(TIME)
        columns = [self._ids(products), times]
        columns += [available[name]() for name in self.catalogue.names[2:]]
        return pa.table(columns, schema=self.catalogue)

    def _names(self, column: str, products: Indices) -> pa.Array:
        names, indices = self.product_names[column]
        return names.take(pa.array(indices[products]))

    # --- impressions ------------------------------------------------------------------------

    def _write_impressions(self, day: Day, root: Path, stamp: str) -> None:
        source = self.source
        if self.purchases is not None:
            self.purchases.pass_day()
        rng = np.random.default_rng([self.settings.seed, 4, day.day])
        num_requests = max(1, source.impressions_per_day // source.ads_per_page)
        hours = np.repeat(np.arange(HOURS_A_DAY), rng.multinomial(num_requests, day.traffic))
        per_slice = max(1, ROWS_PER_SLICE // source.ads_per_page)
        with (
            pq.ParquetWriter(root / "impressions" / f"{stamp}.parquet", self.impressions) as rows,
            pq.ParquetWriter(root / "oracle" / f"{stamp}.parquet", ORACLE_SCHEMA) as oracle,
        ):
            for begin in range(0, num_requests, per_slice):
                impressions, truth = self._requests(day, hours[begin : begin + per_slice], rng)
                rows.write_table(impressions, row_group_size=ROWS_PER_GROUP)
                oracle.write_table(truth, row_group_size=ROWS_PER_GROUP)

    def _requests(
        self, day: Day, hours: Indices, rng: np.random.Generator
    ) -> tuple[pa.Table, pa.Table]:
        """Impressions of some requests, and their click probabilities."""
        market, width = self.market, self.source.ads_per_page
        count = hours.size
        times = self._micros(day.day * HOURS_A_DAY) + np.sort(
            hours * HOUR_MICROS + rng.integers(0, HOUR_MICROS, size=count)
        )
        pages = draw(day.page_cdf, hours, rng.random(count))
        apps = rng.integers(0, self.source.num_applications, size=count)
        ads = _draw_lists(day.ad_cdf, hours, width, rng)
        parent = np.repeat(np.arange(count), width)
        row_hours = hours[parent]
        flat = ads.ravel()
        logits = (
            day.worth[row_hours, flat]
            + day.application[row_hours, apps[parent]]
            + day.affinity[market.topic[pages][parent], market.topic[flat]]
            + day.base[row_hours]
        )
        probabilities = 1 / (1 + np.exp(-logits))
        clicked = rng.random(flat.size) < probabilities
        self.tally.add(day.day, logits, clicked)
        event_times = times[parent]
        delays = CLICK_DELAY_MINUTES * np.exp(
            CLICK_DELAY_SPREAD * rng.standard_normal(int(clicked.sum()))
        )
        click_times = np.zeros(flat.size, dtype=np.int64)
        click_times[clicked] = event_times[clicked] + (delays * 60_000_000).astype(np.int64)
        requests = pa.array(self.num_requests + 1 + np.arange(count)).cast(pa.string())
        positions = np.tile(np.arange(width, dtype=np.int32), count)
        places = pa.array([str(place) for place in range(width)])
        request_ids = requests.take(pa.array(parent))
        event_time = pa.array(event_times).cast(TIME)
        columns = {
            "impression_id": pc.binary_join_element_wise(
                request_ids, places.take(pa.array(positions)), "-"
            ),
            "event_time": event_time,
            "page_product_id": self._ids(pages[parent]),
            "ad_product_id": self._ids(flat),
            "clicked": pa.array(clicked),
            "click_time": pa.array(click_times, mask=~clicked).cast(TIME),
            "request_id": request_ids,
            "position": pa.array(positions),
            "propensity": pa.nulls(flat.size, pa.float64()),
            "application": self.vocabulary.applications.take(pa.array(apps[parent])),
            **hour_columns(event_times // HOUR_MICROS),
        }
        if self.purchases is not None:
            bought = self.purchases.probabilities(row_hours, flat, logits)
            luck = np.random.default_rng([self.settings.seed, 6, day.day, self.num_requests])
            purchased = (luck.random(flat.size) < bought).astype(np.float64)
            columns[PURCHASED] = pa.array(purchased, mask=~clicked)
        self.num_requests += count
        first, last = (_moment(value) for value in (int(times[0]), int(times[-1])))
        self.first = self.first or first
        self.last = last
        impressions = pa.table([columns[n] for n in self.impressions.names], self.impressions)
        truth = pa.table([columns["impression_id"], event_time, probabilities], ORACLE_SCHEMA)
        return impressions, truth

    # --- reports ----------------------------------------------------------------------------

    def report(self) -> SimulationReport:
        """The figures of all days written so far."""
        assert self.first is not None
        tally = self.tally
        return SimulationReport(
            ingest=IngestReport(
                kind="simulate",
                num_impressions=tally.num_rows,
                num_clicks=tally.num_clicks,
                num_products=self.num_versions,
                num_counter_rows=self.num_counter_rows,
                span=span_of(self.first, self.last),
                put_aside={},
            ),
            auc=tally.auc(),
            log_loss=tally.log_loss(),
            click_rate=tally.num_clicks / tally.num_rows,
        )

    def oracle_json(self, report: SimulationReport) -> dict[str, Any]:
        """What the best possible model scores, overall and by day of the market."""
        settings = self.settings.model_dump(mode="json")
        described = {name: settings[name] for name in ("seed", "source", "features")}
        if described["source"]["purchase_rate"] is None:
            del described["source"]["purchase_rate"]  # as before there was such a setting
        return {
            "auc": report.auc,
            "auc_by_day": {
                format_time(self.start + timedelta(days=day)): auc
                for day, auc in self.tally.auc_by_day().items()
            },
            "log_loss": report.log_loss,
            "click_rate": report.click_rate,
            "num_impressions": report.ingest.num_impressions,
            "num_clicks": report.ingest.num_clicks,
            "seed": self.settings.seed,
            "settings_hash": hash_value(described),
        }

    def _ids(self, products: Indices) -> pa.Array:
        return pa.array(products + FIRST_PRODUCT_ID, pa.int64())

    def _micros(self, hour: int) -> int:
        """Start of an hour of the market, in microseconds since 1970."""
        start = (self.start - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
        return start + hour * HOUR_MICROS


def _draw_lists(cdf: Floats, hours: Indices, width: int, rng: np.random.Generator) -> Indices:
    """Ads of each request, ``[requests, width]``: one from each stratum, in a rotated order.

    Strata keep a popular product from filling a page: it is shown in neighbouring strata at most.
    """
    count = hours.size
    turns = rng.integers(0, width, size=count)
    strata = (np.arange(width) + turns[:, None]) % width
    chances = (strata + rng.random((count, width))) / width
    return draw(cdf, np.repeat(hours, width), chances.ravel()).reshape(count, width)


def _moment(micros: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=micros)


def _write(table: pa.Table, path: Path) -> None:
    pq.write_table(table, path, row_group_size=ROWS_PER_GROUP)

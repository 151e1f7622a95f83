"""The simulated market: what every product, campaign, word and hour is worth, and how that drifts.

The log-odds of a click are a sum of parts, each with a time scale of its own:

================  ===========================================  ========================
part              known to a model through                     changes within
================  ===========================================  ========================
words             title and description                        months (AR(1))
affinity          page text x ad text                          months (AR(1))
category          category                                     weeks (AR(1))
campaign          advertiser; a campaign ends, another begins  ``campaign_days``
application       application; likewise                        ``campaign_days``
demand            sales counters, click counters               hours (shock, then decay)
novelty           time since launch                            days
hour of the week  hour_of_week                                 never
================  ===========================================  ========================

The click rate as a whole is held at its target each day. Source: the three time scales of
papers.md S0.2; all sizes are ours.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from driftline.features.simulate_text import (
    DESCRIPTION_FILLER,
    NUM_FILLER_WORDS,
    NUM_QUALITY,
    NUM_QUALITY_WORDS,
    NUM_TOPIC,
    TITLE_QUALITY,
    TOPIC_WORDS_EACH,
)
from driftline.platform.settings import SimulateSource

Floats = np.ndarray[Any, np.dtype[np.float64]]
Indices = np.ndarray[Any, np.dtype[np.int64]]

HOURS_A_DAY: Final = 24
BURN_IN_HOURS: Final = 7 * 24
"""The market runs this long before the log starts, so that shocks and sales are under way."""


@dataclass(frozen=True)
class MarketShape:
    """Standard deviations in log-odds, and time scales."""

    words: float = 0.35
    affinity: float = 0.1
    category: float = 0.12
    campaign: float = 0.8
    application: float = 0.45
    novelty: float = 0.5
    """Height at launch; falls by a factor e every ``novelty_hours``."""
    hour_of_day: float = 0.12
    product_shock: float = 0.7
    """Scale of one shock to one product; 7 of 10 shocks are upward."""
    category_shock: float = 0.4
    words_hours: float = 60 * 24.0
    affinity_hours: float = 60 * 24.0
    category_hours: float = 14 * 24.0
    novelty_hours: float = 36.0
    shock_decay_hours: float = 10.0
    shocks_per_product_day: float = 0.5
    shocks_per_category_day: float = 0.7
    edits_per_product_day: float = 0.01
    """Share of products whose text is edited each day."""
    sales_per_hour: float = 100.0
    sales_elasticity: float = 1.5
    """Log-sales per unit of demand."""
    sales_spread: float = 0.15
    """Standard deviation of the products' own log-sales."""


@dataclass(frozen=True)
class Day:
    """One day of the market, hour by hour.

    Shapes: H hours of the day, P products of all times (launched or not), A applications,
    K topics.
    """

    day: int
    worth: Floats
    """Log-odds of each product as the ad, without its partner and surroundings. ``[H, P]``."""
    application: Floats
    """Log-odds of each application. ``[H, A]``."""
    affinity: Floats
    """Log-odds of (page topic, ad topic). ``[K, K]``."""
    base: Floats
    """Intercept and hour of the day. ``[H]``."""
    ad_cdf: Floats
    """Cumulative chance of being shown as the ad; launched products only. ``[H, P]``."""
    page_cdf: Floats
    """The same as the page. ``[H, P]``."""
    traffic: Floats
    """Share of the day's requests. ``[H]``."""
    sales: Floats
    """Units sold in the hour *before* each hour; NaN before the launch. ``[H, P]``."""
    versions: tuple[tuple[int, Indices, Indices], ...]
    """(hour of the day, products launched or edited, their quality words from then on)."""


class Campaigns:
    """What each advertiser's (or application's) running campaign is worth; each ends some day.

    Lengths are uniform within a third of the mean. The next campaign begins at once and has nothing
    to do with the one before.
    """

    def __init__(self, rng: np.random.Generator, count: int, *, mean_days: float) -> None:
        self.worth: Floats = _spread(rng, count)
        self._mean_hours = 24.0 * mean_days
        self._hours_left: Floats = self._mean_hours * rng.random(count)

    def pass_hour(self, rng: np.random.Generator) -> None:
        """Let an hour pass; replace the campaigns that end."""
        self._hours_left -= 1.0
        ended = self._hours_left <= 0
        self.worth = np.where(ended, _spread(rng, ended.size), self.worth)
        length = self._mean_hours * rng.uniform(2 / 3, 4 / 3, size=ended.size)
        self._hours_left = np.where(ended, length, self._hours_left)


class Market:
    """The state of a market. Iterate over :meth:`days`, in order, once."""

    def __init__(
        self,
        source: SimulateSource,
        *,
        seed: int,
        first_hour_of_week: int,
        shape: MarketShape | None = None,
    ) -> None:
        self.source = source
        self.shape = shape or MarketShape()
        self.num_topics = source.num_categories
        self._first_hour = first_hour_of_week
        self._rng = np.random.default_rng([seed, 1])
        self._sales_seed = (seed, 2)
        self._launch_products()
        self._start_drift()

    # --- products ---------------------------------------------------------------------------

    def _launch_products(self) -> None:
        source, rng = self.source, self._rng
        later = source.new_products_per_day * source.num_days
        self.num_products = source.num_products + later
        count = self.num_products
        launches = np.sort(rng.integers(0, HOURS_A_DAY * source.num_days, size=later))
        ages = rng.integers(24, 60 * 24, size=source.num_products)
        self.launch_hour: Indices = np.concatenate([-ages, launches])
        self.category: Indices = rng.integers(0, source.num_categories, size=count)
        other = rng.integers(0, self.num_topics, size=count)
        self.topic: Indices = np.where(rng.random(count) < 0.8, self.category, other)
        self.advertiser: Indices = rng.choice(
            source.num_advertisers, size=count, p=_shares(source.num_advertisers)
        )
        self.quality_words: Indices = rng.integers(0, NUM_QUALITY_WORDS, size=(count, NUM_QUALITY))
        within = rng.integers(0, TOPIC_WORDS_EACH, size=(count, NUM_TOPIC))
        self.topic_words: Indices = self.topic[:, None] * TOPIC_WORDS_EACH + within
        self.filler_words: Indices = rng.integers(
            0, NUM_FILLER_WORDS, size=(count, DESCRIPTION_FILLER)
        )
        self._ad_weight = _power_law(rng, count)
        self._page_weight = _power_law(rng, count)
        spread = self.shape.sales_spread * rng.standard_normal(count)
        self._sales_rate = self.shape.sales_per_hour * np.exp(spread)

    # --- drift ------------------------------------------------------------------------------

    def _start_drift(self) -> None:
        source, rng = self.source, self._rng
        self._words = rng.standard_normal(NUM_QUALITY_WORDS)
        self._affinity = rng.standard_normal((self.num_topics, self.num_topics))
        self._category = rng.standard_normal(source.num_categories)
        self._campaign = Campaigns(rng, source.num_advertisers, mean_days=source.campaign_days)
        self._application = Campaigns(rng, source.num_applications, mean_days=source.campaign_days)
        self._product_demand = np.zeros(self.num_products)
        self._category_demand = np.zeros(source.num_categories)
        for _ in range(BURN_IN_HOURS):
            self._pass_hour()

    def _pass_hour(self) -> None:
        """Let one hour pass for everything that drifts."""
        shape, rng = self.shape, self._rng
        self._words = drift(rng, self._words, shape.words_hours)
        self._affinity = drift(rng, self._affinity, shape.affinity_hours)
        self._category = drift(rng, self._category, shape.category_hours)
        self._campaign.pass_hour(rng)
        self._application.pass_hour(rng)
        keep = np.exp(-1 / shape.shock_decay_hours)
        struck = rng.random(self.num_products) < shape.shocks_per_product_day / HOURS_A_DAY
        sizes = rng.exponential(shape.product_shock, size=int(struck.sum()))
        signs = np.where(rng.random(sizes.size) < 0.7, 1.0, -1.0)
        self._product_demand *= keep
        self._product_demand[struck] += sizes * signs
        hit = rng.random(self._category_demand.size) < shape.shocks_per_category_day / HOURS_A_DAY
        pushes = shape.category_shock * rng.standard_normal(self._category_demand.size)
        self._category_demand = self._category_demand * keep + np.where(hit, pushes, 0.0)

    def _edit_texts(self) -> Indices:
        """Replace one title word of a few products; give the products concerned."""
        rng = self._rng
        chance = self.shape.edits_per_product_day / HOURS_A_DAY
        edited: Indices = np.flatnonzero(rng.random(self.num_products) < chance)
        places = rng.integers(0, TITLE_QUALITY, size=edited.size)
        self.quality_words[edited, places] = rng.integers(0, NUM_QUALITY_WORDS, size=edited.size)
        return edited

    # --- worth ------------------------------------------------------------------------------

    def demand(self) -> Floats:
        """Demand of each product at the moment, in log-odds. ``[P]``."""
        return self._product_demand + self._category_demand[self.category]

    def _worth(self, hour: int) -> Floats:
        shape = self.shape
        weights = np.full(NUM_QUALITY, 0.6)
        weights[:TITLE_QUALITY] = 1.0
        text = self._words[self.quality_words] @ (weights / np.linalg.norm(weights))
        age = np.maximum(hour - self.launch_hour, 0)
        worth: Floats = (
            shape.words * text
            + shape.category * self._category[self.category]
            + shape.campaign * self._campaign.worth[self.advertiser]
            + shape.novelty * np.exp(-age / shape.novelty_hours)
            + self.demand()
        )
        return worth

    def days(self) -> Iterator[Day]:
        """All days in order; each changes the state."""
        for day in range(self.source.num_days):
            yield self._pass_day(day)

    def _pass_day(self, day: int) -> Day:
        source, shape, count = self.source, self.shape, self.num_products
        sales_rng = np.random.default_rng([*self._sales_seed, day])
        worth = np.empty((HOURS_A_DAY, count))
        sales = np.full((HOURS_A_DAY, count), np.nan)
        applications = np.empty((HOURS_A_DAY, source.num_applications))
        ad_cdf, page_cdf = np.empty_like(worth), np.empty_like(worth)
        versions = []
        for hour in range(HOURS_A_DAY):
            now = day * HOURS_A_DAY + hour
            on_sale = self.launch_hour < now
            rate = self._sales_rate * np.exp(shape.sales_elasticity * self.demand())
            sold = sales_rng.poisson(rate * _sales_cycle(self._first_hour + now - 1))
            sales[hour, on_sale] = sold[on_sale]
            self._pass_hour()
            changed = self._edit_texts()
            launched_before = self.launch_hour < now
            changed = changed[launched_before[changed]] if now else changed[:0]
            launches = self.launch_hour == now if now else self.launch_hour <= 0
            products = np.concatenate([np.flatnonzero(launches), changed])
            if products.size:
                versions.append((hour, products, self.quality_words[products]))
            worth[hour] = self._worth(now)
            applications[hour] = shape.application * self._application.worth
            launched = self.launch_hour <= now
            ad_cdf[hour] = _cumulative(self._ad_weight * launched)
            page_cdf[hour] = _cumulative(self._page_weight * launched)
        hours = self._first_hour + day * HOURS_A_DAY + np.arange(HOURS_A_DAY)
        affinity = shape.affinity * self._affinity
        base = shape.hour_of_day * np.sin(2 * np.pi * (hours % 24 - 15) / 24)
        intercept = self._find_intercept(
            worth, applications=applications, affinity=affinity, base=base, ad_cdf=ad_cdf
        )
        return Day(
            day=day,
            worth=worth,
            application=applications,
            affinity=affinity,
            base=base + intercept,
            ad_cdf=ad_cdf,
            page_cdf=page_cdf,
            traffic=_traffic(hours),
            sales=sales,
            versions=tuple(versions),
        )

    def _find_intercept(
        self,
        worth: Floats,
        *,
        applications: Floats,
        affinity: Floats,
        base: Floats,
        ad_cdf: Floats,
    ) -> float:
        """The constant at which the day's expected click rate is the target, by bisection."""
        rng = np.random.default_rng(0)
        size = 20_000
        hours = rng.integers(0, HOURS_A_DAY, size=size)
        ads = draw(ad_cdf, hours, rng.random(size))
        topics = rng.integers(0, self.num_topics, size=size)
        apps = rng.integers(0, self.source.num_applications, size=size)
        logits = worth[hours, ads] + base[hours]
        logits += applications[hours, apps] + affinity[topics, self.topic[ads]]
        low, high = -20.0, 20.0
        for _ in range(40):
            middle = (low + high) / 2
            rate = float(np.mean(1 / (1 + np.exp(-logits - middle))))
            low, high = (middle, high) if rate < self.source.click_rate else (low, middle)
        return (low + high) / 2


def draw(cdf: Floats, hours: Indices, chances: Floats) -> Indices:
    """Products by inverse cumulative chance ``[H, P]``, each in its own hour."""
    num_hours, num_products = cdf.shape
    ladder = (cdf + np.arange(num_hours)[:, None]).ravel()
    found = np.searchsorted(ladder, hours + chances, side="right")
    return np.minimum(found, (hours + 1) * num_products - 1) - hours * num_products


def drift(rng: np.random.Generator, state: Floats, hours: float) -> Floats:
    """One hour of a stationary AR(1) process with unit variance and correlation time ``hours``."""
    keep = math.exp(-1 / hours)
    moved: Floats = keep * state + math.sqrt(1 - keep**2) * rng.standard_normal(state.shape)
    return moved


def _spread(rng: np.random.Generator, count: int) -> Floats:
    """Unit variance without tails: no single campaign decides how hard a log is."""
    worth: Floats = rng.uniform(-math.sqrt(3), math.sqrt(3), size=count)
    return worth


def _power_law(rng: np.random.Generator, count: int) -> Floats:
    """Popularity: rank to the power of -0.6, ranks in random order."""
    ranks = 1 + rng.permutation(count)
    weights: Floats = np.power(ranks.astype(np.float64), -0.6)
    return weights


def _shares(count: int) -> Floats:
    """Shares of the products by advertiser: a few are large."""
    weights = np.power(np.arange(1.0, count + 1), -1.1)
    shares: Floats = weights / weights.sum()
    return shares


def _cumulative(weights: Floats) -> Floats:
    totals: Floats = np.cumsum(weights)
    shares: Floats = totals / totals[-1]
    return shares


def _traffic(hours: Indices) -> Floats:
    """Day and night, working days and the weekend; hours count from Monday midnight."""
    daily = 1 + 0.6 * np.sin(2 * np.pi * (hours % 24 - 9) / 24)
    weekend = np.where(hours // 24 % 7 >= 5, 1.15, 1.0)
    requests = daily * weekend
    shares: Floats = requests / requests.sum()
    return shares


def _sales_cycle(hour: int) -> float:
    return float(1 + 0.3 * np.sin(2 * np.pi * (hour % 24 - 10) / 24))

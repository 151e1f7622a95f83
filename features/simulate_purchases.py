"""Which clicks of the simulated market end in a purchase, and how that drifts.

The log-odds of a purchase are a sum, as those of a click (see ``simulate_market``): words and
campaigns have another worth for buyers than for those who click, and drift just as fast; the rest
they share with the click. The rate as a whole is held at its target.
"""

from typing import Final

import numpy as np

from driftline.features.simulate_market import (
    HOURS_A_DAY,
    Campaigns,
    Floats,
    Indices,
    Market,
    drift,
)
from driftline.features.simulate_text import NUM_QUALITY_WORDS, TITLE_QUALITY

SHARED: Final = 0.5
"""Log-odds of a purchase for each unit of log-odds of a click."""
WORDS: Final = 0.6
CAMPAIGN: Final = 0.8


class Purchases:
    """What each product is worth to a buyer. Call ``pass_day`` once for each day of the market."""

    def __init__(self, market: Market, *, seed: int, rate: float) -> None:
        self._market = market
        self._rate = rate
        self._rng = np.random.default_rng([seed, 5])
        self._words: Floats = self._rng.standard_normal(NUM_QUALITY_WORDS)
        source = market.source
        self._campaign = Campaigns(
            self._rng, source.num_advertisers, mean_days=source.campaign_days
        )
        self._worth: Floats = np.empty((0, market.num_products))

    def pass_day(self) -> None:
        """Let a day pass; texts are those at its end."""
        market = self._market
        title = market.quality_words[:, :TITLE_QUALITY]
        hours = []
        for _ in range(HOURS_A_DAY):
            self._words = drift(self._rng, self._words, market.shape.words_hours)
            self._campaign.pass_hour(self._rng)
            text = self._words[title].sum(axis=1) / np.sqrt(TITLE_QUALITY)
            hours.append(WORDS * text + CAMPAIGN * self._campaign.worth[market.advertiser])
        self._worth = np.stack(hours)

    def probabilities(self, hours: Indices, ads: Indices, click_logits: Floats) -> Floats:
        """Probability that a click on each impression would end in a purchase. ``[N]``.

        Args:
            hours: Hours of the day. ``[N]``.
            ads: Products shown. ``[N]``.
            click_logits: True log-odds of a click. ``[N]``.
        """
        chances = 1 / (1 + np.exp(-click_logits))
        logits = self._worth[hours, ads] + SHARED * click_logits
        low, high = -20.0, 20.0
        for _ in range(40):
            middle = (low + high) / 2
            rate = float(np.average(1 / (1 + np.exp(-logits - middle)), weights=chances))
            low, high = (middle, high) if rate < self._rate else (low, middle)
        found: Floats = 1 / (1 + np.exp(-logits - low))
        return found

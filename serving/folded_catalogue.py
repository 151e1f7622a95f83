"""What every product of a snapshot adds to the head's first layer, computed before anybody asks.

A request then gathers a row for each ad and adds the page's: numbers, categories and the vector of
the text are all in it. Made in the background for each bundle and snapshot. The same numbers as
``RequestScorer`` finds from the feature tables, to within rounding.

Shape suffixes: B ads, P products, S pairs of categories, V width of the first layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from driftline.features.online_catalogue import Catalogue, Places
from driftline.features.online_views import Found
from driftline.platform.scorer import Scorer
from driftline.serving.head_shares import CategoryRows, Float32, Side

CHUNK: Final = 2_048
"""Products folded at once: requests get their turn in between."""


@dataclass(frozen=True)
class FoldedCatalogue:
    """Shares of the first layer, by place in a catalogue; the last is that of no product."""

    page: Float32
    """``[P + 1, V]``"""
    ad: Float32
    """With what the ad's category adds. ``[P + 1, V]``."""
    pair: Float32 | None
    """By slot of the view of pairs. ``[S + 1, V]``."""
    uncached: NDArray[np.bool_] | None
    """Whether a product has a text without a cached vector; ``None`` if none has. ``[P + 1]``."""

    @classmethod
    def of(
        cls,
        catalogue: Catalogue,
        scorer: Scorer,
        rows: CategoryRows,
        sides: Mapping[str, Side],
        *,
        max_bytes: int,
    ) -> Self | None:
        """Fold a catalogue; ``None`` where that would take more than ``max_bytes``."""
        pairs = catalogue.pairs
        num, width = len(catalogue) + 1, len(scorer.fused.bias)
        num_pairs = 0 if pairs is None else len(pairs.table.event_us)
        if (2 * num + num_pairs) * width * 4 > max_bytes:
            return None
        page, ad = (np.empty((num, width), np.float32) for _ in range(2))
        uncached = np.empty(num, bool)
        for first in range(0, num, CHUNK):
            part = slice(first, first + CHUNK)
            rows_K = np.arange(first, min(first + CHUNK, num))
            found = catalogue.found(rows_K)
            text_ids = text_ids_of(found, len(rows_K))
            places = scorer.vectors.rows(text_ids)
            uncached[part] = (places < 0) & (text_ids > 0)
            page[part] = sides["page"].states(scorer, rows, found, num_rows=len(rows_K))
            page[part] += scorer.projected.page[places]
            ad[part] = sides["ad"].states(scorer, rows, found, num_rows=len(rows_K))
            ad[part] += scorer.projected.ad[places]
            if "ad_category" in sides:
                ad[part] += sides["ad_category"].states(scorer, rows, found, num_rows=len(rows_K))
        pair = None
        if pairs is not None:
            every = {pairs.wanted.view.name: Found(pairs.table, np.arange(num_pairs))}
            pair = sides["category_pair"].states(scorer, rows, every, num_rows=num_pairs)
        return cls(page, ad, pair, uncached if uncached.any() else None)

    def states(self, places: Places, impression_V: Float32) -> Float32:
        """The first layer of each ad, with what the impression adds. ``[B, V]``."""
        rows = places.rows
        states_BV = self.ad.take(rows[1:], axis=0)
        states_BV += self.page[rows[0]] + impression_V
        if self.pair is not None and places.pair_slots is not None:
            states_BV += self.pair.take(places.pair_slots, axis=0)
        return states_BV

    def uncached_of(self, places: Places) -> NDArray[np.bool_] | None:
        """Which texts of page and ads are not cached; ``None`` for none. ``[B + 1]``."""
        return None if self.uncached is None else self.uncached.take(places.rows)


def text_ids_of(found: Mapping[str, Found], num: int) -> NDArray[np.int64]:
    """Text of each product, 0 for none. ``[num]``."""
    for one in found.values():
        if one.table.text_id is not None:
            return one.table.text_id.take(one.slots)
    return np.zeros(num, np.int64)

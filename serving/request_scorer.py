"""Scores one page and its ads without building a frame: the same numbers as ``Scorer``.

Where the snapshot has a catalogue that was folded for this bundle, a request is a few gathers and
the layers after the first. Else the first layer is computed from the feature tables.

Shape suffixes: B ads, V width of the first layer.
"""

import copy
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from driftline.features.online_catalogue import Catalogue
from driftline.features.online_read import OnlineRead, aliases
from driftline.features.online_views import Found, OnlineVersion, Wanted
from driftline.platform.scorer import Scorer
from driftline.serving.folded_catalogue import FoldedCatalogue, text_ids_of
from driftline.serving.head_shares import CategoryRows, Float32, Impression, Side


@dataclass(frozen=True)
class RequestScore:
    """What a request scores."""

    probabilities: NDArray[np.float64]
    """Click probability of each ad, on the natural click rate. ``[B]``."""
    uncached: NDArray[np.bool_] | None
    """Which of page and ads have a text without a cached vector, so that the neutral one was taken;
    ``None`` for none. ``[B + 1]``."""


class RequestScorer:
    """Scores requests with one bundle. Thread-safe.

    Which column of which view goes where is settled by the first snapshot.

    Args:
        scorer: The bundle's.
        max_folded_bytes: Memory that may be spent on folding a snapshot's catalogue.
    """

    def __init__(self, scorer: Scorer, *, max_folded_bytes: int = 0) -> None:
        self.scorer = scorer
        self._max_folded_bytes = max_folded_bytes
        self._rows = CategoryRows(scorer)
        self._sides: dict[str, Side] | None = None
        self._impression: Impression | None = None
        self._folded: WeakKeyDictionary[Catalogue, FoldedCatalogue] = WeakKeyDictionary()

    def over(self, scorer: Scorer) -> "RequestScorer":
        """The same over a scorer that differs in its vectors alone; folds anew what it had."""
        made = copy.copy(self)
        made.scorer = scorer
        made._folded = WeakKeyDictionary()
        for catalogue in list(self._folded):
            made._fold(catalogue)
        return made

    def prepare(self, version: OnlineVersion) -> None:
        """Do what can be done for a snapshot before the first request sees it."""
        self._rows.prepare(version.tables())
        if version.catalogue is not None and version.catalogue not in self._folded:
            self._fold(version.catalogue)

    def score(self, read: OnlineRead) -> RequestScore:
        """Score the page and ads of a read."""
        logits_B2, uncached = self.logits(read)
        logits_B2 = logits_B2.astype(np.float64)
        odds = logits_B2[:, 1] - logits_B2[:, 0]
        return RequestScore(self.scorer.calibration.probabilities(odds), uncached)

    def logits(self, read: OnlineRead) -> tuple[Float32, NDArray[np.bool_] | None]:
        """Of no click and click ``[B, 2]``; and which texts are not cached, as in the score."""
        impression_V, places = self.impression(read), read.places
        folded = None if places is None else self._folded.get(places.catalogue)
        if places is None or folded is None:
            states_BV, uncached = self._from_tables(read, impression_V)
            return self.scorer.fused.finish(states_BV), uncached
        states_BV = folded.states(places, impression_V)
        return self.scorer.fused.finish(states_BV), folded.uncached_of(places)

    def impression(self, read: OnlineRead) -> Float32:
        """What the impression itself adds to the first layer, and its bias. ``[V]``."""
        if self._impression is None:
            self._impression = Impression.of(self.scorer, list(read.context_kinds))
        return self._impression.state(self.scorer, self._rows, read.context)

    def folded(self, catalogue: Catalogue) -> FoldedCatalogue | None:
        """What was folded of a catalogue, if it was."""
        return self._folded.get(catalogue)

    def _from_tables(
        self, read: OnlineRead, impression_V: Float32
    ) -> tuple[Float32, NDArray[np.bool_]]:
        """The first layer ``[B, V]``; which texts are not cached ``[B + 1]``."""
        scorer, rows, parts = self.scorer, self._rows, read.parts
        sides = self._sides or self._settle(tuple(part.wanted for part in parts))
        products = {p.wanted.view.name: p.found for p in parts if p.rows is None}
        page = {name: Found(one.table, one.slots[:1]) for name, one in products.items()}
        ads = {name: Found(one.table, one.slots[1:]) for name, one in products.items()}
        text_ids = text_ids_of(products, read.num_ads + 1)
        places = scorer.vectors.rows(text_ids)
        states_BV = sides["ad"].states(scorer, rows, ads, num_rows=read.num_ads)
        states_BV += scorer.projected.ad.take(places[1:], axis=0)
        page_1V = sides["page"].states(scorer, rows, page, num_rows=1)
        states_BV += page_1V + scorer.projected.page[places[:1]] + impression_V
        for part in parts:
            if part.rows is not None:
                side = sides[part.aliases[0]]
                found = {part.wanted.view.name: part.found}
                groups = side.states(scorer, rows, found, num_rows=len(part.found.slots))
                states_BV += groups.take(part.rows, axis=0)
        return states_BV, (places < 0) & (text_ids > 0)

    def _fold(self, catalogue: Catalogue) -> None:
        pairs = () if catalogue.pairs is None else (catalogue.pairs.wanted,)
        sides = self._sides or self._settle((*catalogue.wanted, *pairs))
        folded = FoldedCatalogue.of(
            catalogue, self.scorer, self._rows, sides, max_bytes=self._max_folded_bytes
        )
        if folded is not None:
            self._folded[catalogue] = folded

    def _settle(self, views: tuple[Wanted, ...]) -> dict[str, Side]:
        by_alias: dict[str, list[Wanted]] = {}
        for wanted in views:
            for alias in aliases(wanted.view):
                by_alias.setdefault(alias, []).append(wanted)
        self._sides = {name: Side.of(self.scorer, name, of) for name, of in by_alias.items()}
        return self._sides

"""Scores one page and its ads straight from the feature tables, without building a frame.

The same numbers as ``Scorer``, arranged for a request. The head's first layer is linear, so what
the page and the impression give to it is computed once and not once an ad. Strings are not touched:
each table's categories are mapped to the bundle's when the table comes. Numbers are gathered,
scaled and multiplied a whole side at a time.

Shape suffixes: K rows of one side (1 for the page, B for the ads), N numeric columns of a side,
F numeric inputs made of them, V width of the first layer.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Self
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from driftline.features.online import OnlineRead
from driftline.features.online_views import ViewTable
from driftline.platform.columns import PRODUCT_ALIASES
from driftline.platform.scorer import Scorer
from driftline.platform.tabular import TabularEncoder

Float32 = NDArray[np.float32]
Places = NDArray[np.int64]

PAGE: Final = PRODUCT_ALIASES[0]


@dataclass(frozen=True)
class RequestScore:
    """What a request scores."""

    probabilities: NDArray[np.float64]
    """Click probability of each ad, on the natural click rate. ``[B]``."""
    page_uncached: bool
    """The page has a text without a cached vector; the neutral one was taken."""
    ads_uncached: NDArray[np.bool_]
    """The same for each ad. ``[B]``."""


@dataclass(frozen=True)
class _Source:
    """What one view gives to a side under one alias."""

    part: int
    alias: str
    num_numbers: int
    columns: NDArray[np.int64] | None
    """Columns of the table that the head reads, in the side's order; all of them: ``None``."""
    categories: tuple[tuple[str, str], ...]
    """Names as the head and as the table know them."""


@dataclass(frozen=True)
class _Side:
    """Columns that are alike for all ads of a request, or those that differ."""

    sources: tuple[_Source, ...]
    context: tuple[tuple[str, ...], tuple[str, ...]]
    """Numbers and categories of the impression itself; on the page's side."""
    numbers: TabularEncoder
    weights: Float32
    """``[F, V]``"""

    @classmethod
    def of(cls, scorer: Scorer, read: OnlineRead, *, page: bool) -> Self:
        numbers = {number.column for number in scorer.tabular.numbers}
        categories = {category.column for category in scorer.tabular.categories}
        sources = []
        order: list[str] = []
        for index, part in enumerate(read.parts):
            for alias in part.aliases:
                if (alias == PAGE) == page:
                    named = [f"{alias}__{name}" for name in part.wanted.numbers]
                    at = [place for place, column in enumerate(named) if column in numbers]
                    order += [named[place] for place in at]
                    pairs = ((f"{alias}__{name}", name) for name in part.wanted.categories)
                    read_too = tuple(pair for pair in pairs if pair[0] in categories)
                    columns = None if len(at) == len(named) else np.array(at, np.int64)
                    sources.append(_Source(index, alias, len(at), columns, read_too))
        own = list(read.context_kinds) if page else []
        context = (
            tuple(name for name in own if name in numbers),
            tuple(name for name in own if name in categories),
        )
        tabular, inputs = scorer.tabular.selected([*order, *context[0]])
        return cls(tuple(sources), context, tabular, scorer.fused.numbers[inputs])


class RequestScorer:
    """Scores requests with one bundle. Thread-safe.

    Which column of which view goes where is settled by the first read, the warm-up's.

    Args:
        scorer: The bundle's.
    """

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self._settled: tuple[_Side, _Side] | None = None
        columns = scorer.tabular.categories
        first_rows = scorer.fused.first_rows.tolist()
        self._categories = {
            category.column: (category, first)
            for category, first in zip(columns, first_rows, strict=True)
        }
        self._places: WeakKeyDictionary[ViewTable, dict[str, Places]] = WeakKeyDictionary()

    def over(self, scorer: Scorer) -> "RequestScorer":
        """The same over a scorer that differs in its vectors alone; what was mapped is kept."""
        made = copy.copy(self)
        made.scorer = scorer
        return made

    def prepare(self, tables: Iterable[ViewTable]) -> None:
        """Map the categories of tables that are about to come, so that no request has to."""
        for table in tables:
            for column in self._categories:
                name = column.partition("__")[2]
                if name in table.categories:
                    self._map(table, column, name)

    def score(self, read: OnlineRead) -> RequestScore:
        """Score the page and ads of a read."""
        scorer = self.scorer
        page, ads = self._sides(read)
        page_1V = self._states(page, read, num_rows=1)
        states_BV = self._states(ads, read, num_rows=read.num_ads)
        text_ids = _text_ids(read)
        rows = scorer.vectors.rows(text_ids)
        uncached = (rows < 0) & (text_ids > 0)
        page_1V += scorer.projected.page[rows[:1]]
        page_1V += scorer.fused.bias
        states_BV += scorer.projected.ad.take(rows[1:], axis=0)
        states_BV += page_1V
        logits_B2 = scorer.fused.finish(states_BV).astype(np.float64)
        return RequestScore(
            probabilities=scorer.calibration.probabilities(logits_B2[:, 1] - logits_B2[:, 0]),
            page_uncached=bool(uncached[0]),
            ads_uncached=uncached[1:],
        )

    def _sides(self, read: OnlineRead) -> tuple[_Side, _Side]:
        if self._settled is None:
            page, ads = (_Side.of(self.scorer, read, page=page) for page in (True, False))
            self._settled = page, ads
        return self._settled

    def _states(self, side: _Side, read: OnlineRead, *, num_rows: int) -> Float32:
        """What a side gives to the head's first layer. ``[K, V]``."""
        fused = self.scorer.fused
        raw_NK = np.empty((len(side.numbers.numbers), num_rows))
        places: list[Places] = []
        end = 0
        for source in side.sources:
            part = read.parts[source.part]
            table, slots = part.found.table, part.slots(source.alias)
            start, end = end, end + source.num_numbers
            if end > start:
                found_NK = table.numbers.take(slots, axis=0).T
                raw_NK[start:end] = found_NK if source.columns is None else found_NK[source.columns]
            for column, name in source.categories:
                codes = table.categories[name][0].take(slots)
                places.append(self._map(table, column, name).take(codes))
        numbers, categories = side.context
        for place, name in enumerate(numbers, start=end):
            value = read.context.get(name)
            raw_NK[place] = np.nan if value is None else value
        states_KV = side.numbers.normalise(raw_NK) @ side.weights
        for rows in places:
            states_KV += fused.categories.take(rows, axis=0)
        for name in categories:
            category, first = self._categories[name]
            states_KV += fused.categories[first + category.number(read.context.get(name))]
        return states_KV

    def _map(self, table: ViewTable, column: str, name: str) -> Places:
        """Row of the fused categories for each code of a table, the last one's for none."""
        known = self._places.get(table)
        if known is None:
            known = self._places.setdefault(table, {})
        if column not in known:
            category, first = self._categories[column]
            known[column] = first + category.encode_objects(table.categories[name][1]).astype(int)
        return known[column]


def _text_ids(read: OnlineRead) -> NDArray[np.int64]:
    """Text of the page, then of each ad; 0 for none. ``[B + 1]``."""
    for part in read.parts:
        text_id = part.found.table.text_id
        if text_id is not None:
            return text_id.take(part.found.slots)
    return np.zeros(read.num_ads + 1, np.int64)

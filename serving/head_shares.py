"""What each side of a request adds to the head's first layer, straight from the feature tables.

That layer is linear in what it reads, so page, ads, categories and the impression are computed
apart: the page once a request and not once an ad, a category once and not once an ad of it. Strings
are not touched: a table's categories are mapped to the bundle's when the table comes. Numbers are
gathered, scaled and multiplied a whole side at a time.

Shape suffixes: K rows of one side, N numeric columns of a side, F numeric inputs made of them,
V width of the first layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Self
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from driftline.features.online_views import Found, ViewTable, Wanted
from driftline.platform.scorer import Scorer
from driftline.platform.tabular import CategoryVocabulary, TabularEncoder

Float32 = NDArray[np.float32]
Rows = NDArray[np.int64]

MAX_KNOWN: Final = 4_096
"""Impressions whose share of the first layer is remembered: half a kilobyte each."""


class CategoryRows:
    """Row of the folded categories for each code of a table. Thread-safe."""

    def __init__(self, scorer: Scorer) -> None:
        columns = scorer.tabular.categories
        first_rows = scorer.fused.first_rows.tolist()
        self.columns: dict[str, tuple[CategoryVocabulary, int]] = {
            category.column: (category, first)
            for category, first in zip(columns, first_rows, strict=True)
        }
        self._known: WeakKeyDictionary[ViewTable, dict[str, Rows]] = WeakKeyDictionary()

    def prepare(self, tables: Sequence[ViewTable]) -> None:
        """Map tables that are about to come, so that no request has to."""
        for table in tables:
            for column in self.columns:
                name = column.partition("__")[2]
                if name in table.categories:
                    self.of(table, column, name)

    def of(self, table: ViewTable, column: str, name: str) -> Rows:
        """Rows by code, the last one's for none, of a column that the table calls ``name``."""
        known = self._known.get(table)
        if known is None:
            known = self._known.setdefault(table, {})
        if column not in known:
            category, first = self.columns[column]
            known[column] = first + category.encode_objects(table.categories[name][1]).astype(int)
        return known[column]

    def of_value(self, column: str, value: object) -> int:
        """Row of one value."""
        category, first = self.columns[column]
        return first + category.number(value)


@dataclass(frozen=True)
class _Source:
    """What one view gives to a side."""

    view: str
    num_numbers: int
    columns: NDArray[np.int64] | None
    """Columns of the table that the head reads, in the side's order; all of them: ``None``."""
    categories: tuple[tuple[str, str], ...]
    """Names as the head and as the table know them."""


@dataclass(frozen=True)
class Side:
    """The columns of one alias: ``page``, ``ad``, ``ad_category`` or ``category_pair``."""

    sources: tuple[_Source, ...]
    numbers: TabularEncoder
    weights: Float32
    """``[F, V]``"""

    @classmethod
    def of(cls, scorer: Scorer, alias: str, views: Sequence[Wanted]) -> Self:
        """What a head reads of the views that give columns to an alias."""
        numbers = {number.column for number in scorer.tabular.numbers}
        categories = {category.column for category in scorer.tabular.categories}
        sources = []
        order: list[str] = []
        for wanted in views:
            named = [f"{alias}__{name}" for name in wanted.numbers]
            at = [place for place, column in enumerate(named) if column in numbers]
            order += [named[place] for place in at]
            pairs = ((f"{alias}__{name}", name) for name in wanted.categories)
            columns = None if len(at) == len(named) else np.array(at, np.int64)
            read = tuple(pair for pair in pairs if pair[0] in categories)
            sources.append(_Source(wanted.view.name, len(at), columns, read))
        tabular, inputs = scorer.tabular.selected(order)
        return cls(tuple(sources), tabular, scorer.fused.numbers[inputs])

    def states(
        self, scorer: Scorer, rows: CategoryRows, found: Mapping[str, Found], *, num_rows: int
    ) -> Float32:
        """The side's share of the first layer. ``[K, V]``.

        Args:
            scorer: The bundle's.
            rows: Of the same bundle.
            found: Slots by view. ``[K]`` each.
            num_rows: K.
        """
        raw_NK = np.empty((len(self.numbers.numbers), num_rows))
        categories: list[Rows] = []
        end = 0
        for source in self.sources:
            table, slots = found[source.view].table, found[source.view].slots
            start, end = end, end + source.num_numbers
            if end > start:
                taken_NK = table.numbers.take(slots, axis=0).T
                raw_NK[start:end] = taken_NK if source.columns is None else taken_NK[source.columns]
            for column, name in source.categories:
                codes = table.categories[name][0].take(slots)
                categories.append(rows.of(table, column, name).take(codes))
        states_KV = self.numbers.normalise(raw_NK) @ self.weights
        for places in categories:
            states_KV += scorer.fused.categories.take(places, axis=0)
        return states_KV


@dataclass(frozen=True)
class Impression:
    """Columns of the impression itself, and the bias, which is as much everybody's."""

    number_names: tuple[str, ...]
    category_names: tuple[str, ...]
    numbers: TabularEncoder
    weights: Float32
    """``[F, V]``"""
    known: dict[tuple[int, ...], Float32]
    """Shares of the newest combinations of categories. ``[V]`` each."""

    @classmethod
    def of(cls, scorer: Scorer, names: Sequence[str]) -> Self:
        """What a head reads of the features of the impression with these names."""
        numbers = {number.column for number in scorer.tabular.numbers}
        categories = {category.column for category in scorer.tabular.categories}
        read = tuple(name for name in names if name in numbers)
        tabular, inputs = scorer.tabular.selected(read)
        kinds = tuple(name for name in names if name in categories)
        return cls(read, kinds, tabular, scorer.fused.numbers[inputs], {})

    def state(
        self, scorer: Scorer, rows: CategoryRows, context: Mapping[str, str | float | None]
    ) -> Float32:
        """Its share of the first layer, not to be changed. ``[V]``."""
        places = tuple([rows.of_value(name, context.get(name)) for name in self.category_names])
        state_V = self.known.get(places)
        if state_V is None:
            state_V = scorer.fused.categories[list(places)].sum(axis=0) + scorer.fused.bias
            if len(self.known) >= MAX_KNOWN:
                self.known.clear()
            self.known[places] = state_V
        if self.number_names:
            values = [context.get(name) for name in self.number_names]
            raw_N1 = np.array([[np.nan if value is None else value] for value in values], float)
            state_V = state_V + (self.numbers.normalise(raw_N1) @ self.weights)[0]
        return state_V

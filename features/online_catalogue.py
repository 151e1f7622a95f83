"""All products of a snapshot in one numbering, so that a request is looked up once.

Each view has its own slots; a request would look in all of them, and then in the views of
categories. Here a product's slot in every view, its category's, and how old all these values are
stand side by side. Computed in the background when a snapshot comes, and never changed. Costs
about a hundred bytes a product in each process, so catalogues above a bound do without.

Shape suffixes: P products, W views, T tiers, C categories, K requested products, B ads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from driftline.features.feast_plugins.keys import KeyIndex, Keys, build_key_index
from driftline.features.online_freshness import NEVER_US
from driftline.features.online_views import Found, SnapshotLookup, ViewTable, Wanted
from driftline.features.views import View

Slots = NDArray[np.int64]

MAX_PAIRS: Final = 250_000
"""Categories squared, up to which the slots of all pairs are known beforehand."""


@dataclass(frozen=True)
class Pairs:
    """The view of pairs of categories, by the codes of page and ad."""

    wanted: Wanted
    table: ViewTable
    slots: NDArray[np.int32]
    """``[C + 1, C + 1]``, the last ones for a product without a category."""
    event_us: NDArray[np.int64]
    """By slot; ``NEVER_US`` for a pair that is not there."""
    clock: int
    """Its tier's place among the catalogue's."""


@dataclass(frozen=True, eq=False)
class Catalogue:
    """Where every product stands; the last place, also at -1, is that of an unknown one."""

    index: KeyIndex
    wanted: tuple[Wanted, ...]
    """Views of products, then that of categories if there is one. ``[W]``."""
    tables: tuple[ViewTable, ...]
    num_products: int
    """Views of products: the first of ``wanted``."""
    slots: NDArray[np.int32]
    """``[P + 1, W]``"""
    clocks: tuple[View, ...]
    """A view of each tier in here; all views of a tier have one clock. ``[T]``."""
    oldest_us: NDArray[np.int64]
    """Event time of a product's oldest value in each tier, ``NEVER_US`` where there is none: as a
    page, then as an ad, to which its category's values belong. ``[P + 1, 2T]``."""
    codes: NDArray[np.int32]
    """Category of each product. ``[P + 1]``."""
    pairs: Pairs | None

    @classmethod
    def of(
        cls, lookups: Sequence[SnapshotLookup], category: str | None, *, max_bytes: int
    ) -> Self | None:
        """Number the products of all views; ``None`` where that would take too much memory.

        Args:
            lookups: The views of one snapshot.
            category: The feature that views of categories go by.
            max_bytes: What the catalogue may take, roughly.
        """
        products = [one for one in lookups if one.wanted.view.entity == "product"]
        groups = {one.wanted.view.entity: one for one in lookups if one not in products}
        held = [one.snapshot for one in products if one.snapshot is not None]
        clocks = tuple({one.wanted.view.tier: one.wanted.view for one in lookups}.values())
        num_bytes = 4 * (len(products) + 1) + 16 * len(clocks)
        if not held or max(map(len, held)) * num_bytes > max_bytes:
            return None
        keys = _distinct([snapshot.keys() for snapshot in held])
        columns = [one.find(keys).slots for one in products]
        codes, values = _categories(products, columns, category)
        if "category_pair" in groups and len(values) ** 2 > MAX_PAIRS:
            return None
        used = list(products)
        if (by_category := groups.get("category")) is not None:
            columns.append(by_category.find(values).slots.take(codes[:-1]))
            used.append(by_category)
        slots = np.full((len(keys) + 1, len(columns)), -1, np.int32)
        oldest_us = np.full((len(slots), 2 * len(clocks)), NEVER_US)
        tiers = [clock.tier for clock in clocks]
        for place, (column, one) in enumerate(zip(columns, used, strict=True)):
            slots[:-1, place] = column
            event_us = np.where(column < 0, NEVER_US, one.table.event_us.take(column))
            tier = tiers.index(one.wanted.view.tier)
            read_as = (0, len(tiers)) if one in products else (len(tiers),)
            for first in read_as:
                oldest = oldest_us[:-1, first + tier]
                np.minimum(oldest, event_us, out=oldest)
        by_pair = groups.get("category_pair")
        return cls(
            index=build_key_index(keys),
            wanted=tuple(one.wanted for one in used),
            tables=tuple(one.table for one in used),
            num_products=len(products),
            slots=slots,
            clocks=clocks,
            oldest_us=oldest_us,
            codes=codes,
            pairs=None if by_pair is None else _pairs(by_pair, values, tiers),
        )

    def __len__(self) -> int:
        return len(self.slots) - 1

    def find(self, keys: Keys) -> "Places":
        """Where a page and its ads stand. ``[B + 1]``, the page first."""
        rows = self.index.rows(keys)
        pair_slots = None
        if self.pairs is not None:
            codes = self.codes.take(rows)
            pair_slots = self.pairs.slots[codes[0]].take(codes[1:])
        return Places(self, rows, pair_slots)

    def found(self, rows: Slots) -> dict[str, Found]:
        """Slots by view of the products in some places, but for pairs. ``[K]`` each."""
        slots_KW = self.slots.take(rows, axis=0).astype(np.int64)
        views = zip(self.wanted, self.tables, slots_KW.T, strict=True)
        return {wanted.view.name: Found(table, slots_K) for wanted, table, slots_K in views}


@dataclass(frozen=True)
class Places:
    """A page and its ads in a catalogue."""

    catalogue: Catalogue
    rows: Slots
    """-1 for an unknown product. ``[B + 1]``."""
    pair_slots: NDArray[np.int32] | None
    """Slot of each ad's pair of categories. ``[B]``."""

    def oldest_us(self) -> list[int]:
        """Event time of the oldest value used of each tier, ``NEVER_US`` if none is. ``[T]``."""
        catalogue, num = self.catalogue, len(self.catalogue.clocks)
        times_us = catalogue.oldest_us.take(self.rows, axis=0)
        page = times_us[0, :num].tolist()
        ads = np.minimum.reduce(times_us[1:, num:], axis=0, initial=NEVER_US).tolist()
        oldest = list(map(min, page, ads))
        pairs = catalogue.pairs
        if pairs is not None and self.pair_slots is not None:
            of_pairs = pairs.event_us.take(self.pair_slots).min(initial=NEVER_US)
            oldest[pairs.clock] = min(oldest[pairs.clock], int(of_pairs))
        return oldest

    def found(self) -> dict[str, Found]:
        """Slots by view: of page and ads in views of products ``[B + 1]``, else of the ads."""
        catalogue = self.catalogue
        found = catalogue.found(self.rows)
        for wanted in catalogue.wanted[catalogue.num_products :]:
            of_all = found[wanted.view.name]
            found[wanted.view.name] = Found(of_all.table, of_all.slots[1:])
        if catalogue.pairs is not None and self.pair_slots is not None:
            pairs = catalogue.pairs
            found[pairs.wanted.view.name] = Found(pairs.table, self.pair_slots.astype(np.int64))
        return found

    def found_once(self) -> list[tuple[View, Found]]:
        """The same, but each category, and each pair of categories, stands there once."""
        pairs = self.catalogue.pairs
        every = (*self.catalogue.wanted, *(() if pairs is None else (pairs.wanted,)))
        views = {one.view.name: one.view for one in every}
        return [
            (view, found if view.entity == "product" else _once(found))
            for name, found in self.found().items()
            for view in (views[name],)
        ]


def _once(found: Found) -> Found:
    return Found(found.table, np.unique(found.slots))


def _distinct(columns: Sequence[pa.ChunkedArray]) -> pa.Array:
    """Every key once."""
    first, *others = columns
    keys = first.combine_chunks()
    for column in others:
        if not column.equals(first):
            keys = pa.chunked_array([keys, *column.chunks]).unique()
    return keys


def _categories(
    products: Sequence[SnapshotLookup], columns: Sequence[Slots], category: str | None
) -> tuple[NDArray[np.int32], list[Any]]:
    """Code of each product's category ``[P + 1]``, and the names, ``None`` last ``[C + 1]``.

    Args:
        products: The views of products.
        columns: Slots of all products in each. ``[P]``.
        category: The feature.
    """
    for one, slots in zip(products, columns, strict=True):
        if category in one.wanted.categories:
            codes, values = one.table.categories[category]
            return np.append(codes.take(slots), -1).astype(np.int32), values.tolist()
    return np.full(len(columns[0]) + 1, -1, np.int32), [None]


def _pairs(lookup: SnapshotLookup, values: Sequence[str | None], tiers: Sequence[str]) -> Pairs:
    slots = np.full((len(values), len(values)), -1, np.int32)
    for page, name in enumerate(values):
        if name is not None:
            keys = [None if ad is None else f"{name}|{ad}" for ad in values]
            slots[page] = lookup.find(keys).slots
    event_us = lookup.table.event_us.copy()
    event_us[-1] = NEVER_US
    clock = tiers.index(lookup.wanted.view.tier)
    return Pairs(lookup.wanted, lookup.table, slots, event_us, clock)

"""What is known of a request's page and ads at one moment, view by view."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftline.features.online_catalogue import Places
from driftline.features.online_freshness import StaleTier
from driftline.features.online_views import Found, Key, Wanted
from driftline.features.views import NO_TEXT, TEXT_ID, View
from driftline.platform.columns import PRODUCT_ALIASES, TEXT_ID_COLUMNS

Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Part:
    """What one view gives to a request: slots of its table for each alias that reads it."""

    wanted: Wanted
    found: Found
    """Slots of the page and the ads ``[B + 1]``, or of the distinct groups of ads ``[G]``; expired
    values stand nowhere (-1)."""
    rows: NDArray[np.int64] | None = None
    """Group of each ad, for views of categories. ``[B]``."""

    @property
    def aliases(self) -> tuple[str, ...]:
        """Prefixes of the columns that it fills."""
        return aliases(self.wanted.view)

    def slots(self, alias: str) -> NDArray[np.int64]:
        """Slot of each ad's value under an alias; one for all of the page. ``[B or 1]``."""
        slots = self.found.slots
        if self.rows is not None:
            return slots[self.rows]
        return slots[:1] if alias == PRODUCT_ALIASES[0] else slots[1:]


def aliases(view: View) -> tuple[str, ...]:
    """Prefixes of the columns that a view fills."""
    if view.entity == "product":
        return PRODUCT_ALIASES
    return ("ad_category",) if view.entity == "category" else ("category_pair",)


@dataclass(frozen=True)
class OnlineRead:
    """Features of one page and B ads at one moment."""

    num_ads: int
    find_parts: Callable[[], tuple[Part, ...]]
    """Gives :attr:`parts`, which most requests never ask for."""
    context: Mapping[str, str | float | None]
    """Features of the impression, by name; those not given are missing."""
    context_kinds: Mapping[str, str]
    tiers: Mapping[str, tuple[float, bool]]
    """By tier: age in seconds of the oldest value used (NaN when none was), and whether it is
    stale: a value older than the tier allows was used, or all values found had expired."""
    unknown_page: bool
    """The page is in no view of products."""
    unknown_ads: NDArray[np.bool_]
    """The same for each ad. ``[B]``."""
    as_of: datetime | None = None
    """Moment up to which the store was known to be complete."""
    refusal: StaleTier | None = None
    """A tier with ``on_stale: refuse`` has a value that is too old: do not answer."""
    store_unavailable: bool = False
    """The online store did not answer: features are missing for that reason alone, and which
    products are unknown cannot be told."""
    places: Places | None = None
    """Where page and ads stand in the snapshot's catalogue; ``None`` where there is no catalogue,
    or where it does not tell all because values have expired."""

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """What each view gives."""
        return self.find_parts()

    @cached_property
    def columns(self) -> Columns:
        """Every feature column of a frame, and both text ids. ``[B]`` each.

        Numbers are float32 with NaN for missing, categories objects with ``None``, text ids int64
        with 0.
        """
        num = self.num_ads
        columns: Columns = {}
        for name, kind in self.context_kinds.items():
            value = self.context.get(name)
            if kind == "numeric":
                columns[name] = np.full(num, np.nan if value is None else value, np.float32)
            else:
                columns[name] = np.full(num, value, np.object_)
        for name in TEXT_ID_COLUMNS:
            columns[name] = np.full(num, NO_TEXT, np.int64)
        for part in self.parts:
            table = part.found.table
            for alias in part.aliases:
                slots = np.broadcast_to(part.slots(alias), num)
                for place, name in enumerate(part.wanted.numbers):
                    columns[f"{alias}__{name}"] = table.numbers[slots, place]
                for name, (codes, values) in table.categories.items():
                    columns[f"{alias}__{name}"] = values[codes[slots]]
                if table.text_id is not None:
                    columns[f"{alias}__{TEXT_ID}"] = table.text_id[slots]
        return columns


class Groups:
    """Distinct categories of a request's ads, for views that have a row for a category."""

    def __init__(self, parts: Sequence[Part], category: str | None) -> None:
        self._page: str | None = None
        self._categories: list[str | None] = []
        self.rows = np.empty(0, np.int64)
        for part in parts:
            if category in part.wanted.categories:
                codes, values = part.found.table.categories[category]
                page, *ads = codes.take(part.found.slots).tolist()
                places: dict[int, int] = {}  # quicker than np.unique for a request's rows
                rows = [places.setdefault(code, len(places)) for code in ads]
                self.rows = np.array(rows, np.int64)
                self._page = values[page]
                self._categories = [values[code] for code in places]

    def keys(self, view: View) -> list[Key | None]:
        """Keys of the groups in a view of categories, or of pairs with the page's. ``[G]``."""
        if view.entity == "category":
            return list(self._categories)
        page = self._page
        return [
            None if page is None or category is None else f"{page}|{category}"
            for category in self._categories
        ]

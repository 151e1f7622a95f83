"""Features for one request: the same columns as a frame's row of that moment, in microseconds.

Nothing of Feast is loaded. With the embedded store views are immutable snapshots in mapped files,
and :meth:`OnlineFeatures.refresh` swaps to newer ones by one assignment. With Redis the values of
products come from there, one round trip a request.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from driftline.features.feast_plugins.keys import Keys
from driftline.features.online_freshness import MICROSECOND, Ages, StaleCounts, StaleTier
from driftline.features.online_views import (
    Found,
    Key,
    OnlineVersion,
    SnapshotLookup,
    SnapshotVersion,
    ViewTable,
    Wanted,
    empty_table,
)
from driftline.features.paths import (
    materialized_path,
    online_folder,
    project_name,
    unfinished_path,
)
from driftline.features.views import NO_TEXT, TEXT_ID, View, feature_views
from driftline.platform.artefacts import read_json
from driftline.platform.columns import PRODUCT_ALIASES, TEXT_ID_COLUMNS, head_columns
from driftline.platform.settings import DriftlineSettings
from driftline.platform.windows import format_time, parse_time

if TYPE_CHECKING:
    from driftline.features.online_redis import RedisSource

logger = logging.getLogger(__name__)

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
PATIENCE_SECONDS: Final = 5.0
"""How long a reader that has nothing yet waits for a materialisation to end."""

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
        if self.wanted.view.entity == "product":
            return PRODUCT_ALIASES
        return ("ad_category",) if self.wanted.view.entity == "category" else ("category_pair",)

    def slots(self, alias: str) -> NDArray[np.int64]:
        """Slot of each ad's value under an alias; one for all of the page. ``[B or 1]``."""
        slots = self.found.slots
        if self.rows is not None:
            return slots[self.rows]
        return slots[:1] if alias == PRODUCT_ALIASES[0] else slots[1:]


@dataclass(frozen=True)
class OnlineRead:
    """Features of one page and B ads at one moment."""

    num_ads: int
    parts: tuple[Part, ...]
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


class OnlineFeatures:
    """Reads features for requests; safe to share among threads. Get one by :meth:`open`."""

    def __init__(self, settings: DriftlineSettings) -> None:
        self._settings = settings
        self._wanted = _wanted(settings)
        self._context = {
            column.name: column.kind for column in head_columns(settings) if column.alias is None
        }
        self._category = settings.counters.category
        self._nothing = {one.view.name: empty_table(one) for one in self._wanted}
        self._stale = StaleCounts()
        self._redis = _redis(settings, self._wanted)
        self._version = self._look(None)

    @classmethod
    def open(cls, settings: DriftlineSettings) -> "OnlineFeatures":
        """The newest snapshots; views that were never materialised count as empty."""
        return cls(settings)

    @property
    def as_of(self) -> datetime | None:
        """Moment up to which the store is known to be complete; ``None`` before the first time."""
        return self._version.as_of

    def refresh(self, *, prepare: Callable[[Sequence[ViewTable]], None] | None = None) -> bool:
        """Swap to newer snapshots if there are any; whether there were.

        Args:
            prepare: Called with the new tables before any request sees them.

        Raises:
            FeatureStoreError: a snapshot is damaged; the old ones stay.
        """
        old = self._version
        new = self._look(old)
        if new is not old:
            if prepare is not None:
                prepare(new.tables())
            self._version = new
        return new is not old

    def counts(self) -> dict[str, Mapping[str, Any]]:
        """What happened so far, for metrics.

        ``stale``: values older than their tier allows, by tier and by what became of them
        (``used``, ``defaulted``, ``refused``). ``store``: round trips to Redis (``reads``), those
        that failed (``failures``), requests that did not try because it was away (``skipped``).
        """
        store = {} if self._redis is None else self._redis.counts()
        return {"stale": self._stale.get(), "store": store}

    def read(
        self,
        page: Key,
        ads: Sequence[Key] | NDArray[np.int64],
        *,
        context: Mapping[str, str | float | None],
        now: datetime,
    ) -> OnlineRead:
        """Features of a page and its ads, as a frame would hold them for a request at ``now``.

        Args:
            page: Page product.
            ads: Ad products, in any order, duplicates allowed. ``[B]``.
            context: Features of the impression itself; those not given are missing.
            now: Moment of the request, not before ``as_of``.
        """
        version = self._version
        now_us = (now - EPOCH) // MICROSECOND
        ages = Ages(self._stale)
        unknown = np.ones(len(ads) + 1, bool)
        parts = []
        products = version.products(_keys(page, ads))
        away = products is None
        for wanted in self._wanted:
            if wanted.view.entity == "product":
                found = self._none(wanted, len(ads) + 1)
                if products is not None:
                    found = products[wanted.view.name]
                unknown &= found.slots < 0
                parts.append(Part(wanted, ages.add(wanted.view, found, now_us)))
        groups = _Groups(parts, self._category)
        for wanted in self._wanted:
            if wanted.view.entity != "product":
                keys = groups.keys(wanted.view)
                group = None if away else version.group(wanted.view, keys)
                away = group is None
                found = self._none(wanted, len(keys)) if group is None else group
                parts.append(Part(wanted, ages.add(wanted.view, found, now_us), groups.rows))
        if products is None:
            unknown[:] = False
        return OnlineRead(
            num_ads=len(ads),
            parts=tuple(parts),
            context=context,
            context_kinds=self._context,
            tiers=ages.by_tier(now_us),
            unknown_page=bool(unknown[0]),
            unknown_ads=unknown[1:],
            as_of=version.as_of,
            refusal=ages.refusal,
            store_unavailable=away,
        )

    def status(self, *, now: datetime) -> dict[str, Any]:
        """What is in memory, JSON-able: completeness, and version and size of each view."""
        version = self._version
        as_of = version.as_of
        return {
            "as_of": None if as_of is None else format_time(as_of),
            "seconds_behind": None if as_of is None else (now - as_of).total_seconds(),
            "views": {
                wanted.view.name: {
                    "tier": wanted.view.tier,
                    "version": version.view_version(wanted.view.name),
                }
                for wanted in self._wanted
            },
            "counts": self.counts(),
            "store_away": self._redis is not None and self._redis.is_away,
        }

    def _look(self, old: OnlineVersion | None) -> OnlineVersion:
        """The newest version; ``old`` itself when there is no newer one."""
        if self._redis is not None:
            from driftline.features.online_redis import RedisVersion

            assert old is None or isinstance(old, RedisVersion)
            return self._redis.look(old, as_of=self._read_as_of())
        assert old is None or isinstance(old, SnapshotVersion)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            before = self._finished()
            new = self._look_at_snapshots(old)
            if before is not None and before == self._finished():
                return old if old is not None and new.equals(old) else new
            if old is not None:
                return old  # some views are newer than others: look again later
            if time.monotonic() > deadline:
                logger.warning("the online store is half written; starting with what is there")
                return new
            time.sleep(0.05)

    def _look_at_snapshots(self, old: SnapshotVersion | None) -> SnapshotVersion:
        as_of = self._read_as_of()
        folder = online_folder(self._settings)
        lookups = {}
        for wanted in self._wanted:
            name = wanted.view.name
            since = None if old is None else old.lookups[name]
            lookups[name] = SnapshotLookup.open(folder / name, wanted, since=since)
        return SnapshotVersion(lookups, as_of)

    def _finished(self) -> tuple[int, int] | None:
        """Changes with every materialisation; ``None`` while one is under way or was killed."""
        if unfinished_path(self._settings).exists():
            return None
        try:
            found = materialized_path(self._settings).stat()
        except FileNotFoundError:
            return 0, 0
        return found.st_ino, found.st_mtime_ns

    def _none(self, wanted: Wanted, num: int) -> Found:
        """Keys of a view about which nothing is known."""
        return Found(self._nothing[wanted.view.name], np.full(num, -1, np.int64))

    def _read_as_of(self) -> datetime | None:
        path = materialized_path(self._settings)
        state = read_json(path) if path.exists() else {}
        times = [
            state[name]["as_of"] for name in (w.view.name for w in self._wanted) if name in state
        ]
        return parse_time(min(times)) if len(times) == len(self._wanted) and times else None


def _redis(settings: DriftlineSettings, wanted: Sequence[Wanted]) -> "RedisSource | None":
    """The source of a market whose online store is Redis."""
    if settings.store.online != "redis":
        return None
    from driftline.features.online_redis import RedisSource

    return RedisSource(
        wanted,
        project=project_name(settings),
        address=settings.store.redis_address,
        timeout_ms=settings.store.redis_timeout_ms,
    )


class _Groups:
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


def _keys(page: Key, ads: Sequence[Key] | NDArray[np.int64]) -> Keys:
    """Page first, then ads; integers as an array. ``[B + 1]``."""
    if not isinstance(ads, np.ndarray):
        return [page, *ads]
    keys = np.empty(len(ads) + 1, np.int64)
    keys[0], keys[1:] = page, ads
    return keys


def _wanted(settings: DriftlineSettings) -> tuple[Wanted, ...]:
    """What a head reads of each view; views of which it reads nothing are left out."""
    read = {column.feature for column in head_columns(settings) if column.alias is not None}
    wanted = []
    for view in feature_views(settings):
        numbers = [f.name for f in view.features if f.name in read and _is_number(f)]
        categories = [f.name for f in view.features if f.name in read and not _is_number(f)]
        has_text = TEXT_ID in view.features.names
        if numbers or categories or has_text:
            wanted.append(Wanted(view, tuple(numbers), tuple(categories), has_text))
    return tuple(wanted)


def _is_number(field: Any) -> bool:
    return str(field.type) == "float"

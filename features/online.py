"""Features for one request: the same columns as a frame's row of that moment, in microseconds.

Nothing of Feast is loaded. With the embedded store views are immutable snapshots in mapped files,
and :meth:`OnlineFeatures.refresh` swaps to newer ones by one assignment. With Redis the values of
products come from there, one round trip a request.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from driftline.features.online_catalogue import Catalogue, Places
from driftline.features.online_freshness import MICROSECOND, Ages, StaleCounts
from driftline.features.online_read import Groups, OnlineRead, Part
from driftline.features.online_views import (
    Found,
    Key,
    OnlineVersion,
    SnapshotLookup,
    SnapshotVersion,
    Wanted,
    empty_table,
)
from driftline.features.paths import (
    materialized_path,
    online_folder,
    project_name,
    unfinished_path,
)
from driftline.features.views import TEXT_ID, feature_views
from driftline.platform.artefacts import read_json
from driftline.platform.columns import head_columns
from driftline.platform.settings import DriftlineSettings
from driftline.platform.windows import format_time, parse_time

if TYPE_CHECKING:
    from driftline.features.online_redis import RedisSource

logger = logging.getLogger(__name__)

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
PATIENCE_SECONDS: Final = 5.0
"""How long a reader that has nothing yet waits for a materialisation to end."""

AsList = list[Key] | NDArray[np.int64]


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
        self._version = self._numbered(self._look(None), None)

    @classmethod
    def open(cls, settings: DriftlineSettings) -> "OnlineFeatures":
        """The newest snapshots; views that were never materialised count as empty."""
        return cls(settings)

    @property
    def as_of(self) -> datetime | None:
        """Moment up to which the store is known to be complete; ``None`` before the first time."""
        return self._version.as_of

    @property
    def version(self) -> OnlineVersion:
        """What requests see now."""
        return self._version

    def refresh(self, *, prepare: Callable[[OnlineVersion], None] | None = None) -> bool:
        """Swap to newer snapshots if there are any; whether there were.

        Args:
            prepare: Called with what is new before any request sees it.

        Raises:
            FeatureStoreError: a snapshot is damaged; the old ones stay.
        """
        old = self._version
        new = self._look(old)
        if new is not old:
            new = self._numbered(new, old)
            if prepare is not None:
                prepare(new)
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
        keys = _keys(page, ads)
        ages = Ages(self._stale)
        places = None if version.catalogue is None else version.catalogue.find(keys)
        if places is not None and ages.add_places(places, now_us):
            unknown, away = places.rows < 0, False
            find_parts = partial(self._parts_at, places)
        else:
            places = None
            parts, unknown, away = self._parts_by_view(version, keys, ages, now_us)
            find_parts = partial(tuple, parts)
        return OnlineRead(
            num_ads=len(ads),
            find_parts=find_parts,
            context=context,
            context_kinds=self._context,
            tiers=ages.by_tier(now_us),
            unknown_page=bool(unknown[0]),
            unknown_ads=unknown[1:],
            as_of=version.as_of,
            refusal=ages.refusal,
            store_unavailable=away,
            places=places,
        )

    def _parts_by_view(
        self, version: OnlineVersion, keys: AsList, ages: Ages, now_us: int
    ) -> tuple[list[Part], NDArray[np.bool_], bool]:
        """Look in one view after the other; which keys are in none, and is the store away."""
        parts = []
        unknown: NDArray[np.bool_] = np.ones(len(keys), np.bool_)
        products = version.products(keys)
        away = products is None
        for wanted in self._wanted:
            if wanted.view.entity == "product":
                found = self._none(wanted, len(keys))
                if products is not None:
                    found = products[wanted.view.name]
                unknown &= found.slots < 0
                parts.append(Part(wanted, ages.add(wanted.view, found, now_us)))
        groups = Groups(parts, self._category)
        for wanted in self._wanted:
            if wanted.view.entity != "product":
                names = groups.keys(wanted.view)
                group = None if away else version.group(wanted.view, names)
                away = group is None
                found = self._none(wanted, len(names)) if group is None else group
                parts.append(Part(wanted, ages.add(wanted.view, found, now_us), groups.rows))
        if products is None:
            unknown[:] = False
        return parts, unknown, away

    def _parts_at(self, places: Places) -> tuple[Part, ...]:
        """The same from the catalogue, for who asks."""
        found = places.found()
        each_ad = np.arange(len(places.rows) - 1)
        return tuple(
            Part(one, found[one.view.name], None if one.view.entity == "product" else each_ad)
            for one in self._wanted
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

    def _numbered(self, new: OnlineVersion, old: OnlineVersion | None) -> OnlineVersion:
        """With a catalogue, if there is room for one."""
        if not isinstance(new, SnapshotVersion):
            return new
        if isinstance(old, SnapshotVersion) and old.has_lookups_of(new):
            return replace(new, catalogue=old.catalogue)
        lookups = list(new.lookups.values())
        max_bytes = self._settings.serving.max_folded_bytes
        made = Catalogue.of(lookups, self._category, max_bytes=max_bytes)
        return replace(new, catalogue=made)

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


def _keys(page: Key, ads: Sequence[Key] | NDArray[np.int64]) -> AsList:
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

"""How old the values of a request are, and what happens to those older than their tier allows.

Each value has the age of its event time. A tier declares (``tiers.X.on_stale``) what becomes of an
older one: it is used and flagged, counts as missing, or the request is refused. All are counted.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from threading import Lock
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from driftline.features.online_views import Found
from driftline.features.views import TIERS, View

if TYPE_CHECKING:
    from driftline.features.online_catalogue import Places

MICROSECOND: Final = timedelta(microseconds=1)
NEVER_US: Final = 2**62
"""Event time of what is not there: later than any, so that it is never the oldest."""

Handling = Literal["used", "defaulted", "refused"]


@dataclass(frozen=True)
class StaleTier:
    """Why a request must be refused: the oldest value of a tier with ``on_stale: refuse``."""

    tier: str
    age_seconds: float
    limit_seconds: float
    num_values: int
    """Rows of features older than the limit: a page or ad in one view counts once."""


class StaleCounts:
    """Values older than their tier allows, by tier and by what became of them. Thread-safe."""

    def __init__(self) -> None:
        self._lock = Lock()
        none: dict[Handling, int] = {"used": 0, "defaulted": 0, "refused": 0}
        self._counts = {str(tier): dict(none) for tier in TIERS}

    def add(self, tier: str, handling: Handling, number: int) -> None:
        """Count values; only called when there are any, so that fresh requests take no lock."""
        with self._lock:
            self._counts[tier][handling] += number

    def get(self) -> Mapping[str, Mapping[Handling, int]]:
        """A copy of all counts so far."""
        with self._lock:
            return {tier: dict(counts) for tier, counts in self._counts.items()}


class Ages:
    """The ages of one request's values, as its views are read.

    Args:
        counts: Where stale values are counted.
    """

    def __init__(self, counts: StaleCounts) -> None:
        self._counts = counts
        self._tiers: dict[str, tuple[int | None, bool]] = {}
        self.refusal: StaleTier | None = None
        """The worst of the tiers that want the request refused."""

    def add(self, view: View, found: Found, now_us: int) -> Found:
        """Take note of the ages of a view's values; gives those that have not expired."""
        known = found.slots >= 0
        event_us = found.table.event_us.take(found.slots)
        event_us[~known] = NEVER_US
        limit_us = view.value_freshness // MICROSECOND
        oldest_us = int(event_us.min(initial=NEVER_US))
        stale = now_us - oldest_us > limit_us
        if stale:  # rare: the common case above takes a handful of array operations
            old = now_us - event_us > limit_us
            self._handle(view, int(old.sum()), age_us=now_us - oldest_us, limit_us=limit_us)
            if view.expires:
                found = replace(found, slots=np.where(old, -1, found.slots))
                event_us[old] = NEVER_US
                oldest_us = int(event_us.min(initial=NEVER_US))
                stale = oldest_us == NEVER_US
        self._note(view.tier, oldest_us if oldest_us < NEVER_US else None, stale=stale)
        return found

    def add_places(self, places: "Places", now_us: int) -> bool:
        """The same for all views at once; ``False``, and nothing noted, if a value has expired."""
        oldest = list(zip(places.catalogue.clocks, places.oldest_us(), strict=True))
        stale = [
            clock
            for clock, oldest_us in oldest
            if now_us - oldest_us > clock.value_freshness // MICROSECOND
        ]
        if any(clock.expires for clock in stale):
            return False
        if stale:  # rare: which views are it, and how many values?
            for view, found in places.found_once():
                self.add(view, found, now_us)
        else:
            for clock, oldest_us in oldest:
                self._tiers[clock.tier] = (oldest_us if oldest_us < NEVER_US else None), False
        return True

    def by_tier(self, now_us: int) -> dict[str, tuple[float, bool]]:
        """Age in seconds (never below 0, NaN where nothing is known) and staleness of each tier."""
        return {
            tier: (np.nan if oldest is None else max((now_us - oldest) / 1e6, 0.0), stale)
            for tier, (oldest, stale) in self._tiers.items()
        }

    def _note(self, tier: str, oldest_us: int | None, *, stale: bool) -> None:
        if tier in self._tiers:
            before, was_stale = self._tiers[tier]
            if before is not None:
                oldest_us = before if oldest_us is None else min(before, oldest_us)
            stale = stale or was_stale
        self._tiers[tier] = oldest_us, stale

    def _handle(self, view: View, number: int, *, age_us: int, limit_us: int) -> None:
        handling: Handling = "used"
        if view.expires:
            handling = "defaulted"
        elif view.refuses:
            handling = "refused"
            self._refuse(StaleTier(view.tier, age_us / 1e6, limit_us / 1e6, number))
        self._counts.add(view.tier, handling, number)

    def _refuse(self, stale: StaleTier) -> None:
        worst = self.refusal
        if worst is None or stale.age_seconds > worst.age_seconds:
            self.refusal = stale

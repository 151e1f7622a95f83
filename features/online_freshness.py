"""How old the values of a request are, and what happens to those older than their tier allows.

Each value has the age of its event time. A tier declares (``tiers.X.on_stale``) what becomes of an
older one: it is used and flagged, counts as missing, or the request is refused. All are counted.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from threading import Lock
from typing import Final, Literal

import numpy as np

from driftline.features.online_views import Found
from driftline.features.views import TIERS, View

MICROSECOND: Final = timedelta(microseconds=1)

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
        self._oldest: dict[str, float] = {}
        self._stale: dict[str, bool] = {}
        self.refusal: StaleTier | None = None
        """The worst of the tiers that want the request refused."""

    def add(self, view: View, found: Found, now_us: int) -> Found:
        """Take note of the ages of a view's values; gives those that have not expired."""
        known = found.slots >= 0
        age_us = now_us - found.table.event_us[found.slots]
        limit_us = view.value_freshness // MICROSECOND
        old = known & (age_us > limit_us)
        stale = bool(old.any())
        if stale:
            handling: Handling = "used"
            if view.expires:
                handling = "defaulted"
            elif view.refuses:
                handling = "refused"
                oldest_us = int(age_us[old].max())
                self._refuse(StaleTier(view.tier, oldest_us / 1e6, limit_us / 1e6, int(old.sum())))
            self._counts.add(view.tier, handling, int(old.sum()))
        if stale and view.expires:
            known &= ~old
            found = replace(found, slots=np.where(known, found.slots, -1))
            stale = not known.any()
        oldest = float(age_us[known].max()) / 1e6 if known.any() else np.nan
        self._oldest[view.tier] = float(np.fmax(self._oldest.get(view.tier, np.nan), oldest))
        self._stale[view.tier] = self._stale.get(view.tier, False) or stale
        return found

    def by_tier(self) -> dict[str, tuple[float, bool]]:
        """Age in seconds (never below 0) and staleness of each tier."""
        return {
            tier: (max(age, 0.0) if age == age else age, self._stale[tier])
            for tier, age in self._oldest.items()
        }

    def _refuse(self, stale: StaleTier) -> None:
        worst = self.refusal
        if worst is None or stale.age_seconds > worst.age_seconds:
            self.refusal = stale

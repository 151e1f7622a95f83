"""Which bundles are live, and the search for their successors.

A reader takes ``routes`` once and works with what it got; the holder replaces the reference, never
the object, and only after every bundle in it was verified and warmed. So there is no moment
without a champion, and no answer from two bundles. What is no longer named anywhere is let go.
"""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from driftline.platform.bundle import Bundle
from driftline.platform.errors import BundleError, DriftlineError
from driftline.platform.registry import POINTER, ChampionPointer, read_champion
from driftline.platform.traffic import TRAFFIC, BundleRef, Canary, Traffic, read_traffic
from driftline.platform.windows import format_time
from driftline.serving.prepared import PreparedBundle
from driftline.serving.rollout.routes import LiveBundle, Routes

logger = logging.getLogger(__name__)

RETRY_SECONDS: Final = 30.0
"""A refused bundle is looked at again after this long, in case it was published again."""

UNUSABLE: Final = (DriftlineError, OSError, ValueError, LookupError, TypeError, RuntimeError)
"""What an incomplete, altered or foreign bundle raises while it is read; torch says RuntimeError
for weights of another shape. None of them may end a server that has a good bundle."""


@dataclass(frozen=True)
class Refusal:
    """A bundle that was not taken."""

    fingerprint: str | None
    message: str
    at: str


class RouteHolder:
    """Follows ``bundles/CHAMPION`` and ``bundles/TRAFFIC``.

    Args:
        bundles: Folder of bundles.
        prepare: Makes a verified bundle ready; may raise what ``UNUSABLE`` names.
        warm_up: Scores with it before it goes live; may raise the same.
    """

    def __init__(
        self,
        bundles: Path,
        *,
        prepare: Callable[[Bundle], PreparedBundle],
        warm_up: Callable[[LiveBundle], None],
    ) -> None:
        self._bundles = bundles
        self._prepare = prepare
        self._warm_up = warm_up
        self._routes = Routes()
        self._loaded: dict[str, LiveBundle] = {}
        self._traffic = Traffic()
        self._num_loads = 0
        self._num_refusals = 0
        self._last_refusal: Refusal | None = None
        self._complaints: dict[str, str] = {}
        """What was said last about each bundle or file, so that it is said and counted once."""
        self._refused: dict[BundleRef, float] = {}
        """When each refused bundle may be tried again."""

    @property
    def routes(self) -> Routes:
        """The bundles that are live now; take it once for one answer."""
        return self._routes

    @property
    def live(self) -> LiveBundle | None:
        """The champion that answers now."""
        return self._routes.champion

    def look(self) -> bool:
        """Look at both files once; verify, prepare and take what is new. True if any was loaded.

        The champion goes live before the others are loaded. Raises nothing for a bundle that
        cannot be used: an old champion stays, a canary or shadow is left out, and ``status`` says
        what was wrong.
        """
        num_loads = self._num_loads
        champion = self._look_at_champion()
        self._publish(champion)
        self._look_at_traffic()
        others = [ref for ref in self._others() if self._get(ref) is not None]
        self._publish(champion)
        named = {ref.fingerprint for ref in others}
        named |= {champion.fingerprint} if champion is not None else set()
        self._loaded = {name: live for name, live in self._loaded.items() if name in named}
        return self._num_loads > num_loads

    def load(self, ref: BundleRef) -> LiveBundle:
        """Open, verify, prepare and warm up a bundle without making it live.

        Raises:
            BundleError: it is not the bundle that the reference names, or is incomplete or altered.
            Exception: anything of ``UNUSABLE``.
        """
        started = time.perf_counter()
        bundle = Bundle.open(ref.path)
        if bundle.fingerprint != ref.fingerprint:
            raise BundleError(
                f"the registry names {ref.fingerprint}, but {ref.path} holds "
                f"{bundle.fingerprint}; publish or promote again"
            )
        live = LiveBundle(
            version=ref.version,
            prepared=self._prepare(bundle),
            promoted_at=None,
            loaded_at=datetime.now(UTC),
            load_seconds=0.0,
        )
        self._warm_up(live)
        return replace(
            live,
            loaded_at=datetime.now(UTC),
            load_seconds=round(time.perf_counter() - started, 3),
        )

    def status(self) -> dict[str, Any]:
        """Live bundles, loads and refusals so far."""
        last = self._last_refusal
        return {
            "routes": self._routes.to_json(),
            "loads": self._num_loads,
            "refusals": self._num_refusals,
            "last_refusal": None if last is None else asdict(last),
        }

    # --- how ------------------------------------------------------------------------------

    def _look_at_champion(self) -> LiveBundle | None:
        """The champion to answer from now on: the one that the pointer names, if it can be used."""
        old = self._routes.champion
        try:
            pointer = read_champion(self._bundles)
        except UNUSABLE as error:
            self._refuse(POINTER, error)
            return old
        self._complaints.pop(POINTER, None)
        if pointer is None:
            return old
        found = self._get(_ref(pointer))
        if found is None:
            return old
        if old is None or old.fingerprint != found.fingerprint:
            logger.info("serving version %d (%s)", pointer.version, pointer.fingerprint)
        return replace(found, version=pointer.version, promoted_at=pointer.promoted_at)

    def _look_at_traffic(self) -> None:
        try:
            self._traffic = read_traffic(self._bundles)
        except UNUSABLE as error:
            self._refuse(TRAFFIC, error)
        else:
            self._complaints.pop(TRAFFIC, None)

    def _others(self) -> Iterator[BundleRef]:
        if self._traffic.canary is not None:
            yield self._traffic.canary.bundle
        yield from self._traffic.shadows

    def _publish(self, champion: LiveBundle | None) -> None:
        """Replace the routes, if they are others than before."""
        canary = self._canary(champion)
        found = [self._loaded.get(ref.fingerprint) for ref in self._traffic.shadows]
        shadows = tuple(live for live in found if live is not None)
        routes = Routes.of(champion, canary=canary, shadows=shadows)
        if routes != self._routes:
            self._routes = routes

    def _canary(self, champion: LiveBundle | None) -> tuple[Canary, LiveBundle] | None:
        plan = self._traffic.canary
        if plan is None or champion is None:
            return None
        live = self._loaded.get(plan.bundle.fingerprint)
        if live is None:
            return None
        ours, others = (one.prepared.bundle.contract for one in (champion, live))
        if any(ours[part] != others[part] for part in ("key_type", "context")):
            self._refuse(
                plan.bundle,
                BundleError(f"bundle {live.fingerprint} takes other requests than the champion"),
            )
            return None
        return plan, live

    def _get(self, ref: BundleRef) -> LiveBundle | None:
        """A bundle that is loaded or can be; a refused one is not tried again for a while."""
        known = self._loaded.get(ref.fingerprint)
        if known is not None:
            return known
        if time.monotonic() < self._refused.get(ref, 0.0):
            return None
        try:
            live = self.load(ref)
        except UNUSABLE as error:
            self._refuse(ref, error)
            return None
        self._refused.pop(ref, None)
        self._complaints.pop(ref.fingerprint, None)
        self._loaded[ref.fingerprint] = live
        self._num_loads += 1
        return live

    def _refuse(self, about: BundleRef | str, error: Exception) -> None:
        """Take note of a bundle, or of a file, that cannot be used."""
        fingerprint = about.fingerprint if isinstance(about, BundleRef) else None
        message = f"{type(error).__name__}: {error}"
        name = fingerprint or str(about)
        if self._complaints.get(name) != message:
            logger.warning("%s refused, what is live stays: %s", name, message)
            self._num_refusals += 1
            self._complaints[name] = message
        self._last_refusal = Refusal(fingerprint, message, format_time(datetime.now(UTC)))
        if isinstance(about, BundleRef):
            self._refused[about] = time.monotonic() + RETRY_SECONDS


def _ref(pointer: ChampionPointer) -> BundleRef:
    return BundleRef(pointer.version, pointer.fingerprint, pointer.path)

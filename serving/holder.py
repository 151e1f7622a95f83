"""The one bundle that answers, and the search for its successor.

A reader takes ``live`` once and works with what it got; the holder replaces the reference, never
the object, and only after the successor was verified and warmed. So there is no moment without a
bundle, and no answer from two.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from driftline.platform.bundle import Bundle
from driftline.platform.errors import BundleError, DriftlineError
from driftline.platform.registry import ChampionPointer, read_champion
from driftline.platform.windows import format_time
from driftline.serving.prepared import PreparedBundle

logger = logging.getLogger(__name__)

RETRY_SECONDS: Final = 30.0
"""A refused bundle is looked at again after this long, in case it was published again."""

UNUSABLE: Final = (DriftlineError, OSError, ValueError, KeyError, TypeError, RuntimeError)
"""What an incomplete, altered or foreign bundle raises while it is read; torch says RuntimeError
for weights of another shape. None of them may end a server that has a good bundle."""


@dataclass(frozen=True)
class LiveBundle:
    """A prepared bundle with its place in the registry."""

    version: int
    prepared: PreparedBundle
    promoted_at: datetime | None
    loaded_at: datetime
    load_seconds: float

    @property
    def fingerprint(self) -> str:
        """Names the bundle in every answer."""
        return self.prepared.bundle.fingerprint


@dataclass(frozen=True)
class Refusal:
    """A champion that was not taken."""

    fingerprint: str | None
    message: str
    at: str


class ChampionHolder:
    """Follows ``bundles/CHAMPION``.

    Args:
        bundles: Folder of bundles.
        prepare: Makes a verified bundle ready, warm-up included; may raise ``BundleError``.
    """

    def __init__(self, bundles: Path, *, prepare: Callable[[Bundle], PreparedBundle]) -> None:
        self._bundles = bundles
        self._prepare = prepare
        self._live: LiveBundle | None = None
        self._num_loads = 0
        self._num_refusals = 0
        self._last_refusal: Refusal | None = None
        self._refused: ChampionPointer | None = None
        self._retry_at = 0.0

    @property
    def live(self) -> LiveBundle | None:
        """The bundle that answers now; take it once for one answer."""
        return self._live

    def look(self) -> bool:
        """Look at the pointer once; verify, prepare and take a new champion. True if taken.

        Raises nothing for a champion that cannot be used: the old one stays, and ``status`` says
        what was wrong.
        """
        pointer: ChampionPointer | None = None
        try:
            pointer = read_champion(self._bundles)
            if pointer is None or not self._is_news(pointer):
                return False
            self._live = self._load(pointer)
        except UNUSABLE as error:
            self._refuse(pointer, error)
            return False
        self._num_loads += 1
        self._refused = None
        logger.info("serving version %d (%s)", pointer.version, pointer.fingerprint)
        return True

    def status(self) -> dict[str, Any]:
        """Loads and refusals so far."""
        last = self._last_refusal
        return {
            "loads": self._num_loads,
            "refusals": self._num_refusals,
            "last_refusal": None if last is None else asdict(last),
        }

    def _is_news(self, pointer: ChampionPointer) -> bool:
        if self._live is not None and self._live.fingerprint == pointer.fingerprint:
            return False
        return pointer != self._refused or time.monotonic() >= self._retry_at

    def _load(self, pointer: ChampionPointer) -> LiveBundle:
        started = time.perf_counter()
        bundle = Bundle.open(pointer.path)
        if bundle.fingerprint != pointer.fingerprint:
            raise BundleError(
                f"the registry names {pointer.fingerprint}, but {pointer.path} holds "
                f"{bundle.fingerprint}; publish or promote again"
            )
        prepared = self._prepare(bundle)
        return LiveBundle(
            version=pointer.version,
            prepared=prepared,
            promoted_at=pointer.promoted_at,
            loaded_at=datetime.now(UTC),
            load_seconds=round(time.perf_counter() - started, 3),
        )

    def _refuse(self, pointer: ChampionPointer | None, error: Exception) -> None:
        fingerprint = pointer.fingerprint if pointer else None
        message = f"{type(error).__name__}: {error}"
        known = self._last_refusal
        if known is None or (known.fingerprint, known.message) != (fingerprint, message):
            logger.warning("champion %s refused, the old one stays: %s", fingerprint, message)
            self._num_refusals += 1
        self._last_refusal = Refusal(fingerprint, message, format_time(datetime.now(UTC)))
        self._refused = pointer
        self._retry_at = time.monotonic() + RETRY_SECONDS

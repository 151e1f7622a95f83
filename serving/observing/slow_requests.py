"""Requests that took long, with where their time went, and how late the event loop was.

An observer: a request below the threshold costs one comparison. The newest slow ones stand in
memory for ``GET /v1/slow`` and, one JSON object a line, in a file of bounded size.
"""

import asyncio
import logging
import time
from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import orjson

from driftline.platform.observation_settings import SlowRequestSettings
from driftline.platform.windows import format_time
from driftline.serving.observing.bounded_folder import bound_folder
from driftline.serving.observing.decision_rows import latency_seconds
from driftline.serving.observing.repeating import Repeating
from driftline.serving.transport.requests import RefusedRequestError

if TYPE_CHECKING:
    from driftline.serving.answers import Answer

logger = logging.getLogger(__name__)

SUFFIX: Final = ".jsonl"
WRITE_SECONDS: Final = 1.0
KEEP_SECONDS: Final = 30 * 86_400.0


class LoopLag:
    """How late the event loop comes to what is due: a timer that looks at its own delay."""

    TICK_SECONDS: Final = 0.1
    NUM_KEPT: Final = 100

    def __init__(self) -> None:
        self._delays: deque[float] = deque([0.0], maxlen=self.NUM_KEPT)
        self._loop: asyncio.AbstractEventLoop | None = None

    def follow(self, loop: asyncio.AbstractEventLoop) -> None:
        """Measure a loop from now on; to be called on its thread."""
        if loop is not self._loop:
            self._loop = loop
            self._wait(loop)

    @property
    def last_seconds(self) -> float:
        """Delay of the last tick."""
        return self._delays[-1]

    @property
    def worst_seconds(self) -> float:
        """Longest delay of the last ten seconds."""
        return max(tuple(self._delays))

    def _wait(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.call_later(self.TICK_SECONDS, self._tick, loop, loop.time() + self.TICK_SECONDS)

    def _tick(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        self._delays.append(max(0.0, loop.time() - due))
        if loop is self._loop:
            self._wait(loop)


class SlowRequests:
    """Observer that remembers slow requests; get it going with :meth:`start`.

    Args:
        settings: What counts as slow, and how much is kept.
        folder: Of the files, one a replica.
        replica: Name of this copy.
    """

    def __init__(self, settings: SlowRequestSettings, *, folder: Path, replica: str) -> None:
        self.lag = LoopLag()
        self.num_slow = 0
        self._settings = settings
        self._threshold = settings.threshold_ms / 1e3
        self._folder = folder
        self._path = folder / f"{replica}{SUFFIX}"
        self._replica = replica
        self._kept: deque[dict[str, Any]] = deque(maxlen=settings.capacity)
        self._unwritten: deque[dict[str, Any]] = deque(maxlen=settings.capacity)
        self._failed = False
        self._thread = Repeating("slow-requests", seconds=WRITE_SECONDS, action=self.write)

    def start(self) -> None:
        """Start the thread that writes."""
        self._thread.start()

    def answered(self, answer: "Answer") -> None:
        """Keep the request if it was slow."""
        seconds = latency_seconds(answer.stages)
        if self.lag._loop is None:
            self._follow_loop()
        if seconds < self._threshold:
            return
        self.num_slow += 1
        found = {
            "at": time.time(),
            "total_ms": 1e3 * seconds,
            "stages_ms": answer.stages,
            "num_ads": len(answer.probabilities),
            "bundle": answer.live.fingerprint,
            "arm": answer.live.arm,
            "form": answer.form,
            "page_product_id": answer.request.page,
            "request_id": answer.request_id,
            "features": answer.tiers,
            "num_fallbacks": len(answer.ad_fallbacks) + (answer.page_fallback is not None),
            "loop_lag_ms": 1e3 * self.lag.last_seconds,
        }
        self._kept.append(found)
        self._unwritten.append(found)

    def refused(self, error: RefusedRequestError) -> None:
        """A refusal has no breakdown."""

    def close(self) -> None:
        """Write what waits."""
        self._thread.close()
        self.write()

    def to_json(self) -> dict[str, Any]:
        """The slowest first, of the last minutes."""
        since = time.time() - 60 * self._settings.minutes
        kept = [_readable(found) for found in tuple(self._kept) if found["at"] >= since]
        return {
            "replica": self._replica,
            "threshold_ms": self._settings.threshold_ms,
            "minutes": self._settings.minutes,
            "slow_since_start": self.num_slow,
            "loop_lag_ms": {
                "last": round(1e3 * self.lag.last_seconds, 3),
                "worst": round(1e3 * self.lag.worst_seconds, 3),
            },
            "requests": sorted(kept, key=lambda found: -found["total_ms"]),
        }

    def write(self) -> None:
        """Append what is new to the file; a disk that refuses loses it."""
        lines = []
        while self._unwritten:
            lines.append(orjson.dumps(_readable(self._unwritten.popleft())) + b"\n")
        if not lines:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            half = self._settings.max_bytes // 2
            if self._path.exists() and self._path.stat().st_size > half // 2:
                self._path.replace(self._path.with_name(f"{self._replica}-before{SUFFIX}"))
            with self._path.open("ab") as file:
                file.writelines(lines)
            bound_folder(
                self._folder,
                suffix=SUFFIX,
                keep_seconds=KEEP_SECONDS,
                max_bytes=self._settings.max_bytes,
            )
        except OSError as error:
            if not self._failed:
                logger.warning("slow requests are not written to %s: %s", self._path, error)
            self._failed = True

    def _follow_loop(self) -> None:
        try:
            self.lag.follow(asyncio.get_running_loop())
        except RuntimeError:  # scored without a server, e.g. `driftline score`
            return


def _readable(found: dict[str, Any]) -> dict[str, Any]:
    return {
        **found,
        "at": format_time(datetime.fromtimestamp(found["at"], UTC)),
        "total_ms": round(found["total_ms"], 3),
        "stages_ms": {name: round(1e3 * value, 3) for name, value in found["stages_ms"].items()},
        "features": {
            tier: {"age_seconds": None if age != age else round(age, 3), "stale": stale}
            for tier, (age, stale) in found["features"].items()
        },
        "loop_lag_ms": round(found["loop_lag_ms"], 3),
    }

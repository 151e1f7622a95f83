"""Counts errors and times of the arms while a canary runs, and writes them down now and then."""

import logging
import time
from pathlib import Path
from typing import Final

from driftline.platform.arm_health import ArmCounts, ArmKey, health_folder, write_health
from driftline.platform.settings import DriftlineSettings
from driftline.platform.workspace import Workspace
from driftline.serving.answers import Answer
from driftline.serving.rollout.routes import LiveBundle
from driftline.serving.transport.requests import RefusedRequestError

logger = logging.getLogger(__name__)

KEEP_SECONDS: Final = 7 * 24 * 3600.0
"""Files of replicas that wrote nothing for so long are removed."""
MAX_KEPT: Final = 24
"""Newest arms that are remembered; an experiment has two, or a few where its champion changed."""


class ArmCounter:
    """Observer that counts; :meth:`write` belongs to the thread that follows the bundles.

    Without a canary it costs one comparison a request.
    """

    def __init__(self, settings: DriftlineSettings, *, replica: str) -> None:
        self._folder = health_folder(Workspace.of(settings))
        self._path = self._folder / f"{replica}.json"
        self._seconds = settings.serving.delivery.health_seconds
        self._counts: dict[ArmKey, ArmCounts] = {}
        self._written_at = -self._seconds
        self._written_attempts = 0
        self._error: str | None = None

    def answered(self, answer: Answer) -> None:
        """Count an answer and the time it took in the replica."""
        if answer.live.experiment is not None:
            stages = answer.stages
            total = stages.get("total")
            self._of(answer.live).add(sum(stages.values()) if total is None else total)

    def failed(self, live: LiveBundle) -> None:
        """A bundle could not answer a request that another one, or none, then answered."""
        if live.experiment is not None:
            self._of(live).errors += 1

    def refused(self, error: RefusedRequestError) -> None:
        """Says nothing about a bundle."""

    def write(self) -> None:
        """Replace the file, if it is time and there is news. A full disk is logged, once."""
        now = time.monotonic()
        attempts = sum(counts.attempts for counts in list(self._counts.values()))
        if now - self._written_at < self._seconds or attempts == self._written_attempts:
            return
        self._written_at, self._written_attempts = now, attempts
        for key in list(self._counts)[:-MAX_KEPT]:
            del self._counts[key]
        try:
            write_health(self._path, dict(self._counts))
            self._error = None
        except OSError as error:
            if self._error != str(error):
                logger.warning("arms not written down: %s", error)
            self._error = str(error)

    def remove_old(self, *, now: float) -> None:
        """Remove files that were not written for a week. ``now`` in seconds since the epoch."""
        for path in self._folder.glob("*.json"):
            if _age(path, now=now) > KEEP_SECONDS:
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Write what was counted last."""
        self._written_at = -self._seconds
        self.write()

    def _of(self, live: LiveBundle) -> ArmCounts:
        key = ArmKey(live.experiment or "", live.arm, live.fingerprint)
        counts = self._counts.get(key)
        if counts is None:
            counts = self._counts[key] = ArmCounts()
        return counts


def _age(path: Path, *, now: float) -> float:
    try:
        return now - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0

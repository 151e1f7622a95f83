"""Shadows score what was answered and answer nothing: how would another bundle have scored?

They see the same request and the same feature values, later, on a thread of their own that uses a
bounded share of a core. What does not fit is dropped and counted.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from driftline.platform.bootstrap import json_number
from driftline.platform.delivery_settings import DeliverySettings
from driftline.platform.metrics import logit
from driftline.serving.answers import Answer
from driftline.serving.rollout.holder import UNUSABLE
from driftline.serving.rollout.routes import LiveBundle
from driftline.serving.transport.requests import RefusedRequestError

logger = logging.getLogger(__name__)

Float64 = NDArray[np.float64]

IDLE_SECONDS: Final = 0.05
"""How long the thread sleeps when nothing waits; a request must not have to wake it."""


@dataclass
class Agreement:
    """How a shadow's scores compare with the answers; sums, so that they can go on."""

    bundle: str
    version: int
    num_requests: int = 0
    num_ads: int = 0
    num_errors: int = 0
    difference: float = 0.0
    """Sum over ads of the absolute difference of logits."""
    largest: float = 0.0
    num_ranked: int = 0
    """Requests with two ads or more whose scores are not all alike."""
    correlation: float = 0.0
    num_other_top: int = 0
    seconds: float = field(default=0.0)

    def add(self, answered_B: Float64, shadow_B: Float64, *, seconds: float) -> None:
        """Count one request. ``[B]`` probabilities each."""
        self.num_requests += 1
        self.num_ads += len(answered_B)
        self.seconds += seconds
        moved_B = np.abs(logit(answered_B) - logit(shadow_B))
        self.difference += float(moved_B.sum())
        self.largest = max(self.largest, float(moved_B.max()))
        correlation = rank_correlation(answered_B, shadow_B)
        if not np.isnan(correlation):
            self.num_ranked += 1
            self.correlation += correlation
            # The shadow's first choice is another one only if the answer ranks it lower.
            top = answered_B[int(np.argmax(shadow_B))]
            self.num_other_top += bool(top < answered_B.max())

    def to_json(self) -> dict[str, Any]:
        """Means so far; null where there is nothing to say."""
        ranked, requests = self.num_ranked or float("nan"), self.num_requests or float("nan")
        return {
            "bundle": self.bundle,
            "version": self.version,
            "requests": self.num_requests,
            "errors": self.num_errors,
            "mean_logit_difference": json_number(self.difference / (self.num_ads or float("nan"))),
            "largest_logit_difference": self.largest,
            "mean_rank_correlation": json_number(self.correlation / ranked),
            "share_other_top_ad": json_number(self.num_other_top / ranked),
            "mean_milliseconds": json_number(1e3 * self.seconds / requests),
        }


class ShadowScorer:
    """Observer that scores what was answered with every shadow.

    Args:
        settings: How much may wait, and how much of a core may be used.
    """

    def __init__(self, settings: DeliverySettings) -> None:
        self._max_waiting = settings.max_shadow_waiting
        self._load = settings.max_shadow_load
        self._queue: deque[Answer] = deque()
        self._shadows: tuple[LiveBundle, ...] = ()
        self._agreements: Mapping[str, Agreement] = {}
        self._num_dropped = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def follow(self, shadows: tuple[LiveBundle, ...]) -> None:
        """Score with these from now on; a new one starts with new figures."""
        if shadows == self._shadows:
            return
        known = self._agreements
        self._agreements = {
            live.fingerprint: known.get(live.fingerprint)
            or Agreement(live.fingerprint, live.version)
            for live in shadows
        }
        self._shadows = shadows
        if not shadows:
            self._queue.clear()  # what waits holds on to bundles that may be gone
        elif self._thread is None:
            self._thread = threading.Thread(target=self._run, name="shadows", daemon=True)
            self._thread.start()

    def answered(self, answer: Answer) -> None:
        """Put the answer in line, if there is a shadow and room."""
        if not self._shadows:
            return
        if len(self._queue) >= self._max_waiting:
            self._num_dropped += 1
            return
        self._queue.append(answer)

    def refused(self, error: RefusedRequestError) -> None:
        """Nothing to compare with."""

    def close(self) -> None:
        """End the thread; what waits is left."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def status(self) -> dict[str, Any]:
        """Figures of each shadow, and how many requests wait or were dropped."""
        return {
            "waiting": len(self._queue),
            "dropped": self._num_dropped,
            "bundles": [agreement.to_json() for agreement in self._agreements.values()],
        }

    def score_next(self) -> bool:
        """Score the request that waits longest; whether there was one."""
        try:
            answer = self._queue.popleft()
        except IndexError:
            return False
        shadows, agreements = self._shadows, self._agreements
        for live in shadows:
            agreement = agreements.get(live.fingerprint)
            if agreement is not None and live.fingerprint != answer.live.fingerprint:
                self._score(answer, live, agreement)
        return True

    def _score(self, answer: Answer, live: LiveBundle, agreement: Agreement) -> None:
        started = time.perf_counter()
        try:
            found_B = live.prepared.scorer.score(answer.read.columns)
            if not np.isfinite(found_B).all():
                raise ValueError(f"bundle {live.fingerprint} answers {found_B}")
        except UNUSABLE as error:
            if not agreement.num_errors:
                logger.warning("shadow %s failed: %s", live.fingerprint, error)
            agreement.num_errors += 1
            return
        agreement.add(answer.probabilities, found_B, seconds=time.perf_counter() - started)

    def _run(self) -> None:
        while not self._stop.is_set():
            started = time.perf_counter()
            if not self.score_next():
                self._stop.wait(IDLE_SECONDS)
                continue
            busy = time.perf_counter() - started
            self._stop.wait(busy * (1 / self._load - 1))


def rank_correlation(first_B: Float64, second_B: Float64) -> float:
    """Spearman's: the correlation of mid-ranks; NaN when one side does not rank at all."""
    ranks = [_mid_ranks(values_B) for values_B in (first_B, second_B)]
    centred = [rank - rank.mean() for rank in ranks]
    size = float(np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return float(centred[0] @ centred[1]) / size if size else float("nan")


def _mid_ranks(values_B: Float64) -> Float64:
    _, places, counts = np.unique(values_B, return_inverse=True, return_counts=True)
    middles = np.cumsum(counts) - (counts - 1) / 2
    return np.asarray(middles[places], np.float64)

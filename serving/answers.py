"""What is known once a request is answered: for the client, the decision log, the metrics."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from driftline.features.online_read import OnlineRead
from driftline.serving.rollout.routes import Arm, LiveBundle
from driftline.serving.transport.requests import RefusedRequestError, ScoreRequest


@dataclass(frozen=True)
class Answer:
    """One request, scored by one bundle over one feature snapshot."""

    request: ScoreRequest
    request_id: str
    """The request's own, or one made up: what the client and the decision log call it."""
    live: LiveBundle
    """The bundle that scored it."""
    now: datetime
    """The moment that the features stand for."""
    probabilities: NDArray[np.float64]
    """In the order of the request. ``[B]``."""
    tiers: Mapping[str, tuple[float, bool]]
    """Age in seconds of the oldest value used of each tier, and whether it is stale."""
    page_fallback: str | None
    """Why the page was not scored as usual."""
    ad_fallbacks: Mapping[int, str]
    """The same for ads, by their place in the request."""
    read: OnlineRead
    """The served feature values."""
    stages: dict[str, float]
    """Seconds by stage: ``parse``, ``features``, ``fuse``; and before observers are told, where a
    server answers, ``wait``, ``write`` and ``total``."""
    features_as_of: datetime | None = None
    """Moment up to which the feature snapshot was known to be complete."""
    form: str = "json"
    """``WireForm.name`` of the request and the answer."""

    @property
    def arm(self) -> Arm:
        """The arm of an A/B test that the request belongs to; ``champion`` without a test."""
        return self.live.arm

    @property
    def experiment(self) -> str | None:
        """Names the A/B test that runs, and its share; ``None`` without one."""
        return self.live.experiment


class Observer(Protocol):
    """Is told of every request after it was answered, on the thread that answered it.

    Must return within microseconds and never raise: whatever takes longer belongs on a thread of
    the observer's own, behind a bounded queue.
    """

    def answered(self, answer: Answer) -> None:
        """A request was scored and the answer handed to the client."""

    def refused(self, error: RefusedRequestError) -> None:
        """A request was refused (4xx) or could not be served (5xx)."""

    def close(self) -> None:
        """The server stops: write what is waiting."""

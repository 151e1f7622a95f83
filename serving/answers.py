"""What is known once a request is answered: for the client, the decision log, the metrics."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from driftline.serving.holder import LiveBundle
from driftline.serving.requests import RefusedRequestError, ScoreRequest


@dataclass(frozen=True)
class Answer:
    """One request, scored by one bundle over one feature snapshot."""

    request: ScoreRequest
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
    columns: Callable[[], Mapping[str, NDArray[Any]]]
    """The served feature values, a frame's columns; put together when first asked for."""
    stages: Mapping[str, float]
    """Seconds by stage: ``parse``, ``features``, ``fuse``."""


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

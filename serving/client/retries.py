"""When a client asks again: scoring changes nothing, so a request that was lost may be repeated."""

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from driftline.platform.errors import RequestError


class UnavailableError(RequestError):
    """The server could not answer, also when asked again; the request itself may be fine."""


@dataclass(frozen=True)
class Retries:
    """Attempts with pauses that double and are drawn at random, so that clients spread out.

    The n-th pause is drawn between 0 and ``first_seconds * 2 ** n`` ("full jitter"), is at least
    what the server asked for by ``Retry-After``, and at most ``max_seconds``.
    """

    num_attempts: int = 3
    """The first one counts; 1 never asks again."""
    first_seconds: float = 0.05
    max_seconds: float = 5.0
    draw: Callable[[float, float], float] = random.uniform
    sleep: Callable[[float], None] = time.sleep

    def attempts(self) -> "Iterator[Attempt]":
        """One attempt after the other; each pauses before the next unless it is the last."""
        for number in range(self.num_attempts):
            attempt = Attempt(is_last=number + 1 == self.num_attempts)
            yield attempt
            if not attempt.is_last:
                self.sleep(self.pause(number, attempt.retry_after))

    def pause(self, number: int, retry_after: float | None = None) -> float:
        """Seconds between attempt ``number``, from 0, and the next."""
        drawn = self.draw(0.0, min(self.first_seconds * 2**number, self.max_seconds))
        return min(max(drawn, retry_after or 0.0), self.max_seconds)


@dataclass
class Attempt:
    """One of several."""

    is_last: bool
    retry_after: float | None = None
    """To be filled with what the server asked for."""


def read_retry_after(value: str | None) -> float | None:
    """The seconds of a ``Retry-After`` header; ``None`` for a date or anything else."""
    return float(value) if value is not None and value.isdigit() else None

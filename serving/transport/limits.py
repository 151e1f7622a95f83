"""Back-pressure in one replica: who waits, for how long, and how much they may hold in memory.

Scoring holds the event loop, so a replica serves one request after the other. Without a line of
its own, requests would queue where nobody can count them: in the loop and in sockets.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial
from types import CoroutineType
from typing import Any, Final

from driftline.serving.transport.requests import RefusedRequestError, refuse

RETRY_SECONDS: Final = 1
"""What a client that is turned away is told to wait."""


class WaitingLine:
    """Gives requests their turn, first come first served, one in each round of the event loop.

    Between two turns the loop looks at its sockets. So a newcomer is counted, a client that hung up
    is noticed, and nobody's arrival is older than one turn when it is first seen. When nobody
    waits, a turn costs nothing.

    Args:
        max_waiting: Longest line.
        max_seconds: Longest wait; later, an answer is of no use.
    """

    def __init__(self, *, max_waiting: int, max_seconds: float) -> None:
        self._max_waiting = max_waiting
        self._max_seconds = max_seconds
        self._line: deque[tuple[float, Callable[[float], None]]] = deque()
        self._taken = False

    def __len__(self) -> int:
        """How many wait."""
        return len(self._line)

    def check(self) -> None:
        """Turn a newcomer away while the line is full.

        Raises:
            RefusedRequestError: 503, to be sent again later.
        """
        if len(self._line) >= self._max_waiting:
            raise too_busy(f"{len(self._line)} requests wait already", allowed=self._max_waiting)

    def enter(self, serve: Callable[[float], None]) -> None:
        """Have ``serve`` called in its turn, with the seconds it waited; at once if nobody waits.

        Raises:
            RefusedRequestError: the line is full.
        """
        loop = asyncio.get_running_loop()
        if self._taken:
            self.check()
            self._line.append((loop.time(), serve))
        else:
            self._taken = True
            loop.call_soon(self._next, loop)
            serve(0.0)

    def check_wait(self, seconds: float) -> None:
        """Turn away who waited longer than an answer is of use.

        Raises:
            RefusedRequestError: 503, to be sent again later.
        """
        if seconds > self._max_seconds:
            raise waited_too_long(seconds, allowed=self._max_seconds)

    async def turn(self) -> None:
        """Wait until it is this request's turn to be scored.

        Raises:
            RefusedRequestError: the line is full, or the wait was too long.
        """
        place: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self.enter(partial(_wake, place))
        self.check_wait(await place)

    def _next(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._line:
            self._taken = False
            return
        since, serve = self._line.popleft()
        try:
            serve(loop.time() - since)
        finally:
            loop.call_soon(self._next, loop)  # after whatever was woken


def _wake(place: asyncio.Future[float], waited: float) -> None:
    if not place.done():  # else whoever waited has given up
        place.set_result(waited)


class HeldBytes:
    """Counts the bytes of bodies that have not arrived completely, of all clients together.

    Args:
        max_bytes: Most that may be held.
    """

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held = 0

    @property
    def held(self) -> int:
        """Bytes held now."""
        return self._held

    def take(self, num_bytes: int) -> None:
        """Hold some more.

        Raises:
            RefusedRequestError: 503, to be sent again later.
        """
        if self._held + num_bytes > self._max_bytes:
            raise too_busy("too many unfinished requests", allowed=self._max_bytes)
        self._held += num_bytes

    def give_back(self, num_bytes: int) -> None:
        """They were read or thrown away."""
        self._held -= num_bytes


def too_busy(reason: str, *, allowed: Any = None) -> RefusedRequestError:
    """The refusal of a request that may be sent again in a moment."""
    return refuse(
        f"the server is busy: {reason}",
        status=503,
        code="overloaded",
        allowed=allowed,
        hint=f"send it again after {RETRY_SECONDS} s; more replicas: serving.num_replicas",
    )


def waited_too_long(seconds: float, *, allowed: float) -> RefusedRequestError:
    """The refusal of a request whose turn came too late for its answer to be of use."""
    return refuse(
        f"the request waited {seconds:.3f} s for its turn, {allowed:g} s are allowed",
        status=503,
        code="timed_out",
        allowed={"request_timeout_seconds": allowed},
        hint=f"send it again after {RETRY_SECONDS} s; more replicas: serving.num_replicas",
    )


def body_too_large(num_bytes: int, *, max_bytes: int) -> RefusedRequestError:
    """The refusal of a large request."""
    return refuse(
        f"the body may have {max_bytes:,} bytes, got {num_bytes:,} or more",
        status=413,
        code="body_too_large",
        allowed={"max_bytes": max_bytes},
        hint="send fewer ads in each request, or raise serving.max_request_bytes",
    )


def poll(receive: Callable[[], Any]) -> Any:
    """What a coroutine function returns at once; ``None`` if it would wait.

    A coroutine that waits is closed again, which leaves a queue or an event as it was. Cheaper than
    a timeout around something that is nearly always there.
    """
    waiting = receive()
    if not isinstance(waiting, CoroutineType):
        return None
    try:
        waiting.send(None)
    except StopIteration as done:
        return done.value
    waiting.close()
    return None

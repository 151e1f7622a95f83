"""What stands before Ray Serve in a process that listens: which requests and headers reach it.

**Scoring goes past Ray Serve.** In a replica the guard stands between uvicorn and what Ray Serve
does for each request: two identifiers, metadata, a context, a semaphore, counters, two wrappers
around each message, together 0.15 ms. They serve what we do not use: handles, multiplexed models,
scaling by ongoing requests, an access log. So ``/v1/score`` is handed to our own face here, on the
same event loop, and everything else goes on. Placement, health, roll-out and draining stay Ray
Serve's: a replica that goes reports itself unwell, closes its listener and stops uvicorn, which
finishes what is under way. Ray Serve's own counts and its ``X-Request-ID`` know nothing of these
requests; ``observing/`` does. There is no setting for it: nothing gets better by the longer way.

**Headers.** Ray Serve takes orders from clients in headers: how long a request may take, which of
its models, under which id. It decodes them without care, so that one wrong byte becomes a 500. Only
what our own face reads is let through.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final, Protocol, TypeAlias, runtime_checkable

from starlette.middleware import Middleware

from driftline.platform.loopback import bind_serve_grpc
from driftline.serving.transport.paths import SCORE

Application: TypeAlias = Callable[[MutableMapping[str, Any], Any, Any], Awaitable[None]]

MIDDLEWARES: Final = "driftline.serving.transport.guard.middlewares"
"""For ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH``: Ray Serve calls it where it is to listen."""
GRPC_HOST: Final = "DRIFTLINE_GRPC_HOST"
"""Where gRPC servers listen; Ray Serve has no setting for it."""

READ: Final = frozenset(
    (b"content-type", b"content-length", b"content-encoding", b"authorization", b"accept")
)
NOT_WATCHED: Final = (b"x-request-disconnect-disabled", b"?1")
"""Ray Serve need not watch for a client that hangs up, with two tasks a request: our face does."""


@runtime_checkable
class Replica(Protocol):
    """A deployment that the guard may hand requests to."""

    face: Application
    """Answers ``POST /v1/score``."""
    loop: asyncio.AbstractEventLoop
    """The only event loop that it may be used on."""


def middlewares() -> list[Middleware]:
    """The guard; and gRPC servers of this process will listen where the settings say."""
    host = os.environ.get(GRPC_HOST)
    if host:
        bind_serve_grpc(host)
    return [Middleware(Guard)]


class Guard:
    """An ASGI middleware: scoring to our face, the rest to Ray Serve without strange headers."""

    def __init__(self, app: Application) -> None:
        self._app = app
        self._face: Application | None = None

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        """One request."""
        app = self._app
        if scope["type"] == "http":
            if scope["path"] == SCORE:
                self._face = self._face or face_of_this_process()
                app = self._face or app
            if app is self._app:
                scope["headers"] = [pair for pair in scope["headers"] if pair[0] in READ]
                scope["headers"].append(NOT_WATCHED)
        await app(scope, receive, send)


def face_of_this_process() -> Application | None:
    """The face of the replica that this process runs; ``None`` where there is none of ours.

    A proxy's process has none. Nor has a replica whose code Ray Serve runs on a thread of its own,
    as it does without ``RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD=0``.
    """
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        replica = serve.get_replica_context().servable_object
    except RayServeException:
        return None
    if not isinstance(replica, Replica) or replica.loop is not asyncio.get_running_loop():
        return None
    return replica.face

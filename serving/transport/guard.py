"""What stands before Ray Serve in a process that listens: which requests and headers reach it.

**Scoring goes past Ray Serve.** In a replica the guard stands between uvicorn and what Ray Serve
does for each request: two identifiers, metadata, a context, a semaphore, counters, two wrappers
around each message, together 0.15 ms. They serve what we do not use: handles, multiplexed models,
scaling by ongoing requests, an access log. So ``/v1/score`` is handed to our own face here, on the
same event loop, and everything else goes on. Most of it does not even come here, but takes the
short way (``short_way.py``). Placement, health, roll-out and draining stay Ray
Serve's: a replica that goes reports itself unwell, closes its listener and stops uvicorn, which
finishes what is under way. Ray Serve's own counts and its ``X-Request-ID`` know nothing of these
requests; ``observing/`` does. There is no setting for it: nothing gets better by the longer way.

**Headers.** Ray Serve takes orders from clients in headers: how long a request may take, which of
its models, under which id. It decodes them without care, so that one wrong byte becomes a 500. Only
what our own face reads is let through.
"""

import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final, TypeAlias

from starlette.middleware import Middleware

from driftline.platform.loopback import bind_serve_grpc
from driftline.serving.transport.paths import SCORE
from driftline.serving.transport.replica_face import Face, face_of_this_process
from driftline.serving.transport.short_way import take_short_way

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


def middlewares() -> list[Middleware]:
    """The guard; and servers of this process will listen where and speak what we want."""
    host = os.environ.get(GRPC_HOST)
    if host:
        bind_serve_grpc(host)
    take_short_way()
    return [Middleware(Guard)]


class Guard:
    """An ASGI middleware: scoring to our face, the rest to Ray Serve without strange headers."""

    def __init__(self, app: Application) -> None:
        self._app = app
        self._face: Face | None = None

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

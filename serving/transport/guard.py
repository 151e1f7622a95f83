"""What stands before Ray Serve in a process that listens: which headers reach it.

Ray Serve takes orders from clients in headers: how long a request may take, which of its models,
under which id. It decodes them without care, so that one wrong byte becomes a 500. Only what our
own face reads is let through.
"""

import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from starlette.middleware import Middleware

from driftline.platform.loopback import bind_serve_grpc

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
    """The guard; and gRPC servers of this process will listen where the settings say."""
    host = os.environ.get(GRPC_HOST)
    if host:
        bind_serve_grpc(host)
    return [Middleware(HeaderGuard)]


class HeaderGuard:
    """An ASGI middleware that lets through the headers that somebody reads."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        """One request."""
        if scope["type"] == "http":
            scope["headers"] = [pair for pair in scope["headers"] if pair[0] in READ]
            scope["headers"].append(NOT_WATCHED)
        await self._app(scope, receive, send)

"""The HTTP face: a handful of routes in plain ASGI, every refusal with a body.

Plain ASGI because a web framework costs a fifth of the throughput, and there is one route to serve.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

import orjson

from driftline.platform.settings import ServingSettings
from driftline.serving.transport.limits import WaitingLine
from driftline.serving.transport.openapi import openapi_json, openapi_page
from driftline.serving.transport.pages import (
    Message,
    Page,
    Receive,
    Send,
    refusal,
    send_page,
)
from driftline.serving.transport.paths import DOCS, HEALTH, OPENAPI, SCORE, STATUS
from driftline.serving.transport.requests import RefusedRequestError, refuse, show
from driftline.serving.transport.score_route import ScoreRoute, Scoring, failed
from driftline.serving.transport.short_way import Exchange

READ: Final = ("GET", "HEAD")
METHODS: Final = {SCORE: ("POST",), **dict.fromkeys((STATUS, HEALTH, OPENAPI, DOCS), READ)}
HTML: Final = "text/html; charset=utf-8"


class ScoringService(Scoring, Protocol):
    """What answers behind the HTTP face."""

    def status(self) -> dict[str, Any]:
        """What is served, how fresh it is, and since when."""

    @property
    def ready(self) -> bool:
        """Whether there is a bundle to score with."""

    @property
    def contract(self) -> Mapping[str, Any] | None:
        """Key type and context features of the bundle that answers now."""


class HttpFace:
    """An ASGI application over a :class:`ScoringService`; used by one event loop.

    Args:
        service: Answers.
        settings: Limits, and what the OpenAPI page tells of them.
        pages: Further routes to read, by path.
    """

    def __init__(
        self,
        service: ScoringService,
        settings: ServingSettings,
        *,
        pages: Mapping[str, Callable[[], Page]] | None = None,
    ) -> None:
        self._pages = dict(pages or {})
        self._methods = METHODS | dict.fromkeys(self._pages, READ)
        self._service = service
        self._settings = settings
        self._route = ScoreRoute(service, settings)

    @property
    def line(self) -> WaitingLine:
        """Where requests wait for their turn; the gRPC face stands in the same."""
        return self._route.line

    def take(self, exchange: Exchange) -> None:
        """Answer a scoring request that has arrived whole, without ASGI."""
        self._route.take(exchange)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One connection's request, or the server's start and stop."""
        if scope["type"] == "lifespan":
            await _acknowledge(receive, send)
            return
        if scope["type"] != "http":
            await _hang_up(scope, send)
            return
        path, method = scope["path"], scope["method"]
        try:
            if path == SCORE and method == "POST":
                await self._route.page(scope, receive, send)
            else:
                await send_page(send, self._page(path, method), empty=method == "HEAD")
        except RefusedRequestError as error:
            await self._refuse(error, send)
        except Exception:
            await self._refuse(failed(f"{method} {path}"), send)

    async def _refuse(self, error: RefusedRequestError, send: Send) -> None:
        self._service.refused(error)
        await send_page(send, refusal(error))

    def _page(self, path: str, method: str) -> Page:
        methods = self._methods.get(path)
        if methods is None:
            raise refuse(
                f"there is nothing at {show(path)}",
                status=404,
                code="unknown_path",
                allowed=[f"{verbs[0]} {known}" for known, verbs in self._methods.items()],
            )
        if method not in methods:
            raise refuse(
                f"{path} takes {methods[0]}, got {show(method)}",
                status=405,
                code="wrong_method",
                allowed=list(methods),
            )
        if path in self._pages:
            return self._pages[path]()
        if path == STATUS:
            return Page(orjson.dumps(self._service.status()))
        if path == HEALTH:
            ready = self._service.ready
            return Page(orjson.dumps({"ready": ready}), status=200 if ready else 503)
        contract = self._service.contract
        if path == OPENAPI:
            return Page(orjson.dumps(openapi_json(self._settings, contract)))
        return Page(openapi_page(self._settings, contract).encode(), content_type=HTML)


async def _hang_up(scope: Message, send: Send) -> None:
    """Nobody speaks WebSocket here."""
    if "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": 1008})
        return
    page = refusal(refuse("there is no WebSocket here", status=404, code="unknown_path"))
    start = {"type": "websocket.http.response.start", "status": page.status}
    await send({**start, "headers": page.headers})
    await send({"type": "websocket.http.response.body", "body": page.body})


async def _acknowledge(receive: Receive, send: Send) -> None:
    """Nothing to do at start and stop: the replica holds the state."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return

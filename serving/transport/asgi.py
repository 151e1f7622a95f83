"""The HTTP face: a handful of routes in plain ASGI, every refusal with a body.

Plain ASGI because a web framework costs a fifth of the throughput, and there is one route to serve.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeAlias

import orjson

from driftline.platform.settings import ServingSettings
from driftline.serving.answers import Answer
from driftline.serving.transport.limits import (
    RETRY_SECONDS,
    HeldBytes,
    WaitingLine,
    body_too_large,
    poll,
)
from driftline.serving.transport.openapi import openapi_json, openapi_page
from driftline.serving.transport.paths import DOCS, HEALTH, OPENAPI, SCORE, STATUS
from driftline.serving.transport.requests import RefusedRequestError, refuse, show
from driftline.serving.transport.wire import JSON, JsonForm, WireForm
from driftline.serving.transport.wire_protobuf import ProtobufForm

logger = logging.getLogger(__name__)

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]

READ: Final = ("GET", "HEAD")
METHODS: Final = {SCORE: ("POST",), **dict.fromkeys((STATUS, HEALTH, OPENAPI, DOCS), READ)}
HTML: Final = "text/html; charset=utf-8"
MAX_HELD: Final = 64
"""Unfinished bodies may hold so many times the largest body."""
GONE: Final = "http.disconnect"


class ScoringService(Protocol):
    """What answers behind the HTTP face."""

    def answer(self, body: bytes, form: WireForm) -> Answer:
        """Parse and score one request; raises ``RefusedRequestError``."""

    def sent(self, answer: Answer) -> None:
        """The answer has been handed to the client."""

    def refused(self, error: RefusedRequestError) -> None:
        """A request was refused; told once, however often this is called."""

    def status(self) -> dict[str, Any]:
        """What is served, how fresh it is, and since when."""

    @property
    def ready(self) -> bool:
        """Whether there is a bundle to score with."""

    @property
    def contract(self) -> Mapping[str, Any] | None:
        """Key type and context features of the bundle that answers now."""


@dataclass(frozen=True)
class Page:
    """What a route other than scoring gives."""

    body: bytes
    status: int = 200
    content_type: str = JSON


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
        self._forms: dict[bytes, WireForm] = {}
        for form in (JsonForm(), ProtobufForm()):
            self._forms[form.content_type.encode()] = form
        self._line = WaitingLine(
            max_waiting=settings.max_waiting, max_seconds=settings.request_timeout_seconds
        )
        self._held = HeldBytes(max_bytes=MAX_HELD * settings.max_request_bytes)

    @property
    def line(self) -> WaitingLine:
        """Where requests wait for their turn; the gRPC face stands in the same."""
        return self._line

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One connection's request, or the server's start and stop."""
        if scope["type"] == "lifespan":
            await _acknowledge(receive, send)
            return
        if scope["type"] != "http":
            await _hang_up(scope, send)
            return
        try:
            if scope["path"] == SCORE and scope["method"] == "POST":
                await self._score(scope, receive, send)
            else:
                page = self._page(scope["path"], scope["method"])
                await _send(
                    send,
                    page.body,
                    status=page.status,
                    content_type=page.content_type.encode(),
                    empty=scope["method"] == "HEAD",
                )
        except RefusedRequestError as error:
            await self._refuse(error, send)
        except Exception:
            logger.exception("%s %s failed", scope["method"], scope["path"])
            mistake = "a mistake of the server's; the log of its replica says more"
            await self._refuse(refuse(mistake, status=500, code="internal_error"), send)

    async def _refuse(self, error: RefusedRequestError, send: Send) -> None:
        self._service.refused(error)
        extra = []
        if error.status == 405:
            extra.append((b"allow", ", ".join(error.allowed).encode()))
        if error.status == 503:
            extra.append((b"retry-after", str(RETRY_SECONDS).encode()))
        if error.status in (408, 413):  # the rest of the body is not worth reading
            extra.append((b"connection", b"close"))
        body = orjson.dumps(error.body, default=str)
        await _send(send, body, status=error.status, headers=extra)

    # --- scoring --------------------------------------------------------------------------

    async def _score(self, scope: Message, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        form = self._form(headers)
        self._line.check()
        body = await self._read_body(headers, receive)
        if body is None:
            return
        self._held.take(len(body))
        arrived = time.perf_counter()
        try:
            await self._line.turn()
        finally:
            self._held.give_back(len(body))
        if (message := poll(receive)) is not None and message["type"] == GONE:
            return
        begun = time.perf_counter()
        answer = self._service.answer(body, form)
        scored = time.perf_counter()
        content = form.write(answer)
        written = time.perf_counter()
        await _send(send, content, content_type=form.content_type.encode())
        answer.stages.update(wait=begun - arrived, write=written - scored, total=written - arrived)
        self._service.sent(answer)

    def _form(self, headers: Mapping[bytes, bytes]) -> WireForm:
        """The form that the content type names."""
        kind = headers.get(b"content-type", b"application/json")
        form = self._forms.get(kind)
        if form is None:
            form = self._forms.get(kind.partition(b";")[0].strip().lower())
        encoding = headers.get(b"content-encoding", b"identity").strip().lower()
        if form is None:
            allowed = [known.decode() for known in self._forms]
            raise refuse(
                f"content-type must be {' or '.join(allowed)}, got {show(kind.decode('latin-1'))}",
                status=415,
                code="wrong_content_type",
                allowed=allowed,
            )
        if encoding != b"identity":
            raise refuse(
                f"content-encoding must be identity, got {show(encoding.decode('latin-1'))}",
                status=415,
                code="wrong_content_encoding",
                allowed=["identity"],
                hint="send the body uncompressed; application/x-protobuf is the compact form",
            )
        return form

    async def _read_body(self, headers: Mapping[bytes, bytes], receive: Receive) -> bytes | None:
        """The whole body; ``None`` when the client went away."""
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self._settings.max_request_bytes:
            raise self._too_large(int(length[:20]))
        message = poll(receive)
        if message is not None and not message.get("more_body") and message["type"] != GONE:
            body = message.get("body", b"")
            if len(body) > self._settings.max_request_bytes:
                raise self._too_large(len(body))
            return bytes(body)
        seconds = self._settings.read_timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                return await self._read_pieces(message, receive)
        except TimeoutError:
            raise refuse(
                f"the body did not arrive in {seconds:g} s",
                status=408,
                code="body_too_slow",
                allowed={"read_timeout_seconds": seconds},
            ) from None

    async def _read_pieces(self, message: Message | None, receive: Receive) -> bytes | None:
        body = bytearray()
        try:
            while True:
                if message is None:
                    message = await receive()
                if message["type"] == GONE:
                    return None
                piece = message.get("body", b"")
                if len(body) + len(piece) > self._settings.max_request_bytes:
                    raise self._too_large(len(body) + len(piece))
                self._held.take(len(piece))
                body += piece
                if not message.get("more_body"):
                    return bytes(body)
                message = None
        finally:
            self._held.give_back(len(body))

    def _too_large(self, num_bytes: int) -> RefusedRequestError:
        return body_too_large(num_bytes, max_bytes=self._settings.max_request_bytes)

    # --- the other routes -----------------------------------------------------------------

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


async def _send(
    send: Send,
    body: bytes,
    *,
    status: int = 200,
    content_type: bytes = JSON.encode(),
    headers: list[tuple[bytes, bytes]] | None = None,
    empty: bool = False,
) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(b"content-type", content_type), length, *(headers or [])],
        }
    )
    await send({"type": "http.response.body", "body": b"" if empty else body})


async def _hang_up(scope: Message, send: Send) -> None:
    """Nobody speaks WebSocket here."""
    if "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": 1008})
        return
    error = refuse("there is no WebSocket here", status=404, code="unknown_path")
    start = {
        "type": "websocket.http.response.start",
        "status": error.status,
        "headers": [(b"content-type", JSON.encode())],
    }
    await send(start)
    await send({"type": "websocket.http.response.body", "body": orjson.dumps(error.body)})


async def _acknowledge(receive: Receive, send: Send) -> None:
    """Nothing to do at start and stop: the replica holds the state."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return

"""The HTTP face: three routes in plain ASGI, JSON in and out, every refusal with a body.

Plain ASGI because a web framework costs a fifth of the throughput, and there is one route to serve.
"""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final, Protocol, TypeAlias

import orjson

from driftline.serving.answers import Answer
from driftline.serving.requests import RefusedRequestError, refuse, show
from driftline.serving.wire import JsonForm, WireForm

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]

SCORE, STATUS, HEALTH = "/v1/score", "/v1/status", "/healthz"
METHODS: Final = {SCORE: ("POST",), STATUS: ("GET", "HEAD"), HEALTH: ("GET", "HEAD")}
JSON_HEADER: Final = (b"content-type", b"application/json")


class ScoringService(Protocol):
    """What answers behind the HTTP face."""

    def answer(self, body: bytes, form: WireForm) -> Answer:
        """Parse and score one request; raises ``RefusedRequestError``."""

    def sent(self, answer: Answer) -> None:
        """The answer has been handed to the client."""

    def status(self) -> dict[str, Any]:
        """What is served, how fresh it is, and since when."""

    @property
    def ready(self) -> bool:
        """Whether there is a bundle to score with."""


class HttpFace:
    """An ASGI application over a :class:`ScoringService`."""

    def __init__(self, service: ScoringService, *, max_request_bytes: int) -> None:
        self._service = service
        self._max_bytes = max_request_bytes
        self._form = JsonForm()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One connection's request, or the server's start and stop."""
        if scope["type"] == "lifespan":
            await _acknowledge(receive, send)
            return
        try:
            await self._route(scope, receive, send)
        except RefusedRequestError as error:
            extra = []
            if error.status == 405:
                extra.append((b"allow", ", ".join(error.allowed).encode()))
            if error.status == 503:
                extra.append((b"retry-after", b"1"))
            body = orjson.dumps(error.body, default=str)
            await _send_json(send, body, status=error.status, headers=extra)

    async def _route(self, scope: Message, receive: Receive, send: Send) -> None:
        path, method = scope["path"], scope["method"]
        methods = METHODS.get(path)
        if methods is None:
            raise refuse(
                f"there is nothing at {show(path)}",
                status=404,
                code="unknown_path",
                allowed=[f"{verbs[0]} {known}" for known, verbs in METHODS.items()],
            )
        if method not in methods:
            raise refuse(
                f"{path} takes {methods[0]}, got {method}",
                status=405,
                code="wrong_method",
                allowed=list(methods),
            )
        if path == SCORE:
            body = await self._read_body(scope, receive)
            if body is not None:
                answer = self._service.answer(body, self._form)
                await _send_json(send, self._form.write(answer))
                self._service.sent(answer)
            return
        ready = self._service.ready
        value = self._service.status() if path == STATUS else {"ready": ready}
        status = 200 if ready or path == STATUS else 503
        await _send_json(send, orjson.dumps(value), status=status, empty=method == "HEAD")

    async def _read_body(self, scope: Message, receive: Receive) -> bytes | None:
        """The whole body; ``None`` when the client went away."""
        headers = dict(scope["headers"])
        kind = headers.get(b"content-type", b"application/json").decode("latin-1")
        if kind.partition(";")[0].strip().lower() != "application/json":
            raise refuse(
                f"content-type must be application/json, got {show(kind)}",
                status=415,
                code="wrong_content_type",
                allowed=["application/json"],
            )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_bytes:
            raise self._too_large(int(length))
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._max_bytes:
                raise self._too_large(len(body))
            if not message.get("more_body"):
                return bytes(body)

    def _too_large(self, num_bytes: int) -> RefusedRequestError:
        return refuse(
            f"the body may have {self._max_bytes:,} bytes, got {num_bytes:,} or more",
            status=413,
            code="body_too_large",
            allowed={"max_bytes": self._max_bytes},
            hint="send fewer ads in each request, or raise serving.max_request_bytes",
        )


async def _send_json(
    send: Send,
    body: bytes,
    *,
    status: int = 200,
    headers: list[tuple[bytes, bytes]] | None = None,
    empty: bool = False,
) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [JSON_HEADER, length, *(headers or [])],
        }
    )
    await send({"type": "http.response.body", "body": b"" if empty else body})


async def _acknowledge(receive: Receive, send: Send) -> None:
    """Nothing to do at start and stop: the replica holds the state."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return

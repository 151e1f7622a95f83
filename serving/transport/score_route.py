"""``POST /v1/score``: a body is read, waits for its turn, is scored, and answered.

Two ways lead here. A request that has arrived whole is taken by a call, as ``short_way.py`` does.
One that is still coming is an ASGI application's, which waits for it, but not for long.
"""

import asyncio
import logging
import time
from collections.abc import Mapping
from functools import partial
from typing import Final, Protocol

from driftline.platform.settings import ServingSettings
from driftline.serving.answers import Answer
from driftline.serving.transport.limits import HeldBytes, WaitingLine, body_too_large, poll
from driftline.serving.transport.pages import (
    Message,
    Page,
    Receive,
    Send,
    refusal,
    send_page,
)
from driftline.serving.transport.requests import RefusedRequestError, refuse, show
from driftline.serving.transport.short_way import Exchange
from driftline.serving.transport.wire import JsonForm, WireForm
from driftline.serving.transport.wire_protobuf import ProtobufForm

logger = logging.getLogger(__name__)

MAX_HELD: Final = 64
"""Unfinished bodies may hold so many times the largest body."""
GONE: Final = "http.disconnect"


class Scoring(Protocol):
    """What scores behind the route."""

    def answer(self, body: bytes, form: WireForm) -> Answer:
        """Parse and score one request; raises ``RefusedRequestError``."""

    def sent(self, answer: Answer) -> None:
        """The answer has been handed to the client."""

    def refused(self, error: RefusedRequestError) -> None:
        """A request was refused; told once, however often this is called."""


class ScoreRoute:
    """Answers scoring requests; used by one event loop.

    Args:
        service: Scores.
        settings: Limits.
    """

    def __init__(self, service: Scoring, settings: ServingSettings) -> None:
        self._service = service
        self._settings = settings
        self._forms: dict[bytes, WireForm] = {}
        for form in (JsonForm(), ProtobufForm()):
            self._forms[form.content_type.encode()] = form
        self.line = WaitingLine(
            max_waiting=settings.max_waiting, max_seconds=settings.request_timeout_seconds
        )
        self._held = HeldBytes(max_bytes=MAX_HELD * settings.max_request_bytes)

    def take(self, exchange: Exchange) -> None:
        """Answer a request that has arrived whole, now or in its turn."""
        try:
            form = self._form(exchange.headers)
            if len(exchange.body) > self._settings.max_request_bytes:
                raise self._too_large(len(exchange.body))
            self.line.enter(partial(self._serve, exchange, form, time.perf_counter()))
        except RefusedRequestError as error:
            self._turn_away(exchange, error)

    def _serve(self, exchange: Exchange, form: WireForm, arrived: float, waited: float) -> None:
        """It is an exchange's turn."""
        if exchange.disconnected:
            return
        try:
            self.line.check_wait(waited)
            answer, content = self._scored(exchange.body, form, arrived)
        except RefusedRequestError as error:
            self._turn_away(exchange, error)
        except Exception:
            self._turn_away(exchange, failed("POST /v1/score"))
        else:
            exchange.answer(content, 200, [(b"content-type", form.content_type.encode())])
            self._service.sent(answer)

    def _turn_away(self, exchange: Exchange, error: RefusedRequestError) -> None:
        self._service.refused(error)
        page = refusal(error)
        exchange.answer(page.body, page.status, page.headers)

    async def page(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request by ASGI.

        Raises:
            RefusedRequestError: nothing was sent.
        """
        headers = dict(scope["headers"])
        form = self._form(headers)
        self.line.check()
        body = await self._read_body(headers, receive)
        if body is None:
            return
        arrived = time.perf_counter()
        await self.line.turn()
        if (message := poll(receive)) is not None and message["type"] == GONE:
            return
        answer, content = self._scored(body, form, arrived)
        await send_page(send, Page(content, content_type=form.content_type))
        self._service.sent(answer)

    def _scored(self, body: bytes, form: WireForm, arrived: float) -> tuple[Answer, bytes]:
        begun = time.perf_counter()
        answer = self._service.answer(body, form)
        scored = time.perf_counter()
        content = form.write(answer)
        written = time.perf_counter()
        answer.stages.update(wait=begun - arrived, write=written - scored, total=written - arrived)
        return answer, content

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


def failed(what: str) -> RefusedRequestError:
    """Log the exception that is being handled, and answer with a reason all the same."""
    logger.exception("%s failed", what)
    mistake = "a mistake of the server's; the log of its replica says more"
    return refuse(mistake, status=500, code="internal_error")

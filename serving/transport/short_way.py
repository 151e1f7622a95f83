"""The short way of a scoring request: from uvicorn's parser to our face by a call, and back.

uvicorn gives each request a description, an event, a task, and coroutines that read the body and
write the answer in two pieces; middlewares look at it on its way. A request that has arrived whole
needs none of this, and it costs a third of what scoring 100 ads does. So a replica's connections
speak this protocol: such a request is handed over by a call, and its answer is one write.
Everything else goes uvicorn's way, which is the only one that waits: slow bodies, pipelined
requests, clients that do not read, HTTP/1.0, headers that ask for more.
"""

from typing import Any, Final

import uvicorn.config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from driftline.serving.transport.paths import SCORE
from driftline.serving.transport.replica_face import Face, face_of_this_process

PATH: Final = SCORE.encode()
LONG_WAY: Final = frozenset((b"expect", b"upgrade", b"transfer-encoding"))
"""Headers that ask for more than a body and its answer."""


class Exchange:
    """A request that has arrived whole; uvicorn sees it as one of its own that is under way."""

    __slots__ = (
        "_protocol",
        "body",
        "disconnected",
        "headers",
        "keep_alive",
        "message_event",
        "response_complete",
    )

    def __init__(self, protocol: "ShortWayProtocol", headers: dict[bytes, bytes]) -> None:
        self._protocol = protocol
        self.headers = headers
        self.body = b""
        self.disconnected = False
        self.keep_alive = True
        self.response_complete = False
        self.message_event = self

    def set(self) -> None:
        """Nobody waits for a message to arrive, as uvicorn supposes."""

    def answer(self, body: bytes, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Send the answer; ``headers`` are all but the length."""
        self._protocol.write_answer(self, body, status, headers)


class ShortWayProtocol(HttpToolsProtocol):
    """uvicorn's HTTP with a short way for scoring."""

    face: Face | None = None
    """What answers; this process's replica if not set before."""
    cycle: Any
    _exchange: Exchange | None = None
    _defaults: Any = None
    _default_lines = b""

    def on_message_begin(self) -> None:
        """A request begins. uvicorn's description of it is made when it is needed."""
        self.url = b""
        self.expect_100_continue = False
        self.headers = []

    def on_headers_complete(self) -> None:
        """All headers have arrived: choose the way."""
        if self.url == PATH and self._is_plain():
            self.face = self.face or face_of_this_process()
            if self.face is not None:
                self.cycle = self._exchange = Exchange(self, dict(self.headers))
                return
        self._go_long_way()

    def on_body(self, body: bytes) -> None:
        """A piece of the body has arrived."""
        if self._exchange is None:
            super().on_body(body)
        else:
            self._exchange.body += body

    def on_message_complete(self) -> None:
        """The request has arrived whole."""
        exchange, self._exchange = self._exchange, None
        if exchange is None:
            super().on_message_complete()
        else:
            assert self.face is not None
            self.face.take(exchange)

    def data_received(self, data: bytes) -> None:
        """Bytes have arrived; a request that they leave unfinished goes the long way."""
        super().data_received(data)
        exchange, self._exchange = self._exchange, None
        if exchange is not None and not self.transport.is_closing():
            self.cycle = None
            self._go_long_way()
            if exchange.body:
                super().on_body(exchange.body)

    def write_answer(
        self, exchange: Exchange, body: bytes, status: int, headers: list[tuple[bytes, bytes]]
    ) -> None:
        """See :meth:`Exchange.answer`."""
        exchange.response_complete = True
        if exchange.disconnected or self.transport.is_closing():
            return
        if not exchange.keep_alive:  # the server stops
            headers.append((b"connection", b"close"))
        self.transport.write(
            b"%b%b%bcontent-length: %d\r\n\r\n%b"
            % (STATUS_LINE[status], self._date_and_name(), _lines(headers), len(body), body)
        )
        if (b"connection", b"close") in headers:
            self.transport.close()
        self.on_response_complete()

    def _date_and_name(self) -> bytes:
        """Headers of uvicorn's own, which it makes anew each second."""
        defaults = self.server_state.default_headers
        if defaults is not self._defaults:
            self._defaults, self._default_lines = defaults, _lines(defaults)
        return self._default_lines

    def _is_plain(self) -> bool:
        return (
            self.parser.get_method() == b"POST"
            and self.parser.get_http_version() == "1.1"
            and self.parser.should_keep_alive()
            and (self.cycle is None or self.cycle.response_complete)
            and not self.flow.write_paused
            and all(name not in LONG_WAY for name, _ in self.headers)
        )

    def _go_long_way(self) -> None:
        url, headers, expect = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expect
        self.headers.extend(headers)
        super().on_headers_complete()


def take_short_way() -> None:
    """HTTP servers that uvicorn starts in this process from now on know the short way.

    Ray Serve starts them, and has no setting for it. Harmless to call again.
    """
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{ShortWayProtocol.__name__}"


def _lines(headers: list[tuple[bytes, bytes]]) -> bytes:
    return b"".join([b"%b: %b\r\n" % pair for pair in headers])

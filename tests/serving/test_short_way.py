"""Whichever way a request takes to the face, what comes back is the same bytes in the same order.

uvicorn's protocol with and without the short way, on a real socket, over a real service.
"""

import asyncio
import http.client
import io
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import pytest
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.serving.hostile import GOOD, MAX_BYTES, Hostile, all_requests
from tests.tiny_market import TinyMarket
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from driftline.platform.bundle import Bundle
from driftline.platform.settings import ServingSettings
from driftline.serving.answers import Answer
from driftline.serving.service import BundleService
from driftline.serving.transport.asgi import HttpFace
from driftline.serving.transport.short_way import ShortWayProtocol, take_short_way
from driftline.serving.transport.wire import WireForm

SETTINGS = ServingSettings(max_request_bytes=MAX_BYTES, clock="snapshot")
CHUNKED = b"POST /v1/score HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
FUZZ = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


class Watched(HttpFace):
    """Counts who comes which way."""

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self.num_short = self.num_long = 0

    def take(self, exchange: Any) -> None:
        self.num_short += 1
        super().take(exchange)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.num_long += 1
        await super().__call__(scope, receive, send)


@pytest.fixture(scope="module")
def service(market: TinyMarket, first: Bundle) -> BundleService:
    market.promote(first)
    service = BundleService(market.settings)
    service.look()
    return service


class Server(NamedTuple):
    face: Watched
    connections: set[Any]
    ask: Callable[..., Coroutine[Any, Any, list[Reply]]]


@asynccontextmanager
async def serving(service: BundleService, *, short: bool = True) -> AsyncIterator[Server]:
    """A server on this event loop, and one connection to it."""
    face = Watched(service, SETTINGS)
    kind = type("Short", (ShortWayProtocol,), {"face": face}) if short else HttpToolsProtocol
    config = uvicorn.Config(face, http=kind, lifespan="off", access_log=False)
    config.load()
    state = ServerState()
    state.default_headers = [(b"server", b"uvicorn")]
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: kind(config, state, {}), "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())

    async def ask(pieces: Sequence[bytes], num: int = 1) -> list[Reply]:
        """Send pieces one after the other, and wait for so many answers."""
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            for _ in range(3):  # so that it arrives by itself
                await asyncio.sleep(0)
        found = b""
        async with asyncio.timeout(10):
            while len(replies(found)) < num:
                piece = await reader.read(1 << 20)
                assert piece, f"closed after {found!r}"
                found += piece
        return replies(found)

    try:
        yield Server(face, state.connections, ask)
    finally:
        writer.close()
        server.close()


def wire(body: bytes, *, headers: Sequence[str] = (), path: str = "/v1/score") -> bytes:
    """A request as it travels."""
    lines = [f"POST {path} HTTP/1.1", "Host: here", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def scoring(number: int) -> bytes:
    ads = [100_002 + place for place in range(1 + number % 3)]
    body = json.dumps({**GOOD, "ad_product_ids": ads, "request_id": f"view-{number}"})
    return wire(body.encode(), headers=["Content-Type: application/json"])


def replies(found: bytes) -> list[Reply]:
    """All that stand in the bytes of a connection."""

    class Bytes(io.BytesIO):
        def makefile(self, *_: Any) -> io.BytesIO:
            return self

        def close(self) -> None:
            """Reading one answer does not close the connection."""

    stream, read = Bytes(found), []
    while stream.tell() < len(found):
        response = http.client.HTTPResponse(stream)  # type: ignore[arg-type]
        try:
            response.begin()
            headers = {name.lower(): value for name, value in response.getheaders()}
            read.append(Reply(response.status, headers, response.read()))
        except http.client.HTTPException:  # the rest is still to come
            break
    return read


def talk(
    service: BundleService, pieces: Sequence[bytes], *, short: bool, num: int = 1
) -> list[Reply]:
    async def main() -> list[Reply]:
        async with serving(service, short=short) as server:
            return await server.ask(pieces, num)

    return asyncio.run(main())


def test_a_request_in_one_piece_takes_the_short_way(service: BundleService) -> None:
    async def main() -> tuple[list[Reply], Watched]:
        async with serving(service) as server:
            return await server.ask([scoring(1)]), server.face

    (reply,), face = asyncio.run(main())

    assert (face.num_short, face.num_long) == (1, 0)
    assert reply.status == 200
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["server"] == "uvicorn"
    assert [reply] == talk(service, [scoring(1)], short=False)


@pytest.mark.parametrize(
    "request_",
    [
        scoring(2).replace(b"HTTP/1.1", b"HTTP/1.0"),
        wire(b"", headers=["Connection: close"]),
        wire(json.dumps(GOOD).encode(), headers=["Expect: 100-continue"]),
        wire(json.dumps(GOOD).encode(), headers=["Upgrade: h2c", "Connection: upgrade"]),
        wire(json.dumps(GOOD).encode(), path="/v1/score?now"),
        CHUNKED + b"2\r\n{}\r\n0\r\n\r\n",
        b"GET /v1/score HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n",
    ],
)
def test_what_is_out_of_the_ordinary_goes_the_long_way(
    request_: bytes, service: BundleService
) -> None:
    async def main() -> tuple[list[Reply], Watched]:
        async with serving(service) as server:
            return await server.ask([request_]), server.face

    found, face = asyncio.run(main())

    assert (face.num_short, face.num_long) == (0, 1)
    expected = talk(service, [request_], short=False)
    assert [r._replace(body=b"") for r in found] == [
        r._replace(body=b"", headers=f.headers | {"content-length": r.headers["content-length"]})
        for r, f in zip(expected, found, strict=True)
    ]


def test_what_comes_in_two_pieces_is_answered_alike(service: BundleService) -> None:
    request = scoring(1)
    expected = talk(service, [request], short=True)

    for at in range(1, len(request), 7):
        assert talk(service, [request[:at], request[at:]], short=True) == expected


@FUZZ
@given(numbers=st.lists(st.integers(0, 20), min_size=1, max_size=5), data=st.data())
def test_requests_are_answered_in_their_order_however_they_are_cut(
    numbers: list[int], data: st.DataObject, service: BundleService
) -> None:
    stream = b"".join(scoring(number) for number in numbers)
    cuts = sorted(data.draw(st.lists(st.integers(1, len(stream) - 1), max_size=4)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]

    found = talk(service, pieces, short=True, num=len(numbers))

    assert [json.loads(reply.body)["request_id"] for reply in found] == [
        f"view-{number}" for number in numbers
    ]
    assert found == [talk(service, [scoring(number)], short=False)[0] for number in numbers]


ONE_PIECE = {
    name: one
    for name, one in all_requests().items()
    if len(one.chunks) == 1 and (one.method, one.path) == ("POST", "/v1/score")
}


@pytest.mark.parametrize("name", ONE_PIECE)
def test_what_is_refused_is_refused_alike(name: str, service: BundleService) -> None:
    request: Hostile = ONE_PIECE[name]
    headers = [f"{k}: {v}" for k, v in request.headers.items() if k != "content-length"]
    sent = wire(request.chunks[0], headers=headers)

    short, long = (talk(service, [sent], short=short) for short in (True, False))

    assert [(r.status, r.headers.keys()) for r in short] == [
        (r.status, r.headers.keys()) for r in long
    ]
    for mine, other in zip(short, long, strict=True):
        if mine.status != 200:
            assert mine == other


class Failing(BundleService):
    """Makes a mistake."""

    def answer(self, body: bytes, form: WireForm) -> Answer:
        raise ZeroDivisionError(f"while reading {form.name}")


def test_a_mistake_of_ours_is_answered_and_the_connection_lives(
    market: TinyMarket, caplog: pytest.LogCaptureFixture
) -> None:
    found = talk(Failing(market.settings), [scoring(1) + scoring(2)], short=True, num=2)

    assert [reply.status for reply in found] == [500, 500]
    assert "POST /v1/score failed" in caplog.text


async def waiting(server: Server) -> tuple["asyncio.Task[list[Reply]]", Callable[[], None]]:
    """A request that stands in line, and what calls it up."""
    line = server.face.line
    line._taken = True  # somebody else's turn
    asking = asyncio.create_task(server.ask([scoring(1)]))
    while not len(line):
        await asyncio.sleep(0)
    return asking, lambda: line._next(asyncio.get_running_loop())


def test_who_waits_is_answered_though_the_server_stops(service: BundleService) -> None:
    async def main() -> list[Reply]:
        async with serving(service) as server:
            asking, call_up = await waiting(server)
            for connection in list(server.connections):
                connection.shutdown()
            call_up()
            return await asking

    (reply,) = asyncio.run(main())

    assert reply.status == 200
    assert reply.headers["connection"] == "close"


def test_who_hung_up_while_waiting_is_not_scored(service: BundleService) -> None:
    before = service.status()["answers"]

    async def main() -> int:
        async with serving(service) as server:
            asking, call_up = await waiting(server)
            (connection,) = server.connections
            connection.transport.abort()
            while server.connections:
                await asyncio.sleep(0)
            call_up()
            with pytest.raises((AssertionError, ConnectionError)):
                await asking
            return len(server.face.line)

    assert asyncio.run(main()) == 0
    assert service.status()["answers"] == before


def test_uvicorn_takes_the_short_way_when_told(service: BundleService) -> None:
    known = dict(uvicorn.config.HTTP_PROTOCOLS)
    try:
        take_short_way()
        config = uvicorn.Config(HttpFace(service, SETTINGS))
        config.load()
        assert config.http_protocol_class is ShortWayProtocol
    finally:
        uvicorn.config.HTTP_PROTOCOLS.update(known)

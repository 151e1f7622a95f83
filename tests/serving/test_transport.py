"""The real server from outside: raw sockets, gRPC, slow clients, and who can reach what."""

import json
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BufferedReader
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from tests.listening import listeners
from tests.tiny_market import AS_OF, TinyMarket

from driftline.features.store import materialize
from driftline.platform.bundle import Bundle
from driftline.platform.errors import RequestError
from driftline.platform.processes import family_members, free_port
from driftline.serving import scoring_pb2
from driftline.serving.client import ScoringClient
from driftline.serving.client.grpc import GrpcScoringClient
from driftline.serving.server import ServingHandle, start_serving
from driftline.serving.transport.grpc_face import SERVICE

pytestmark = pytest.mark.ray

PAGE, ADS = 100_001, [100_002, 100_003]
GOOD = {"page_product_id": PAGE, "ad_product_ids": ADS}
BODY = json.dumps(GOOD).encode()
JSON = b"application/json"


@pytest.fixture(scope="module")
def server(market: TinyMarket, first: Bundle) -> Iterator[ServingHandle]:
    materialize(market.settings, as_of=AS_OF)
    market.promote(first)
    changes = {
        "port": free_port(),
        "grpc_port": free_port(),
        "ingress": "haproxy",
        "read_timeout_seconds": 1.0,
    }
    serving = market.settings.serving.model_copy(update=changes)
    with start_serving(market.settings.model_copy(update={"serving": serving})) as handle:
        yield handle


@pytest.fixture
def call(server: ServingHandle) -> Iterator[grpc.UnaryUnaryMultiCallable]:
    """``Score`` for bytes."""
    assert server.grpc_address is not None
    with grpc.insecure_channel(server.grpc_address) as channel:
        yield channel.unary_unary(f"/{SERVICE}/Score")


def test_grpc_answers_as_http_does(
    server: ServingHandle, call: grpc.UnaryUnaryMultiCallable
) -> None:
    request = scoring_pb2.ScoreRequest(page_product_id=PAGE, ad_product_ids=ADS)

    found = scoring_pb2.ScoreAnswer.FromString(call(request.SerializeToString(), timeout=10))

    with server.client as client:
        expected = client.score(PAGE, ADS)
    np.testing.assert_allclose(found.probabilities, expected["probabilities"], rtol=1e-6)
    assert found.bundle == expected["bundle"]


def test_every_client_gets_the_same_answer(server: ServingHandle) -> None:
    assert server.grpc_address is not None
    context = {"application": "mail"}
    with server.client as client:
        expected = client.score(PAGE, ADS, context=context, time=AS_OF)
    with (
        ScoringClient(server.url, form="protobuf") as binary,
        GrpcScoringClient(server.grpc_address) as calls,
    ):
        clients: tuple[ScoringClient | GrpcScoringClient, ...] = (binary, calls)
        for other in clients:
            answer = other.score(PAGE, ADS, context=context, time=AS_OF, request_id="a")

            found, meant = answer.pop("probabilities"), expected["probabilities"]
            np.testing.assert_allclose(found, meant, rtol=1e-6)
            assert answer.pop("request_id") == "a"
            own = ("probabilities", "request_id")
            assert answer == {k: v for k, v in expected.items() if k not in own}
            made_up = [other.score(PAGE, ADS)["request_id"] for _ in range(2)]
            assert len({*made_up, expected["request_id"]}) == 3

            with pytest.raises(RequestError, match=r"context\.colour: is not known"):
                other.score(PAGE, ADS, context={"colour": "red"})


def test_one_client_serves_many_threads(server: ServingHandle) -> None:
    pages = range(PAGE, PAGE + 8)
    with server.client as client, ThreadPoolExecutor(4) as pool:
        expected = [client.score(page, ADS)["probabilities"] for page in pages]

        found = list(pool.map(lambda page: client.score(page, ADS)["probabilities"], [*pages] * 5))

    assert found == expected * 5


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_protobuf"),
        (b"\xff" * 20, "invalid_protobuf"),
        (scoring_pb2.ScoreRequest(page_product_id=1).SerializeToString(), "no_ads"),
        (bytes(1_100_000), "body_too_large"),
    ],
)
def test_a_refused_call_says_why(
    call: grpc.UnaryUnaryMultiCallable, body: bytes, code: str
) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        call(body, timeout=10)

    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert json.loads(refused.value.details())["error"]["code"] == code


def test_everything_listens_on_loopback_only(server: ServingHandle) -> None:
    heard = {(one.ip.removeprefix("::ffff:"), one.process) for one in listeners(server.family)}
    assert len(heard) > 3
    assert {ip for ip, _ in heard} == {"127.0.0.1"}, heard


def exchange(server: ServingHandle, *pieces: bytes, pause: float = 0.0) -> tuple[int, Any]:
    """Send bytes as they are; gives the first answer's status and, if it is JSON, its body."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(pause)
        return read_answer(connection.makefile("rb"))


def read_answer(reader: BufferedReader) -> tuple[int, Any]:
    status = int(reader.readline().split()[1])
    headers: dict[bytes, bytes] = {}
    while line := reader.readline().strip():
        name, _, value = line.partition(b":")
        headers[name.lower()] = value.strip()
    if status == 100:
        return read_answer(reader)
    body = reader.read(int(headers[b"content-length"])) if b"content-length" in headers else b""
    return status, json.loads(body) if headers.get(b"content-type") == JSON else None


def post(*headers: bytes, path: bytes = b"/v1/score", method: bytes = b"POST") -> bytes:
    return b"\r\n".join([method + b" " + path + b" HTTP/1.1", b"Host: x", *headers, b"", b""])


def sized(body: bytes, *headers: bytes) -> bytes:
    length = b"Content-Length: %d" % len(body)
    return post(b"Content-Type: application/json", length, *headers) + body


def chunked(*chunks: bytes) -> bytes:
    body = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in (*chunks, b""))
    return post(b"Content-Type: application/json", b"Transfer-Encoding: chunked") + body


RAW: dict[str, tuple[bytes, int]] = {
    "plain": (sized(BODY), 200),
    "HTTP/1.0": (sized(BODY).replace(b"HTTP/1.1", b"HTTP/1.0"), 200),
    "chunked": (chunked(BODY[:5], BODY[5:]), 200),
    "no length": (post(b"Content-Type: application/json"), 400),
    "length too short": (sized(BODY).replace(b"Length: 6", b"Length: 1"), 400),
    "too large": (post(b"Content-Length: 1000000000") + bytes(50_000), 413),
    "too large and there": (sized(b"x" * 300_000), 413),
    "no host": (b"POST /v1/score HTTP/1.1\r\nContent-Length: 0\r\n\r\n", 400),
    "version 9": (b"GET / HTTP/9.9\r\n\r\n", 404),
    "request id not text": (sized(BODY, b"X-Request-Id: \xff\xfe"), 200),
    "model id not text": (sized(BODY, b"Serve_Multiplexed_Model_Id: \xff"), 200),
    "session id not text": (sized(BODY, b"X-Session-Id: \xff"), 200),
    "time-out of the client's": (sized(BODY, b"X-Request-Timeout-Seconds: 0.000001"), 200),
    "length not text": (sized(BODY, b"X-Anything: \xff\xfe"), 200),
    "upgrade to WebSocket": (
        post(
            b"Upgrade: websocket",
            b"Connection: Upgrade",
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
            b"Sec-WebSocket-Version: 13",
            method=b"GET",
        ),
        404,
    ),
    "TRACE": (post(method=b"TRACE"), 405),
    "made-up method": (post(method=b"BREW"), 405),
    "star": (post(path=b"*", method=b"OPTIONS"), 404),
    "CONNECT": (b"CONNECT x:80 HTTP/1.1\r\nHost: x:80\r\n\r\n", 404),
    "traversal": (post(path=b"/../../etc/passwd", method=b"GET"), 404),
    "gzip": (sized(BODY, b"Content-Encoding: gzip"), 415),
    "expectation": (sized(BODY, b"Expect: 100-continue"), 200),
}

NO_HTTP: dict[str, bytes] = {
    "chunk sizes no numbers": post(b"Transfer-Encoding: chunked") + b"zz\r\n{}\r\n0\r\n\r\n",
    "chunk of negative size": post(b"Transfer-Encoding: chunked") + b"-1\r\n\r\n",
    "negative length": post(b"Content-Length: -5"),
    "two lengths": post(b"Content-Length: 5", b"Content-Length: 7") + b"{}xxx",
    "length in words": post(b"Content-Length: ten"),
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(60) + b"\r\n\r\n",
    "space in a name": post(b"Bad Name: x"),
    "null byte in a header": post(b"X: a\x00b", b"Content-Length: 0"),
    "null byte in the path": post(path=b"/v1/score\x00"),
    "header without end": post(b"X: " + b"a" * 100_000),
    "many headers": post(*[b"X-%d: y" % i for i in range(5_000)]),
    "address without end": post(path=b"/" + b"a" * 100_000, method=b"GET"),
}
"""HAProxy answers these before it knows of a request, and with a page of its own."""


@pytest.mark.parametrize("name", RAW)
def test_hostile_bytes_get_a_reason_and_the_server_survives(
    name: str, server: ServingHandle
) -> None:
    sent, expected = RAW[name]

    status, answer = exchange(server, sent)

    assert status == expected, answer
    if status >= 400:
        assert answer["error"]["code"]
        assert answer["error"]["message"]
    with server.client as client:
        assert client.score(PAGE, ADS)["probabilities"]


@pytest.mark.parametrize("name", NO_HTTP)
def test_what_is_not_http_is_refused_at_the_door(name: str, server: ServingHandle) -> None:
    assert exchange(server, NO_HTTP[name])[0] == 400
    with server.client as client:
        assert client.score(PAGE, ADS)["probabilities"]


def test_length_and_chunks_together_are_one_request(server: ServingHandle) -> None:
    """Else the second would be smuggled past whoever reads the length."""
    hidden = b"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n"
    headers = (b"Transfer-Encoding: chunked", b"Content-Length: %d" % (5 + len(hidden)))

    answers = converse(server, post(*headers) + b"0\r\n\r\n" + hidden)

    assert answers[0] == 400
    assert 200 not in answers


def converse(server: ServingHandle, sent: bytes) -> list[int]:
    """Send bytes and read until the server closes or has nothing more to say; the statuses."""
    host, port = server.url.removeprefix("http://").split(":")
    received = b""
    with socket.create_connection((host, int(port)), timeout=3) as connection:
        connection.sendall(sent)
        with suppress(TimeoutError):
            while piece := connection.recv(65536):
                received += piece
    return [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3}) ", received)]


def test_a_pipeline_is_answered_in_order(server: ServingHandle) -> None:
    last = post(b"Connection: close", method=b"GET", path=b"/healthz")

    assert converse(server, sized(BODY) + sized(b"[]") + last) == [200, 422, 200]


@pytest.mark.parametrize(
    "pieces",
    [
        [b"POST /v1/sc"],
        [post(b"X: y")[:-2], *[b"X-%d: y\r\n" % i for i in range(3)]],
        [sized(BODY)[:-10]],
        [post(b"Content-Length: 200000") + bytes(100_000)],
        [post(b"Transfer-Encoding: chunked") + b"5\r\nhello\r\n"],
    ],
)
def test_a_slow_client_is_given_up(server: ServingHandle, pieces: list[bytes]) -> None:
    status, answer = exchange(server, *pieces, pause=0.1)

    assert status == 408
    assert answer is None or answer["error"]["code"] in ("request_too_slow", "body_too_slow")


def test_slow_clients_do_not_keep_others_waiting(server: ServingHandle) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    slow = [socket.create_connection((host, int(port))) for _ in range(50)]
    for connection in slow:
        connection.sendall(sized(BODY)[:-1])
    with server.client as client:
        assert client.score(PAGE, ADS)["probabilities"]
    for connection in slow:
        connection.close()


def test_hostile_bytes_leave_nothing_in_memory(server: ServingHandle) -> None:
    def resident() -> int:
        found = []
        for process in family_members(server.family):
            with suppress(psutil.NoSuchProcess):  # Ray's workers come and go
                if "ServeReplica" in " ".join(process.cmdline()):
                    found.append(process.memory_info().rss)
        return max(found)

    def once() -> None:
        for sent in (*(sent for sent, _ in RAW.values()), *NO_HTTP.values()):
            exchange(server, sent)

    once()
    before = resident()
    for _ in range(3):
        once()

    assert resident() - before < 30_000_000

"""The real server from outside: raw sockets, gRPC, slow clients, and who can reach what."""

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from tests.tiny_market import AS_OF, TinyMarket

from driftline.features.store import materialize
from driftline.platform.bundle import Bundle
from driftline.platform.processes import family_members, free_port
from driftline.serving import scoring_pb2
from driftline.serving.grpc_face import SERVICE
from driftline.serving.server import ServingHandle, start_serving

pytestmark = pytest.mark.ray

PAGE, ADS = 100_001, [100_002, 100_003]
GOOD = {"page_product_id": PAGE, "ad_product_ids": ADS}
BODY = json.dumps(GOOD).encode()


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
    heard = {
        (connection.laddr.ip.removeprefix("::ffff:"), process.name())
        for process in family_members(server.family)
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }

    assert len(heard) > 3
    assert {ip for ip, _ in heard} == {"127.0.0.1"}, heard


def exchange(server: ServingHandle, *pieces: bytes, pause: float = 0.0) -> tuple[int, Any]:
    """Send bytes as they are; gives the last answer's status and JSON body."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(pause)
        reader = connection.makefile("rb")
        status = int(reader.readline().split()[1])
        length = 0
        while line := reader.readline().strip():
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        return status, json.loads(reader.read(length))


def post(*headers: bytes, path: bytes = b"/v1/score", method: bytes = b"POST") -> bytes:
    return b"\r\n".join([method + b" " + path + b" HTTP/1.1", b"Host: x", *headers, b"", b""])


def sized(body: bytes, *headers: bytes) -> bytes:
    length = b"Content-Length: %d" % len(body)
    return post(b"Content-Type: application/json", length, *headers) + body

"""The whole server: a process of its own, a real Ray Serve, HTTP."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil
import pytest
from tests.listening import listeners
from tests.tiny_market import AS_OF, TinyMarket

from driftline.features.store import materialize
from driftline.platform.bundle import Bundle
from driftline.platform.errors import RequestError, ResourceError
from driftline.platform.processes import family_members, free_port
from driftline.platform.scorer import Scorer
from driftline.platform.workspace import Workspace
from driftline.serving.server import ServingHandle, start_serving

pytestmark = pytest.mark.ray

KNOWN = 100_001
GOOD = {"page_product_id": KNOWN, "ad_product_ids": [100_002, 100_003]}
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def server(market: TinyMarket) -> Iterator[ServingHandle]:
    """A running server that starts without a champion."""
    materialize(market.settings, as_of=AS_OF)
    (Workspace.of(market.settings).bundles / "CHAMPION").unlink(missing_ok=True)
    serving = market.settings.serving.model_copy(update={"port": free_port(), "ingress": "haproxy"})
    settings = market.settings.model_copy(update={"serving": serving})
    with start_serving(settings) as handle:
        with handle.client as client:
            status, answer = client.request("POST", "/v1/score", json.dumps(GOOD).encode())
            assert (status, answer["error"]["code"]) == (503, "no_champion")
            assert not client.ready()
        yield handle


def promote(market: TinyMarket, bundle: Bundle, server: ServingHandle) -> None:
    """Make a bundle champion and wait until the server answers with it."""
    market.promote(bundle)
    with server.client as client:
        deadline = time.monotonic() + 120
        while client.status()["bundle"] != bundle.fingerprint:
            assert time.monotonic() < deadline, client.status()
            time.sleep(0.02)


def test_online_scores_over_http_equal_offline_scores(
    market: TinyMarket, first: Bundle, server: ServingHandle
) -> None:
    promote(market, first, server)
    frame = market.frame(num_hours=2)
    offline = Scorer.of(first).score(frame)
    requests = market.requests(frame)
    with server.client as client:
        for request in requests[:: len(requests) // 4]:
            done = materialize(market.settings, as_of=request.time)
            deadline = time.monotonic() + 120
            while client.status()["features"]["seconds_behind"] != 0 or (
                client.status()["now"] < done.as_of.isoformat()[:19]
            ):
                assert time.monotonic() < deadline
                time.sleep(0.02)

            answer = client.score(
                request.page, request.ads, context=request.context, time=request.time
            )

            np.testing.assert_allclose(answer["probabilities"], offline[request.rows], atol=1e-5)


def test_no_answer_fails_or_mixes_bundles_while_the_champion_changes(
    market: TinyMarket, first: Bundle, second: Bundle, server: ServingHandle
) -> None:
    expected: dict[str, Any] = {}
    for bundle in (first, second):
        promote(market, bundle, server)
        with server.client as client:
            answer = client.score(KNOWN, [100_002, 100_003, 100_002])
            expected[answer["bundle"]] = answer["probabilities"]
    assert len(expected) == 2
    answers: list[tuple[int, dict[str, Any]]] = []
    stop = threading.Event()

    def hammer() -> None:
        body = json.dumps({**GOOD, "ad_product_ids": [100_002, 100_003, 100_002]}).encode()
        with server.client as client:
            while not stop.is_set():
                answers.append(client.request("POST", "/v1/score", body))

    threads = [threading.Thread(target=hammer) for _ in range(2)]
    for thread in threads:
        thread.start()
    for bundle in (first, second) * 2:
        promote(market, bundle, server)
    stop.set()
    for thread in threads:
        thread.join()

    assert {status for status, _ in answers} == {200}
    assert {answer["bundle"] for _, answer in answers} == set(expected)
    for _, answer in answers:
        np.testing.assert_allclose(
            answer["probabilities"], expected[answer["bundle"]], atol=1e-9, rtol=0
        )


MALFORMED: dict[str, tuple[str, str, bytes, dict[str, str], int]] = {
    "empty": ("POST", "/v1/score", b"", JSON, 400),
    "not JSON": ("POST", "/v1/score", b"page=1", JSON, 400),
    "cut off": ("POST", "/v1/score", b'{"page_product_id": 1', JSON, 400),
    "binary": ("POST", "/v1/score", bytes(range(256)), JSON, 400),
    "deep": ("POST", "/v1/score", b"[" * 100_000, JSON, 400),
    "list": ("POST", "/v1/score", b"[]", JSON, 422),
    "no ads": ("POST", "/v1/score", b'{"page_product_id": 1}', JSON, 422),
    "empty ads": (
        "POST",
        "/v1/score",
        json.dumps({**GOOD, "ad_product_ids": []}).encode(),
        JSON,
        422,
    ),
    "many ads": (
        "POST",
        "/v1/score",
        json.dumps({**GOOD, "ad_product_ids": [1] * 1001}).encode(),
        JSON,
        422,
    ),
    "text keys": (
        "POST",
        "/v1/score",
        json.dumps({**GOOD, "ad_product_ids": ["1"]}).encode(),
        JSON,
        422,
    ),
    "huge key": (
        "POST",
        "/v1/score",
        json.dumps({**GOOD, "page_product_id": 10**40}).encode(),
        JSON,
        422,
    ),
    "NaN": ("POST", "/v1/score", b'{"page_product_id": NaN, "ad_product_ids": [1]}', JSON, 422),
    "unknown field": ("POST", "/v1/score", json.dumps({**GOOD, "ads": 1}).encode(), JSON, 422),
    "unknown context": (
        "POST",
        "/v1/score",
        json.dumps({**GOOD, "context": {"aplication": "x"}}).encode(),
        JSON,
        422,
    ),
    "wrong context": (
        "POST",
        "/v1/score",
        json.dumps({**GOOD, "context": {"application": 1}}).encode(),
        JSON,
        422,
    ),
    "bad time": ("POST", "/v1/score", json.dumps({**GOOD, "time": "now"}).encode(), JSON, 422),
    "form": (
        "POST",
        "/v1/score",
        b"a=1",
        {"content-type": "application/x-www-form-urlencoded"},
        415,
    ),
    "large": ("POST", "/v1/score", b"x" * 1_000_001, JSON, 413),
    "get": ("GET", "/v1/score", b"", {}, 405),
    "put": ("PUT", "/v1/score", b"{}", JSON, 405),
    "post status": ("POST", "/v1/status", b"{}", JSON, 405),
    "nothing there": ("GET", "/v1/scores", b"", {}, 404),
    "root": ("GET", "/", b"", {}, 404),
    "traversal": ("GET", "/../../etc/passwd", b"", {}, 404),
    "long path": ("GET", "/" + "a" * 4_000, b"", {}, 404),
}


def test_malformed_requests_get_a_reason_and_the_server_survives(
    market: TinyMarket, first: Bundle, server: ServingHandle
) -> None:
    promote(market, first, server)
    for name, (method, path, body, headers, status) in MALFORMED.items():
        with server.client as client:
            found, answer = client.request(method, path, body or None, headers)
            assert found == status, (name, answer)
            assert answer["error"]["message"], name
            assert answer["error"]["code"], name
    with server.client as client:
        assert client.score(page=KNOWN, ads=[100_002])["bundle"] == first.fingerprint
        assert client.ready()


def test_the_client_reports_what_the_server_said(
    market: TinyMarket, first: Bundle, server: ServingHandle
) -> None:
    promote(market, first, server)
    with (
        server.client as client,
        pytest.raises(RequestError, match=r"HTTP 422: context\.colour: is not known"),
    ):
        client.score(KNOWN, [100_002], context={"colour": "red"})


def test_a_client_that_breaks_off_does_no_harm(server: ServingHandle) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    for piece in (b"", b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(piece)
    with server.client as client:
        assert client.status()["following"]


def test_the_port_is_bound_to_loopback_only(server: ServingHandle) -> None:
    port = int(server.url.rsplit(":", 1)[1])
    assert {one.ip for one in listeners(server.family) if one.port == port} == {"127.0.0.1"}


def test_a_taken_port_is_refused_before_anything_starts(
    market: TinyMarket, server: ServingHandle
) -> None:
    port = int(server.url.rsplit(":", 1)[1])
    serving = market.settings.serving.model_copy(update={"port": port})
    before = psutil.Process().children()

    with pytest.raises(ResourceError, match=rf"serving.port: cannot listen on 127.0.0.1:{port}"):
        start_serving(market.settings.model_copy(update={"serving": serving}))

    assert psutil.Process().children() == before


def test_stopping_leaves_nothing_behind(server: ServingHandle) -> None:
    assert len(family_members(server.family)) > 3

    server.stop()

    assert family_members(server.family) == []
    assert not server.scratch.exists()
    assert not server.is_alive
    with pytest.raises(OSError, match="refused"):
        http.client.HTTPConnection(server.url.removeprefix("http://")).connect()

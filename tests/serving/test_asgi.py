"""The HTTP face over a real service, driven without a server."""

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.tiny_market import TinyMarket

from driftline.platform.bundle import Bundle
from driftline.platform.settings import ServingSettings
from driftline.platform.workspace import Workspace
from driftline.serving.answers import Answer
from driftline.serving.service import BundleService
from driftline.serving.transport.asgi import HttpFace
from driftline.serving.transport.wire import WireForm

SMALL = ServingSettings(max_request_bytes=1_000)
GOOD = b'{"page_product_id": 100001, "ad_product_ids": [100002, 100003], "request_id": "view-1"}'

Reply = tuple[int, dict[str, str], Any]
Exchange = Callable[..., Reply]


@pytest.fixture(scope="module")
def service(market: TinyMarket, first: Bundle) -> BundleService:
    """A service with a champion."""
    market.promote(first)
    service = BundleService(market.settings)
    service.look()
    assert service.ready
    return service


@pytest.fixture(scope="module")
def empty(market: TinyMarket, service: BundleService) -> Iterator[BundleService]:
    """A service without one."""
    pointer = Workspace.of(market.settings).bundles / "CHAMPION"
    kept = pointer.read_bytes()
    pointer.unlink()
    yield BundleService(market.settings)
    pointer.write_bytes(kept)


@pytest.fixture
def exchange(service: BundleService) -> Exchange:
    """Send one request to the service with a champion, or to another one."""

    def send(*request: Any, **more: Any) -> Reply:
        return exchange_with(more.pop("service", service), *request, **more)

    return send


def exchange_with(
    service: BundleService,
    method: str,
    path: str,
    *chunks: bytes,
    headers: dict[str, str] | None = None,
    vanish: bool = False,
    unfinished: bool = False,
    settings: ServingSettings = SMALL,
) -> Reply:
    """Send one request in chunks; gives status, headers and JSON body."""
    parts = chunks or (b"",)
    messages: list[dict[str, Any]] = [
        {"type": "http.request", "body": part, "more_body": i < len(parts) - 1 or unfinished}
        for i, part in enumerate(parts)
    ]
    if vanish:
        messages.append({"type": "http.disconnect"})
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        if not messages:
            await asyncio.Event().wait()
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [(k.encode(), v.encode()) for k, v in (headers or {}).items()],
    }
    face = HttpFace(service, settings)
    asyncio.run(face(scope, receive, send))
    if not sent:
        return 0, {}, None
    received = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
    assert int(received["content-length"]) >= len(sent[1]["body"])
    return sent[0]["status"], received, json.loads(sent[1]["body"] or b"null")


def test_a_body_that_comes_in_pieces_is_put_together(exchange: Exchange) -> None:
    whole = exchange("POST", "/v1/score", GOOD)

    assert exchange("POST", "/v1/score", GOOD[:20], b"", GOOD[20:]) == whole
    assert len(whole[2]["probabilities"]) == 2


@pytest.mark.parametrize(
    "kind", ["application/json", "Application/JSON; charset=utf-8", "application/json;charset=x"]
)
def test_json_is_accepted_however_it_is_spelt(exchange: Exchange, kind: str) -> None:
    assert exchange("POST", "/v1/score", GOOD, headers={"content-type": kind})[0] == 200


REFUSED: dict[str, tuple[str, str, dict[str, str], int, str]] = {
    "path": ("GET", "/v2/score", {}, 404, "unknown_path"),
    "root": ("GET", "/", {}, 404, "unknown_path"),
    "slash": ("POST", "/v1/score/", {}, 404, "unknown_path"),
    "get": ("GET", "/v1/score", {}, 405, "wrong_method"),
    "delete": ("DELETE", "/v1/status", {}, 405, "wrong_method"),
    "form": (
        "POST",
        "/v1/score",
        {"content-type": "application/x-www-form-urlencoded"},
        415,
        "wrong_content_type",
    ),
    "compressed": (
        "POST",
        "/v1/score",
        {"content-encoding": "gzip"},
        415,
        "wrong_content_encoding",
    ),
    "announced": ("POST", "/v1/score", {"content-length": "1001"}, 413, "body_too_large"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served_is_refused_with_a_body(exchange: Exchange, name: str) -> None:
    method, path, headers, status, code = REFUSED[name]

    found, received, body = exchange(method, path, b"{}", headers=headers)

    assert (found, body["error"]["code"]) == (status, code)
    assert received["content-type"] == "application/json"
    assert body["error"]["allowed"]


def test_a_body_that_grows_beyond_the_limit_is_refused(exchange: Exchange) -> None:
    status, _, body = exchange("POST", "/v1/score", b"x" * 600, b"x" * 600)

    assert status == 413
    assert "1,000 bytes, got 1,200 or more" in body["error"]["message"]


def test_a_wrong_method_learns_the_right_one(exchange: Exchange) -> None:
    assert exchange("GET", "/v1/score")[1]["allow"] == "POST"


def test_without_a_champion_the_client_is_asked_to_come_back(
    exchange: Exchange, empty: BundleService
) -> None:
    status, headers, body = exchange("POST", "/v1/score", b"{}", service=empty)

    assert (status, headers["retry-after"]) == (503, "1")
    assert body["error"]["message"] == "tiny has no champion yet"


def test_health_tells_whether_there_is_a_champion(exchange: Exchange, empty: BundleService) -> None:
    assert exchange("GET", "/healthz")[0] == 200
    assert exchange("GET", "/healthz", service=empty)[0] == 503


def test_status_answers_without_a_champion(exchange: Exchange, empty: BundleService) -> None:
    assert exchange("GET", "/v1/status", service=empty)[0] == 200


def test_head_has_the_length_but_not_the_body(exchange: Exchange) -> None:
    status, headers, body = exchange("HEAD", "/healthz")

    assert (status, headers["content-length"], body) == (200, "14", None)


def test_a_client_that_goes_away_gets_no_answer(exchange: Exchange, service: BundleService) -> None:
    before = service.status()["answers"]

    assert exchange("POST", "/v1/score", b"{", vanish=True, unfinished=True)[0] == 0
    assert exchange("POST", "/v1/score", GOOD, vanish=True)[0] == 0

    assert service.status()["answers"] == before


class Failing(BundleService):
    """Makes a mistake."""

    def answer(self, body: bytes, form: WireForm) -> Answer:
        raise ZeroDivisionError(f"while reading {form.name}")


def test_a_mistake_of_ours_is_answered_and_logged(
    exchange: Exchange, market: TinyMarket, caplog: pytest.LogCaptureFixture
) -> None:
    status, _, body = exchange("POST", "/v1/score", GOOD, service=Failing(market.settings))

    assert (status, body["error"]["code"]) == (500, "internal_error")
    assert "POST /v1/score failed" in caplog.text
    assert "ZeroDivisionError: while reading json" in caplog.text


def test_a_body_that_never_ends_is_given_up(service: BundleService) -> None:
    settings = ServingSettings(read_timeout_seconds=0.01)

    status, headers, body = exchange_with(
        service, "POST", "/v1/score", b"{", unfinished=True, settings=settings
    )

    assert (status, body["error"]["code"]) == (408, "body_too_slow")
    assert headers["connection"] == "close"


def test_more_than_may_wait_are_asked_to_come_back(service: BundleService) -> None:
    face = HttpFace(service, ServingSettings(max_waiting=2))
    outcomes: list[tuple[int, dict[bytes, bytes]]] = []

    async def one() -> None:
        waiting = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if waiting.is_set():
                await asyncio.Event().wait()
            waiting.set()
            return {"type": "http.request", "body": GOOD, "more_body": False}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                outcomes.append((message["status"], dict(message["headers"])))

        scope = {"type": "http", "method": "POST", "path": "/v1/score", "headers": []}
        await face(scope, receive, send)

    async def all_at_once() -> None:
        await asyncio.gather(*(one() for _ in range(10)))

    asyncio.run(all_at_once())

    assert sorted(status for status, _ in outcomes) == [200] * 3 + [503] * 7
    for status, headers in outcomes:
        assert (b"retry-after" in headers) == (status == 503)

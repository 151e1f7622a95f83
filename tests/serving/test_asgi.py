"""The HTTP face, driven without a server."""

import asyncio
import json
from typing import Any

import pytest

from driftline.serving.asgi import HttpFace
from driftline.serving.requests import refuse

MAX_BYTES = 1_000


class Echo:
    """Answers with the length of what came."""

    ready = True

    def score(self, body: bytes) -> bytes:
        return json.dumps({"num_bytes": len(body)}).encode()

    def status(self) -> dict[str, Any]:
        return {"name": "echo"}


class Empty(Echo):
    ready = False

    def score(self, body: bytes) -> bytes:
        raise refuse("no champion yet", status=503, code="no_champion")


def exchange(
    method: str,
    path: str,
    *chunks: bytes,
    headers: dict[str, str] | None = None,
    service: Echo | None = None,
    vanish: bool = False,
) -> tuple[int, dict[str, str], Any]:
    """Send one request in chunks; gives status, headers and JSON body."""
    parts = chunks or (b"",)
    messages: list[dict[str, Any]] = [
        {"type": "http.request", "body": part, "more_body": i < len(parts) - 1 or vanish}
        for i, part in enumerate(parts)
    ]
    messages.append({"type": "http.disconnect"})
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [(k.encode(), v.encode()) for k, v in (headers or {}).items()],
    }
    face = HttpFace(service or Echo(), max_request_bytes=MAX_BYTES)
    asyncio.run(face(scope, receive, send))
    if not sent:
        return 0, {}, None
    received = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
    assert int(received["content-length"]) >= len(sent[1]["body"])
    return sent[0]["status"], received, json.loads(sent[1]["body"] or b"null")


def test_a_body_that_comes_in_pieces_is_put_together() -> None:
    assert exchange("POST", "/v1/score", b"ab", b"", b"cde")[2] == {"num_bytes": 5}


@pytest.mark.parametrize(
    "kind", ["application/json", "Application/JSON; charset=utf-8", "application/json;charset=x"]
)
def test_json_is_accepted_however_it_is_spelt(kind: str) -> None:
    assert exchange("POST", "/v1/score", b"{}", headers={"content-type": kind})[0] == 200


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
    "announced": ("POST", "/v1/score", {"content-length": "1001"}, 413, "body_too_large"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served_is_refused_with_a_body(name: str) -> None:
    method, path, headers, status, code = REFUSED[name]

    found, received, body = exchange(method, path, b"{}", headers=headers)

    assert (found, body["error"]["code"]) == (status, code)
    assert received["content-type"] == "application/json"
    assert body["error"]["allowed"]


def test_a_body_that_grows_beyond_the_limit_is_refused() -> None:
    status, _, body = exchange("POST", "/v1/score", b"x" * 600, b"x" * 600)

    assert status == 413
    assert "1,000 bytes, got 1,200 or more" in body["error"]["message"]


def test_a_wrong_method_learns_the_right_one() -> None:
    assert exchange("GET", "/v1/score")[1]["allow"] == "POST"


def test_without_a_champion_the_client_is_asked_to_come_back() -> None:
    status, headers, body = exchange("POST", "/v1/score", b"{}", service=Empty())

    assert (status, headers["retry-after"]) == (503, "1")
    assert body["error"]["message"] == "no champion yet"


def test_health_tells_whether_there_is_a_champion() -> None:
    assert exchange("GET", "/healthz")[0] == 200
    assert exchange("GET", "/healthz", service=Empty())[0] == 503


def test_status_answers_without_a_champion() -> None:
    assert exchange("GET", "/v1/status", service=Empty())[0] == 200


def test_head_has_the_length_but_not_the_body() -> None:
    status, headers, body = exchange("HEAD", "/healthz")

    assert (status, headers["content-length"], body) == (200, "14", None)


def test_a_client_that_goes_away_gets_no_answer() -> None:
    assert exchange("POST", "/v1/score", b"{", vanish=True)[0] == 0

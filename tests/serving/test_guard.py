"""What the guard lets through to Ray Serve, and what it keeps to ourselves."""

import asyncio
from typing import Any

import pytest

from driftline.serving.transport.guard import Guard
from driftline.serving.transport.replica_face import face_of_this_process


def passed_on(scope: dict[str, Any]) -> dict[str, Any]:
    """The scope that reaches the application behind the guard."""
    reached: list[dict[str, Any]] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope)

    asyncio.run(Guard(application)(scope, None, None))
    (found,) = reached
    return found


@pytest.mark.parametrize("path", ["/v1/score", "/v1/status", "/-/healthz"])
def test_without_a_replica_of_ours_everything_is_passed_on(path: str) -> None:
    assert face_of_this_process() is None
    assert passed_on({"type": "http", "path": path, "headers": []})["path"] == path


def test_orders_for_ray_serve_are_not_passed_on() -> None:
    kept = [(b"content-type", b"application/json"), (b"authorization", b"Bearer x")]
    orders = [(b"x-request-timeout-seconds", b"0"), (b"x-request-id", b"\xff")]

    headers = passed_on({"type": "http", "path": "/v1/status", "headers": orders + kept})["headers"]

    assert headers == [*kept, (b"x-request-disconnect-disabled", b"?1")]


def test_what_is_not_http_is_passed_on_as_it_is() -> None:
    scope = {"type": "websocket", "path": "/v1/score", "headers": [(b"x-request-id", b"a")]}

    assert passed_on(dict(scope)) == scope

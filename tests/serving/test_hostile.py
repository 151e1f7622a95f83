"""Whatever is sent: 4xx with a reason, never a 500, and the next request is answered.

Against the HTTP face in this process; ``test_transport.py`` does the same to a real server.
"""

import asyncio
import gc
import json
import tracemalloc
from collections import Counter
from collections.abc import MutableMapping
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.serving.hostile import (
    GOOD,
    GOOD_BODY,
    MAX_BYTES,
    PROTOBUF,
    Hostile,
    all_requests,
    message,
    of,
)
from tests.tiny_market import TinyMarket

from driftline.platform.bundle import Bundle
from driftline.platform.settings import ServingSettings
from driftline.serving.service import BundleService
from driftline.serving.transport.asgi import HttpFace

REQUESTS = all_requests()
SETTINGS = ServingSettings(max_request_bytes=MAX_BYTES, clock="snapshot")


@pytest.fixture(scope="module")
def face(market: TinyMarket, first: Bundle) -> HttpFace:
    market.promote(first)
    service = BundleService(market.settings)
    service.look()
    return HttpFace(service, SETTINGS)


async def send(face: HttpFace, request: Hostile) -> tuple[int, Any]:
    """Status and JSON body."""
    sent: list[MutableMapping[str, Any]] = []
    chunks = list(request.chunks)

    async def receive() -> dict[str, Any]:
        if not chunks:
            await asyncio.Event().wait()
        chunk = chunks.pop(0)
        return {"type": "http.request", "body": chunk, "more_body": bool(chunks)}

    async def keep(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    headers = [(name.encode(), value.encode("latin-1")) for name, value in request.headers.items()]
    scope = {
        "type": "http",
        "method": request.method,
        "path": request.path,
        "headers": headers,
    }
    async with asyncio.timeout(30):
        await face(scope, receive, keep)
    kind = dict(sent[0]["headers"])[b"content-type"].decode()
    body = sent[1]["body"]
    return sent[0]["status"], json.loads(body) if kind == "application/json" and body else None


def ask(face: HttpFace, request: Hostile) -> tuple[int, Any]:
    return asyncio.run(send(face, request))


def test_there_are_enough_of_them() -> None:
    assert len(REQUESTS) >= 120
    assert Counter(request.status for request in REQUESTS.values())[200] < 20


@pytest.mark.parametrize("name", REQUESTS)
def test_each_is_answered_as_it_deserves(name: str, face: HttpFace) -> None:
    request = REQUESTS[name]

    status, body = ask(face, request)

    assert status == request.status, body
    if request.code is not None and request.method != "HEAD":
        error = body["error"]
        assert error["code"] == request.code
        assert 0 < len(error["message"]) < 400
    assert ask(face, of(200, None, GOOD_BODY))[0] == 200


def test_a_protobuf_answer_is_no_json(face: HttpFace) -> None:
    request = Hostile(200, None, (message(),), headers={"content-type": PROTOBUF})

    assert ask(face, request) == (200, None)


LEAF = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from([2**63, -(2**63), 2**64, 10**30, 100_001])
)
TREE = st.recursive(
    LEAF, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner)
)
BODY = st.fixed_dictionaries(
    {},
    optional={
        "page_product_id": st.sampled_from([100_001]) | TREE,
        "ad_product_ids": st.lists(st.sampled_from([100_002, 5]) | LEAF, max_size=4) | TREE,
        "context": st.dictionaries(st.sampled_from(["application", "hour_of_week", "x"]), LEAF)
        | TREE,
        "request_id": st.text(max_size=3) | TREE,
        "request_key": st.text(max_size=3) | TREE,
        "time": st.datetimes().map(lambda moment: f"{moment.isoformat()}Z") | TREE,
        "more": LEAF,
    },
)
FUZZ = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(body=BODY)
def test_any_json_is_answered_or_refused(body: Any, face: HttpFace) -> None:
    status, answer = ask(face, of(0, None, json.dumps(body).encode()))

    assert status in (200, 400, 422), answer
    assert ("error" in answer) == (status != 200)


@FUZZ
@given(body=st.binary(max_size=80), form=st.sampled_from(["application/json", PROTOBUF]))
def test_any_bytes_are_answered_or_refused(body: bytes, form: str, face: HttpFace) -> None:
    request = Hostile(0, None, (body,), headers={"content-type": form})

    status, answer = ask(face, request)

    assert status in (200, 400, 422), answer


@FUZZ
@given(
    at=st.integers(0, 60),
    byte=st.integers(0, 255),
    form=st.sampled_from(["application/json", PROTOBUF]),
)
def test_one_wrong_byte_is_answered_or_refused(
    at: int, byte: int, form: str, face: HttpFace
) -> None:
    body = bytearray(message() if form == PROTOBUF else json.dumps(GOOD).encode())
    body[at % len(body)] = byte

    status, answer = ask(face, Hostile(0, None, (bytes(body),), headers={"content-type": form}))

    assert status in (200, 400, 422), answer


def test_they_leave_nothing_in_memory(face: HttpFace) -> None:
    async def once() -> None:
        for request in REQUESTS.values():
            await send(face, request)

    def held() -> int:
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    asyncio.run(once())
    asyncio.run(once())
    tracemalloc.start()
    try:
        asyncio.run(once())
        before = held()
        for _ in range(3):
            asyncio.run(once())
        grown = held() - before
    finally:
        tracemalloc.stop()

    assert grown < 100_000  # a body is up to 20,000 bytes and there are 400 of them

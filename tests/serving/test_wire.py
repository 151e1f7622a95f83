"""The compact form beside JSON: the same requests, the same answers, the same refusals."""

import json
import struct
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny_market import TinyMarket

from driftline.platform.bundle import Bundle
from driftline.serving import scoring_pb2
from driftline.serving.scoring_pb2 import ContextValue
from driftline.serving.service import BundleService
from driftline.serving.transport.requests import (
    ContextFeature,
    KeyType,
    RefusedRequestError,
    RequestParser,
    ScoreRequest,
)
from driftline.serving.transport.wire import JsonForm
from driftline.serving.transport.wire_protobuf import ProtobufForm

ROOT = Path(__file__).parents[2]
CONTEXT = (ContextFeature("application", "categorical"), ContextFeature("depth", "numeric"))


def parser(key_type: KeyType = "int64", *, accept_time: bool = True) -> RequestParser:
    return RequestParser(key_type, CONTEXT, max_ads=5, accept_time=accept_time)


def message(**fields: Any) -> scoring_pb2.ScoreRequest:
    good: dict[str, Any] = {"page_product_id": 7, "ad_product_ids": [3, -1, 3]}
    return scoring_pb2.ScoreRequest(**(good | fields))


def read(body: bytes, key_type: KeyType = "int64", **options: Any) -> ScoreRequest:
    return ProtobufForm().read(body, parser(key_type, **options))


def fields(request: ScoreRequest) -> tuple[Any, ...]:
    ads = request.ads if request.ads_array is None else tuple(request.ads_array.tolist())
    return (
        request.page,
        ads,
        request.context,
        request.time,
        request.request_id,
        request.request_key,
    )


def refusal(body: bytes, **options: Any) -> RefusedRequestError:
    with pytest.raises(RefusedRequestError) as refused:
        read(body, **options)
    return refused.value


def test_the_generated_module_is_that_of_the_published_file(tmp_path: Path) -> None:
    outputs = [f"--python_out={tmp_path}", f"--pyi_out={tmp_path}"]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", *outputs, "serving/scoring.proto"]
    subprocess.run(command, cwd=ROOT, check=True)

    for name in ("scoring_pb2.py", "scoring_pb2.pyi"):
        assert (ROOT / "serving" / name).read_text() == (tmp_path / "serving" / name).read_text(), (
            "run the command at the top of serving/scoring.proto"
        )


KEYS = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(max_size=8)


@given(
    page=KEYS,
    ads=st.lists(KEYS, min_size=1, max_size=5),
    application=st.none() | TEXT,
    depth=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    request_id=st.none() | st.text(min_size=1, max_size=8),
    seconds=st.none() | st.integers(0, 10**9),
)
def test_both_forms_say_the_same(
    page: int,
    ads: list[int],
    application: str | None,
    depth: float | None,
    request_id: str | None,
    seconds: int | None,
) -> None:
    time = None if seconds is None else datetime.fromtimestamp(seconds, UTC)
    as_json = {
        "page_product_id": page,
        "ad_product_ids": ads,
        "context": {"application": application, "depth": depth},
        "request_id": request_id,
        "time": time and time.isoformat(),
    }
    as_protobuf = message(
        page_product_id=page,
        ad_product_ids=ads,
        context={
            "application": ContextValue(text=application),
            "depth": ContextValue(number=depth),
        },
        request_id=request_id,
        time_us=None if seconds is None else seconds * 10**6,
    )

    found = fields(read(as_protobuf.SerializeToString()))

    assert found == fields(JsonForm().read(json.dumps(as_json).encode(), parser()))


def test_products_may_be_strings() -> None:
    body = scoring_pb2.ScoreRequest(page_product_key="a", ad_product_keys=["b", "c"])

    request = read(body.SerializeToString(), "string")

    assert (request.page, request.ads, request.ads_array) == ("a", ("b", "c"), None)


def test_ids_may_come_one_by_one_or_in_pieces() -> None:
    page = message(ad_product_ids=[]).SerializeToString()
    lone = b"".join(b"\x19" + struct.pack("<q", ad) for ad in (3, -1, 3))
    pieces = b"\x1a\x08" + struct.pack("<q", 3) + b"\x1a\x10" + struct.pack("<qq", -1, 3)

    expected = fields(read(message().SerializeToString()))

    assert fields(read(page + lone)) == expected
    assert fields(read(page + pieces)) == expected


def test_a_request_cannot_be_changed_through_its_array() -> None:
    ads = read(message().SerializeToString()).ads_array

    assert ads is not None
    with pytest.raises(ValueError, match="read-only"):
        ads[0] = 1


REFUSED: dict[str, tuple[bytes, int, str, str]] = {
    "empty": (b"", 400, "invalid_protobuf", "the body is empty"),
    "JSON": (b'{"page_product_id": 7}', 400, "invalid_protobuf", "is not the message"),
    "cut off": (message().SerializeToString()[:-3], 400, "invalid_protobuf", "is not the message"),
    "half an id": (b"\x09" + bytes(8) + b"\x1a\x03abc", 400, "invalid_protobuf", "3 bytes"),
    "no page": (
        scoring_pb2.ScoreRequest(ad_product_ids=[1]).SerializeToString(),
        422,
        "missing_field",
        "page_product_id: is required",
    ),
    "no ads": (message(ad_product_ids=[]).SerializeToString(), 422, "no_ads", "at least one ad"),
    "many ads": (
        message(ad_product_ids=[1] * 6).SerializeToString(),
        422,
        "too_many_ads",
        "at most 5 ads, got 6",
    ),
    "strings": (
        scoring_pb2.ScoreRequest(page_product_key="a", ad_product_keys=["b"]).SerializeToString(),
        422,
        "wrong_value",
        "must be an integer",
    ),
    "both": (message(ad_product_keys=["b"]).SerializeToString(), 422, "wrong_value", "not both"),
    "NaN": (
        message(context={"depth": ContextValue(number=float("nan"))}).SerializeToString(),
        422,
        "wrong_value",
        "must be a finite number",
    ),
    "unknown context": (
        message(context={"colour": ContextValue(text="red")}).SerializeToString(),
        422,
        "unknown_field",
        "context.colour: is not known",
    ),
    "wrong context": (
        message(context={"depth": ContextValue(text="deep")}).SerializeToString(),
        422,
        "wrong_value",
        "context.depth: must be a number",
    ),
    "empty name": (message(request_id="").SerializeToString(), 422, "wrong_value", "request_id"),
    "far future": (message(time_us=2**62).SerializeToString(), 422, "wrong_value", "year 10000"),
    "unknown field": (
        message().SerializeToString() + b"\x98\x06\x01",
        422,
        "unknown_field",
        "field 99: is not known",
    ),
    "no text": (b"\x12\x02\xff\xfe", 400, "invalid_protobuf", "is not the message"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_message_is_refused_with_its_reason(name: str) -> None:
    body, status, code, words = REFUSED[name]

    error = refusal(body)

    assert (error.status, error.code) == (status, code)
    assert words in str(error)


def test_a_time_is_refused_while_the_wall_clock_counts() -> None:
    error = refusal(message(time_us=10**15).SerializeToString(), accept_time=False)

    assert "serving.clock is 'wall'" in str(error)


@given(body=st.binary(max_size=60))
def test_any_bytes_give_a_request_or_a_refusal(body: bytes) -> None:
    for before in (b"", message().SerializeToString()):
        status = 200
        try:
            read(before + body)
        except RefusedRequestError as error:
            status = error.status
        assert status in (200, 400, 422)


def test_both_forms_answer_the_same(market: TinyMarket, first: Bundle, pointer: Path) -> None:
    market.promote(first)
    service = BundleService(market.settings)
    service.look()
    ads = [100_002, 999_999_999, 100_003]
    named: dict[str, Any] = {"page_product_id": 100_001, "request_id": "view-1"}
    body = message(ad_product_ids=ads, **named).SerializeToString()
    as_json = {"ad_product_ids": ads, **named}

    binary = service.answer(body, ProtobufForm())
    found = scoring_pb2.ScoreAnswer.FromString(ProtobufForm().write(binary))
    answer = json.loads(JsonForm().write(service.answer(json.dumps(as_json).encode(), JsonForm())))

    np.testing.assert_allclose(found.probabilities, answer["probabilities"], rtol=1e-6)
    assert found.bundle == answer["bundle"]
    assert found.request_id == answer["request_id"] == "view-1"
    assert scoring_pb2.PackedScoreAnswer.FromString(ProtobufForm().write(binary)).request_id == (
        "view-1"
    )
    assert found.as_of_us == int(datetime.fromisoformat(answer["as_of"]).timestamp() * 10**6)
    assert found.page_fallback == (answer["fallbacks"]["page"] or "")
    assert [{"index": f.index, "reason": f.reason} for f in found.ad_fallbacks] == answer[
        "fallbacks"
    ]["ads"]
    assert {
        tier.tier: {
            "age_seconds": round(tier.age_seconds, 3) if tier.HasField("age_seconds") else None,
            "stale": tier.stale,
        }
        for tier in found.tiers
    } == answer["features"]

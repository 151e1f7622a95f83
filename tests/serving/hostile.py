"""Requests that nobody should send, and what each must be answered."""

import gzip
import json
import struct
from dataclasses import dataclass, field
from typing import Any

from driftline.serving import scoring_pb2
from driftline.serving.scoring_pb2 import ContextValue

PAGE, AD = 100_001, 100_002
GOOD: dict[str, Any] = {"page_product_id": PAGE, "ad_product_ids": [AD]}
GOOD_BODY = json.dumps(GOOD).encode()
JSON, PROTOBUF = "application/json", "application/x-protobuf"
MAX_BYTES = 20_000


@dataclass(frozen=True)
class Hostile:
    """One request and its answer."""

    status: int
    code: str | None
    """Of the error; ``None`` for what is legal after all."""
    chunks: tuple[bytes, ...] = (b"",)
    method: str = "POST"
    path: str = "/v1/score"
    headers: dict[str, str] = field(default_factory=dict)


def changed(**fields: Any) -> bytes:
    return json.dumps({**GOOD, **fields}).encode()


def raw(text: str) -> bytes:
    return b'{"page_product_id": 100001, "ad_product_ids": [100002], ' + text.encode() + b"}"


def of(status: int, code: str | None, *chunks: bytes, **more: Any) -> Hostile:
    return Hostile(status, code, chunks or (b"",), **more)


def message(**fields: Any) -> bytes:
    good: dict[str, Any] = {"page_product_id": PAGE, "ad_product_ids": [AD]}
    return scoring_pb2.ScoreRequest(**(good | fields)).SerializeToString()


def binary(status: int, code: str | None, body: bytes) -> Hostile:
    return Hostile(status, code, (body,), headers={"content-type": PROTOBUF})


BROKEN_JSON: dict[str, bytes] = {
    "nothing": b"",
    "white space": b" \n\t ",
    "null byte": b"\x00",
    "null bytes around": b"\x00" + GOOD_BODY + b"\x00",
    "null byte within": GOOD_BODY.replace(b": ", b":\x00"),
    "words": b"page=1&ads=2",
    "cut off": GOOD_BODY[:-1],
    "cut off in a key": GOOD_BODY[:8],
    "cut off in a number": b'{"page_product_id": 1, "ad_product_ids": [1',
    "two documents": GOOD_BODY + GOOD_BODY,
    "trailing comma": b'{"page_product_id": 1, "ad_product_ids": [1,]}',
    "single quotes": b"{'page_product_id': 1, 'ad_product_ids': [1]}",
    "comment": b"/* */" + GOOD_BODY,
    "byte order mark": b"\xef\xbb\xbf" + GOOD_BODY,
    "UTF-16": GOOD_BODY.decode().encode("utf-16"),
    "Latin-1": '{"é": 1}'.encode("latin-1"),
    "all bytes": bytes(range(256)),
    "overlong UTF-8": raw('"request_id": "X"').replace(b"X", b"\xc0\xaf"),
    "cut off UTF-8": raw('"request_id": "X"').replace(b"X", b"\xe2\x82"),
    "half a surrogate": raw('"request_id": "\\ud800"'),
    "bad escape": raw('"request_id": "\\x41"'),
    "line feed in a string": raw('"request_id": "a\nb"'),
    "deep lists": b"[" * (MAX_BYTES - 1),
    "deep objects": b'{"a":' * 3_000,
    "deep and closed": b"[" * 5_000 + b"]" * 5_000,
    "deep context": raw('"context": ' + "[" * 5_000 + "]" * 5_000),
    "digits without end": raw('"request_id": ' + "9" * 10_000),
    "leading zero": b'{"page_product_id": 007, "ad_product_ids": [1]}',
    "hexadecimal": b'{"page_product_id": 0x7, "ad_product_ids": [1]}',
    "compressed and not said": gzip.compress(GOOD_BODY),
    "protobuf as JSON": message(),
}
WRONG_JSON: dict[str, tuple[str, bytes]] = {
    "list": ("wrong_value", b"[]"),
    "string": ("wrong_value", b'"a"'),
    "number": ("wrong_value", b"1e400"),
    "null": ("wrong_value", b"null"),
    "empty object": ("missing_field", b"{}"),
    "no ads": ("missing_field", b'{"page_product_id": 1}'),
    "no page": ("missing_field", b'{"ad_product_ids": [1]}'),
    "empty ads": ("no_ads", changed(ad_product_ids=[])),
    "ads null": ("wrong_value", changed(ad_product_ids=None)),
    "ads an object": ("wrong_value", changed(ad_product_ids={"0": 1})),
    "ads a string": ("wrong_value", changed(ad_product_ids="1")),
    "ads nested": ("wrong_value", changed(ad_product_ids=[[1]])),
    "1,001 ads": ("too_many_ads", changed(ad_product_ids=[1] * 1_001)),
    "ad true": ("wrong_value", changed(ad_product_ids=[1, True])),
    "ad text": ("wrong_value", changed(ad_product_ids=["1"])),
    "ad null": ("wrong_value", changed(ad_product_ids=[1, None])),
    "ad fraction": ("wrong_value", changed(ad_product_ids=[1.5])),
    "ad whole fraction": ("wrong_value", changed(ad_product_ids=[1.0])),
    "ad over 64 bits": ("wrong_value", changed(ad_product_ids=[2**63])),
    "ad under 64 bits": ("wrong_value", changed(ad_product_ids=[-(2**63) - 1])),
    "ad over 128 bits": ("wrong_value", changed(ad_product_ids=[1, 10**40])),
    "page false": ("wrong_value", changed(page_product_id=False)),
    "page 1e400": ("wrong_value", b'{"page_product_id": 1e400, "ad_product_ids": [1]}'),
    "page NaN": ("wrong_value", b'{"page_product_id": NaN, "ad_product_ids": [1]}'),
    "page -Infinity": ("wrong_value", b'{"page_product_id": -Infinity, "ad_product_ids": [1]}'),
    "page an object": ("wrong_value", changed(page_product_id={"$ne": None})),
    "page a query": ("wrong_value", changed(page_product_id="1; DROP TABLE ads")),
    "unknown field": ("unknown_field", changed(admin=True)),
    "prototype": ("unknown_field", changed(__proto__={"admin": True})),
    "dunder class": ("unknown_field", changed(__class__="int")),
    "other case": ("unknown_field", changed(Ad_Product_Ids=[1])),
    "empty key": ("unknown_field", raw('"": 1')),
    "masses of fields": ("unknown_field", json.dumps({f"f{i}": i for i in range(1_200)}).encode()),
    "context a list": ("wrong_value", changed(context=[])),
    "context a string": ("wrong_value", changed(context="a")),
    "unknown context": ("unknown_field", changed(context={"colour": "red"})),
    "masses of context": ("unknown_field", changed(context={f"f{i}": i for i in range(1_200)})),
    "context number": ("wrong_value", changed(context={"application": 1})),
    "context true": ("wrong_value", changed(context={"application": True})),
    "context nested": ("wrong_value", changed(context={"application": {"a": "b"}})),
    "request id empty": ("wrong_value", changed(request_id="")),
    "request id long": ("wrong_value", changed(request_id="x" * 257)),
    "request id number": ("wrong_value", changed(request_id=1)),
    "request key a list": ("wrong_value", changed(request_key=["a"])),
    "time yesterday": ("wrong_value", changed(time="yesterday")),
    "time without zone": ("wrong_value", changed(time="2026-01-02T12:00:00")),
    "time number": ("wrong_value", changed(time=1e300)),
    "time year 0": ("wrong_value", changed(time="0000-01-01T00:00:00Z")),
    "time before the first": ("wrong_value", changed(time="0001-01-01T00:00:00+01:00")),
    "time after the last": ("wrong_value", changed(time="9999-12-31T23:59:59-01:00")),
    "time 31 February": ("wrong_value", changed(time="2026-02-31T00:00:00Z")),
}
LEGAL: dict[str, bytes] = {
    "unknown products": changed(page_product_id=1, ad_product_ids=[2, 3]),
    "the same ad a thousand times": changed(ad_product_ids=[AD] * 1_000),
    "negative products": changed(page_product_id=-1, ad_product_ids=[0, -(2**63), 2**63 - 1]),
    "the last of two keys": b'{"page_product_id": "x", ' + GOOD_BODY[1:],
    "white space around": b" \n" + GOOD_BODY + b"\r\n\t ",
    "escaped keys": GOOD_BODY.replace(b"page", b"\\u0070age"),
    "null in a string": raw('"context": {"application": "\\u0000"}'),
    "strange text": changed(context={"application": "\u202e\U0001f4a9" * 500}),
    "a category never seen": changed(context={"application": "'; --"}),
    "a first moment": changed(time="0001-01-01T00:00:00Z"),
    "a last moment": changed(time="9999-12-31T23:59:59.999999Z"),
    "a strange zone": changed(time="2026-01-02T12:00:00+23:59"),
}
BROKEN_PROTOBUF: dict[str, bytes] = {
    "nothing": b"",
    "all ones": b"\xff" * 100,
    "all bytes": bytes(range(256)),
    "cut off": message()[:-1],
    "varint without end": b"\x30" + b"\xff" * 11,
    "length beyond the end": b"\x1a\x7f" + bytes(8),
    "enormous length": b"\x1a\xff\xff\xff\xff\x0f",
    "negative length": b"\x1a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
    "7 bytes of an id": b"\x09" + bytes(8) + b"\x1a\x07" + bytes(7),
    "field zero": b"\x00\x00" + message(),
    "wire type 7": b"\x0f" + message(),
    "group without end": b"\x0b" * 3_000,
    "end without group": b"\x0c",
    "text not UTF-8": message() + b"\x3a\x02\xff\xfe",
    "JSON as protobuf": GOOD_BODY,
}
WRONG_PROTOBUF: dict[str, tuple[str, bytes]] = {
    "no page": ("missing_field", scoring_pb2.ScoreRequest(ad_product_ids=[1]).SerializeToString()),
    "no ads": ("no_ads", message(ad_product_ids=[])),
    "1,001 ads": ("too_many_ads", message(ad_product_ids=[1] * 1_001)),
    "both kinds of ads": ("wrong_value", message(ad_product_keys=["a"])),
    "strings": (
        "wrong_value",
        scoring_pb2.ScoreRequest(page_product_key="a", ad_product_keys=["b"]).SerializeToString(),
    ),
    "unknown field": ("unknown_field", message() + b"\x98\x06\x01"),
    "unknown deep groups": ("unknown_field", message() + b"\x9b\x06" * 50 + b"\x9c\x06" * 50),
    "unknown context": ("unknown_field", message(context={"x": ContextValue(number=1)})),
    "time beyond time": ("wrong_value", message(time_us=2**63 - 1)),
    "empty request id": ("wrong_value", message(request_id="")),
    "page as varint": ("unknown_field", b"\x08\x01\x1a\x08" + struct.pack("<q", 1)),
}


def all_requests() -> dict[str, Hostile]:
    """By name."""
    found = {f"JSON: {name}": of(400, "invalid_json", body) for name, body in BROKEN_JSON.items()}
    for name, (code, body) in WRONG_JSON.items():
        found[f"JSON: {name}"] = of(422, code, body)
    for name, body in LEGAL.items():
        found[f"JSON: {name}"] = of(200, None, body)
    for name, body in BROKEN_PROTOBUF.items():
        found[f"protobuf: {name}"] = binary(400, "invalid_protobuf", body)
    for name, (code, body) in WRONG_PROTOBUF.items():
        found[f"protobuf: {name}"] = binary(422, code, body)
    return found | HTTP


HTTP: dict[str, Hostile] = {
    "too large": of(413, "body_too_large", b"x" * (MAX_BYTES + 1)),
    "too large in pieces": of(413, "body_too_large", *[b"x" * 1_000] * 30),
    "too large and only said so": of(
        413, "body_too_large", GOOD_BODY, headers={"content-length": "9" * 30}
    ),
    "length is no number": of(200, None, GOOD_BODY, headers={"content-length": "-1"}),
    "in single bytes": of(200, None, *[bytes([byte]) for byte in GOOD_BODY]),
    "gzip": of(
        415,
        "wrong_content_encoding",
        gzip.compress(GOOD_BODY),
        headers={"content-encoding": "gzip"},
    ),
    "gzip bomb": of(
        415,
        "wrong_content_encoding",
        gzip.compress(bytes(10**6)),
        headers={"content-encoding": "gzip, gzip"},
    ),
    "form": of(415, "wrong_content_type", b"a=b", headers={"content-type": "text/plain"}),
    "multipart": of(
        415,
        "wrong_content_type",
        b"--x",
        headers={"content-type": "multipart/form-data; boundary=x"},
    ),
    "empty content type": of(415, "wrong_content_type", GOOD_BODY, headers={"content-type": ""}),
    "content type not ASCII": of(
        415, "wrong_content_type", GOOD_BODY, headers={"content-type": "\xff\xfe"}
    ),
    "another charset": of(
        400,
        "invalid_json",
        GOOD_BODY.decode().encode("utf-32"),
        headers={"content-type": "application/json; charset=utf-32"},
    ),
    "GET": of(405, "wrong_method", method="GET"),
    "HEAD to scoring": of(405, "wrong_method", method="HEAD"),
    "TRACE": of(405, "wrong_method", method="TRACE"),
    "made-up method": of(405, "wrong_method", method="X" * 1_000),
    "lower-case method": of(405, "wrong_method", GOOD_BODY, method="post"),
    "POST to status": of(405, "wrong_method", GOOD_BODY, path="/v1/status"),
    "DELETE docs": of(405, "wrong_method", method="DELETE", path="/docs"),
    "root": of(404, "unknown_path", method="GET", path="/"),
    "empty path": of(404, "unknown_path", method="GET", path=""),
    "star": of(404, "unknown_path", method="OPTIONS", path="*"),
    "traversal": of(404, "unknown_path", method="GET", path="/v1/../../etc/passwd"),
    "double slash": of(404, "unknown_path", GOOD_BODY, path="//v1/score"),
    "trailing slash": of(404, "unknown_path", GOOD_BODY, path="/v1/score/"),
    "encoded slash": of(404, "unknown_path", GOOD_BODY, path="/v1%2fscore"),
    "null byte in the path": of(404, "unknown_path", GOOD_BODY, path="/v1/score\x00.json"),
    "long path": of(404, "unknown_path", method="GET", path="/" + "a" * 100_000),
    "whole address": of(404, "unknown_path", GOOD_BODY, path="http://x/v1/score"),
    "other case": of(404, "unknown_path", GOOD_BODY, path="/V1/SCORE"),
}

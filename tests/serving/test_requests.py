"""What a request may look like, and what the refusal of another one says."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from driftline.serving.transport.requests import (
    ContextFeature,
    KeyType,
    RefusedRequestError,
    RequestParser,
    ScoreRequest,
)

CONTEXT = (ContextFeature("application", "categorical"), ContextFeature("depth", "numeric"))
GOOD: dict[str, Any] = {
    "page_product_id": 7,
    "ad_product_ids": [3, 1, 3],
    "context": {"application": "mail", "depth": 2},
}


def parser(key_type: KeyType = "int64", *, accept_time: bool = True) -> RequestParser:
    return RequestParser(key_type, CONTEXT, max_ads=5, accept_time=accept_time)


def parse(value: object, **options: Any) -> ScoreRequest:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return parser(**options).parse(body)


def test_ads_keep_their_order_and_their_duplicates() -> None:
    request = parse(GOOD)

    assert request.page == 7
    assert request.ads_array is not None
    assert request.ads_array.tolist() == [3, 1, 3]
    assert request.context == {"application": "mail", "depth": 2.0}


@pytest.mark.parametrize("context", [None, {}, {"depth": None}])
def test_context_that_is_left_out_is_not_known(context: object) -> None:
    assert parse({**GOOD, "context": context}).context == {"application": None, "depth": None}


def test_context_is_told_by_name_and_not_by_place() -> None:
    request = parse({**GOOD, "context": {"depth": 1.5, "application": "web"}})

    assert request.context == {"application": "web", "depth": 1.5}


@pytest.mark.parametrize("name", ["copy", "json", "model_config", "schema", "fields", "self"])
def test_a_feature_may_have_any_name(name: str) -> None:
    own = RequestParser("int64", [ContextFeature(name, "numeric")], max_ads=5, accept_time=False)

    assert own.parse(json.dumps({**GOOD, "context": {name: 1}}).encode()).context == {name: 1.0}


def test_a_time_is_read_in_its_zone() -> None:
    request = parse({**GOOD, "time": "2026-01-05T12:00:00+02:00"})

    assert request.time == datetime(2026, 1, 5, 10, tzinfo=UTC)


MALFORMED: dict[str, tuple[object, int, str, str]] = {
    "empty": (b"", 400, "", "the body is empty"),
    "cut off": (b'{"page_product_id": 7', 400, "", "the body is not JSON"),
    "no text": (b"\xff\xfe", 400, "", "the body is not JSON"),
    "deep": (b"[" * 5_000, 400, "", "recursion limit"),
    "half a character": (b'{"page_product_id": "\\ud800"}', 400, "", "the body is not JSON"),
    "list": ([], 422, "", "must be an object"),
    "null": (None, 422, "", "must be an object"),
    "no page": ({"ad_product_ids": [1]}, 422, "page_product_id", "is required"),
    "no ads": ({"page_product_id": 7}, 422, "ad_product_ids", "is required"),
    "empty ads": ({**GOOD, "ad_product_ids": []}, 422, "ad_product_ids", "at least one ad"),
    "many ads": (
        {**GOOD, "ad_product_ids": [1] * 6},
        422,
        "ad_product_ids",
        "at most 5 ads, got 6",
    ),
    "ads no list": ({**GOOD, "ad_product_ids": 3}, 422, "ad_product_ids", "must be a list"),
    "ads a text": ({**GOOD, "ad_product_ids": "31"}, 422, "ad_product_ids", "must be a list"),
    "one ad null": ({**GOOD, "ad_product_ids": [1, None]}, 422, "ad_product_ids.1", "an integer"),
    "one ad text": ({**GOOD, "ad_product_ids": [1, "2"]}, 422, "ad_product_ids.1", "got '2'"),
    "page text": ({**GOOD, "page_product_id": "7"}, 422, "page_product_id", "an integer"),
    "page float": ({**GOOD, "page_product_id": 7.0}, 422, "page_product_id", "an integer"),
    "page bool": ({**GOOD, "page_product_id": True}, 422, "page_product_id", "an integer"),
    "page null": ({**GOOD, "page_product_id": None}, 422, "page_product_id", "an integer"),
    "page huge": ({**GOOD, "page_product_id": 2**63}, 422, "page_product_id", "64 bits"),
    "page NaN": (b'{"page_product_id": NaN, "ad_product_ids": [1]}', 422, "page_product_id", "nan"),
    "unknown key": ({**GOOD, "pages": 1}, 422, "pages", "is not known"),
    "unknown context": ({**GOOD, "context": {"depht": 1}}, 422, "context.depht", "is not known"),
    "context list": ({**GOOD, "context": []}, 422, "context", "must be an object of features"),
    "category number": (
        {**GOOD, "context": {"application": 3}},
        422,
        "context.application",
        "must be a string or null, got 3",
    ),
    "number text": ({**GOOD, "context": {"depth": "3"}}, 422, "context.depth", "must be a number"),
    "number bool": ({**GOOD, "context": {"depth": True}}, 422, "context.depth", "must be a number"),
    "number NaN": (
        b'{"page_product_id": 7, "ad_product_ids": [1], "context": {"depth": NaN}}',
        422,
        "context.depth",
        "must be a finite number or null, got nan",
    ),
    "number infinite": (
        b'{"page_product_id": 7, "ad_product_ids": [1], "context": {"depth": 1e999}}',
        422,
        "context.depth",
        "finite",
    ),
    "time without zone": ({**GOOD, "time": "2026-01-05T12:00:00"}, 422, "time", "time zone"),
    "time no time": ({**GOOD, "time": "yesterday"}, 422, "time", "ISO 8601"),
    "time a number": ({**GOOD, "time": 3}, 422, "time", "ISO 8601"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_request_is_refused_with_its_field_and_reason(name: str) -> None:
    value, status, field, words = MALFORMED[name]

    with pytest.raises(RefusedRequestError) as refused:
        parse(value)

    error = refused.value.body["error"]
    assert refused.value.status == status
    assert error.get("field", "") == field
    assert words in error["message"]


def test_a_string_market_refuses_integers() -> None:
    with pytest.raises(
        RefusedRequestError, match="page_product_id: must be a string, as in the log"
    ):
        parse(GOOD, key_type="string")


def test_an_unknown_context_feature_is_told_which_ones_there_are() -> None:
    with pytest.raises(RefusedRequestError) as refused:
        parse({**GOOD, "context": {"app": "mail"}})

    assert refused.value.allowed == ["application", "depth"]


def test_a_time_is_refused_while_the_wall_clock_counts() -> None:
    with pytest.raises(RefusedRequestError, match=r"serving.clock is 'wall'"):
        parse({**GOOD, "time": "2026-01-05T12:00:00Z"}, accept_time=False)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=10,
)
FIELD = st.sampled_from(["page_product_id", "ad_product_ids", "context", "time", "x"])


@given(
    body=st.binary(max_size=40) | st.dictionaries(FIELD, JSON).map(lambda v: json.dumps(v).encode())
)
def test_any_bytes_give_a_request_or_a_refusal(body: bytes) -> None:
    refusal = None
    try:
        request = parser().parse(body)
    except RefusedRequestError as error:
        refusal = error

    if refusal is None:
        assert isinstance(request.page, int)
    else:
        assert refusal.status in (400, 422)
        assert refusal.body["error"]["message"]


PLAIN = st.fixed_dictionaries(
    {
        "page_product_id": st.integers(-(2**64), 2**64) | st.booleans() | st.text(max_size=2),
        "ad_product_ids": st.lists(
            st.integers(-(2**64), 2**64) | st.booleans() | st.text(max_size=2), max_size=6
        )
        | st.lists(st.integers(0, 9), max_size=6)
        | st.lists(st.text(max_size=2), max_size=6),
    },
    optional={
        "context": st.none()
        | st.dictionaries(
            st.sampled_from(["application", "depth", "x"]),
            st.none() | st.text(max_size=2) | st.integers() | st.floats() | st.booleans(),
        ),
        "request_id": st.none() | st.text(max_size=2) | st.integers(),
        "request_key": st.none() | st.text(min_size=255, max_size=258),
    },
)


@given(values=PLAIN, key_type=st.sampled_from(["int64", "string"]))
def test_the_short_way_takes_what_the_model_takes(values: Any, key_type: KeyType) -> None:
    """A ``time``, even null, sends a request through the model."""

    def outcome(body: dict[str, Any]) -> object:
        try:
            request = parse(body, key_type=key_type)
        except RefusedRequestError as error:
            return error.status, str(error)
        ads = request.ads if request.ads_array is None else request.ads_array.tolist()
        return request.page, ads, request.context, request.request_id, request.request_key

    assert outcome(values) == outcome({**values, "time": None})


def test_the_last_of_two_equal_keys_counts() -> None:
    twice = b'{"page_product_id": "x", "page_product_id": 7, "ad_product_ids": [1]'

    for body in (twice + b"}", twice + b', "time": null}'):
        assert parse(body).page == 7

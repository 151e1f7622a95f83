"""The service's description of itself."""

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from tests.tiny_market import TinyMarket

from driftline.pipelines.student import bundle_contract
from driftline.platform.settings import ServingSettings
from driftline.serving.transport.openapi import openapi_json, openapi_page
from driftline.serving.transport.requests import (
    ContextFeature,
    RefusedRequestError,
    RequestParser,
    refuse,
)

CONTRACT = {"key_type": "int64", "context": {"application": "categorical", "depth": "numeric"}}
GOOD: dict[str, Any] = {"page_product_id": 7, "ad_product_ids": [3]}


def document(contract: Any = CONTRACT, **settings: Any) -> dict[str, Any]:
    return openapi_json(ServingSettings(**settings), contract)


def references(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return own.union(*(references(inner) for inner in value.values()))
    return (
        set().union(*(references(inner) for inner in value)) if isinstance(value, list) else set()
    )


@pytest.mark.parametrize("contract", [None, CONTRACT, {"key_type": "string", "context": {}}])
def test_the_document_holds_together(contract: Any) -> None:
    found = document(contract)

    assert re.fullmatch(r"3\.1\.\d", found["openapi"])
    assert {"title", "version"} <= set(found["info"])
    for reference in references(found):
        kind, _, name = reference.removeprefix("#/components/").partition("/")
        assert name in found["components"][kind], reference
    for schema in found["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)
    for verbs in found["paths"].values():
        for operation in verbs.values():
            assert operation["operationId"]
            assert all(answer["description"] for answer in operation["responses"].values())


def validator(found: dict[str, Any], name: str) -> Draft202012Validator:
    schema = {"components": found["components"], "$ref": f"#/components/schemas/{name}"}
    return Draft202012Validator(schema)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"context": {"application": "mail", "depth": 2.5}},
        {"context": {"application": 3}},
        {"context": {"colour": "red"}},
        {"ad_product_ids": []},
        {"ad_product_ids": [1] * 6},
        {"ad_product_ids": ["1"]},
        {"page_product_id": None},
        {"page_product_id": 2**63},
        {"request_id": ""},
        {"request_key": "a"},
        {"time": "2026-01-05T12:00:00Z"},
        {"more": 1},
    ],
)
def test_the_schema_allows_what_the_server_takes(change: dict[str, Any]) -> None:
    body = {**GOOD, **change}
    context = [ContextFeature("application", "categorical"), ContextFeature("depth", "numeric")]
    parser = RequestParser("int64", context, max_ads=5, accept_time=False)
    taken = True
    try:
        parser.parse(json.dumps(body).encode())
    except RefusedRequestError:
        taken = False

    found = document(max_ads_per_request=5)

    assert validator(found, "ScoreRequest").is_valid(body) == taken


def test_an_error_has_the_form_that_is_promised() -> None:
    error = refuse("no", status=422, code="wrong_value", field="time", allowed=[1], hint="ask")

    validator(document(), "Error").validate(error.body)


def test_limits_are_told() -> None:
    found = document(max_ads_per_request=77, max_request_bytes=12_345)

    assert "At most 77 ads and 12,345 bytes" in found["info"]["description"]
    assert (
        found["components"]["schemas"]["ScoreRequest"]["properties"]["ad_product_ids"]["maxItems"]
        == 77
    )


def test_a_markets_own_context_is_described(market: TinyMarket) -> None:
    found = openapi_json(market.settings.serving, bundle_contract(market.settings))

    context = found["components"]["schemas"]["Context"]["properties"]
    assert set(context) == {f.name for f in market.settings.select(entity="impression")}


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [value or "" for name, value in attrs if name in ("src", "srcset")]
        if tag in ("link", "script", "iframe", "img"):
            self.loaded.append(tag)


def test_the_page_loads_nothing_and_shows_every_path() -> None:
    context = {"<script>": "categorical"}
    page = openapi_page(ServingSettings(), {"key_type": "string", "context": context})
    links = Links()
    links.feed(page)

    assert links.loaded == []
    assert "http:" not in page
    for path in document()["paths"]:
        assert path in page

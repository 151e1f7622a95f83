"""The service described by itself: OpenAPI 3.1 from the live bundle's contract, and a page of it.

The schema of a request is the model that checks requests, so the two cannot differ.
"""

import json
from collections.abc import Mapping
from html import escape
from importlib.metadata import version
from typing import Any, Final

from driftline.platform.settings import ServingSettings
from driftline.serving.transport.requests import ContextFeature, KeyType, RequestParser

ERRORS: Final[Mapping[int, tuple[str, str]]] = {
    400: ("The body is not JSON or not the protobuf message.", "invalid_json, invalid_protobuf"),
    408: ("The body did not arrive in time.", "body_too_slow"),
    413: ("The body is too large.", "body_too_large"),
    415: (
        "Another content type or a compressed body.",
        "wrong_content_type, wrong_content_encoding",
    ),
    422: (
        "The request breaks the contract; `field` names what is wrong.",
        "missing_field, unknown_field, wrong_value, no_ads, too_many_ads",
    ),
    503: (
        "To be sent again after the seconds of `Retry-After`.",
        "no_champion, overloaded, timed_out",
    ),
}
PROBABILITIES: Final = "On the natural click rate, in the order of the request."


def openapi_json(settings: ServingSettings, contract: Mapping[str, Any] | None) -> dict[str, Any]:
    """The OpenAPI document.

    Args:
        settings: Limits.
        contract: Of the bundle that answers; ``None`` before there is one, and then products may
            be integers or strings and the context is not known.
    """
    request, parts = _request_schema(settings, contract)
    schemas = {
        **parts,
        "ScoreRequest": request,
        "ScoreAnswer": ANSWER,
        "Error": ERROR,
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Driftline scoring",
            "version": version("driftline"),
            "description": _limits(settings),
        },
        "paths": {
            "/v1/score": {"post": _score(settings)},
            "/v1/status": _page("status", "What is served, how fresh it is, and since when."),
            "/healthz": _page("health", "200 once there is a bundle to score with, 503 before."),
        },
        "components": {"schemas": schemas},
    }


def openapi_page(settings: ServingSettings, contract: Mapping[str, Any] | None) -> str:
    """The same as one HTML page that loads nothing from anywhere."""
    document = openapi_json(settings, contract)
    sections = []
    for path, verbs in document["paths"].items():
        for verb, operation in verbs.items():
            rows = "".join(
                f"<tr><td>{escape(status)}</td><td>{escape(answer['description'])}</td></tr>"
                for status, answer in operation["responses"].items()
            )
            sections.append(
                f"<h2><code>{verb.upper()} {escape(path)}</code></h2>"
                f"<p>{escape(operation['summary'])}</p><table>{rows}</table>"
            )
    schemas = "".join(
        f"<h3>{escape(name)}</h3><pre>{escape(json.dumps(schema, indent=2))}</pre>"
        for name, schema in document["components"]["schemas"].items()
    )
    title = escape(document["info"]["title"])
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>"
        f"<p>{escape(document['info']['description'])}</p>"
        '<p>As a document: <a href="v1/openapi.json">/v1/openapi.json</a></p>'
        f"{''.join(sections)}<h2>Schemas</h2>{schemas}</body></html>"
    )


def _request_schema(
    settings: ServingSettings, contract: Mapping[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The schema of a request, and those that it refers to."""
    known: Mapping[str, Any] = {"key_type": "int64", "context": {}}
    known = known if contract is None else contract
    key_type: KeyType = "int64" if known["key_type"] == "int64" else "string"
    schema = RequestParser(
        key_type,
        [ContextFeature(name, kind) for name, kind in known["context"].items()],
        max_ads=settings.max_ads_per_request,
        accept_time=settings.clock != "wall",
    ).json_schema()
    parts = schema.pop("$defs", {})
    if contract is None:
        key = {"type": ["integer", "string"]}
        schema["properties"]["page_product_id"] = key
        schema["properties"]["ad_product_ids"]["items"] = key
        schema["properties"]["context"] = {"type": ["object", "null"]}
        parts = {}
    return schema, parts


def _limits(settings: ServingSettings) -> str:
    return (
        f"Scores the ads of a page. At most {settings.max_ads_per_request:,} ads and "
        f"{settings.max_request_bytes:,} bytes in a request; a body must arrive within "
        f"{settings.read_timeout_seconds:g} s and an answer comes within "
        f"{settings.request_timeout_seconds:g} s or not at all. Scoring may be repeated: it "
        "changes nothing."
    )


def _score(settings: ServingSettings) -> dict[str, Any]:
    binary = {"type": "string", "format": "binary", "description": "See serving/scoring.proto."}
    return {
        "operationId": "score",
        "summary": "Probability of a click for each ad of a page.",
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": _ref("ScoreRequest")},
                "application/x-protobuf": {"schema": binary},
            },
        },
        "responses": {
            "200": {
                "description": "Scored; in the form of the request.",
                "content": {
                    "application/json": {"schema": _ref("ScoreAnswer")},
                    "application/x-protobuf": {"schema": binary},
                },
            },
            **{str(status): _error(status) for status in ERRORS},
        },
    }


def _error(status: int) -> dict[str, Any]:
    text, codes = ERRORS[status]
    response: dict[str, Any] = {
        "description": f"{text} Codes: {codes}.",
        "content": {"application/json": {"schema": _ref("Error")}},
    }
    if status == 503:
        response["headers"] = {"Retry-After": {"schema": {"type": "integer"}}}
    return response


def _page(name: str, summary: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"type": "object"}}}
    answers: dict[str, Any] = {"200": {"description": summary, "content": content}}
    if name == "health":
        answers["503"] = {"description": "There is no bundle yet.", "content": content}
    return {"get": {"operationId": name, "summary": summary, "responses": answers}}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


ANSWER: Final[Mapping[str, Any]] = {
    "type": "object",
    "required": ["request_id", "bundle", "probabilities", "features", "fallbacks", "as_of"],
    "properties": {
        "request_id": {
            "type": "string",
            "description": "The request's own, or made up. Clicks come back with it: the ad at "
            "place 3, from 0, is impression `REQUEST_ID:3` of the decision log.",
        },
        "bundle": {"type": "string", "description": "Fingerprint of the bundle that scored it."},
        "probabilities": {
            "type": "array",
            "items": {"type": "number", "minimum": 0, "maximum": 1},
            "description": PROBABILITIES,
        },
        "features": {
            "type": "object",
            "description": "By drift tier.",
            "additionalProperties": {
                "type": "object",
                "required": ["age_seconds", "stale"],
                "properties": {
                    "age_seconds": {
                        "type": ["number", "null"],
                        "description": "Of the oldest value used.",
                    },
                    "stale": {"type": "boolean"},
                },
            },
        },
        "fallbacks": {
            "type": "object",
            "required": ["page", "ads"],
            "properties": {
                "page": {"type": ["string", "null"]},
                "ads": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "required": ["index", "reason"],
                        "properties": {
                            "index": {"type": "integer"},
                            "reason": {"type": "string"},
                        },
                    },
                },
            },
        },
        "as_of": {"type": "string", "format": "date-time"},
    },
}
ERROR: Final[Mapping[str, Any]] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message"],
            "properties": {
                "code": {"type": "string"},
                "message": {"type": "string"},
                "field": {"type": "string"},
                "allowed": {},
                "hint": {"type": "string"},
            },
        }
    },
}
STYLE: Final = (
    "body{font:16px/1.5 sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "pre{background:#f4f4f4;padding:1rem;overflow:auto}"
    "td{padding:.1rem 1rem .1rem 0;vertical-align:top}"
)

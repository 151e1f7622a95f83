"""The forms in which requests and answers travel: one parser and one writer each."""

from typing import Any, Final, Protocol

import numpy as np
import orjson

from driftline.platform.windows import format_time
from driftline.serving.answers import Answer
from driftline.serving.transport.requests import RequestParser, ScoreRequest

JSON: Final = "application/json"


class WireForm(Protocol):
    """One form of the body of ``POST /v1/score``, told apart by its content type."""

    content_type: str
    name: str
    """Short, for logs and metrics."""

    def read(self, body: bytes, parser: RequestParser) -> ScoreRequest:
        """The request in a body; raises ``RefusedRequestError``."""

    def write(self, answer: Answer) -> bytes:
        """The body of the answer."""


class JsonForm:
    """JSON in, JSON out."""

    content_type = JSON
    name = "json"

    def read(self, body: bytes, parser: RequestParser) -> ScoreRequest:
        """See ``RequestParser.parse``."""
        return parser.parse(body)

    def write(self, answer: Answer) -> bytes:
        """See the README for what the fields mean."""
        return orjson.dumps(answer_json(answer), option=orjson.OPT_SERIALIZE_NUMPY)


def answer_json(answer: Answer) -> dict[str, Any]:
    """The answer as plain values and one array."""
    return {
        "request_id": answer.request_id,
        "bundle": answer.live.fingerprint,
        "probabilities": answer.probabilities,
        "features": {
            tier: {"age_seconds": None if np.isnan(age) else round(float(age), 3), "stale": stale}
            for tier, (age, stale) in answer.tiers.items()
        },
        "fallbacks": {
            "page": answer.page_fallback,
            "ads": [
                {"index": index, "reason": reason} for index, reason in answer.ad_fallbacks.items()
            ],
        },
        "as_of": format_time(answer.now),
    }

"""The forms in which requests travel: JSON always, the binary one where the server has it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection
from urllib.parse import urlsplit

import numpy as np
import orjson
from numpy.typing import NDArray
from tests.benchmarks.rig.market import Asked

from driftline.platform.windows import parse_time


@dataclass(frozen=True)
class Told:
    """What an answer says, whatever its form."""

    bundle: str
    as_of: datetime
    """The moment of the features."""
    probabilities: NDArray[np.float64]
    fallbacks: frozenset[str]
    """Why the page or any ad was not scored as usual."""


@dataclass(frozen=True)
class Form:
    """One content type, from the client's side."""

    name: str
    content_type: str
    write: Callable[[Asked], bytes]
    read: Callable[[bytes], Told]
    tolerance: float
    """Of a probability, against the offline score."""


def _read_json(content: bytes) -> Told:
    answer = orjson.loads(content)
    reasons = {answer["fallbacks"]["page"], *(one["reason"] for one in answer["fallbacks"]["ads"])}
    return Told(
        answer["bundle"],
        parse_time(answer["as_of"]),
        np.array(answer["probabilities"], np.float64),
        frozenset(reasons - {None}),
    )


def _write_binary(asked: Asked) -> bytes:
    from driftline.serving.scoring_pb2 import ContextValue, ScoreRequest

    context = {
        name: ContextValue(text=value) if isinstance(value, str) else ContextValue(number=value)
        for name, value in asked.context.items()
        if value is not None
    }
    message = ScoreRequest(page_product_id=asked.page, ad_product_ids=asked.ads, context=context)
    return bytes(message.SerializeToString())


def _read_binary(content: bytes) -> Told:
    from driftline.serving.scoring_pb2 import ScoreAnswer

    answer = ScoreAnswer.FromString(content)
    reasons = {answer.page_fallback, *(one.reason for one in answer.ad_fallbacks)}
    return Told(
        answer.bundle,
        EPOCH + timedelta(microseconds=answer.as_of_us),
        np.array(answer.probabilities, np.float64),
        frozenset(reasons - {""}),
    )


EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
SCORE = "/v1/score"
JSON = Form("json", "application/json", lambda asked: asked.json, _read_json, 2e-6)
BINARY = Form("binary", "application/x-protobuf", _write_binary, _read_binary, 2e-6)


def forms_of(url: str, asked: Asked) -> Sequence[Form]:
    """The forms in which a server answers one request."""
    return [form for form in (JSON, BINARY) if _answers(url, form, asked)]


def _answers(url: str, form: Form, asked: Asked) -> bool:
    parts = urlsplit(url)
    connection = HTTPConnection(parts.hostname or "", parts.port, timeout=30)
    try:
        connection.request("POST", SCORE, form.write(asked), {"content-type": form.content_type})
        response = connection.getresponse()
        response.read()
    finally:
        connection.close()
    return response.status == 200

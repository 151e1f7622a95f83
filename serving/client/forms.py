"""What a client says and hears, in either form of the body."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal

from driftline.platform.windows import format_time

Form = Literal["json", "protobuf"]
CONTENT_TYPES: Final[Mapping[Form, str]] = {
    "json": "application/json",
    "protobuf": "application/x-protobuf",
}
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND: Final = timedelta(microseconds=1)


@dataclass(frozen=True)
class Question:
    """A request, as the caller knows it."""

    page: int | str
    ads: Sequence[int | str]
    context: Mapping[str, str | float | None] | None = None
    time: datetime | None = None
    request_id: str | None = None
    request_key: str | None = None

    def encode(self, form: Form) -> bytes:
        """The body of the request."""
        return self._protobuf() if form == "protobuf" else self._json()

    def _json(self) -> bytes:
        body: dict[str, Any] = {"page_product_id": self.page, "ad_product_ids": list(self.ads)}
        if self.context is not None:
            body["context"] = dict(self.context)
        if self.time is not None:
            body["time"] = format_time(self.time)
        for name in ("request_id", "request_key"):
            if (value := getattr(self, name)) is not None:
                body[name] = value
        return json.dumps(body).encode()

    def _protobuf(self) -> bytes:
        from driftline.serving.scoring_pb2 import ContextValue, ScoreRequest

        message = ScoreRequest(request_id=self.request_id, request_key=self.request_key)
        if isinstance(self.page, int):
            message.page_product_id = self.page
        else:
            message.page_product_key = self.page
        for ad in self.ads:
            if isinstance(ad, int):
                message.ad_product_ids.append(ad)
            else:
                message.ad_product_keys.append(ad)
        for name, value in (self.context or {}).items():
            known = ContextValue()
            if isinstance(value, str):
                known.text = value
            elif value is not None:
                known.number = value
            message.context[name].CopyFrom(known)
        if self.time is not None:
            message.time_us = (self.time - EPOCH) // MICROSECOND
        return message.SerializeToString()


def decode_answer(body: bytes, form: Form) -> dict[str, Any]:
    """An answer in the shape of the JSON one."""
    if form == "json":
        answer = json.loads(body)
        assert isinstance(answer, dict)
        return {"request_id": None, **answer}  # servers of before do not tell
    from driftline.serving.scoring_pb2 import ScoreAnswer

    message = ScoreAnswer.FromString(body)
    return {
        "request_id": message.request_id or None,
        "bundle": message.bundle,
        "probabilities": list(message.probabilities),
        "features": {
            tier.tier: {
                "age_seconds": tier.age_seconds if tier.HasField("age_seconds") else None,
                "stale": tier.stale,
            }
            for tier in message.tiers
        },
        "fallbacks": {
            "page": message.page_fallback or None,
            "ads": [{"index": ad.index, "reason": ad.reason} for ad in message.ad_fallbacks],
        },
        "as_of": format_time(EPOCH + message.as_of_us * MICROSECOND),
    }

"""The compact form: ``serving/scoring.proto`` as the body of a request and of an answer.

Ids and probabilities are read and written as whole arrays, through the ``Packed`` messages of the
published file, which have the same bytes.
"""

from datetime import UTC, datetime, timedelta
from typing import Any, Final

import numpy as np
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet
from numpy.typing import NDArray

from driftline.serving.answers import Answer
from driftline.serving.scoring_pb2 import (
    AdFallback,
    ContextValue,
    PackedScoreAnswer,
    PackedScoreRequest,
    TierAge,
)
from driftline.serving.scoring_pb2 import ScoreRequest as PublishedRequest
from driftline.serving.transport.requests import RequestParser, ScoreRequest, refuse, show

PROTOBUF: Final = "application/x-protobuf"
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND: Final = timedelta(microseconds=1)
HINT: Final = "send driftline.v1.ScoreRequest of serving/scoring.proto"
ID_BYTES: Final = 8


class ProtobufForm:
    """Protobuf in, protobuf out."""

    content_type = PROTOBUF
    name = "protobuf"

    def read(self, body: bytes, parser: RequestParser) -> ScoreRequest:
        """The request in a ``driftline.v1.ScoreRequest``.

        Raises:
            RefusedRequestError: not protobuf (400), or a message that breaks the contract (422).
        """
        if not body:
            raise refuse("the body is empty", status=400, code="invalid_protobuf", hint=HINT)
        try:
            message = PackedScoreRequest.FromString(body)
        except DecodeError as error:
            raise _unreadable(str(error)) from None
        if len(UnknownFieldSet(message)):
            message = _unpacked(body)
        values: dict[str, Any] = {}
        if (page := message.WhichOneof("page")) is not None:
            values["page_product_id"] = getattr(message, page)
        if message.ad_product_ids and message.ad_product_keys:
            raise refuse(
                "ad_product_keys: give ad_product_ids or ad_product_keys, not both",
                status=422,
                code="wrong_value",
                field="ad_product_keys",
            )
        if message.ad_product_keys:
            values["ad_product_ids"] = list(message.ad_product_keys)
        else:
            values["ad_product_ids"] = _ids(message.ad_product_ids)
        if message.context:
            values["context"] = {name: _value(v) for name, v in message.context.items()}
        if message.HasField("time_us"):
            values["time"] = _moment(message.time_us)
        if message.HasField("request_id"):
            values["request_id"] = message.request_id
        if message.HasField("request_key"):
            values["request_key"] = message.request_key
        return parser.check(values)

    def write(self, answer: Answer) -> bytes:
        """A ``driftline.v1.ScoreAnswer``; probabilities as float32."""
        message = PackedScoreAnswer(
            bundle=answer.live.fingerprint,
            probabilities=answer.probabilities.astype("<f4").tobytes(),
            tiers=[
                TierAge(tier=tier, age_seconds=None if age != age else age, stale=stale)
                for tier, (age, stale) in answer.tiers.items()
            ],
            page_fallback=answer.page_fallback or "",
            ad_fallbacks=[
                AdFallback(index=index, reason=reason)
                for index, reason in answer.ad_fallbacks.items()
            ],
            as_of_us=(answer.now - EPOCH) // MICROSECOND,
            request_id=answer.request_id,
        )
        return message.SerializeToString()


def _ids(pieces: Any) -> NDArray[np.int64]:
    """The ids of the packed field, without a copy. ``[B]``."""
    body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
    if len(body) % ID_BYTES:
        raise _unreadable(f"ad_product_ids has {len(body)} bytes, no multiple of {ID_BYTES}")
    return np.frombuffer(body, "<i8").astype(np.int64, copy=False)


def _unpacked(body: bytes) -> PackedScoreRequest:
    """A message with fields that the packed reading does not know: lone ids, or unknown ones."""
    try:
        message = PublishedRequest.FromString(body)
    except DecodeError as error:
        raise _unreadable(str(error)) from None
    unknown = UnknownFieldSet(message)
    if len(unknown):
        number = unknown[0].field_number
        raise refuse(
            f"field {number}: is not known",
            status=422,
            code="unknown_field",
            field=str(number),
            allowed=[f.name for f in PublishedRequest.DESCRIPTOR.fields],
            hint="client and server have different versions of serving/scoring.proto",
        )
    return PackedScoreRequest.FromString(message.SerializeToString())


def _value(value: ContextValue) -> str | float | None:
    kind = value.WhichOneof("value")
    return None if kind is None else getattr(value, kind)


def _moment(micros: int) -> datetime:
    try:
        return EPOCH + micros * MICROSECOND
    except OverflowError:
        raise refuse(
            f"time_us: must be microseconds since 1970 before the year 10000, got {show(micros)}",
            status=422,
            code="wrong_value",
            field="time_us",
        ) from None


def _unreadable(reason: str) -> Exception:
    return refuse(
        f"the body is not the message: {reason}", status=400, code="invalid_protobuf", hint=HINT
    )

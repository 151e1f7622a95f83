"""The same client over gRPC."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final, Self

import grpc

from driftline.platform.errors import RequestError
from driftline.serving.client.forms import Question, decode_answer
from driftline.serving.client.retries import Retries, UnavailableError

METHOD: Final = "/driftline.v1.Scoring/Score"
AGAIN: Final = frozenset(
    (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    )
)


class GrpcScoringClient:
    """Talks to one server over one channel. Thread-safe; calls of several threads run together.

    Args:
        address: Host and port, without encryption.
        timeout_seconds: Of one attempt.
        retries: How often :meth:`score` asks again when the server is busy, away or silent.
    """

    def __init__(
        self, address: str, *, timeout_seconds: float = 10.0, retries: Retries | None = None
    ) -> None:
        self._channel = grpc.insecure_channel(address)
        self._call = self._channel.unary_unary(METHOD)
        self._timeout_seconds = timeout_seconds
        self._retries = retries or Retries()

    def score(
        self,
        page: int | str,
        ads: Sequence[int | str],
        *,
        context: Mapping[str, str | float | None] | None = None,
        time: datetime | None = None,
        request_id: str | None = None,
        request_key: str | None = None,
    ) -> dict[str, Any]:
        """See ``ScoringClient.score``."""
        question = Question(page, ads, context, time, request_id, request_key)
        body = question.encode("protobuf")
        problem = "never asked"
        for _ in self._retries.attempts():
            try:
                answer = self._call(body, timeout=self._timeout_seconds)
            except grpc.RpcError as error:
                problem = f"{error.code().name}: {_reason(error.details())}"
                if error.code() not in AGAIN:
                    raise RequestError(problem) from None
                continue
            return decode_answer(answer, "protobuf")
        raise UnavailableError(problem)

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _reason(details: str) -> str:
    """What an error says."""
    try:
        return str(json.loads(details)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return details

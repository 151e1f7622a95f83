"""The gRPC face: ``Scoring.Score`` of ``serving/scoring.proto``, through Ray Serve's own server.

Requests come as bytes and answers leave as bytes, in the same compact form as over HTTP, and wait
in the same line.
"""

import asyncio
import time
from typing import Any, Final, Protocol

import grpc
import orjson

from driftline.platform.settings import ServingSettings
from driftline.serving.transport.asgi import ScoringService
from driftline.serving.transport.limits import WaitingLine, body_too_large
from driftline.serving.transport.requests import RefusedRequestError
from driftline.serving.transport.wire_protobuf import ProtobufForm

SERVICE: Final = "driftline.v1.Scoring"
SERVICER: Final = "driftline.serving.transport.grpc_face.add_scoring_to_server"
"""For Ray Serve's ``grpc_servicer_functions``."""


def add_scoring_to_server(servicer: Any, server: Any) -> None:
    """What the generated code of a service has, but for bytes on both sides."""
    handlers = {"Score": grpc.unary_unary_rpc_method_handler(servicer.Score)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


class GrpcContext(Protocol):
    """What we need of a call's context."""

    def set_code(self, code: grpc.StatusCode) -> None:
        """How the call ended."""

    def set_details(self, details: str) -> None:
        """Why."""


class Encoded:
    """A message that is already bytes; Ray Serve asks it to serialise itself."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    def SerializeToString(self) -> bytes:  # noqa: N802 - protobuf's name
        """The bytes."""
        return self._body


class GrpcFace:
    """Answers gRPC calls over a :class:`ScoringService`.

    Args:
        service: Answers.
        settings: Limits.
        line: Where HTTP requests wait, too.
    """

    def __init__(
        self, service: ScoringService, settings: ServingSettings, *, line: WaitingLine
    ) -> None:
        self._service = service
        self._max_bytes = settings.max_request_bytes
        self._line = line
        self._form = ProtobufForm()

    async def score(self, body: bytes, context: GrpcContext) -> Encoded:
        """Answer one call; a refusal goes to the context, its details the JSON body of HTTP."""
        arrived = time.perf_counter()
        try:
            self._line.check()
            if len(body) > self._max_bytes:
                raise body_too_large(len(body), max_bytes=self._max_bytes)
            await self._line.turn()
            begun = time.perf_counter()
            answer = self._service.answer(body, self._form)
        except RefusedRequestError as error:
            self._service.refused(error)
            context.set_code(status_code(error))
            context.set_details(orjson.dumps(error.body, default=str).decode())
            return Encoded(b"")
        scored = time.perf_counter()
        encoded = Encoded(self._form.write(answer))
        written = time.perf_counter()
        answer.stages.update(wait=begun - arrived, write=written - scored, total=written - arrived)
        asyncio.get_running_loop().call_soon(self._service.sent, answer)  # after it is handed over
        return encoded


def status_code(error: RefusedRequestError) -> grpc.StatusCode:
    """The gRPC status of a refusal; all but ``INVALID_ARGUMENT`` may be sent again."""
    if error.code == "overloaded":
        return grpc.StatusCode.RESOURCE_EXHAUSTED
    if error.status >= 500:
        return grpc.StatusCode.UNAVAILABLE
    return grpc.StatusCode.INVALID_ARGUMENT

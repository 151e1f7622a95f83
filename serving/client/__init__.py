"""Clients of the server: :class:`ScoringClient` over HTTP, ``client.grpc`` over gRPC."""

from driftline.platform.errors import RequestError
from driftline.serving.client.http import ScoringClient
from driftline.serving.client.retries import Retries, UnavailableError

__all__ = ["RequestError", "Retries", "ScoringClient", "UnavailableError"]

"""What is answered over HTTP, scores aside: a body, a status, a few headers."""

from dataclasses import dataclass

import orjson

from driftline.serving.transport.limits import RETRY_SECONDS
from driftline.serving.transport.requests import RefusedRequestError
from driftline.serving.transport.wire import JSON


@dataclass(frozen=True)
class Page:
    """An answer."""

    body: bytes
    status: int = 200
    content_type: str = JSON
    more_headers: tuple[tuple[bytes, bytes], ...] = ()
    """Names in lower case; neither type nor length."""

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """All but the length."""
        return [(b"content-type", self.content_type.encode()), *self.more_headers]


def refusal(error: RefusedRequestError) -> Page:
    """What the client is told, and whether it should come back, or hang up."""
    more = []
    if error.status == 405:
        more.append((b"allow", ", ".join(error.allowed).encode()))
    if error.status == 503:
        more.append((b"retry-after", str(RETRY_SECONDS).encode()))
    if error.status in (408, 413):  # the rest of the body is not worth reading
        more.append((b"connection", b"close"))
    body = orjson.dumps(error.body, default=str)
    return Page(body, error.status, more_headers=tuple(more))

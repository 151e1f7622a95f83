"""What is answered over HTTP, scores aside: a body, a status, a few headers."""

from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import orjson

from driftline.serving.transport.limits import RETRY_SECONDS
from driftline.serving.transport.requests import RefusedRequestError
from driftline.serving.transport.wire import JSON

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]


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


async def send_page(send: Send, page: Page, *, empty: bool = False) -> None:
    """Send an answer by ASGI; ``empty`` keeps its body back, as for HEAD."""
    headers = [*page.headers, (b"content-length", str(len(page.body)).encode())]
    await send({"type": "http.response.start", "status": page.status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if empty else page.body})

"""A small client of the scoring service over HTTP, on the standard library."""

import http.client
import json
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final, Self
from urllib.parse import urlsplit

from driftline.platform.errors import RequestError, ResourceError
from driftline.serving.client.forms import CONTENT_TYPES, Form, Question, decode_answer
from driftline.serving.client.retries import Retries, UnavailableError, read_retry_after
from driftline.serving.transport.paths import HEALTH, SCORE, STATUS

AGAIN: Final = frozenset((408, 425, 429, 500, 502, 503, 504))
"""Statuses after which the same request may be answered."""
BROKEN: Final = (OSError, http.client.HTTPException)


class ScoringClient:
    """Talks to one server over kept connections, which are opened again when they were lost.

    Thread-safe: each thread that calls has a connection of its own until :meth:`close`.

    Args:
        url: Such as ``http://127.0.0.1:8700``.
        timeout_seconds: Of one attempt.
        form: ``protobuf`` is the compact one, for many ads.
        retries: How often :meth:`score` asks again when the server is busy, away or silent.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_seconds: float = 10.0,
        form: Form = "json",
        retries: Retries | None = None,
    ) -> None:
        self.url = url
        self._parts = urlsplit(url)
        self._timeout_seconds = timeout_seconds
        self._form: Form = form
        self._retries = retries or Retries()
        self._own = threading.local()
        self._opened: list[http.client.HTTPConnection] = []

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
        """The server's answer, with one probability for each ad in their order.

        Raises:
            RequestError: the server refused; its explanation is the message.
            UnavailableError: it could not answer in any attempt.
        """
        question = Question(page, ads, context, time, request_id, request_key)
        body, headers = question.encode(self._form), {"content-type": CONTENT_TYPES[self._form]}
        problem = "never asked"
        for attempt in self._retries.attempts():
            try:
                status, received, content = self._exchange("POST", SCORE, body, headers)
            except BROKEN as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            if status == 200:
                return decode_answer(content, self._form)
            problem = f"HTTP {status}: {_reason(content)}"
            if status not in AGAIN:
                raise RequestError(problem)
            attempt.retry_after = read_retry_after(received.get("retry-after"))
        raise UnavailableError(problem)

    def status(self) -> dict[str, Any]:
        """What is served, how fresh it is, and since when."""
        return self.request("GET", STATUS)[1]

    def ready(self) -> bool:
        """Whether the server has a bundle to score with."""
        return bool(self.request("GET", HEALTH)[1].get("ready"))

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, dict[str, Any]]:
        """One exchange, without retries: HTTP status and JSON body.

        Raises:
            OSError: nobody answers, or not in time.
        """
        sent = {"content-type": "application/json"} if headers is None else dict(headers)
        status, _, content = self._exchange(method, path, body, sent)
        return status, json.loads(content or b"{}")

    def wait_until_up(self, *, seconds: float) -> None:
        """Wait until the application answers, with or without a bundle.

        Raises:
            ResourceError: it does not in time.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                if self.request("GET", STATUS)[0] == 200:
                    return
            except (*BROKEN, ValueError):
                pass
            time.sleep(0.05)
        raise ResourceError(f"{self.url} did not answer in {seconds:g} s; see the server's log")

    def close(self) -> None:
        """Close the connections of all threads."""
        for connection in self._opened:
            connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _exchange(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers by lower-case name, and body of one exchange."""
        connection = self._connection()
        kept = connection.sock is not None
        try:
            return _ask(connection, method, path, body, headers)
        except (ConnectionError, http.client.HTTPException):
            connection.close()
            if not kept:
                raise
        except OSError:  # what comes late must not be taken for the next answer
            connection.close()
            raise
        return _ask(connection, method, path, body, headers)  # a kept connection had died

    def _connection(self) -> http.client.HTTPConnection:
        connection: http.client.HTTPConnection | None = getattr(self._own, "connection", None)
        if connection is None:
            connection = http.client.HTTPConnection(
                self._parts.hostname or "", self._parts.port, timeout=self._timeout_seconds
            )
            self._own.connection = connection
            self._opened.append(connection)
        return connection


def _ask(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: bytes | None,
    headers: Mapping[str, str],
) -> tuple[int, Mapping[str, str], bytes]:
    connection.request(method, path, body, dict(headers))
    response = connection.getresponse()
    received = {name.lower(): value for name, value in response.getheaders()}
    return response.status, received, response.read()


def _reason(content: bytes) -> str:
    """What an error says."""
    try:
        return str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return content[:200].decode("utf-8", "replace")

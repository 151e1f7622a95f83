"""A small client of the scoring service, on the standard library alone."""

import http.client
import json
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Self
from urllib.parse import urlsplit

from driftline.platform.artefacts import hash_value
from driftline.platform.errors import RequestError, ResourceError
from driftline.platform.settings import DriftlineSettings
from driftline.platform.windows import format_time
from driftline.serving.asgi import HEALTH, SCORE, STATUS
from driftline.serving.requests import Key


def settings_identity(settings: DriftlineSettings) -> str:
    """Hash by which a server's status tells the settings it was started with."""
    return hash_value(settings.model_dump(mode="json"))[:12]


class ScoringClient:
    """Talks to one server over one connection, which is opened again when it was lost.

    Not thread-safe; give each thread its own.
    """

    def __init__(self, url: str, *, timeout_seconds: float = 10.0) -> None:
        parts = urlsplit(url)
        self.url = url
        self._connection = http.client.HTTPConnection(
            parts.hostname or "", parts.port, timeout=timeout_seconds
        )

    def score(
        self,
        page: Key,
        ads: Sequence[Key],
        *,
        context: Mapping[str, str | float | None] | None = None,
        time: datetime | None = None,
    ) -> dict[str, Any]:
        """The server's answer, with one probability for each ad in their order.

        Raises:
            RequestError: the server refused; its explanation is the message.
        """
        body: dict[str, Any] = {"page_product_id": page, "ad_product_ids": list(ads)}
        if context is not None:
            body["context"] = dict(context)
        if time is not None:
            body["time"] = format_time(time)
        status, answer = self.request("POST", SCORE, json.dumps(body).encode())
        if status != 200:
            raise RequestError(f"HTTP {status}: {answer['error']['message']}")
        return answer

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
        """One exchange: HTTP status and JSON body.

        Raises:
            ConnectionError: nobody answers.
        """
        sent = {"content-type": "application/json"} if headers is None else dict(headers)
        try:
            return self._exchange(method, path, body, sent)
        except (http.client.HTTPException, ConnectionError):  # a kept connection may have died
            self._connection.close()
            return self._exchange(method, path, body, sent)

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
            except (OSError, ValueError):
                self._connection.close()
            time.sleep(0.05)
        raise ResourceError(f"{self.url} did not answer in {seconds:g} s; see the server's log")

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _exchange(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> tuple[int, dict[str, Any]]:
        self._connection.request(method, path, body, dict(headers))
        response = self._connection.getresponse()
        answer = json.loads(response.read() or b"{}")
        return response.status, answer

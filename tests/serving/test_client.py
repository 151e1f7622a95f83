"""The client asks again when that may help. A server that fails stands in for a failing one."""

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from driftline.platform.errors import RequestError
from driftline.platform.processes import free_port
from driftline.serving.client import ScoringClient
from driftline.serving.client.forms import Form, decode_answer
from driftline.serving.client.retries import Retries, UnavailableError, read_retry_after
from driftline.serving.scoring_pb2 import ScoreAnswer

ANSWER = {
    "request_id": "a-1",
    "bundle": "b",
    "probabilities": [0.5],
    "features": {},
    "fallbacks": {},
    "as_of": "now",
}
Outcome = tuple[int, dict[str, str], Any]
BUSY: Outcome = (503, {"Retry-After": "3"}, {"error": {"code": "overloaded", "message": "busy"}})
FINE: Outcome = (200, {}, ANSWER)


@contextmanager
def failing_server(*outcomes: Outcome | None) -> Iterator[tuple[str, list[str]]]:
    """Answers with one outcome after the other, ``None`` hangs up; its URL and who called."""
    left, callers = list(outcomes), []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            callers.append(f"{self.client_address}")
            outcome = left.pop(0)
            if outcome is None:
                self.close_connection = True
                return
            status, headers, body = outcome
            content = json.dumps(body).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Not in a test's output."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", callers
        server.shutdown()
        thread.join()


def remembering(num_attempts: int = 3) -> tuple[Retries, list[float]]:
    pauses: list[float] = []
    return Retries(num_attempts=num_attempts, sleep=pauses.append), pauses


def test_a_busy_server_is_asked_again_after_the_time_it_wants() -> None:
    retries, pauses = remembering()
    with (
        failing_server(BUSY, FINE) as (url, callers),
        ScoringClient(url, retries=retries) as client,
    ):
        assert client.score(1, [2]) == ANSWER

    assert pauses == [3.0]
    assert len(set(callers)) == 1, "the connection is kept"


@pytest.mark.parametrize("form", ["json", "protobuf"])
def test_answers_of_servers_that_tell_no_request_id_are_read(form: Form) -> None:
    without = {name: value for name, value in ANSWER.items() if name != "request_id"}
    as_json, as_protobuf = json.dumps(without).encode(), ScoreAnswer(bundle="b").SerializeToString()

    answer = decode_answer(as_json if form == "json" else as_protobuf, form)

    assert (answer["request_id"], answer["bundle"]) == (None, "b")


def test_a_server_that_stays_busy_is_given_up() -> None:
    retries, pauses = remembering()
    with (
        failing_server(BUSY, BUSY, BUSY) as (url, callers),
        ScoringClient(url, retries=retries) as client,
        pytest.raises(UnavailableError, match="HTTP 503: busy"),
    ):
        client.score(1, [2])

    assert (len(callers), len(pauses)) == (3, 2)


def test_a_refused_request_is_not_sent_again() -> None:
    refused: Outcome = (422, {}, {"error": {"message": "page_product_id: is required"}})
    with (
        failing_server(refused) as (url, callers),
        ScoringClient(url) as client,
        pytest.raises(RequestError, match="HTTP 422: page_product_id: is required"),
    ):
        client.score(1, [2])

    assert len(callers) == 1


def test_a_kept_connection_that_died_costs_no_attempt() -> None:
    retries, pauses = remembering(num_attempts=1)
    with (
        failing_server(FINE, None, FINE) as (url, callers),
        ScoringClient(url, retries=retries) as client,
    ):
        client.score(1, [2])
        assert client.score(1, [2]) == ANSWER

    assert (len(callers), pauses) == (3, [])


def test_a_server_that_hangs_up_is_asked_again() -> None:
    retries, pauses = remembering()
    with failing_server(None, FINE) as (url, _), ScoringClient(url, retries=retries) as client:
        assert client.score(1, [2]) == ANSWER

    assert len(pauses) == 1


def test_a_server_that_is_not_there_is_named() -> None:
    retries, _ = remembering()
    with (
        ScoringClient(f"http://127.0.0.1:{free_port()}", retries=retries) as client,
        pytest.raises(UnavailableError, match="ConnectionRefusedError"),
    ):
        client.score(1, [2])


@given(number=st.integers(0, 30), wanted=st.none() | st.floats(0, 100), seed=st.floats(0, 1))
def test_pauses_are_drawn_below_a_bound_that_doubles(
    number: int, wanted: float | None, seed: float
) -> None:
    retries = Retries(
        first_seconds=0.1, max_seconds=5.0, draw=lambda low, high: low + seed * (high - low)
    )

    pause = retries.pause(number, wanted)

    bound = 0.1
    for _ in range(number):
        bound = min(2 * bound, 5.0)
    assert min(wanted or 0.0, 5.0) <= pause <= max(bound, min(wanted or 0.0, 5.0)) + 1e-12


@pytest.mark.parametrize(
    ("header", "seconds"),
    [(None, None), ("2", 2.0), ("Wed, 21 Oct 2026 07:28:00 GMT", None), ("-1", None), ("", None)],
)
def test_only_seconds_are_taken_from_a_header(header: str | None, seconds: float | None) -> None:
    assert read_retry_after(header) == seconds

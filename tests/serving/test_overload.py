"""The real server when there is more to do than it can, or nobody to do it."""

import http.client
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import psutil
import pytest
from tests.tiny_market import AS_OF, TinyMarket

from driftline.features.store import materialize
from driftline.platform.bundle import Bundle
from driftline.platform.processes import GONE, family_members, free_port
from driftline.serving.server import ServingHandle, start_serving

pytestmark = pytest.mark.ray

BODY: Final = json.dumps({"page_product_id": 100_001, "ad_product_ids": [100_002, 100_003]})
LONG: Final = BODY.ljust(40_000).encode()
"""More than HAProxy keeps to itself, so that a replica holds it before it is complete."""
JSON: Final = {"content-type": "application/json"}
MAX_WAITING: Final = 3
SECONDS: Final = 8.0
"""No answer takes so long, but those that were let in."""


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: Any

    @property
    def code(self) -> str:
        """What was wrong."""
        return str(self.body["error"]["code"])


@pytest.fixture(scope="module")
def server(market: TinyMarket, first: Bundle) -> Iterator[ServingHandle]:
    """One replica with a short line."""
    materialize(market.settings, as_of=AS_OF)
    market.promote(first)
    changes = {"port": free_port(), "ingress": "haproxy", "max_waiting": MAX_WAITING}
    serving = market.settings.serving.model_copy(update=changes)
    with start_serving(market.settings.model_copy(update={"serving": serving})) as handle:
        yield handle


def ask(address: str, method: str = "POST", path: str = "/v1/score") -> Reply:
    """One request on a connection of its own."""
    with closing(http.client.HTTPConnection(address, timeout=SECONDS)) as connection:
        connection.request(method, path, BODY if method == "POST" else None, JSON)
        return reply(connection)


def reply(connection: http.client.HTTPConnection) -> Reply:
    found = connection.getresponse()
    body = found.read()
    named = {name.lower(): value for name, value in found.getheaders()}
    is_json = named.get("content-type") == JSON["content-type"]
    return Reply(found.status, named, json.loads(body) if is_json else body)


def begin(address: str) -> http.client.HTTPConnection:
    """A request to be finished with the last byte of ``LONG``."""
    connection = http.client.HTTPConnection(address, timeout=30)
    connection.putrequest("POST", "/v1/score")
    for name, value in (JSON | {"content-length": str(len(LONG))}).items():
        connection.putheader(name, value)
    connection.endheaders(LONG[:-1])
    return connection


def finish(connection: http.client.HTTPConnection) -> Reply:
    """The answer to what was begun."""
    connection.send(LONG[-1:])
    return reply(connection)


def fill(server: ServingHandle, stack: ExitStack) -> tuple[list[http.client.HTTPConnection], Reply]:
    """As many unfinished requests as may wait, and the refusal of one more.

    Ray Serve starts another HAProxy when its targets change, and that one counts afresh: they are
    begun again only where this happened, or where not all of them were waiting.
    """
    address, seen = address_of(server), []
    for _ in range(3):
        before = members(server, "haproxy")
        held = [stack.enter_context(closing(begin(address))) for _ in range(MAX_WAITING)]
        deadline = time.monotonic() + 2  # before they are given up
        while (answer := ask(address)).status == 200 and time.monotonic() < deadline:
            pass  # until HAProxy has seen them all
        if answer.status != 200:
            return held, answer
        after = members(server, "haproxy")
        replies = [attempt(partial(finish, each)) for each in held]
        statuses = [found and found.status for found in replies]
        seen.append((before, after, statuses))
        is_steady = len(before) == 1 and before == after
        assert not is_steady or statuses != [200] * MAX_WAITING, seen
    raise AssertionError(seen)


def address_of(server: ServingHandle) -> str:
    return server.url.removeprefix("http://")


def members(server: ServingHandle, word: str) -> list[psutil.Process]:
    """Those processes of the server that have this word in their command."""
    found = []
    for process in family_members(server.family):
        with suppress(*GONE):
            if word in " ".join(process.cmdline()):
                found.append(process)
    return found


def test_scoring_does_not_pass_through_ray_serve(server: ServingHandle) -> None:
    assert ask(address_of(server)).status == 200
    assert "x-request-id" not in ask(address_of(server)).headers
    assert "x-request-id" in ask(address_of(server), "GET", "/v1/status").headers


def test_more_than_may_wait_are_refused_at_the_door(server: ServingHandle) -> None:
    address = address_of(server)
    idle = [http.client.HTTPConnection(address) for _ in range(2 * MAX_WAITING)]
    with ExitStack() as stack:
        for connection in idle:  # connections that rest are not requests
            stack.enter_context(closing(connection)).request("GET", "/healthz")
            assert reply(connection).status == 200
        accepted, refused = fill(server, stack)

        assert (refused.status, refused.code) == (503, "overloaded")
        assert refused.headers["retry-after"] == "1"
        assert refused.body["error"]["allowed"] == MAX_WAITING
        assert "server" not in refused.headers  # the replica's uvicorn would have told its name
        assert ask(address, "GET", "/healthz").status == 200
        assert ask(address, "GET", "/v1/status").body["ready"]
        for connection in accepted:
            answer = finish(connection)
            assert answer.status == 200
            assert len(answer.body["probabilities"]) == 2
    assert ask(address).status == 200


def test_without_a_replica_everyone_is_told_at_once_until_there_is_one(
    server: ServingHandle,
) -> None:
    address, codes = address_of(server), set()
    (killed,) = members(server, "ServeReplica")
    killed.kill()
    killed.wait()

    deadline = time.monotonic() + 90
    while (answer := attempt(partial(ask, address))) is None or answer.status != 200:
        assert time.monotonic() < deadline
        if answer is not None:
            assert (answer.status, answer.headers["retry-after"]) == (503, "1")
            codes.add(answer.code)
        time.sleep(0.05)

    assert codes == {"no_replica"}
    assert [process.pid for process in members(server, "ServeReplica")] != [killed.pid]


def attempt(exchange: Callable[[], Reply]) -> Reply | None:
    """``None`` where the connection breaks off; a time-out is a failure."""
    try:
        return exchange()
    except (http.client.RemoteDisconnected, ConnectionError):
        return None


def test_a_replica_that_is_stopped_answers_what_is_under_way(server: ServingHandle) -> None:
    (replica,) = members(server, "ServeReplica")
    ports = {c.laddr.port for c in replica.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    (address,) = (f"127.0.0.1:{port}" for port in ports if health(port) == 200)
    with closing(begin(address)) as connection:
        os.kill(server.process.pid, signal.SIGTERM)
        deadline = time.monotonic() + 60
        while health(int(address.rpartition(":")[2])) == 200:
            assert time.monotonic() < deadline
            time.sleep(0.02)

        assert finish(connection).status == 200


def health(port: int) -> int | None:
    """Status of Ray Serve's health page; ``None`` where no HTTP is spoken."""
    try:
        return ask(f"127.0.0.1:{port}", "GET", "/-/healthz").status
    except (http.client.HTTPException, OSError):
        return None

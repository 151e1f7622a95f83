"""The load generator of the benchmarks, against servers that are known to the nanosecond.

Servers and generator read one clock (``CLOCK_MONOTONIC``), so that what is asserted follows from
the order of events and not from how fast this machine is.
"""

import asyncio
import shutil
import socket
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from tests.benchmarks.rig import open_loop
from tests.benchmarks.rig.open_loop import Load, drive, generator, read_bodies, run, write_bodies

pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None and shutil.which("gcc") is None,
    reason="the load generator needs a C compiler",
)

Answer = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


@contextmanager
def server(answer: Answer) -> Iterator[str]:
    """An HTTP server in a thread: ``answer`` writes the response to each body."""
    loop, up, ports = asyncio.new_event_loop(), threading.Event(), []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                size = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
                await answer(await reader.readexactly(size), writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except asyncio.CancelledError:
            pass
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()  # else the socket may be found open when the loop ends

    async def main(stop: asyncio.Event) -> None:
        listening = await asyncio.start_server(connected, "127.0.0.1", 0)
        ports.append(listening.sockets[0].getsockname()[1])
        up.set()
        await stop.wait()
        listening.close()
        await asyncio.sleep(0)  # a connection that was just accepted must begin to be closed
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    stop = asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(main(stop),))
    thread.start()
    assert up.wait(60)
    yield f"http://127.0.0.1:{ports[0]}/v1/score"
    loop.call_soon_threadsafe(stop.set)
    thread.join()
    loop.close()


def response(body: bytes, *, status: str = "200 OK", more: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{more}\r\n".encode() + body


async def echo(body: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(response(body))


class Staller:
    """Answers at once, but for one moment in which the whole server stands still."""

    def __init__(self, *, at: int, seconds: float) -> None:
        self.at, self.seconds = at, seconds
        self.number = 0
        self.began = self.ended = 0.0

    async def answer(self, body: bytes, writer: asyncio.StreamWriter) -> None:
        self.number += 1
        if self.number == self.at:
            self.began = time.monotonic()
            time.sleep(self.seconds)  # the whole loop is meant to stand still
            self.ended = time.monotonic()
        writer.write(response(body))


def test_a_stall_is_charged_to_every_request_that_was_scheduled_in_it() -> None:
    staller = Staller(at=100, seconds=0.2)
    with server(staller.answer) as url:
        result = run(url, [b"x"], rate=400, seconds=4, connections=2, arrivals="constant", seed=1)
    scheduled = result.started + result.records["scheduled"] / 1e9
    during = (scheduled > staller.began) & (scheduled < staller.ended)
    charged_ms = (staller.ended - scheduled[during]) * 1e3

    # 0.2 s at 400 a second are 80 requests, whatever the server does and however many connections
    # there are. A generator that waits for answers would have sent two.
    assert during.sum() == pytest.approx(400 * (staller.ended - staller.began), abs=1.001)
    assert during.sum() >= 79
    assert (result.latencies_ms[during] >= charged_ms - 1e-3).all()
    assert result.outcomes == {"200": 1600}
    # Only two of them can have been sent before the stall was over: the others waited here.
    sent = result.started + result.records["sent"] / 1e9
    assert (sent[during] < staller.ended - 1e-6).sum() <= 2


def test_a_closed_loop_hides_the_same_stall() -> None:
    staller = Staller(at=100, seconds=0.2)
    with server(staller.answer) as url:
        result = run(url, [b"x"], rate=0, seconds=0.5, connections=2, arrivals="closed")

    assert (result.records["sent"] >= result.records["scheduled"]).all()
    inside = result.started + result.records["scheduled"] / 1e9
    assert ((inside > staller.began) & (inside < staller.ended)).sum() <= 2


@pytest.mark.parametrize("rate", [50, 1000])
def test_constant_arrivals_keep_their_rate(rate: float) -> None:
    with server(echo) as url:
        result = run(url, [b"x"], rate=rate, seconds=0.5, arrivals="constant")

    gaps = np.diff(result.records["scheduled"])
    assert len(result.records) == rate * 0.5
    np.testing.assert_allclose(gaps, 1e9 / rate, atol=2)
    assert result.offered == pytest.approx(rate, rel=0.05)


def test_poisson_arrivals_have_the_rate_and_the_spread_of_their_law() -> None:
    with server(echo) as url:
        first, again, other = (
            run(url, [b"x"], rate=2000, seconds=1, connections=4, seed=seed) for seed in (3, 3, 4)
        )

    gaps = np.diff(first.records["scheduled"])
    assert len(gaps) == pytest.approx(2000, abs=5 * np.sqrt(2000))
    assert gaps.std() / gaps.mean() == pytest.approx(1, abs=0.15)  # of an exponential it is 1
    assert (gaps > gaps.mean()).mean() == pytest.approx(np.exp(-1), abs=0.06)
    assert (first.records["scheduled"] == again.records["scheduled"]).all()
    assert (
        len(other.records) != len(first.records)
        or (other.records["scheduled"] != first.records["scheduled"]).any()
    )


def test_bodies_arrive_whole_and_in_turn_and_answers_are_kept(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    bodies = [b"a", b"", random.bytes(300_000), b"0\r\n\r\n", b"\r\n\r\n"]
    write_bodies(tmp_path / "bodies", bodies)
    assert read_bodies(tmp_path / "bodies") == bodies
    with server(echo) as url:
        result = run(
            url, bodies, rate=60, seconds=0.5, connections=3, arrivals="constant", keep_every=1
        )

    assert result.outcomes == {"200": 30}
    assert sorted(kept.request for kept in result.answers) == list(range(30))
    for kept in result.answers:
        assert kept.body == kept.request % 5
        assert kept.content == bodies[kept.body]


async def in_chunks(body: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    for start in range(0, len(body), 7):
        part = body[start : start + 7]
        writer.write(b"%x;note=1\r\n%b\r\n" % (len(part), part))
        await writer.drain()
        await asyncio.sleep(0)
    writer.write(b"0\r\n\r\n")


async def until_the_end(body: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.0 200 OK\r\n\r\n" + body)
    await writer.drain()
    writer.close()


@pytest.mark.parametrize("answer", [in_chunks, until_the_end])
def test_answers_without_a_length_are_read_whole(answer: Answer) -> None:
    bodies = [bytes(range(256)) * 4, b"short"]
    with server(answer) as url:
        result = run(
            url, bodies, rate=40, seconds=0.5, connections=2, arrivals="constant", keep_every=1
        )

    assert result.outcomes == {"200": 20}
    assert {(kept.body, kept.content) for kept in result.answers} == set(enumerate(bodies))


class Troubled:
    """Every tenth request finds trouble of another kind."""

    def __init__(self) -> None:
        self.number = -1
        self.met: Counter[str] = Counter()

    async def answer(self, body: bytes, writer: asyncio.StreamWriter) -> None:
        self.number += 1
        place = self.number % 10
        if place == 1:
            self.met["429"] += 1
            writer.write(response(b"slow down", status="429 Too Many Requests"))
        elif place == 3:
            self.met["lost"] += 1
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
            await writer.drain()
            writer.close()
        elif place == 5:
            self.met["malformed"] += 1
            writer.write(b"SSH-2.0-OpenSSH_9.9 and more\r\n\r\n")
        elif place == 7:
            self.met["200 without a marker"] += 1
            writer.write(response(b"bundle=unheard-of"))
        elif place == 9:
            self.met["timed_out"] += 1  # never answered
        else:
            self.met["200"] += 1
            more = "Connection: close\r\n" if place == 8 else ""
            writer.write(response(b"bundle=%s" % (b"red" if place else b"blue"), more=more))


def test_every_scheduled_request_has_exactly_one_outcome() -> None:
    troubled = Troubled()
    with server(troubled.answer) as url:
        result = run(
            url,
            [b"x"],
            rate=200,
            seconds=0.5,
            connections=32,
            arrivals="constant",
            markers=["bundle=red", "bundle=blue"],
            timeout_ms=2_000,
        )

    assert len(result.records) == 100
    assert sum(result.outcomes.values()) == 100
    assert result.outcomes == dict(sorted(troubled.met.items()))
    assert result.num_errors == 100 - result.outcomes["200"]
    assert result.by_marker == {"bundle=red": 40, "bundle=blue": 10}
    assert sum(result.by_marker.values()) == result.outcomes["200"]


def test_nobody_at_the_address_is_an_error_for_each_request() -> None:
    with socket.socket() as taken:  # bound and not listening: nobody else can listen there
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/"
        result = run(url, [b"x"], rate=200, seconds=0.25, arrivals="constant")

    assert result.outcomes == {"refused": 50}
    assert result.throughput == 0


def test_requests_that_are_still_open_at_the_end_count_as_unanswered() -> None:
    async def never(body: bytes, writer: asyncio.StreamWriter) -> None:
        pass

    with server(never) as url:
        load = Load(url, [b"x"], 100, 0.3, arrivals="constant", connections=2, drain_seconds=0.1)
        result = drive(load)

    assert result.outcomes == {"unanswered": 30}
    ages_ms = result.facts["seconds"] * 1e3 - result.records["scheduled"] / 1e6
    np.testing.assert_allclose(result.latencies_ms, ages_ms, rtol=1e-6)


def test_the_warm_up_is_sent_and_not_counted() -> None:
    staller = Staller(at=1, seconds=0.1)
    with server(staller.answer) as url:
        result = run(
            url,
            [b"%d" % number for number in range(1000)],
            rate=200,
            seconds=1,
            warmup_seconds=0.5,
            arrivals="constant",
            keep_every=1,
        )

    assert (len(result.records), result.first) == (100, 100)
    assert (result.records["scheduled"] >= 0.5e9).all()
    assert len(result.answers) == staller.number == 200
    assert result.offered == pytest.approx(200, rel=0.02)
    done = result.records["done"]
    late = (done >= result.facts["scheduled_seconds"] * 1e9).sum()
    assert result.num_done >= len(done) - late  # and those that were asked during the warm-up
    assert result.num_done <= 200


def test_a_running_load_can_be_ended_early() -> None:
    with server(echo) as url:
        running = open_loop.start(Load(url, [b"x"], 100, 3600, arrivals="constant"))
        time.sleep(0.3)
        running.stop()
        result = running.result()

    assert result.facts["scheduled_seconds"] < 3600
    assert len(result.records) == pytest.approx(100 * result.facts["scheduled_seconds"], abs=1.001)
    assert result.outcomes == {"200": len(result.records)}


def test_what_cannot_be_driven_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="http://HOST:PORT/PATH"):
        run("https://127.0.0.1/", [b"x"], rate=1, seconds=1)
    with pytest.raises(ValueError, match="at least one body"):
        run("http://127.0.0.1:1/", [], rate=1, seconds=1)
    generator.cache_clear()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RuntimeError, match="neither cc, gcc nor clang is on the path; install one"):
        run("http://127.0.0.1:1/", [b"x"], rate=1, seconds=1)
    generator.cache_clear()

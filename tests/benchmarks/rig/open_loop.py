"""Drive an HTTP server by a schedule: the Python side of ``open_loop.c``.

    python -m tests.benchmarks.rig.open_loop http://HOST:PORT/v1/score --bodies FILE --rate 1000
    python -m tests.benchmarks.rig.open_loop --quick

Arrivals do not wait for answers, and latency counts from the scheduled moment, so that a stall of
the server is charged for every request that fell into it. The generator is plain C in a process of
its own, compiled when it is first needed, because a generator in Python would take the core that
the server needs. ``--quick`` measures the generator itself against a server that does nothing.
"""

import argparse
import asyncio
import atexit
import json
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray
from tests.benchmarks.rig.report import about, print_figures

SOURCE: Final = Path(__file__).with_name("open_loop.c")
RECORD: Final = np.dtype(
    [("scheduled", "<i8"), ("sent", "<i8"), ("done", "<i8"), ("outcome", "<i4"), ("marker", "<i4")]
)
"""Times in nanoseconds since the start, -1 for never; ``struct record`` of the C source."""
FAILURES: Final[Mapping[int, str]] = {
    -1: "refused",
    -2: "lost",
    -3: "timed_out",
    -4: "unanswered",
    -5: "malformed",
}
Arrivals = Literal["poisson", "constant", "closed"]


@dataclass(frozen=True)
class Load:
    """What is asked for: where, what, how often, and for how long."""

    url: str
    bodies: Sequence[bytes]
    """Sent in turn, request ``i`` gets body ``i % len(bodies)``."""
    rate: float = 0.0
    """Scheduled requests a second; without meaning for closed arrivals."""
    seconds: float = 10.0
    """Length of the schedule, warm-up included."""
    warmup_seconds: float = 0.0
    """Requests scheduled before this are sent and not counted."""
    connections: int = 16
    seed: int = 0
    arrivals: Arrivals = "poisson"
    """``closed`` has no schedule: each connection asks again once it is answered, which gives the
    server's capacity and says nothing about latency under load."""
    content_type: str = "application/json"
    headers: Sequence[str] = ()
    markers: Sequence[str] = ()
    """Strings of which every good answer must hold one, such as the names of bundles."""
    timeout_ms: float = 10_000.0
    drain_seconds: float = 5.0
    """How long to wait for answers after the last arrival."""
    keep_every: int = 0
    """Keep the body of every so-manieth answer; 0 keeps none."""


@dataclass(frozen=True)
class KeptAnswer:
    """One answer as it came."""

    request: int
    """Row of the records."""
    body: int
    """Which body it answers."""
    status: int
    content: bytes


@dataclass(frozen=True)
class Result:
    """What came of a load. Latencies are milliseconds from the scheduled moment."""

    load: Load
    records: NDArray[Any]
    """Every request after the warm-up, in the order of the schedule; dtype ``RECORD``."""
    first: int
    """Number of the first of them, counted from the start of the load."""
    num_done: int
    """Good answers that came between warm-up and end of the schedule, whenever asked for."""
    facts: Mapping[str, float]
    """What the generator says of itself."""
    answers: tuple[KeptAnswer, ...] = field(default=(), repr=False)
    """Those of the warm-up included; ``request`` counts from the start of the load."""

    @property
    def started(self) -> float:
        """Start of the schedule on the clock of ``time.monotonic()``, in seconds."""
        return self.facts["started_ns"] / 1e9

    @cached_property
    def good(self) -> NDArray[np.bool_]:
        """Answered with 200, and with one of the markers if there are any."""
        return _are_good(self.load, self.records)

    @cached_property
    def latencies_ms(self) -> NDArray[np.float64]:
        """Of all requests; those never answered count until the end of the load."""
        ended = self.facts["seconds"] * 1e9
        done = np.where(self.records["done"] < 0, ended, self.records["done"])
        return (done - self.records["scheduled"]) / 1e6

    def percentile_ms(self, percent: float) -> float:
        """Latency below which so many per cent of the requests stay; NaN without requests."""
        return float(np.percentile(self.latencies_ms, percent)) if len(self.records) else np.nan

    @property
    def offered(self) -> float:
        """Scheduled requests a second, after the warm-up."""
        return len(self.records) / self._measured_seconds

    @property
    def throughput(self) -> float:
        """Good answers a second within the schedule: what came later does not count."""
        return self.num_done / self._measured_seconds

    @property
    def outcomes(self) -> dict[str, int]:
        """Number of requests by HTTP status or failure; good ones under ``200``."""
        counted = Counter(self.records["outcome"].tolist())
        named = {FAILURES.get(code, str(code)): number for code, number in counted.items()}
        unmarked = int((self.records["outcome"] == 200).sum() - self.good.sum())
        if unmarked:
            named["200"] -= unmarked
            named["200 without a marker"] = unmarked
        return {name: number for name, number in sorted(named.items()) if number}

    @property
    def num_errors(self) -> int:
        """Requests without a good answer."""
        return int(len(self.records) - self.good.sum())

    @property
    def by_marker(self) -> dict[str, int]:
        """Number of answers that hold each marker."""
        counted = Counter(self.records["marker"].tolist())
        return {marker: counted.get(place, 0) for place, marker in enumerate(self.load.markers)}

    @property
    def cpu_seconds(self) -> float:
        """Processor time of the generator itself, warm-up included."""
        return self.facts["cpu_user_seconds"] + self.facts["cpu_system_seconds"]

    @property
    def _measured_seconds(self) -> float:
        return max(self.facts["scheduled_seconds"] - self.load.warmup_seconds, 1e-9)

    def summary(self) -> dict[str, Any]:
        """The figures of a table's row, JSON-able."""
        return {
            "offered": round(self.offered, 1),
            "throughput": round(self.throughput, 1),
            "p50_ms": round(self.percentile_ms(50), 3),
            "p95_ms": round(self.percentile_ms(95), 3),
            "p99_ms": round(self.percentile_ms(99), 3),
            "p99_9_ms": round(self.percentile_ms(99.9), 3),
            "max_ms": round(self.percentile_ms(100), 3),
            "errors": self.num_errors,
            "outcomes": self.outcomes,
            "generator_cpu_seconds": round(self.cpu_seconds, 3),
        }


class RunningLoad:
    """A load under way. Get one from :func:`start`."""

    def __init__(self, load: Load, process: subprocess.Popen[bytes], folder: Path) -> None:
        self.load = load
        self._process = process
        self._folder = folder

    def stop(self) -> None:
        """End the schedule now; answers still to come are waited for."""
        self._process.terminate()

    def result(self) -> Result:
        """Wait for the end.

        Raises:
            RuntimeError: the generator failed; with what it said.
        """
        said, errors = self._process.communicate()
        try:
            if self._process.returncode:
                raise RuntimeError(f"the load generator failed: {errors.decode().strip()}")
            facts = json.loads(said)
            records = np.fromfile(self._folder / "records", RECORD)
            kept = self._folder / "answers"
            answers = tuple(_read_answers(kept)) if kept.exists() else ()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)
        first = int(np.searchsorted(records["scheduled"], self.load.warmup_seconds * 1e9))
        begin, end = self.load.warmup_seconds * 1e9, facts["scheduled_seconds"] * 1e9
        done = records["done"]
        inside = _are_good(self.load, records) & (done >= begin) & (done < end)
        return Result(self.load, records[first:], first, int(inside.sum()), facts, answers)

    def kill(self) -> None:
        """End at once and forget the figures; harmless when it has ended."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()
        shutil.rmtree(self._folder, ignore_errors=True)


def run(
    url: str,
    bodies: Sequence[bytes],
    *,
    rate: float,
    seconds: float,
    connections: int = 16,
    seed: int = 0,
    **more: Any,
) -> Result:
    """Offer ``rate`` requests a second for so many seconds; ``more`` are fields of ``Load``."""
    load = Load(url, bodies, rate, seconds, connections=connections, seed=seed, **more)
    return drive(load)


def drive(load: Load) -> Result:
    """Offer a load and wait for its end."""
    running = start(load)
    try:
        return running.result()
    except BaseException:
        running.kill()
        raise


def start(load: Load) -> RunningLoad:
    """Offer a load in the background.

    Raises:
        RuntimeError: there is no C compiler.
        ValueError: no bodies, or an address that is not http://HOST:PORT/PATH.
    """
    parts = urlsplit(load.url)
    if parts.scheme != "http" or not parts.hostname:
        raise ValueError(f"url must be http://HOST:PORT/PATH, got {load.url!r}")
    if not load.bodies:
        raise ValueError("bodies must hold at least one body, got none")
    folder = Path(tempfile.mkdtemp(prefix="open-loop-"))
    write_bodies(folder / "bodies", load.bodies)
    options: dict[str, Any] = {
        "host": parts.hostname,
        "port": parts.port or 80,
        "path": parts.path or "/",
        "content-type": load.content_type,
        "bodies": folder / "bodies",
        "records": folder / "records",
        "rate": load.rate,
        "seconds": load.seconds,
        "drain-seconds": load.drain_seconds,
        "timeout-ms": load.timeout_ms,
        "connections": load.connections,
        "seed": load.seed,
        "arrivals": load.arrivals,
    }
    if load.keep_every:
        options |= {"answers": folder / "answers", "every": load.keep_every}
    command = [str(generator())]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    for header in load.headers:
        command += ["--header", header]
    for marker in load.markers:
        command += ["--marker", marker]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    return RunningLoad(load, process, folder)


@cache
def generator() -> Path:
    """The compiled generator, in a folder that goes away with this process.

    Raises:
        RuntimeError: there is no C compiler, or it refuses the source.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError(
            f"{SOURCE.name} needs a C compiler, and neither cc, gcc nor clang is on the path; "
            "install one (Debian: apt-get install gcc libc6-dev)"
        )
    folder = Path(tempfile.mkdtemp(prefix="open-loop-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    program = folder / "open_loop"
    command = [compiler, "-O2", "-std=gnu11", str(SOURCE), "-o", str(program), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return program


def write_bodies(path: Path, bodies: Iterable[bytes]) -> None:
    """Each body after its length in four bytes, the least significant first."""
    with path.open("wb") as file:
        for body in bodies:
            file.write(struct.pack("<I", len(body)) + body)


def read_bodies(path: Path) -> list[bytes]:
    """What ``write_bodies`` wrote."""
    raw, bodies, place = path.read_bytes(), [], 0
    while place < len(raw):
        (size,) = struct.unpack_from("<I", raw, place)
        bodies.append(raw[place + 4 : place + 4 + size])
        place += 4 + size
    return bodies


def _are_good(load: Load, records: NDArray[Any]) -> NDArray[np.bool_]:
    good: NDArray[np.bool_] = records["outcome"] == 200
    return good & (records["marker"] >= 0) if load.markers else good


def _read_answers(path: Path) -> Iterator[KeptAnswer]:
    raw, place = path.read_bytes(), 0
    while place + 16 <= len(raw):
        request, body, status, size = struct.unpack_from("<IIII", raw, place)
        yield KeptAnswer(request, body, status, raw[place + 16 : place + 16 + size])
        place += 16 + size


# --- the generator against a server that does nothing --------------------------------------


class Hollow(asyncio.Protocol):
    """Answers every body with the same bytes; enough HTTP for the generator."""

    answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2200\r\n\r\n" + b"x" * 2200

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport, self._come = transport, b""

    def data_received(self, data: bytes) -> None:
        self._come += data
        while b"\r\n\r\n" in self._come:
            head, _, rest = self._come.partition(b"\r\n\r\n")
            size = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
            if len(rest) < size:
                return
            self._come = rest[size:]
            self._transport.write(self.answer)


@contextmanager
def hollow_server() -> Iterator[str]:
    """The address of such a server, in a thread."""
    loop, up, where = asyncio.new_event_loop(), threading.Event(), []

    async def serve() -> None:
        server = await loop.create_server(Hollow, "127.0.0.1", 0)
        where.append(server.sockets[0].getsockname()[1])
        up.set()

    def run_loop() -> None:
        loop.run_until_complete(serve())
        loop.run_forever()

    thread = threading.Thread(target=run_loop, daemon=True)
    thread.start()
    up.wait()
    yield f"http://127.0.0.1:{where[0]}/"
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


def measure_generator(seconds: float) -> dict[str, float]:
    """Processor time of the generator for each request, and how late it sends."""
    figures: dict[str, float] = {}
    print(
        f"{'rate':>8} {'offered':>10} {'answered':>10} {'CPU-us/request':>15} {'sent late p99':>15}"
    )
    with hollow_server() as url:
        for rate in (500, 1000, 2000, 4000):
            result = run(url, [b"x" * 1200] * 10, rate=rate, seconds=seconds)
            late = (result.records["sent"] - result.records["scheduled"]) / 1e3
            each = result.cpu_seconds * 1e6 / max(len(result.records), 1)
            late_us = float(np.percentile(late, 99))
            print(f"{rate:8} {result.offered:10.1f} {result.throughput:10.1f} {each:15.1f} "
                  f"{late_us:12.0f} us")  # fmt: skip
            figures[f"generator_cpu_us_at_{rate}_rps"] = each
            figures[f"generator_late_p99_us_at_{rate}_rps"] = late_us
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", nargs="?", help="measures the generator itself when not given")
    parser.add_argument("--quick", action="store_true", help="the generator itself, in seconds")
    parser.add_argument("--bodies", type=Path, help="length-prefixed bodies")
    parser.add_argument("--rate", type=float, default=100.0)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--warmup-seconds", type=float, default=0.0)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arrivals", choices=("poisson", "constant", "closed"), default="poisson")
    parser.add_argument("--content-type", default="application/json")
    parser.add_argument("--marker", action="append", default=[])
    given = parser.parse_args()
    if given.url is None:
        origin, figures = about(), measure_generator(2.0 if given.quick else given.seconds)
        print_figures("open_loop", figures, origin=origin)
        return
    if given.bodies is None:
        sys.exit("--bodies is needed: a file of bodies, each after its length in four bytes")
    result = run(
        given.url,
        read_bodies(given.bodies),
        rate=given.rate,
        seconds=given.seconds,
        warmup_seconds=given.warmup_seconds,
        connections=given.connections,
        seed=given.seed,
        arrivals=given.arrivals,
        content_type=given.content_type,
        markers=given.marker,
    )
    print(json.dumps(result.summary()))


if __name__ == "__main__":
    main()

"""What do clients notice of rotations, kills, a dead store and a full disk?

    python tests/benchmarks/serving_chaos.py [--only rotations,kills,materialise,disk,redis]
    python tests/benchmarks/serving_chaos.py --quick

Two replicas behind HAProxy under an open-loop load at half of what saturates them, one page and 100
ads each. *Every* answer is kept and compared afterwards with the offline scores of the bundle and
the snapshot that it names. Nothing may be wrong, mixed or an error in any phase:

- *calm*: nothing happens; the p99 to compare with.
- *rotations*: 50 promotions of two bundles in turn. No error.
- *kills*: ``kill -9`` of each replica in turn, while the other one lives. No error: what was in
  the hands of the killed replica is sent to the other one.
- *materialise*: one materialisation after the other in a process of its own. No error.
- *disk*: the decision log takes every answer, and its disk is full (ENOSPC), then slow (half a
  second a write), then stuck; afterwards it must be written again. No error. The faults come from
  ``rig/faulty_disk.c``, preloaded into the server.
- *redis*: another server on the Redis online store, which is stopped and started, under half of
  what saturates that one. No error: answers without features are flagged ``store_unavailable``, and
  must be those.

The exit status is 1 after an answer or an error that must not be.
"""

import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from shutil import copytree, ignore_patterns, which
from typing import Any, Final

import numpy as np
import pyarrow as pa

sys.path.append(str(Path(__file__).parents[2]))  # the script's own folder is there already

from tests.benchmarks.rig.forms import Form
from tests.benchmarks.rig.market import AS_OF, BenchMarket, bench_market
from tests.benchmarks.rig.offline import Offline, Verdict
from tests.benchmarks.rig.open_loop import FAILURES, Result, start
from tests.benchmarks.rig.report import about, print_figures, print_table, say
from tests.benchmarks.rig.served import (
    Effort,
    Served,
    arguments,
    chosen,
    saturation_of,
    served,
)
from tests.benchmarks.rig.usage import replicas

from driftline.features.store import apply, materialize
from driftline.platform.processes import free_port
from driftline.platform.settings import DriftlineSettings
from driftline.platform.workspace import Workspace
from driftline.serving.client import ScoringClient
from driftline.serving.server import ServingHandle

PARTS: Final = ("rotations", "kills", "materialise", "disk", "redis")
NUM_ADS: Final = 100
NUM_REPLICAS: Final = 2
NOT_SHARED: Final = ("online", "materialized.json", "registry.db", "decisions", "state")
"""What a market with another store does not take over."""
NUM_BODIES: Final = 50
FAULTY_DISK: Final = Path(__file__).parent / "rig" / "faulty_disk.c"


@dataclass(frozen=True)
class Pace:
    """How long the phases take."""

    num_rotations: int = 50
    rotation_seconds: float = 2.0
    phase_seconds: float = 15.0
    num_materialisations: int = 12


HURRIED: Final = Pace(
    num_rotations=4, rotation_seconds=1.5, phase_seconds=3.0, num_materialisations=3
)


@dataclass
class Phase:
    """What clients noticed while something happened."""

    name: str
    result: Result
    verdict: Verdict
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def errors(self) -> dict[str, int]:
        """Requests without a good answer, by outcome."""
        return {name: n for name, n in self.result.outcomes.items() if name != "200"}

    @property
    def num_errors(self) -> int:
        """None of them must be."""
        return sum(self.errors.values())

    def row(self) -> dict[str, Any]:
        """Of the table."""
        result = self.result
        return {
            "phase": self.name,
            "requests/s": round(result.load.rate),
            "requests": len(result.records),
            "checked": dict(self.verdict.counts),
            "errors": self.errors,
            "p50 ms": result.percentile_ms(50),
            "p99 ms": result.percentile_ms(99),
            "p99.9 ms": result.percentile_ms(99.9),
            "slowest ms": result.percentile_ms(100),
        }

    def figures(self) -> dict[str, float]:
        """Of the JSON line."""
        name = self.name.replace(" ", "_")
        numbers = {key.replace(" ", "_"): value for key, value in self.notes.items()}
        return {
            f"rate_rps_{name}": self.result.load.rate,
            f"p99_ms_{name}": self.result.percentile_ms(99),
            f"p99_9_ms_{name}": self.result.percentile_ms(99.9),
            f"slowest_ms_{name}": self.result.percentile_ms(100),
            f"errors_{name}": float(self.num_errors),
            f"bad_answers_{name}": float(self.verdict.num_bad),
            f"checked_answers_{name}": float(sum(self.verdict.counts.values())),
        } | {f"{key}_{name}": float(value) for key, value in numbers.items()}


@dataclass
class Chaos:
    """A server under load to which things happen."""

    bench: Served
    form: Form
    offline: Offline
    rate: float
    pace: Pace
    version: int = 1

    def phase(self, name: str, happen: Callable[[], dict[str, Any]]) -> Phase:
        """Let something happen under load; check all answers when it is over."""
        say(f"{name}, {self.rate:.0f} requests/s")
        load = self.bench.load(self.form, num_ads=NUM_ADS, rate=self.rate, seconds=3_600)
        running = start(replace(load, keep_every=1))
        try:
            time.sleep(load.warmup_seconds)
            notes = happen()
            running.stop()
            result = running.result()
        except BaseException:
            running.kill()
            raise
        done = Phase(name, result, self.offline.check(result.answers, self.form), notes)
        say(f"  p99 {result.percentile_ms(99):.1f} ms, {dict(done.verdict.counts)}, {done.errors}")
        for example in done.verdict.examples:
            say(f"  {example}")
        return done

    def calm(self) -> Phase:
        def wait() -> dict[str, Any]:
            time.sleep(self.pace.phase_seconds)
            return {}

        return self.phase("calm", wait)

    def rotations(self) -> Phase:
        moments: list[tuple[float, int]] = []

        def rotate() -> dict[str, Any]:
            for _ in range(self.pace.num_rotations):
                self.version += 1
                number = (self.version + 1) % 2
                moments.append((time.monotonic(), number))
                self.bench.market.promote(self.bench.market.bundles[number], version=self.version)
                time.sleep(self.pace.rotation_seconds)
            return {}

        done = self.phase("rotations", rotate)
        first, everywhere = zip(*_taken(done.result, moments), strict=True)
        done.notes = {
            "publish to served seconds": statistics.median(first),
            "publish to served seconds everywhere": statistics.median(everywhere),
            "slowest publish to served seconds everywhere": max(everywhere),
        }
        return done

    def kills(self) -> Phase:
        server = self.bench.server
        moments: list[float] = []
        back: list[float] = []

        def kill() -> dict[str, Any]:
            for victim in replicas(server.family):
                before = _names(server)
                moments.append(time.monotonic())
                victim.kill()
                back.append(_until_whole(server, before=before))
                time.sleep(self.pace.phase_seconds / 3)
            return {}

        done = self.phase("kills", kill)
        done.notes = {
            "kills": len(moments),
            "seconds until replaced": statistics.median(back),
        }
        return done

    def materialise(self) -> Phase:
        settings, seconds = self.bench.market.settings, []

        def run() -> dict[str, Any]:
            with materialiser(settings) as bring:
                for number in range(1, self.pace.num_materialisations + 1):
                    seconds.append(bring(AS_OF + number * timedelta(minutes=10)))
                    self.offline.learn(settings)
            return {"materialisation seconds": statistics.median(seconds)}

        return self.phase("materialise", run)

    def disk(self, mode: Path) -> Iterator[Phase]:
        decisions = Workspace.of(self.bench.market.settings).decisions
        for name, letter in (("disk full", "f"), ("disk slow", "s"), ("disk stuck", "h")):

            def suffer(letter: str = letter) -> dict[str, Any]:
                mode.write_text(letter)
                before = _num_files(decisions)
                time.sleep(self.pace.phase_seconds)
                return {"files written": _num_files(decisions) - before}

            yield self.phase(name, suffer)
        mode.write_text("")

        def recover() -> dict[str, Any]:
            before = _num_files(decisions)
            time.sleep(self.pace.phase_seconds)
            return {"files written": _num_files(decisions) - before}

        yield self.phase("disk again", recover)


def _taken(result: Result, moments: Sequence[tuple[float, int]]) -> Iterator[tuple[float, float]]:
    """Of each promotion: seconds to the first answer from the new bundle, and to the last from the
    old one."""
    done = result.started + result.records["done"] / 1e9
    for place, (moment, number) in enumerate(moments):
        until = moments[place + 1][0] if place + 1 < len(moments) else np.inf
        inside = (done > moment) & (done <= until)
        new = done[inside & (result.records["marker"] == number)]
        old = done[inside & (result.records["marker"] == 1 - number)]
        first = float(new.min() - moment) if len(new) else np.inf
        yield first, max(first, float(old.max() - moment) if len(old) else 0.0)


def _names(server: ServingHandle) -> set[str]:
    """Names of the replicas that answer just now; each connection may meet another one."""
    names = set()
    for _ in range(10):
        with contextlib.suppress(OSError, ValueError), ScoringClient(server.url) as client:
            names.add(client.status().get("replica", ""))
    return names - {""}


def _until_whole(server: ServingHandle, *, before: set[str]) -> float:
    """Seconds until a replica answers that was not there before."""
    started = time.monotonic()
    while time.monotonic() - started < 120:
        if _names(server) - before:
            return time.monotonic() - started
        time.sleep(0.2)
    raise SystemExit("a killed replica was not replaced within two minutes")


def _num_files(folder: Path) -> int:
    return sum(1 for _ in folder.rglob("*.parquet")) if folder.exists() else 0


@contextmanager
def materialiser(settings: DriftlineSettings) -> Iterator[Callable[[datetime], float]]:
    """Materialises in a process of its own, as the loop does; gives the seconds it took."""
    script = (
        "import sys, json, time; from datetime import datetime\n"
        "from driftline.features.store import materialize\n"
        "from driftline.platform.priority import step_back\n"
        "from driftline.platform.settings import parse_settings\n"
        "settings = parse_settings(json.loads(sys.stdin.readline()), origin='of the benchmark')\n"
        "step_back()\n"
        "for line in sys.stdin:\n"
        "    report = materialize(settings, as_of=datetime.fromisoformat(line.strip()))\n"
        "    print(report.seconds, flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def bring(as_of: datetime) -> float:
        stdin.write(f"{as_of.isoformat()}\n")
        stdin.flush()
        return float(stdout.readline())

    stdin.write(json.dumps(settings.model_dump(mode="json")) + "\n")
    try:
        yield bring
    finally:
        stdin.close()
        process.wait()


@contextmanager
def faulty_disk(folder: Path) -> Iterator[Path]:
    """Makes servers that are started meanwhile suffer; gives the file that says how."""
    with tempfile.TemporaryDirectory(prefix="faulty-disk-") as temporary:
        library, mode = Path(temporary) / "faulty_disk.so", Path(temporary) / "mode"
        command = ["cc", "-O2", "-shared", "-fPIC", str(FAULTY_DISK), "-o", str(library), "-ldl"]
        subprocess.run(command, check=True)
        ours = {
            "LD_PRELOAD": str(library),
            "DRIFTLINE_FAULTY_FOLDER": str(folder),
            "DRIFTLINE_FAULTY_MODE": str(mode),
        }
        before = {name: os.environ.get(name) for name in ours}
        os.environ.update(ours)
        try:
            yield mode
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


class RedisServer:
    """A Redis of our own, which keeps what it holds from one start to the next."""

    def __init__(self, program: str, folder: Path) -> None:
        self.port = free_port()
        self._command = [program, "--port", str(self.port), "--bind", "127.0.0.1"]
        self._command += ["--save", "3600 1", "--shutdown-on-sigterm", "save"]
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, cwd=self._folder, stdout=subprocess.DEVNULL)
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        raise SystemExit(f"redis-server did not come up on port {self.port}")

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait()
        self._process = None


def with_redis(market: BenchMarket, effort: Effort, pace: Pace, *, rate: float) -> list[Phase]:
    """The same market on another store, which goes away and comes back."""
    program = which("redis-server")
    if program is None:
        print("redis: not available, there is no redis-server")
        return []
    with tempfile.TemporaryDirectory(prefix="driftline-redis-") as temporary:
        redis = RedisServer(program, Path(temporary))
        redis.start()
        try:
            folder = Path(temporary) / "market"
            root = Workspace.of(market.settings).root
            copytree(root, folder, ignore=ignore_patterns(*NOT_SHARED))
            store = {"online": "redis", "redis_address": f"127.0.0.1:{redis.port}"}
            raw = market.settings.model_dump() | {"workspace": folder}
            raw["store"] = raw["store"] | store
            other = replace(market, settings=DriftlineSettings.model_validate(raw))
            say("writing the features into Redis")
            apply(other.settings, key_type=pa.int64())
            materialize(other.settings, as_of=AS_OF)
            with served(other, effort, num_replicas=NUM_REPLICAS) as bench:
                chaos = prepared(bench, pace, rate=rate, known=market.settings)
                return [chaos.phase("redis up", lambda: _sleep(pace)), _redis_away(chaos, redis)]
        finally:
            redis.stop()


def _redis_away(chaos: Chaos, redis: RedisServer) -> Phase:
    def away() -> dict[str, Any]:
        redis.stop()
        time.sleep(chaos.pace.phase_seconds)
        redis.start()
        back = time.monotonic()
        time.sleep(chaos.pace.phase_seconds)
        return {"back": back}

    done = chaos.phase("redis away", away)
    back = done.notes.pop("back")
    flagged = [
        done.result.started + record["done"] / 1e9
        for record, kept in _with_records(done.result)
        if "store_unavailable" in chaos.form.read(kept).fallbacks
    ]
    done.notes["answers without store"] = len(flagged)
    done.notes["seconds flagged after return"] = max([0.0, *(at - back for at in flagged)])
    return done


def _with_records(result: Result) -> Iterator[tuple[Any, bytes]]:
    for kept in result.answers:
        if kept.request >= result.first and kept.status == 200:
            yield result.records[kept.request - result.first], kept.content


def _sleep(pace: Pace) -> dict[str, Any]:
    time.sleep(pace.phase_seconds)
    return {}


def prepared(bench: Served, pace: Pace, *, rate: float, known: DriftlineSettings) -> Chaos:
    """A server whose answers can be checked.

    Args:
        bench: The server.
        pace: How long phases take.
        rate: Requests a second; 0 takes half of what saturates the server.
        known: Settings whose store says what is right.
    """
    form = bench.forms["json"]
    bench.num_bodies = NUM_BODIES
    offline = Offline(bench.market, bench.market.asked(NUM_ADS, NUM_BODIES))
    offline.learn(known)
    if not rate:
        rate = 0.5 * saturation_of(bench, form, num_ads=NUM_ADS)
        if not rate:
            raise SystemExit("the server keeps up with no rate at all; is the machine busy?")
    return Chaos(bench, form, offline, rate, pace)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], PARTS)
    parser.add_argument("--rate", type=float, default=0.0, help="instead of half of saturation")
    given = parser.parse_args()
    wanted, sizes, effort = chosen(given, PARTS)
    pace = HURRIED if given.quick else Pace()
    origin = about()
    phases: list[Phase] = []
    log = {"sample_rate": 1.0, "flush_seconds": 1.0}
    say("building the market")
    with bench_market(given.market, sizes) as market:
        materialize(market.settings, as_of=AS_OF)  # a kept market may have gone on
        decisions = Workspace.of(market.settings).decisions
        if set(wanted) - {"redis"}:
            with (
                faulty_disk(decisions) as mode,
                served(market, effort, num_replicas=NUM_REPLICAS, decision_log=log) as bench,
            ):
                chaos = prepared(bench, pace, rate=given.rate, known=market.settings)
                phases.append(chaos.calm())
                if "rotations" in wanted:
                    phases.append(chaos.rotations())
                if "kills" in wanted:
                    phases.append(chaos.kills())
                if "materialise" in wanted:
                    phases.append(chaos.materialise())
                if "disk" in wanted:
                    phases += chaos.disk(mode)
        if "redis" in wanted:
            materialize(market.settings, as_of=AS_OF)
            phases += with_redis(market, effort, pace, rate=given.rate)
    names = list(dict.fromkeys(name for phase in phases for name in phase.row()))
    rows = [{name: phase.row().get(name) for name in names} for phase in phases]
    print_table(f"1 page x {NUM_ADS} ads, every answer checked", rows)
    print_table(
        "Beside it",
        [
            {"phase": phase.name, "": name, "value": value}
            for phase in phases
            for name, value in phase.notes.items()
        ],
    )
    figures = {name: value for phase in phases for name, value in phase.figures().items()}
    bad = sum(phase.verdict.num_bad for phase in phases)
    errors = sum(phase.num_errors for phase in phases)
    figures |= {"bad_answers": bad, "errors": errors}
    print(f"\n{bad} wrong or mixed answers, {errors} errors")
    name = "serving_chaos_quick" if given.quick else "serving_chaos"
    print_figures(name, figures, origin=origin, failures=sorted(FAILURES.values()))
    sys.exit(1 if bad or errors else 0)


if __name__ == "__main__":
    main()

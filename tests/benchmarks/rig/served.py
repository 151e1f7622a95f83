"""The real server under load, and what all serving benchmarks measure alike."""

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from tests.benchmarks.rig.forms import SCORE, Form, forms_of
from tests.benchmarks.rig.market import QUICK, BenchMarket, MarketSizes
from tests.benchmarks.rig.open_loop import Load, Result, drive
from tests.benchmarks.rig.report import say
from tests.benchmarks.rig.usage import Usage

from driftline.platform.processes import free_port
from driftline.serving.server import ServingHandle, start_serving

NUM_BODIES: Final = 200
SATURATED_MS: Final = 50.0
ANSWERED_SHARE: Final = 0.98
STEP: Final = 1.4


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    rounds: int = 5
    seconds: float = 20.0
    warmup_seconds: float = 3.0
    step_seconds: float = 6.0
    ads: tuple[int, ...] = (1, 20, 100, 500)
    swaps: int = 10
    connections: int = 16


HURRY: Final = Effort(
    rounds=2, seconds=3.0, warmup_seconds=0.5, step_seconds=1.5, ads=(1, 100), swaps=2
)


@dataclass
class Served:
    """A running server and what it can be asked."""

    market: BenchMarket
    server: ServingHandle
    effort: Effort
    num_bodies: int = NUM_BODIES
    seed: int = 0
    bodies: dict[tuple[str, int], list[bytes]] = field(default_factory=dict)

    @cached_property
    def forms(self) -> dict[str, Form]:
        """By name, those that the server answers."""
        found = forms_of(self.server.url, self.market.asked(3, 1)[0])
        return {form.name: form for form in found}

    def load(self, form: Form, *, num_ads: int, rate: float, seconds: float) -> Load:
        """So many requests a second in one form; each load has other arrivals."""
        key = form.name, num_ads
        if key not in self.bodies:
            asked = self.market.asked(num_ads, self.num_bodies)
            self.bodies[key] = [form.write(one) for one in asked]
        self.seed += 1
        return Load(
            f"{self.server.url}{SCORE}",
            self.bodies[key],
            rate,
            self.effort.warmup_seconds + seconds,
            warmup_seconds=self.effort.warmup_seconds,
            connections=self.effort.connections,
            seed=self.seed,
            content_type=form.content_type,
            markers=[bundle.fingerprint for bundle in self.market.bundles],
        )

    def measure(self, form: Form, *, num_ads: int, rate: float, seconds: float) -> "Measured":
        """Drive one load and read what the server spent on it."""
        load = self.load(form, num_ads=num_ads, rate=rate, seconds=seconds)
        before = Usage.of(self.server.family)
        result = drive(load)
        spent = Usage.of(self.server.family).since(before)
        say(
            f"  {form.name} x {num_ads} at {rate:g}/s: p50 {result.percentile_ms(50):.2f}, "
            f"p99 {result.percentile_ms(99):.2f} ms, {result.throughput:.0f}/s, "
            f"{result.num_errors} errors"
        )
        share = float(result.good.mean()) if len(result.records) else 0.0
        answered = max(share * (len(result.records) + result.first), 1)
        return Measured(result, {group: 1e3 * s / answered for group, s in spent.items()})


@dataclass(frozen=True)
class Measured:
    """A load, and what one request of it cost the server."""

    result: Result
    cpu_ms: dict[str, float]
    """Processor milliseconds for each good answer, warm-up included, by group of processes."""

    @property
    def waited_ms(self) -> float:
        """99th percentile of the time between schedule and sending: all connections were busy, or
        the machine had no time for the generator."""
        records = self.result.records
        return float(np.percentile((records["sent"] - records["scheduled"]) / 1e6, 99))

    @property
    def is_saturated(self) -> bool:
        """Whether the server did not keep up."""
        result = self.result
        return (
            result.percentile_ms(99) > SATURATED_MS
            or result.throughput < ANSWERED_SHARE * result.offered
        )


@contextmanager
def served(market: BenchMarket, effort: Effort, **serving: Any) -> Iterator[Served]:
    """The server with the first bundle as champion."""
    market.promote(market.bundles[0], version=1)
    settings = market.serving(port=free_port(), **serving)
    with start_serving(settings) as server:
        with server.client as client:
            deadline = time.monotonic() + 60
            while client.status()["bundle"] != market.bundles[0].fingerprint:
                if time.monotonic() > deadline:
                    raise SystemExit(f"the server did not take the bundle: {client.status()}")
                time.sleep(0.05)
        yield Served(market, server, effort)


def closed_loop(bench: Served, form: Form, *, num_ads: int) -> float:
    """Answers a second when every connection always asks."""
    seconds = bench.effort.step_seconds
    load = bench.load(form, num_ads=num_ads, rate=0, seconds=seconds)
    result = drive(replace(load, arrivals="closed"))
    say(f"  {form.name} x {num_ads}, closed loop: {result.throughput:.0f}/s")
    return result.throughput


def climb(bench: Served, form: Form, *, num_ads: int, capacity: float) -> Iterator[Measured]:
    """Rates that grow until one is too much, then two halvings of what lies between."""
    seconds = bench.effort.step_seconds
    rate, good = max(capacity / 3, 1.0), 0.0
    while True:
        step = bench.measure(form, num_ads=num_ads, rate=rate, seconds=seconds)
        yield step
        if step.is_saturated:
            break
        good, rate = rate, rate * STEP
    bad = rate
    for _ in range(2):
        step = bench.measure(form, num_ads=num_ads, rate=(good + bad) / 2, seconds=seconds)
        yield step
        good, bad = (good, (good + bad) / 2) if step.is_saturated else ((good + bad) / 2, bad)


def saturation_of(bench: Served, form: Form, *, num_ads: int) -> float:
    """The largest rate of ``climb`` that was kept up with; 0 if none was."""
    capacity = closed_loop(bench, form, num_ads=num_ads)
    steps = climb(bench, form, num_ads=num_ads, capacity=capacity)
    return max((s.result.load.rate for s in steps if not s.is_saturated), default=0.0)


def arguments(description: str, parts: Sequence[str]) -> argparse.ArgumentParser:
    """What the serving benchmarks have in common."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a small market, about a minute")
    parser.add_argument("--only", default=",".join(parts), help=f"some of {', '.join(parts)}")
    parser.add_argument("--market", type=Path, help="folder that keeps the market for next time")
    parser.add_argument("--head", default="", help="widths of the head, e.g. 512,256")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=float, help="length of a judged load")
    return parser


def chosen(
    given: argparse.Namespace, parts: Sequence[str]
) -> tuple[list[str], MarketSizes, Effort]:
    """Parts, sizes and effort that the arguments ask for."""
    wanted = given.only.split(",")
    if unknown := [name for name in wanted if name not in parts]:
        raise SystemExit(f"--only: there is no {unknown[0]!r}; the parts are {', '.join(parts)}")
    sizes, effort = (QUICK, HURRY) if given.quick else (MarketSizes(), Effort())
    if given.head:
        widths = tuple(int(width) for width in given.head.split(","))
        sizes = replace(sizes, hidden_sizes=widths)
    if given.rounds is not None:
        effort = replace(effort, rounds=given.rounds)
    if given.seconds is not None:
        effort = replace(effort, seconds=given.seconds)
    return wanted, sizes, effort

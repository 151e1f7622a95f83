"""What does an answer cost, over HTTP, under load that does not wait?

    python tests/benchmarks/serving.py [--only judged,ads,saturation,swap] [--market FOLDER]
    python tests/benchmarks/serving.py --quick

The real server (``start_serving``: Ray Serve behind HAProxy, one replica) on a simulated market of
20,000 products with 7 categorical columns, 60 numbers and vectors of width 256; its bundles have
random weights, which cost as much as trained ones. The load comes from ``open_loop.c`` in a process
of its own: arrivals are a Poisson process, and latency counts from the scheduled moment.

*judged*: one page and 100 ads at 1,000 requests/s as JSON and 2,000 as protobuf, in turn, at least
five rounds. The bar is a p99 below 5 ms with no error. The processor time of each request is read
from /proc for replica, HAProxy and the rest. Where the machine is shared with others, the same work
takes half as much processor time in one minute as in another; so each round is told, too.

*ads*: 1, 20, 100 and 500 ads at a rate that nothing of it can saturate.

*saturation*: the rate grows by 1.4 until p99 exceeds 50 ms or less than 0.98 of what is offered is
answered, then two halvings. *Capacity* beside it is the throughput of a closed loop: an upper bound
that no schedule reaches.

*swap*: a bundle is promoted under load. How long until the first answer from it, and until the last
from the old one; was anything refused, and how much slower was p99 meanwhile than before? The bars
are 3 s, nothing, and 5 ms.

Peers are in ``serving_peers.py``, faults in ``serving_chaos.py``. Generator and server share the
machine: on two cores the generator takes up to a tenth of one.
"""

import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

sys.path.append(str(Path(__file__).parents[2]))  # the script's own folder is there already

from tests.benchmarks.rig.market import bench_market
from tests.benchmarks.rig.open_loop import start
from tests.benchmarks.rig.report import (
    about,
    print_figures,
    print_table,
    say,
    spread,
)
from tests.benchmarks.rig.served import (
    SATURATED_MS,
    Measured,
    Served,
    arguments,
    chosen,
    climb,
    closed_loop,
    served,
)
from tests.benchmarks.rig.usage import Usage

JUDGED: Final = (("json", 1_000), ("binary", 2_000))
PARTS: Final = ("judged", "ads", "saturation", "swap")


def judged(bench: Served) -> dict[str, float]:
    """The points of the bars, in turn."""
    points = [(bench.forms[name], rate) for name, rate in JUDGED if name in bench.forms]
    runs: dict[str, list[Measured]] = {form.name: [] for form, _ in points}
    rounds: list[dict[str, Any]] = []
    for number in range(bench.effort.rounds):
        say(f"judged, round {number + 1} of {bench.effort.rounds}")
        for form, rate in points if number % 2 == 0 else points[::-1]:
            found = bench.measure(form, num_ads=100, rate=rate, seconds=bench.effort.seconds)
            runs[form.name].append(found)
            rounds.append({
                "form": form.name,
                "round": number + 1,
                "CPU ms, replica": found.cpu_ms["replica"],
                **{f"p{p} ms": found.result.percentile_ms(p) for p in (50, 95, 99, 99.9)},
            })  # fmt: skip
    rounds.sort(key=lambda row: (row["form"], row["CPU ms, replica"]))
    print_table("Rounds, by how quick the machine was", rounds)
    figures: dict[str, float] = {}
    columns = {}
    for form, rate in points:
        its_own, cells = _judge(runs[form.name], f"100_ads_{form.name}", rate=rate)
        figures |= its_own
        columns[f"{form.name} at {rate}/s"] = cells
    names = list(dict.fromkeys(name for cells in columns.values() for name in cells))
    table = [{"": n, **{at: cells.get(n) for at, cells in columns.items()}} for n in names]
    print_table(f"1 page x 100 ads, medians of {bench.effort.rounds} rounds (range)", table)
    return figures


def _judge(
    runs: Sequence[Measured], label: str, *, rate: float
) -> tuple[dict[str, float], dict[str, Any]]:
    """Figures of one point, and a column of the table."""
    results = [run.result for run in runs]
    series: dict[str, list[float]] = {}
    figures: dict[str, float] = {}
    for percent in (50, 95, 99, 99.9):
        values = series[f"p{percent} ms"] = [result.percentile_ms(percent) for result in results]
        name = f"p{percent}".replace(".", "_")
        figures[f"{name}_ms_{label}_at_{rate}_rps"] = statistics.median(values)
    answered = series["answered/s"] = [result.throughput for result in results]
    figures[f"throughput_{label}_at_{rate}_rps"] = statistics.median(answered)
    figures[f"errors_{label}_at_{rate}_rps"] = sum(result.num_errors for result in results)
    for group in sorted({group for run in runs for group in run.cpu_ms}):
        cost = series[f"CPU ms, {group}"] = [run.cpu_ms.get(group, 0.0) for run in runs]
        figures[f"cpu_ms_{label}_{group}"] = statistics.median(cost)
    series["CPU ms, generator"] = [
        1e3 * result.cpu_seconds / max(len(result.records) + result.first, 1) for result in results
    ]
    series["waited for a connection, p99 ms"] = [run.waited_ms for run in runs]
    outcomes: Counter[str] = Counter()
    for result in results:
        outcomes.update(result.outcomes)
    return figures, {name: spread(values) for name, values in series.items()} | {
        "outcomes": dict(outcomes)
    }


def by_ads(bench: Served) -> dict[str, float]:
    """What a larger request costs, far from saturation."""
    figures: dict[str, float] = {}
    rows = []
    for form in bench.forms.values():
        for num_ads in bench.effort.ads:
            found = bench.measure(
                form, num_ads=num_ads, rate=100, seconds=bench.effort.step_seconds
            )
            result = found.result
            rows.append({
                "form": form.name,
                "ads": num_ads,
                "body bytes": len(result.load.bodies[0]),
                **{f"p{p} ms": result.percentile_ms(p) for p in (50, 95, 99)},
                "CPU ms": sum(found.cpu_ms.values()),
                "errors": result.num_errors,
            })  # fmt: skip
            label = f"{num_ads}_ads_{form.name}_at_100_rps"
            figures[f"p50_ms_{label}"] = result.percentile_ms(50)
            figures[f"p99_ms_{label}"] = result.percentile_ms(99)
    print_table("By the number of ads, at 100 requests/s", rows)
    return figures


def saturation(bench: Served) -> dict[str, float]:
    """The largest rate that is kept up with, and the steps on the way there."""
    figures: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    summary = []
    for form in bench.forms.values():
        for num_ads in bench.effort.ads:
            capacity = closed_loop(bench, form, num_ads=num_ads)
            steps = list(climb(bench, form, num_ads=num_ads, capacity=capacity))
            kept_up = [step.result for step in steps if not step.is_saturated]
            rate = max((result.load.rate for result in kept_up), default=0.0)
            summary.append({
                "form": form.name, "ads": num_ads, "saturation/s": rate, "capacity/s": capacity,
            })  # fmt: skip
            for step in sorted(steps, key=lambda step: step.result.load.rate):
                found = step.result.summary()
                rows.append({
                    "form": form.name,
                    "ads": num_ads,
                    "rate": round(step.result.load.rate),
                    "answered/s": found["throughput"],
                    "p50 ms": found["p50_ms"],
                    "p99 ms": found["p99_ms"],
                    "p99.9 ms": found["p99_9_ms"],
                    "errors": found["errors"],
                    "CPU ms": sum(step.cpu_ms.values()),
                    "": "saturated" if step.is_saturated else "",
                })  # fmt: skip
            figures[f"saturation_rps_{num_ads}_ads_{form.name}"] = rate
            figures[f"capacity_rps_{num_ads}_ads_{form.name}"] = capacity
    print_table("Steps of rate", rows)
    print_table(f"Saturation: p99 above {SATURATED_MS:g} ms or less than 0.98 answered", summary)
    return figures


def swap(bench: Served) -> dict[str, float]:
    """Promotions under a load of 200 requests/s."""
    form, names = next(iter(bench.forms.values())), [b.fingerprint for b in bench.market.bundles]
    gap, before = 4.0, 2.0
    rows: list[dict[str, Any]] = []
    for number in range(bench.effort.swaps):
        old, new = number % 2, (number + 1) % 2
        load = bench.load(form, num_ads=100, rate=200, seconds=before + gap)
        running = start(load)
        time.sleep(bench.effort.warmup_seconds + before)
        promoted = time.monotonic()
        bench.market.promote(bench.market.bundles[new], version=number + 2)
        result = running.result()
        done = result.started + result.records["done"] / 1e9
        from_new = done[(result.records["marker"] == new) & (done > promoted)]
        from_old = done[result.records["marker"] == old]
        calm = result.latencies_ms[done < promoted]
        after = result.latencies_ms[done >= promoted]
        rows.append({
            "to": names[new][:6],
            "first new s": float(from_new.min() - promoted) if len(from_new) else np.nan,
            "last old s": float(from_old.max() - promoted) if len(from_old) else np.nan,
            "errors": result.num_errors,
            "p99 before ms": float(np.percentile(calm, 99)),
            "p99 after ms": float(np.percentile(after, 99)),
            "slowest ms": float(after.max()),
        })  # fmt: skip
        say(f"  swap {number + 1}: {rows[-1]}")
    print_table("Promotions at 200 requests/s", rows)
    return {
        "publish_to_served_seconds": statistics.median(row["first new s"] for row in rows),
        "publish_to_served_seconds_everywhere": max(row["last old s"] for row in rows),
        "errors_swap": sum(row["errors"] for row in rows),
        "p99_extra_ms_swap": statistics.median(
            row["p99 after ms"] - row["p99 before ms"] for row in rows
        ),
    }


def memory(bench: Served) -> dict[str, float]:
    """What the processes hold after all of it."""
    usage = Usage.of(bench.server.family)
    print_table(
        "Memory, MiB",
        [
            {"group": group, "resident": usage.resident_mib[group], "private": private}
            for group, private in sorted(usage.private_mib.items())
        ],
    )
    return {f"private_mib_{group}": value for group, value in usage.private_mib.items()}


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], PARTS)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--roam", action="store_true", help="without serving.own_cores")
    given = parser.parse_args()
    wanted, sizes, effort = chosen(given, PARTS)
    origin = about()
    figures: dict[str, float] = {}
    say("building the market")
    with bench_market(given.market, sizes) as market:
        say("starting the server")
        serving = {"num_replicas": given.replicas, "own_cores": not given.roam}
        with served(market, effort, **serving) as bench:
            if "binary" not in bench.forms:
                print("the server knows no application/x-protobuf: JSON alone is measured")
            runs = {"judged": judged, "ads": by_ads, "saturation": saturation, "swap": swap}
            for name in PARTS:
                if name in wanted:
                    say(name)
                    figures |= runs[name](bench)
            figures |= memory(bench)
    name = "serving_quick" if given.quick else "serving"
    print_figures(name, figures, origin=origin, head=list(sizes.hidden_sizes))


if __name__ == "__main__":
    main()

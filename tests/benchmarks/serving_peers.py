"""What does a server for this bundle cost beside those of others, and what is each part for?

    python tests/benchmarks/serving_peers.py [--build-peers FOLDER] [--only heads,cache,servers]
    python tests/benchmarks/serving_peers.py --quick

*heads*, in one process: one page and 100 ads from looked-up inputs to logits. Ours, where what a
product adds is folded when a snapshot comes, beside ONNX Runtime (the same tables as a graph, the
head folded without products, and the graph that an exporter makes of the head as trained) and
torch, and ours with one thing more left out: products not folded, vectors not projected at
publication, categories not folded, the page's side once per ad; these get their numbers normalised
already. All agree to 1e-4. The bars are 0.2 ms, and not
slower than ONNX Runtime, for the heads of the presets (128, 64); the paper's reading (512, 256) is
measured beside it. ONNX Runtime is no dependency of ours: ``--build-peers`` makes an environment
with it that borrows this one's packages; without one its rows are missing.

*cache*: the cached vectors mapped, as served, or read into memory: seconds to open, and memory that
a process has to itself.

*servers*, over HTTP on the same bundle, the same requests and the same machine, in turn: ours; ours
behind Ray Serve's own proxy instead of HAProxy; our service in a bare uvicorn application, the
floor of all frameworks (bar: at least 0.6 of its throughput); FastAPI with Feast's
``get_online_features`` and torch; and the arms in the request's path. Throughput is that of a
closed loop with as many connections as the server likes best of 4 and 16; latency is that of an
open loop at half of it.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil

sys.path.append(str(Path(__file__).parents[2]))  # the script's own folder is there already

from tests.benchmarks.rig.environments import borrowing_environment
from tests.benchmarks.rig.heads import OURS as OURS_IN_PROCESS
from tests.benchmarks.rig.heads import (
    Split,
    candidates,
    compare,
    head_of,
    request_milliseconds,
    requests_of,
)
from tests.benchmarks.rig.market import BenchMarket, MarketSizes, bench_market
from tests.benchmarks.rig.open_loop import Load, drive
from tests.benchmarks.rig.report import (
    about,
    print_figures,
    print_table,
    say,
    spread,
)
from tests.benchmarks.rig.served import NUM_BODIES, Effort, arguments, chosen, served
from tests.benchmarks.rig.usage import Usage

from driftline.features.online import OnlineFeatures
from driftline.platform.artefacts import write_json
from driftline.platform.bundle import VectorCache
from driftline.platform.fused_head import Projected
from driftline.platform.processes import free_port, new_family, spawn_module, stop_family
from driftline.platform.scorer import Scorer

ROOT: Final = Path(__file__).parents[2]
PARTS: Final = ("heads", "cache", "servers")
PEERS: Final = ("onnxruntime==1.31.1", "onnx==1.23.2")
NUM_ADS: Final = 100
PAPER_HEAD: Final = (512, 256)
CONNECTIONS: Final = (4, 16)
UP_SECONDS: Final = 120.0
OURS, OURS_PROXY = "driftline (HAProxy)", "driftline (Ray Serve's proxy)"
NAMES: Final = {
    "uvicorn": "bare uvicorn, our service",
    "fastapi": "FastAPI, Feast, torch",
    "bert": "uvicorn, arms in the path",
}


# --- heads and cache: children, in an interpreter that may have ONNX Runtime ---------------


def child_heads(folder: str, sizes: dict[str, Any], rounds: int, repeats: int) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    widths_of_market = tuple(sizes.pop("hidden_sizes"))
    market = BenchMarket.build(Path(folder), MarketSizes(hidden_sizes=widths_of_market, **sizes))
    bundle = market.bundles[0]
    scorer = Scorer.of(bundle)
    features = OnlineFeatures.open(market.settings)
    inputs = requests_of(market, features, scorer, num_ads=NUM_ADS, number=20)
    split = Split.of(scorer, market)
    found: dict[str, Any] = {"request": request_milliseconds(
        market, num_ads=NUM_ADS, rounds=rounds, repeats=repeats
    )}  # fmt: skip
    for widths in dict.fromkeys((widths_of_market, PAPER_HEAD)):
        head = head_of(scorer, widths)
        published = bundle.projected if head is scorer.head else None
        wide = replace(scorer, head=head, published=published)
        several = candidates(wide, features, split=split, published=published)
        label = "x".join(str(width) for width in widths)
        found[label] = compare(several, inputs, rounds=rounds, repeats=repeats)
        found["notes"] = found.get("notes", {}) | {one.name: one.note for one in several}
    return found


def child_cache(bundle: str, how: str) -> dict[str, float]:
    """Open the vectors and tables of a bundle and score with them; then weigh this process."""
    path = Path(bundle)
    process = psutil.Process()
    before = process.memory_full_info().uss
    started = time.perf_counter()
    vectors, tables = VectorCache.open(path), Projected.open(path)
    if how == "loaded":
        vectors = replace(
            vectors,
            text_id=np.array(vectors.text_id),
            page=np.array(vectors.page),
            ad=np.array(vectors.ad),
            trusted=True,
        )
        tables = Projected(np.array(tables.page), np.array(tables.ad))
    seconds = time.perf_counter() - started
    random = np.random.default_rng(0)
    for _ in range(200):  # as many rows as 200 requests touch
        ids = vectors.text_id[random.integers(0, len(vectors.text_id), NUM_ADS)]
        tables.ad[vectors.rows(ids)].sum()
    mib = (process.memory_full_info().uss - before) / 2**20
    return {
        "open_seconds": seconds,
        "private_mib": mib,
        "texts": float(len(vectors.text_id)),
    }


CHILDREN: Final = {child.__name__: child for child in (child_heads, child_cache)}


def run_child(name: str, *values: Any, python: Path | None = None) -> Any:
    """Run one of the above in an interpreter of its own."""
    command = [str(python or sys.executable), "-W", "ignore", __file__, "--child", name]
    paths = [str(ROOT), str(ROOT / ".src")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [*command, json.dumps(values)], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def heads(
    market: BenchMarket, python: Path | None, *, rounds: int, repeats: int
) -> dict[str, float]:
    root = str(market.settings.workspace)
    found = run_child("child_heads", root, asdict(market.sizes), rounds, repeats, python=python)
    notes, request = found.pop("notes"), found.pop("request")
    figures = {f"request_ms_{NUM_ADS}_looked_up_to_probabilities": statistics.median(request)}
    rows = []
    for widths, medians in found.items():
        ours = statistics.median(medians[OURS_IN_PROCESS])
        figures[f"fusion_ms_{NUM_ADS}_head_{widths}"] = ours
        for name, values in medians.items():
            middle = statistics.median(values)
            rows.append({
                "head": widths, "": name, "what": notes[name], "ms": spread(values),
                "ours / it": ours / middle,
            })  # fmt: skip
            if notes[name] != "ours":
                key = name.lower().replace(", ", "_").replace(" ", "_")
                figures[f"ratio_fusion_to_{key}_head_{widths}"] = ours / middle
        if "ONNX Runtime, folded" not in medians:
            print("ONNX Runtime: not available; give --build-peers FOLDER")
    print_table(f"1 page x {NUM_ADS} ads in process, from inputs to logits", rows)
    print(f"  from looked-up features to probabilities, as served: {spread(request)} ms")
    return figures


def cache(market: BenchMarket, *, rounds: int) -> dict[str, float]:
    path = str(market.bundles[0].path)
    runs: dict[str, list[dict[str, float]]] = {"mapped": [], "loaded": []}
    for _ in range(rounds):
        for how, found in runs.items():
            found.append(run_child("child_cache", path, how))
    rows, figures = [], {}
    for how, found in runs.items():
        row: dict[str, Any] = {"cache": how, "texts": int(found[0]["texts"])}
        for name in ("open_seconds", "private_mib"):
            values = [one[name] for one in found]
            row[name] = spread(values)
            figures[f"{name}_cache_{how}"] = statistics.median(values)
        rows.append(row)
    print_table("Vectors and their projections, in each process", rows)
    return figures


# --- servers -------------------------------------------------------------------------------


@dataclass
class Peer:
    """A running server on the bundle."""

    name: str
    url: str
    family: str
    slow: bool = False
    """Too slow to be asked many times."""


@contextlib.contextmanager
def peer_app(market: BenchMarket, name: str) -> Iterator[Peer]:
    """One of ``rig/peer_apps.py``, in a process of its own."""
    port, family = free_port(), new_family()
    with tempfile.TemporaryDirectory(prefix="driftline-peer-") as temporary:
        written, log = Path(temporary) / "settings.json", Path(temporary) / "log"
        write_json(written, market.settings.model_dump(mode="json"))
        before = os.environ.get("PYTHONPATH")
        environment = {
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), before))),
            "OMP_NUM_THREADS": "1",  # as Ray sets it for our replica
        }
        process = spawn_module(
            "tests.benchmarks.rig.peer_apps",
            [name, str(written), "--port", str(port)],
            family=family,
            log=log,
            environment=environment,
        )
        try:
            _until_up(market, port, process=process, log=log)
            url = f"http://127.0.0.1:{port}/v1/score"
            yield Peer(NAMES[name], url, family, slow=name in ("fastapi", "bert"))
        finally:
            stop_family(family)
            process.wait()


def _until_up(
    market: BenchMarket, port: int, *, process: subprocess.Popen[bytes], log: Path
) -> None:
    body = market.asked(3, 1)[0].json
    deadline = time.monotonic() + UP_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        connection = HTTPConnection("127.0.0.1", port, timeout=30)
        with contextlib.suppress(OSError):
            connection.request("POST", "/v1/score", body, {"content-type": "application/json"})
            if connection.getresponse().status == 200:
                return
        connection.close()
        time.sleep(0.2)
    raise SystemExit(f"a peer did not come up:\n{log.read_text()[-2000:]}")


def servers(market: BenchMarket, effort: Effort) -> dict[str, float]:
    """All of them up at once, one under load at a time."""
    with contextlib.ExitStack() as stack:
        say("starting ours")
        ours = stack.enter_context(served(market, effort))
        by_proxy = stack.enter_context(served(market, effort, ingress="proxy"))
        peers = [
            Peer(OURS, f"{ours.server.url}/v1/score", ours.server.family),
            Peer(OURS_PROXY, f"{by_proxy.server.url}/v1/score", by_proxy.server.family),
        ]
        for name in NAMES:
            say(f"starting {NAMES[name]}")
            peers.append(stack.enter_context(peer_app(market, name)))
        bodies = [one.json for one in market.asked(NUM_ADS, NUM_BODIES)]
        agreement = {peer.name: _agreement(peer, peers[0], bodies[:10]) for peer in peers}
        best = {peer.name: _connections(peer, bodies, effort) for peer in peers}
        runs: dict[str, list[dict[str, float]]] = {peer.name: [] for peer in peers}
        for number in range(effort.rounds):
            say(f"round {number + 1} of {effort.rounds}")
            for peer in peers if number % 2 == 0 else peers[::-1]:
                runs[peer.name].append(
                    _measure(peer, bodies, effort, connections=best[peer.name], seed=number)
                )
    return _report(runs, best, agreement)


def _load(peer: Peer, bodies: Sequence[bytes], effort: Effort, *, connections: int) -> Load:
    seconds = effort.step_seconds * (3 if peer.slow else 1)
    return Load(
        peer.url,
        bodies,
        seconds=effort.warmup_seconds + seconds,
        warmup_seconds=effort.warmup_seconds,
        connections=connections,
        arrivals="closed",
        timeout_ms=60_000,
        drain_seconds=30,
    )


def _connections(peer: Peer, bodies: Sequence[bytes], effort: Effort) -> int:
    """With how many connections a server does most."""
    done = {
        number: drive(_load(peer, bodies, effort, connections=number)).throughput
        for number in CONNECTIONS
    }
    best = max(done, key=lambda number: done[number])
    say(f"  {peer.name}: {', '.join(f'{n}: {t:.1f}/s' for n, t in done.items())}")
    return best


def _measure(
    peer: Peer, bodies: Sequence[bytes], effort: Effort, *, connections: int, seed: int
) -> dict[str, float]:
    closed = _load(peer, bodies, effort, connections=connections)
    before = Usage.of(peer.family)
    result = drive(closed)
    spent = Usage.of(peer.family).since(before)
    asked = len(result.records) + result.first
    rate = max(result.throughput / 2, 0.2)
    calm = drive(replace(closed, arrivals="poisson", rate=rate, connections=16, seed=seed))
    say(
        f"  {peer.name}: {result.throughput:.1f}/s; at {rate:.1f}/s p50 "
        f"{calm.percentile_ms(50):.2f}, p99 {calm.percentile_ms(99):.2f} ms"
    )
    return {
        "throughput": result.throughput,
        "cpu_ms": 1e3 * sum(spent.values()) / max(asked, 1),
        "p50_ms": calm.percentile_ms(50),
        "p99_ms": calm.percentile_ms(99),
        "errors": float(result.num_errors + calm.num_errors),
    }


def _agreement(peer: Peer, other: Peer, bodies: Sequence[bytes]) -> float:
    """Share of probabilities that are ours to 1e-4."""
    same = []
    for body in bodies:
        own, theirs = (_probabilities(one.url, body) for one in (peer, other))
        same.append(float((np.abs(own - theirs) < 1e-4).mean()))
    return statistics.fmean(same)


def _probabilities(url: str, body: bytes) -> Any:
    host, port = url.split("/")[2].split(":")
    connection = HTTPConnection(host, int(port), timeout=60)
    try:
        connection.request("POST", "/v1/score", body, {"content-type": "application/json"})
        return np.array(json.loads(connection.getresponse().read())["probabilities"])
    finally:
        connection.close()


def _report(
    runs: dict[str, list[dict[str, float]]], best: dict[str, int], agreement: dict[str, float]
) -> dict[str, float]:
    rows, figures = [], {}
    keys = {OURS: "ours", OURS_PROXY: "ours_ray_proxy"} | {n: key for key, n in NAMES.items()}
    for name, found in runs.items():
        series = {key: [run[key] for run in found] for key in found[0]}
        ratios = [
            ours["throughput"] / max(theirs["throughput"], 1e-9)
            for ours, theirs in zip(runs[OURS], found, strict=True)
        ]
        rows.append({
            "server": name,
            "answers/s": spread(series["throughput"]),
            "connections": best[name],
            "ours / it": spread(ratios),
            "CPU ms": spread(series["cpu_ms"]),
            "p50 ms": spread(series["p50_ms"]),
            "p99 ms": spread(series["p99_ms"]),
            "errors": int(sum(series["errors"])),
            "same answers": f"{agreement[name]:.1%}",
        })  # fmt: skip
        label = keys[name]
        for key in ("throughput", "cpu_ms", "p50_ms", "p99_ms"):
            figures[f"{key}_{NUM_ADS}_ads_{label}"] = statistics.median(series[key])
        if name != OURS:
            figures[f"ratio_throughput_to_{label}"] = statistics.median(ratios)
    print_table(
        f"1 page x {NUM_ADS} ads, JSON; latency at half of each server's own throughput", rows
    )
    return figures


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(CHILDREN[sys.argv[2]](*json.loads(sys.argv[3]))))
        return
    parser = arguments(__doc__.splitlines()[0], PARTS)
    parser.add_argument(
        "--build-peers",
        type=Path,
        metavar="FOLDER",
        help="make an environment with ONNX Runtime there, or use the one there",
    )
    given = parser.parse_args()
    wanted, sizes, effort = chosen(given, PARTS)
    python = None
    if given.build_peers:
        python = borrowing_environment(given.build_peers.resolve(), PEERS, constrained=True)
    origin = about()
    repeats = 50 if given.quick else 500
    figures: dict[str, float] = {}
    say("building the market")
    with bench_market(given.market, sizes) as market:
        if "heads" in wanted:
            say("heads")
            figures |= heads(market, python, rounds=effort.rounds, repeats=repeats)
        if "cache" in wanted:
            say("cache")
            figures |= cache(market, rounds=effort.rounds)
        if "servers" in wanted:
            figures |= servers(market, effort)
    name = "serving_peers_quick" if given.quick else "serving_peers"
    print_figures(name, figures, origin=origin, head=list(sizes.hidden_sizes))


if __name__ == "__main__":
    main()

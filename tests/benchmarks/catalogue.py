"""What does a product cost a replica, and how soon can ten million of them be read?

    python tests/benchmarks/catalogue.py [--quick] [--products 10000000] [--replicas 3]

1. Features: one view of 13 numbers, two categories and a text id, with keys that are dense
   integers, sparse integers or strings. Written once as a materialisation writes it, then opened by
   several replicas, each a process of its own. Bars: open in < 1 s, no memory of a replica's own
   that grows with the catalogue. Peer: a Python dict from product to row.
2. The same after 1 % of the products and some new ones were written (*late*: a materialisation,
   which arranges the view anew), and after 1,000 rows more (*pushed*: too few for that, so that
   readers put them into pages of their own).
3. Vectors after the head's first layer (16 wide, both roles) by text id, and the same after a delta
   of 10,000 texts.
4. Redis, where ``redis-server`` is installed: 101 products of all views in one round trip against
   Feast's ``get_online_features``, once a view.

*Cold*: the first look-up after the system was told to forget the files. *Random*: other products
every time, of all the catalogue. *Same*: the same 101 again. Memory is counted after the look-ups,
by the kernel (``smaps_rollup``): *private* is what the process wrote itself, *shared* its part of
what all replicas map (PSS less private). ``--quick``: 1 M products.
"""

import argparse
import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

sys.path.append(str(Path(__file__).parents[2]))  # the script's own folder is there already

from tests.benchmarks.rig.report import about, print_figures

from driftline.features.feast_plugins.merging import online_rows
from driftline.features.feast_plugins.snapshot_writer import SnapshotWriter
from driftline.features.online_views import SnapshotLookup, Wanted
from driftline.features.views import View
from driftline.platform.bundle import VECTORS, VectorCache, _index_vectors
from driftline.platform.fused_head import AD_FILE, PAGE_FILE, Projected
from driftline.platform.vector_deltas import VectorDelta, _grown

NUM_NUMBERS, NUM_READ, WIDTH, NUM_LATE_TEXTS = 13, 101, 16, 10_000
KINDS = ("dense", "sparse", "strings")
NUMBERS = tuple(f"n{place:02}" for place in range(NUM_NUMBERS))
CATEGORIES = {"category": 1_000, "advertiser": 5_000}
RANDOM_BATCHES, SAME_BATCHES = 300, 2_000


# --- files, written by a process that ends afterwards -------------------------------------


def keys_of(kind: str, places: np.ndarray) -> Any:
    """Products by their place in the catalogue."""
    if kind == "dense":
        return places
    numbers = (places.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)).view(np.int64)
    if kind == "sparse":
        return numbers
    return [f"B{number & 0xFFFFFFFFFFFF:012X}" for number in numbers.tolist()]


def rows_of(kind: str, places: np.ndarray, *, event_us: int) -> pa.Table:
    random = np.random.default_rng(event_us)
    num = len(places)
    columns: dict[str, Any] = {
        "product": pa.array(keys_of(kind, places)),
        "event": pa.array(np.full(num, event_us), pa.timestamp("us", tz="UTC")),
        **{name: random.random(num, np.float32) for name in NUMBERS},
        "text_id": places + 1,
    }
    for name, cardinality in CATEGORIES.items():
        words = pa.array([f"{name}-{value}" for value in range(cardinality)])
        columns[name] = words.take(pa.array(random.integers(0, cardinality, num)))
    return online_rows(
        pa.table(columns),
        key="product",
        event_column="event",
        created_column=None,
        features=[
            *(pa.field(name, pa.float32()) for name in NUMBERS),
            pa.field("text_id", pa.int64()),
            *(pa.field(name, pa.string()) for name in CATEGORIES),
        ],
    )


def write_view(folder: Path, kind: str, num: int, when: str) -> None:
    """A view of ``num`` products; or some of them once more, and a tenth of that new."""
    places, event_us = np.arange(num), 1
    if when != "first":
        event_us = 2 if when == "late" else 3
        again = num // 100 if when == "late" else 900
        random = np.random.default_rng(5)
        places = np.unique(random.integers(0, num, again))
        first = num if when == "late" else num + num // 1_000
        places = np.append(places, np.arange(first, first + again // 10))
    rows = rows_of(kind, places, event_us=event_us)
    started = time.perf_counter()
    SnapshotWriter(folder / kind, categories=list(CATEGORIES)).write(rows)
    print(json.dumps({"write_seconds": time.perf_counter() - started}))


def text_ids(num: int) -> np.ndarray:
    return np.unique(np.random.default_rng(11).integers(1, 2**63 - 1, num))


def write_vectors(folder: Path, num: int) -> None:
    """A bundle's vectors; one number stands for those before the first layer, never read here."""
    folder.mkdir()
    started = time.perf_counter()
    ids = text_ids(num)
    ones = np.ones((len(ids), 1), np.float32)
    VectorCache(ids, ones, ones, trusted=True).save(folder / VECTORS)
    _index_vectors(folder)
    for name in (PAGE_FILE, AD_FILE):
        table = np.lib.format.open_memmap(
            folder / name, "w+", dtype=np.float32, shape=(len(ids) + 1, WIDTH)
        )
        for start in range(0, len(table), 1 << 20):
            part = table[start : start + (1 << 20)]
            part[:] = np.arange(start, start + len(part))[:, None]
        table.flush()
    print(json.dumps({"write_seconds": time.perf_counter() - started}))


# --- replicas: processes that open, look up and wait --------------------------------------


def wanted() -> Wanted:
    hour = timedelta(hours=1)
    view = View(
        name="view",
        entity="product",
        tier="short",
        origin="derived",
        features=pa.schema([]),
        value_freshness=hour,
        parameter_freshness=hour,
        expires=False,
        refuses=False,
        version="",
    )
    return Wanted(view, NUMBERS, tuple(CATEGORIES), text_id=True)


def microseconds(look_up: Callable[[Any], object], batches: list[Any]) -> list[float]:
    seconds = []
    for batch in batches:
        started = time.perf_counter()
        look_up(batch)
        seconds.append((time.perf_counter() - started) * 1e6)
    return seconds


def memory() -> dict[str, int]:
    """Bytes of this process: its own, and its share of all it maps."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    values = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines}
    return {"private": values["Private_Dirty"], "pss": values["Pss"], "rss": values["Rss"]}


class Step:
    """Steps of a child: each begins with the parent's word and ends with an answer."""

    def __init__(self) -> None:
        self.before = memory()

    def begin(self) -> float:
        """Wait for the parent; the moment of its word."""
        sys.stdin.readline()
        return time.perf_counter()

    def say(self, **found: float) -> None:
        print(json.dumps(found), flush=True)

    def remember(self) -> None:
        """All replicas have read the same pages by now, and none is gone yet."""
        self.begin()
        after = memory()
        self.say(**{name: after[name] - self.before[name] for name in after})


def view_replica(folder: Path, kind: str, num: int) -> None:
    random = np.random.default_rng(1)
    step = Step()
    batches = [keys_of(kind, random.integers(0, num, NUM_READ)) for _ in range(RANDOM_BATCHES)]
    step.before = memory()
    started = step.begin()
    lookup = SnapshotLookup.open(folder / kind, wanted())
    opened = time.perf_counter() - started

    def look_up(keys: Any) -> None:
        found = lookup.find(keys)
        table, slots = found.table, found.slots
        table.numbers.take(slots, axis=0, mode="wrap")
        table.event_us.take(slots, mode="wrap")
        for codes, _ in table.categories.values():
            codes.take(slots, mode="wrap")

    (cold,) = microseconds(look_up, batches[:1])
    microseconds(look_up, batches)
    step.say(
        open_seconds=opened,
        cold_us=cold,
        random_us=statistics.median(microseconds(look_up, batches)),
        same_us=statistics.median(microseconds(look_up, batches[:1] * SAME_BATCHES)),
    )
    step.remember()
    for first in (num, num + num // 1_000):
        started = step.begin()
        lookup = SnapshotLookup.open(folder / kind, wanted(), since=lookup)
        opened = time.perf_counter() - started
        new = lookup.find(keys_of(kind, np.arange(first, first + 5)))
        assert (new.slots >= 0).all(), "the new products are not there"
        microseconds(look_up, batches)
        random_us = statistics.median(microseconds(look_up, batches))
        step.say(open_seconds=opened, random_us=random_us)
        step.remember()


def vector_replica(folder: Path, num: int) -> None:
    random = np.random.default_rng(1)
    step = Step()
    ids = text_ids(num)
    batches = [ids[random.integers(0, len(ids), NUM_READ)] for _ in range(RANDOM_BATCHES)]
    known = set(ids[:1_000].tolist())
    late = np.array([n for n in range(1, NUM_LATE_TEXTS + 1) if n not in known], np.int64)
    del ids
    step.before = memory()
    started = step.begin()
    vectors, projected = VectorCache.open(folder), Projected.open(folder)
    opened = time.perf_counter() - started

    def look_up(texts: np.ndarray) -> None:
        projected.ad.take(vectors.rows(texts), axis=0, mode="wrap")

    (cold,) = microseconds(look_up, batches[:1])
    microseconds(look_up, batches)
    step.say(
        open_seconds=opened,
        cold_us=cold,
        random_us=statistics.median(microseconds(look_up, batches)),
        same_us=statistics.median(microseconds(look_up, batches[:1] * SAME_BATCHES)),
    )
    step.remember()
    started = step.begin()
    rows = np.zeros((len(late), WIDTH), np.float32)
    ones = np.ones((len(late), 1), np.float32)
    delta = VectorDelta(VectorCache(late, ones, ones), Projected(rows, rows))
    projected = Projected(
        _grown(projected.page, folder / PAGE_FILE, delta.projected.page),
        _grown(projected.ad, folder / AD_FILE, delta.projected.ad),
    )
    vectors = replace(vectors, late=delta.vectors, trusted=True)
    opened = time.perf_counter() - started
    microseconds(look_up, batches)
    step.say(open_seconds=opened, random_us=statistics.median(microseconds(look_up, batches)))
    step.remember()


def dict_replica(num: int) -> None:
    """The peer: product to row in a Python dict."""
    step = Step()
    random = np.random.default_rng(1)
    keys = keys_of("sparse", np.arange(num)).tolist()
    step.before = memory()
    started = step.begin()
    rows = {key: row for row, key in enumerate(keys)}
    opened = time.perf_counter() - started
    places = random.integers(0, num, (RANDOM_BATCHES, NUM_READ))
    batches = [[keys[place] for place in batch] for batch in places.tolist()]
    found = microseconds(lambda batch: [rows.get(key, -1) for key in batch], batches)
    step.say(open_seconds=opened, random_us=statistics.median(found))
    step.remember()


# --- the parent ---------------------------------------------------------------------------


class Replicas:
    """Several processes of this file in one role, a step at a time."""

    def __init__(self, role: str, *arguments: object, number: int) -> None:
        command = [sys.executable, __file__, "--role", role, *map(str, arguments)]
        pipe = subprocess.PIPE
        self.processes = [
            subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(number)
        ]

    def step(self) -> list[dict[str, float]]:
        """What each of them says to the next step; all have said it before another begins."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        found = []
        for process in self.processes:
            assert process.stdout is not None
            found.append(json.loads(process.stdout.readline()))
        return found

    def end(self) -> None:
        for process in self.processes:
            process.communicate()


def forget(folder: Path) -> int:
    """Have the system drop the pages of all files below a folder; their bytes."""
    total = 0
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            total += os.fstat(file).st_size
            os.close(file)
    return total


def write(*arguments: object) -> float:
    """Write files in a process of their own; its seconds without those of its start."""
    command = [sys.executable, __file__, "--role", *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1])["write_seconds"])


def measure(
    role: str, *arguments: object, replicas: int, num: int, between: tuple[str, ...]
) -> dict[str, float]:
    """Figures of one kind of file before and after something was added to it."""
    peers = Replicas(role, *arguments, number=replicas)
    figures: dict[str, float] = {}
    for when in ("", *between):
        suffix = f"_{when}" if when else ""
        if when and role == "view-replica":
            figures[f"write_seconds{suffix}"] = write("view-writer", *arguments, when)
        times, sizes = peers.step(), peers.step()
        for name in times[0]:
            values = [one[name] for one in times]
            # The first replica alone finds the files forgotten by the system.
            figures[name + suffix] = max(values) if name == "cold_us" else statistics.median(values)
        private = statistics.median(one["private"] for one in sizes)
        pss = statistics.median(one["pss"] for one in sizes)
        figures[f"private_bytes_per_product{suffix}"] = private / num
        figures[f"private_mib{suffix}"] = private / 2**20
        figures[f"shared_mib{suffix}"] = (pss - private) / 2**20 * replicas
    peers.end()
    return figures


def show(title: str, figures: dict[str, float]) -> None:
    print(f"\n{title}")
    for name, value in figures.items():
        print(f"  {name:36} {value:14.4g}")


# --- Redis --------------------------------------------------------------------------------


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[str | None]:
    """A Redis of our own, or none."""
    program = shutil.which("redis-server")
    if program is None:
        yield None
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL) as server:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"localhost:{port}"
        server.terminate()


def redis_reads(folder: Path, address: str, *, repeats: int) -> dict[str, float]:
    """The same 101 products through Redis, by our bytes and by Feast, in turns."""
    from tests.feast_lookup import feast_lookup

    from driftline.features.online import OnlineFeatures
    from driftline.features.online_redis import RedisVersion
    from driftline.features.quality import check_log
    from driftline.features.simulate import simulate
    from driftline.features.store import materialize, open_store
    from driftline.pipelines.prepare import prepare_features
    from driftline.platform.settings import parse_settings
    from driftline.platform.windows import parse_time
    from driftline.platform.workspace import Workspace

    features = [
        ("title", "text", "product", "long"),
        ("category", "categorical", "product", "medium"),
        ("advertiser", "categorical", "product", "medium"),
        ("application", "categorical", "impression", "medium"),
        ("sales_1h", "numeric", "product", "short"),
        ("sales_24h", "numeric", "product", "short"),
    ]
    settings = parse_settings(
        {
            "name": "redis",
            "workspace": str(folder / "market"),
            "source": {
                "kind": "simulate",
                "start": "2026-01-01T00:00:00Z",
                "num_days": 2,
                "impressions_per_day": 10_000,
                "num_products": 1_000,
            },
            "features": [
                {"name": name, "kind": kind, "entity": entity, "tier": tier}
                for name, kind, entity, tier in features
            ],
            "counters": {"category": "category"},
            "store": {"online": "redis", "redis_address": address, "redis_timeout_ms": 1000},
        },
        origin="benchmark",
    )
    workspace = Workspace.of(settings)
    as_of = parse_time("2026-01-02T12:00:00Z")
    simulate(settings, workspace.log)
    check_log(workspace.log, workspace.clean, settings=settings, now=as_of + timedelta(days=9))
    prepare_features(settings, as_of=as_of)
    materialize(settings, as_of=as_of)
    online = OnlineFeatures.open(settings)
    version = online._version
    assert isinstance(version, RedisVersion)
    views = version.source.products.wanted
    store = open_store(settings)
    products = list(range(100_000, 101_000))
    random = np.random.default_rng(0)
    times: dict[str, list[float]] = {"one round trip": [], "whole read": [], "Feast": []}
    for turn in range(repeats):
        keys = random.choice(products, NUM_READ, replace=False).tolist()
        if turn == 5:
            online.refresh()  # categories met so far move into memory
        started = time.perf_counter()
        version.source.read(version.source.products, keys)
        ours = time.perf_counter()
        online.read(keys[0], keys[1:], context={}, now=as_of)
        whole = time.perf_counter()
        for one in views:
            feast_lookup(one, keys, store=store)
        times["one round trip"].append((ours - started) * 1e3)
        times["whole read"].append((whole - ours) * 1e3)
        times["Feast"].append((time.perf_counter() - whole) * 1e3)
    found = {name: np.array(values[10:]) for name, values in times.items()}
    assert online.counts()["store"]["failures"] == 0
    return {
        "redis_one_round_trip_ms_101_products": float(np.median(found["one round trip"])),
        "redis_one_round_trip_p99_ms_101_products": float(
            np.quantile(found["one round trip"], 0.99)
        ),
        "redis_whole_read_ms_100_ads": float(np.median(found["whole read"])),
        "redis_get_online_features_ms_101_products": float(np.median(found["Feast"])),
        "ratio_redis_one_round_trip_to_feast": float(
            np.median(found["one round trip"]) / np.median(found["Feast"])
        ),
    }


def play(role: list[str]) -> None:
    """What a child process does."""
    name, *rest = role
    if name == "view-writer":
        write_view(Path(rest[0]), rest[1], int(rest[2]), rest[3])
    elif name == "vector-writer":
        write_vectors(Path(rest[0]), int(rest[1]))
    elif name == "view-replica":
        view_replica(Path(rest[0]), rest[1], int(rest[2]))
    elif name == "vector-replica":
        vector_replica(Path(rest[0]), int(rest[1]))
    else:
        dict_replica(int(rest[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="1 M products")
    parser.add_argument("--products", type=int, default=10_000_000)
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--keys", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--role", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role:
        play(arguments.role)
        return
    warnings.simplefilter("ignore")  # of Feast and ibis, on what they use of DuckDB and pandas
    num = 1_000_000 if arguments.quick else arguments.products
    size = f"{num // 1_000_000}m" if num >= 1_000_000 else str(num)
    origin, figures = about(), dict[str, float]()
    replicas = arguments.replicas
    with tempfile.TemporaryDirectory(prefix="driftline-benchmark-") as temporary:
        folder = Path(temporary)
        for kind in arguments.keys:
            seconds = write("view-writer", folder, kind, num, "first")
            total = forget(folder / kind)
            found = measure(
                *("view-replica", folder, kind, num),
                replicas=replicas,
                num=num,
                between=("late", "pushed"),
            )
            found = {"write_seconds": seconds, "file_bytes_per_product": total / num, **found}
            show(f"View of {num:,} products, {kind} keys, {replicas} replicas", found)
            figures |= {f"view_{kind}_{name}_{size}": value for name, value in found.items()}
            shutil.rmtree(folder / kind)
        seconds = write("vector-writer", folder / "bundle", num)
        total = forget(folder / "bundle")
        found = measure(
            *("vector-replica", folder / "bundle", num),
            replicas=replicas,
            num=num,
            between=("late",),
        )
        found = {"write_seconds": seconds, "file_bytes_per_product": total / num, **found}
        show(f"Vectors of {num:,} texts, {replicas} replicas", found)
        figures |= {f"vectors_{name}_{size}": value for name, value in found.items()}
        shutil.rmtree(folder / "bundle")
        peer = Replicas("dict-replica", 1_000_000, number=1)
        times, sizes = peer.step(), peer.step()
        peer.end()
        found = {
            "dict_open_seconds_1m": times[0]["open_seconds"],
            "dict_lookup_us_1m": times[0]["random_us"],
            "dict_private_bytes_per_product_1m": sizes[0]["private"] / 1e6,
        }
        show("A Python dict of 1,000,000 products, in each replica", found)
        figures |= found
        with redis_server(folder) as address:
            if address is not None:
                found = redis_reads(folder, address, repeats=100 if arguments.quick else 500)
                show("Redis", found)
                figures |= found
    print()
    print_figures("catalogue", figures, origin=origin)


if __name__ == "__main__":
    main()

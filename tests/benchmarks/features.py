"""What do the feature-store plug-ins cost beside the best that one could write by hand?

    python tests/benchmarks/features.py [--quick] [--repeats 5]

1. Point-in-time join, 1 M impressions x 2 aliased products x 20 features, time to live 2 h, 1 % of
   the feature rows corrected. Ceiling: a hand-written DuckDB ``ASOF JOIN`` over the same Parquet
   file and a hand-written polars ``join_asof``; baseline: Feast's own DuckDB store. The bar is 1.5
   times the hand-written ``ASOF JOIN``; every peer's rows are compared with its rows.
2. Materialisation of 50 k products x 13 floats, against Feast's local engine into SQLite. The bar
   is 60,000 products/s.
3. Online read of 101 products with their ages, against ``get_online_features``. The bar is 0.3 ms.

Peers take turns in one process; figures are medians, with the fastest and the slowest beside them.
"""

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, PushSource
from feast.data_source import PushMode
from feast.repo_config import RepoConfig
from feast.types import Float32
from feast.value_type import ValueType

sys.path.append(str(Path(__file__).parents[2]))  # the script's own folder is there already

from tests.benchmarks.rig.report import about, print_figures

from driftline.features.feast_plugins.online import read_arrays
from driftline.features.feast_plugins.scan import to_us

PLUGINS = "driftline.features.feast_plugins"
START = datetime(2026, 3, 1, tzinfo=UTC)
HOURS = 24
TTL = timedelta(hours=2)
TIME = pa.timestamp("us", tz="UTC")
NUM_JOINED, NUM_ONLINE, NUM_READ = 20, 13, 101


@dataclass(frozen=True)
class Sizes:
    impressions: int
    products: int
    reads: int


@dataclass
class Peers:
    """Runs peers in turn and keeps their times."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def turn(self, name: str, run: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = run()
        self.seconds.setdefault(name, []).append(time.perf_counter() - started)
        return result

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def show(self, title: str, *, scale: float = 1.0, unit: str = "s") -> None:
        print(f"\n{title}")
        print(f"  {'':44} {'median':>10} {'fastest':>10} {'slowest':>10}  {unit}")
        for name, times in sorted(self.seconds.items(), key=lambda item: self.median(item[0])):
            low, high = min(times) * scale, max(times) * scale
            print(f"  {name:44} {self.median(name) * scale:10.3f} {low:10.3f} {high:10.3f}")


def write_inputs(folder: Path, sizes: Sizes) -> pa.Table:
    """Hourly features of every product, with gaps and corrections; and the impressions."""
    rng = np.random.default_rng(7)
    start, hour = to_us(START), 3_600_000_000
    product = np.tile(np.arange(sizes.products), HOURS)
    event = np.repeat(np.arange(HOURS), sizes.products) * hour + start
    there = rng.random(len(product)) > 0.05
    product, event = product[there], event[there]
    corrected = rng.random(len(product)) < 0.01
    created = np.r_[event + 60_000_000, event[corrected] + 3_000_000_000]
    product, event = np.r_[product, product[corrected]], np.r_[event, event[corrected]]
    columns = {f"f{i:02}": rng.normal(size=len(product)).astype("f4") for i in range(NUM_JOINED)}
    features = pa.table(
        {
            "product_id": product,
            "event_timestamp": pa.array(event, TIME),
            "created": pa.array(created, TIME),
            **columns,
        }
    )
    pq.write_table(features, folder / "features.parquet", row_group_size=120_000)
    views = np.sort(rng.integers(start, start + HOURS * hour, sizes.impressions // 10))
    unseen = sizes.products + sizes.products // 100
    return pa.table(
        {
            "impression_id": np.arange(sizes.impressions),
            "event_timestamp": pa.array(views.repeat(10), TIME),
            "page_product_id": rng.integers(0, sizes.products, len(views)).repeat(10),
            "ad_product_id": rng.integers(0, unseen, sizes.impressions),
        }
    )


def market(folder: Path, name: str, *, ours: bool) -> FeatureStore:
    """A Feast store with the views of this benchmark."""
    home = folder / name
    home.mkdir()
    online = {"type": "sqlite", "path": str(home / "online.db")}
    if ours:
        online = {"type": f"{PLUGINS}.online.SnapshotOnlineStore", "path": "online"}
    store = FeatureStore(
        config=RepoConfig(
            project=name,
            provider="local",
            registry={"registry_type": "sql", "path": f"sqlite:///{home / 'registry.db'}"},
            offline_store={"type": f"{PLUGINS}.offline.AsofOfflineStore" if ours else "duckdb"},
            online_store=online,
            batch_engine={"type": f"{PLUGINS}.engine.SnapshotComputeEngine" if ours else "local"},
            repo_path=home,
            entity_key_serialization_version=3,
        )
    )
    product = Entity(name="product", join_keys=["product_id"], value_type=ValueType.INT64)
    batch = FileSource(
        name="batch",
        path=str(folder / "features.parquet"),
        timestamp_field="event_timestamp",
        created_timestamp_column="created",
    )
    schema = [Field(name=f"f{i:02}", dtype=Float32) for i in range(NUM_JOINED)]
    short = FeatureView(name="short", entities=[product], ttl=TTL, schema=schema, source=batch)
    served = FeatureView(
        name="served",
        entities=[product],
        ttl=TTL,
        schema=schema[:NUM_ONLINE],
        source=PushSource(name="pushed", batch_source=batch),
    )
    pair = FeatureService(
        name="pair",
        features=[
            short.with_name("page").with_join_key_map({"product_id": "page_product_id"}),
            short.with_name("ad").with_join_key_map({"product_id": "ad_product_id"}),
        ],
    )
    store.apply([product, short, served, pair])
    return store


def by_duckdb(file: Path, impressions: pa.Table) -> pa.Table:
    """The join as one would write it in DuckDB."""
    names = [f"f{i:02}" for i in range(NUM_JOINED)]
    chosen = [
        f"CASE WHEN e.event_timestamp <= {alias}.event_timestamp + INTERVAL 2 HOUR "
        f"THEN {alias}.{name} END AS {alias}__{name}"
        for alias in ("page", "ad")
        for name in names
    ]
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        connection.register("impressions", impressions)
        connection.execute(
            f"CREATE TEMP TABLE f AS SELECT * FROM read_parquet('{file}') QUALIFY row_number() "
            "OVER (PARTITION BY product_id, event_timestamp ORDER BY created DESC) = 1"
        )
        return connection.sql(
            f"SELECT e.*, {', '.join(chosen)} FROM impressions e "
            "ASOF LEFT JOIN f page ON e.page_product_id = page.product_id "
            "AND e.event_timestamp >= page.event_timestamp "
            "ASOF LEFT JOIN f ad ON e.ad_product_id = ad.product_id "
            "AND e.event_timestamp >= ad.event_timestamp ORDER BY e.impression_id"
        ).to_arrow_table()


def by_polars(file: Path, impressions: pa.Table) -> pa.Table:
    """The join as one would write it in polars."""
    features = (
        pl.scan_parquet(file)
        .sort("event_timestamp", "created")
        .unique(["product_id", "event_timestamp"], keep="last", maintain_order=True)
        .drop("created")
    )
    joined = pl.from_arrow(impressions).lazy()
    for alias in ("page", "ad"):
        renamed = {f"f{i:02}": f"{alias}__f{i:02}" for i in range(NUM_JOINED)}
        joined = joined.join_asof(
            features.rename({**renamed, "product_id": f"{alias}_product_id"}),
            on="event_timestamp",
            by=f"{alias}_product_id",
            strategy="backward",
            tolerance="2h",
            check_sortedness=False,
        )
    return joined.sort("impression_id").collect().to_arrow()


def check_rows(name: str, rows: pa.Table, expected: pa.Table) -> None:
    """Stop if a peer's answer is not the hand-written one's."""
    if name.startswith("Feast"):
        rows = rows.sort_by("impression_id")
    for column in expected.column_names:
        want, got = expected.column(column), rows.column(column)
        same = pa.concat_arrays(got.cast(want.type).chunks).equals(pa.concat_arrays(want.chunks))
        if not same:
            raise SystemExit(f"{name}: column {column} differs from the hand-written ASOF JOIN")


def joins(
    folder: Path, stores: dict[str, FeatureStore], impressions: pa.Table, repeats: int
) -> Peers:
    file, peers = folder / "features.parquet", Peers()
    frame = impressions.to_pandas()

    def historical(store: FeatureStore, entities: Any, **how: bool) -> pa.Table:
        return store.get_historical_features(
            entities, store.get_feature_service("pair"), full_feature_names=True, **how
        ).to_arrow()

    runs: dict[str, Callable[[], pa.Table]] = {
        "DuckDB ASOF JOIN, by hand": lambda: by_duckdb(file, impressions),
        "polars join_asof, by hand": lambda: by_polars(file, impressions),
        "driftline": lambda: historical(stores["ours"], impressions),
        "driftline, as known then": lambda: historical(
            stores["ours"], impressions, filter_by_created_timestamp=True
        ),
        "Feast duckdb": lambda: historical(stores["stock"], frame),
    }
    for turn in range(repeats):
        expected: pa.Table | None = None
        for name, run in runs.items():
            rows = peers.turn(name, run)
            if expected is None:
                expected = rows
            elif turn == 0 and "as known" not in name:
                check_rows(name, rows, expected)
    peers.show(f"Join, {len(impressions):,} impressions x 2 x {NUM_JOINED} features")
    return peers


def materialisations(stores: dict[str, FeatureStore], repeats: int) -> Peers:
    peers = Peers()
    end = START + timedelta(hours=HOURS)
    for _ in range(repeats):
        for name, store in stores.items():
            label = "driftline" if name == "ours" else "Feast local engine, SQLite"
            with quiet():
                peers.turn(label, partial(store.materialize, end - TTL, end, ["served"]))
    peers.show(f"Materialise {NUM_ONLINE} floats per product")
    return peers


def reads(stores: dict[str, FeatureStore], sizes: Sizes, repeats: int) -> Peers:
    rng, peers = np.random.default_rng(3), Peers()
    features = [f"served:f{i:02}" for i in range(NUM_ONLINE)]
    config = stores["ours"].config

    def with_ages(products: Any) -> Any:
        found = read_arrays(config, "served", products)
        return found.matrix, found.missing, found.age_us(now_us)

    def through_feast(store: FeatureStore, products: list[int]) -> Any:
        rows = [{"product_id": product} for product in products]
        return store.get_online_features(features, rows).to_dict()

    now_us = to_us(START)
    for _ in range(repeats):
        for _ in range(sizes.reads):
            products = rng.integers(0, sizes.products, NUM_READ)
            peers.turn("driftline, numpy keys", partial(with_ages, products))
            peers.turn("driftline, a list of keys", partial(with_ages, products.tolist()))
        for _ in range(max(sizes.reads // 10, 5)):
            listed = rng.integers(0, sizes.products, NUM_READ).tolist()
            for name, store in stores.items():
                label = "snapshot" if name == "ours" else "SQLite"
                call = partial(through_feast, store, listed)
                peers.turn(f"Feast get_online_features, {label}", call)
    peers.show(
        f"Online read of {NUM_READ} products x {NUM_ONLINE}, with ages", scale=1e3, unit="ms"
    )
    return peers


def pushes(stores: dict[str, FeatureStore], sizes: Sizes, repeats: int) -> Peers:
    peers, moment = Peers(), START + timedelta(hours=HOURS)
    for turn in range(repeats * 10):
        for name, store in stores.items():
            frame = pd.DataFrame(
                {
                    "product_id": [turn % sizes.products],
                    "event_timestamp": [moment + timedelta(seconds=turn)],
                    "created": [moment + timedelta(seconds=turn)],
                    **{f"f{i:02}": np.zeros(1, np.float32) for i in range(NUM_ONLINE)},
                }
            )
            label = "driftline" if name == "ours" else "Feast SQLite"
            peers.turn(
                f"{label}, push one row",
                partial(store.push, "pushed", frame, to=PushMode.ONLINE),
            )
        peers.turn(
            "driftline, first read after a push",
            lambda: read_arrays(stores["ours"].config, "served", [1, 2, 3]),
        )
    peers.show("Push one row", scale=1e3, unit="ms")
    return peers


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide what Feast prints while it materialises."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the rows")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # of Feast and ibis, on what they use of DuckDB and pandas
    sizes = Sizes(100_000, 5_000, 50) if arguments.quick else Sizes(1_000_000, 50_000, 200)
    repeats, origin = arguments.repeats, about()
    with tempfile.TemporaryDirectory(prefix="driftline-benchmark-") as temporary:
        folder = Path(temporary)
        impressions = write_inputs(folder, sizes)
        stores = {
            "ours": market(folder, "ours", ours=True),
            "stock": market(folder, "stock", ours=False),
        }
        joined = joins(folder, stores, impressions, repeats)
        materialised = materialisations(stores, repeats)
        read = reads(stores, sizes, repeats)
        pushed = pushes(stores, sizes, repeats)
    rows, by_hand = sizes.products, joined.median("DuckDB ASOF JOIN, by hand")
    size = "1m" if not arguments.quick else "100k"
    figures = {
        f"join_seconds_{size}": joined.median("driftline"),
        f"join_seconds_{size}_as_known_then": joined.median("driftline, as known then"),
        "ratio_join_to_duckdb_asof": joined.median("driftline") / by_hand,
        "ratio_join_to_polars_join_asof": joined.median("driftline")
        / joined.median("polars join_asof, by hand"),
        "ratio_join_to_feast_duckdb": joined.median("driftline") / joined.median("Feast duckdb"),
        "materialise_rows_per_second": rows / materialised.median("driftline"),
        "materialise_rows_per_second_feast_sqlite": rows
        / materialised.median("Feast local engine, SQLite"),
        "online_read_ms_101": read.median("driftline, numpy keys") * 1e3,
        "online_read_p99_ms_101": float(
            np.quantile(read.seconds["driftline, numpy keys"], 0.99) * 1e3
        ),
        "online_read_ms_101_get_online_features": read.median("Feast get_online_features, SQLite")
        * 1e3,
        "push_one_row_ms": pushed.median("driftline, push one row") * 1e3,
        "push_one_row_ms_feast_sqlite": pushed.median("Feast SQLite, push one row") * 1e3,
        "read_after_push_ms": pushed.median("driftline, first read after a push") * 1e3,
    }
    print()
    print_figures("features", figures, origin=origin)


if __name__ == "__main__":
    main()

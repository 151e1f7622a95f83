"""One contract for Feast online stores, held against ours, Feast's SQLite and, if one runs, Redis.

Where a store of Feast's breaks the contract today, the case is marked ``xfail(strict)`` with what
it does instead: the day an upgrade repairs it, the suite says so.
"""

import asyncio
import os
import socket
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, PushSource
from feast.data_source import PushMode
from feast.protos.feast.serving.ServingService_pb2 import FieldStatus
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.repo_config import RepoConfig
from feast.types import Array, Float32, Int64, String
from feast.value_type import ValueType

from driftline.features.feast_plugins.errors import FeatureStoreError
from driftline.features.feast_plugins.online import read_arrays, view_dir
from driftline.features.feast_plugins.snapshot import Snapshot, current_version

pytestmark = [
    # Feast 0.67 on pandas 2.3, ibis 12 and DuckDB 2.0; none of these is ours to repair.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    # Its SQLite store leaves connections to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

PLUGINS = "driftline.features.feast_plugins"
REDIS = ("localhost", 6379)
HOUR = timedelta(hours=1)
NOON = datetime(2026, 3, 1, 12, 0, 0, 250_000, tzinfo=UTC)
TIME = pa.timestamp("us", tz="UTC")
ONLINE: dict[str, dict[str, Any]] = {
    "snapshot": {"type": f"{PLUGINS}.online.SnapshotOnlineStore", "path": "online"},
    "sqlite": {"type": "sqlite", "path": "online.db"},
    "redis": {"type": "redis", "connection_string": f"{REDIS[0]}:{REDIS[1]},db=15"},
}
BROKEN = {
    ("sqlite", "test_a_late_row_does_not_overwrite_a_newer_one"): "the last to arrive wins",
    ("sqlite", "test_a_materialisation_keeps_a_fresher_push"): "the batch overwrites the push",
    ("sqlite", "test_event_times_are_exact"): "cuts to seconds",
    ("redis", "test_a_correction_of_the_same_moment_applies"): "refuses an equal event time",
    ("redis", "test_an_unknown_product_is_not_found"): "reports PRESENT",
}


def redis_answers() -> bool:
    try:
        socket.create_connection(REDIS, timeout=0.2).close()
    except OSError:
        return False
    return True


def write_source(path: Path, rows: list[tuple[int, datetime, float]]) -> None:
    table = pa.table(
        {
            "product_id": pa.array([row[0] for row in rows], pa.int64()),
            "event_timestamp": pa.array([row[1] for row in rows], TIME),
            "created": pa.array([row[1] + timedelta(minutes=1) for row in rows], TIME),
            "clicks": pa.array([row[2] for row in rows], pa.float32()),
            "title": pa.array([f"title {row[0]}" for row in rows]),
            "vector": pa.array([[row[2], 1.0] for row in rows], pa.list_(pa.float32())),
            "seller": pa.array([f"s-{row[0]}" for row in rows]),
        }
    )
    pq.write_table(table, path)


def objects(file: Path) -> list[Any]:
    product = Entity(name="product", join_keys=["product_id"], value_type=ValueType.INT64)
    seller = Entity(name="seller", join_keys=["seller"], value_type=ValueType.STRING)
    times = {"timestamp_field": "event_timestamp", "created_timestamp_column": "created"}
    batch = FileSource(name="batch", path=str(file), **times)
    schema = [
        Field(name="clicks", dtype=Float32),
        Field(name="title", dtype=String),
        Field(name="vector", dtype=Array(Float32)),
    ]
    short = FeatureView(
        name="short",
        entities=[product],
        ttl=2 * HOUR,
        schema=schema,
        source=PushSource(name="pushed", batch_source=batch),
    )
    sellers = FeatureView(
        name="sellers",
        entities=[seller],
        schema=schema[:1],
        source=FileSource(name="by_seller", path=str(file), **times),
    )
    pair = FeatureService(
        name="pair",
        features=[
            short[["clicks"]].with_name("page").with_join_key_map({"product_id": "page_id"}),
            short[["clicks"]].with_name("ad").with_join_key_map({"product_id": "ad_id"}),
        ],
    )
    return [product, seller, short, sellers, pair]


def open_store(folder: Path, kind: str) -> FeatureStore:
    offline = f"{PLUGINS}.offline.AsofOfflineStore"
    engine = f"{PLUGINS}.engine.SnapshotComputeEngine" if kind == "snapshot" else "local"
    return FeatureStore(
        config=RepoConfig(
            project=f"market_{os.getpid()}",
            provider="local",
            registry={"registry_type": "file", "path": str(folder / "registry.db")},
            offline_store={"type": offline, "threads": 1},
            online_store=ONLINE[kind],
            batch_engine={"type": engine},
            repo_path=folder,
            entity_key_serialization_version=3,
        )
    )


@pytest.fixture(params=list(ONLINE))
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FeatureStore]:
    """A market with one materialised hour: products 1, 2 and 3."""
    if request.param == "redis" and not redis_answers():
        pytest.skip("no Redis on this machine")
    reason = BROKEN.get((request.param, request.node.name.split("[")[0]))
    if reason is not None:
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    yield from market(tmp_path, request.param)


@pytest.fixture
def ours(tmp_path: Path) -> Iterator[FeatureStore]:
    yield from market(tmp_path, "snapshot")


def market(folder: Path, kind: str) -> Iterator[FeatureStore]:
    write_source(
        folder / "source.parquet",
        [(1, NOON - HOUR, 0.5), (1, NOON, 1.0), (2, NOON, 2.0), (3, NOON - 9 * HOUR, 3.0)],
    )
    store = open_store(folder, kind)
    store.apply(objects(folder / "source.parquet"))
    store.materialize(NOON - 12 * HOUR, NOON)
    yield store
    store.teardown()


def push(store: FeatureStore, *rows: tuple[int, datetime, datetime, float | None]) -> None:
    frame = pd.DataFrame(
        {
            "product_id": [row[0] for row in rows],
            "event_timestamp": [row[1] for row in rows],
            "created": [row[2] for row in rows],
            "clicks": pd.array([row[3] for row in rows], "Float32"),
            "title": [f"title {row[0]}" for row in rows],
            "vector": [np.array([0.0, 1.0], np.float32) for _ in rows],
        }
    )
    store.push("pushed", frame, to=PushMode.ONLINE)


def clicks(store: FeatureStore, *products: int) -> list[float | None]:
    response = store.get_online_features(
        ["short:clicks"], [{"product_id": product} for product in products]
    )
    return list(response.to_dict()["clicks"])


def test_the_newest_row_of_each_product_is_served(store: FeatureStore) -> None:
    response = store.get_online_features(
        ["short:clicks", "short:title", "short:vector"], [{"product_id": 2}, {"product_id": 1}]
    ).to_dict()
    assert response["clicks"] == [2.0, 1.0]
    assert response["title"] == ["title 2", "title 1"]
    assert [list(vector) for vector in response["vector"]] == [[2.0, 1.0], [1.0, 1.0]]


def test_a_value_past_its_time_to_live_is_still_returned(store: FeatureStore) -> None:
    assert clicks(store, 3) == [3.0]


def test_an_unknown_product_is_not_found(store: FeatureStore) -> None:
    rows = [{"product_id": 77}, {"product_id": 1}]
    response = store.get_online_features(["short:clicks"], rows)
    assert response.to_dict()["clicks"] == [None, 1.0]
    statuses = response.proto.results[-1].statuses
    assert list(statuses) == [FieldStatus.NOT_FOUND, FieldStatus.PRESENT]


def test_a_push_is_served_at_once(store: FeatureStore) -> None:
    push(store, (1, NOON + HOUR, NOON + HOUR, 8.0), (9, NOON, NOON, 9.0))
    assert clicks(store, 1, 9, 2) == [8.0, 9.0, 2.0]


def test_a_late_row_does_not_overwrite_a_newer_one(store: FeatureStore) -> None:
    push(store, (1, NOON - HOUR, NOON + 5 * HOUR, -1.0))
    assert clicks(store, 1) == [1.0]


def test_a_correction_of_the_same_moment_applies(store: FeatureStore) -> None:
    push(store, (1, NOON, NOON + HOUR, 1.5))
    assert clicks(store, 1) == [1.5]


def test_a_materialisation_keeps_a_fresher_push(store: FeatureStore) -> None:
    push(store, (1, NOON + HOUR, NOON + HOUR, 8.0))
    store.materialize(NOON - 12 * HOUR, NOON)
    assert clicks(store, 1, 2) == [8.0, 2.0]


def test_a_null_hides_an_older_value(store: FeatureStore) -> None:
    push(store, (1, NOON + HOUR, NOON + HOUR, None), (2, NOON + HOUR, NOON + HOUR, 4.0))
    assert clicks(store, 1, 2) == [None, 4.0]


def test_event_times_are_exact(store: FeatureStore) -> None:
    view = store.get_feature_view("short")
    found = store._get_provider().online_read(
        store.config, view, [entity_key("product_id", 1)], ["clicks"]
    )
    assert found[0][0].astimezone(UTC) == NOON


def test_aliases_of_one_view_read_their_own_product(store: FeatureStore) -> None:
    response = store.get_online_features(
        store.get_feature_service("pair"),
        [{"page_id": 1, "ad_id": 2}, {"page_id": 1, "ad_id": 77}],
        full_feature_names=True,
    ).to_dict()
    assert response["page__clicks"] == [1.0, 1.0]
    assert response["ad__clicks"] == [2.0, None]


def test_string_keys_are_served(store: FeatureStore) -> None:
    rows = [{"seller": "s-2"}, {"seller": "s-99"}]
    response = store.get_online_features(["sellers:clicks"], rows).to_dict()
    assert response["clicks"] == [2.0, None]


def test_another_process_reads_the_same(store: FeatureStore) -> None:
    kind = next(name for name, online in ONLINE.items() if online["type"] == online_type(store))
    assert clicks(open_store(store.config.repo_path, kind), 1, 2, 3) == [1.0, 2.0, 3.0]


def test_a_failed_write_does_not_move_the_watermark(store: FeatureStore) -> None:
    view = store.get_feature_view("short")
    (store.config.repo_path / "source.parquet").write_bytes(b"damaged")
    with pytest.raises(Exception, match=r"(?i)parquet"):
        store.materialize(NOON, NOON + HOUR, ["short"])
    again = store.get_feature_view("short")
    assert again.materialization_intervals == view.materialization_intervals
    assert again.state == view.state
    assert clicks(store, 1) == [1.0]


def online_type(store: FeatureStore) -> str:
    return str(store.config.online_store.type)


def entity_key(name: str, value: int) -> Any:
    return EntityKey(join_keys=[name], entity_values=[Value(int64_val=value)])


# What only our store promises.


def test_the_fast_path_and_feast_agree(ours: FeatureStore) -> None:
    push(ours, (1, NOON + HOUR, NOON + HOUR, 8.0), (4, NOON, NOON, None))
    products = [3, 1, 77, 4, 2, 1]
    view = ours.get_feature_view("short")
    found = read_arrays(ours.config, view, products, ["clicks"])
    assert found.matrix is not None
    assert found.matrix.dtype == np.float32
    fast = [None if np.isnan(value) else value for value in found.matrix[:, 0].tolist()]
    assert fast == clicks(ours, *products)
    assert found.missing.tolist() == [False, False, True, False, False, False]
    noon_us = int(NOON.timestamp()) * 1_000_000 + NOON.microsecond
    assert found.age_us(noon_us).tolist()[:2] == [9 * 3600 * 10**6, -3600 * 10**6]
    everything = read_arrays(ours.config, "short", products)
    assert everything.matrix is None
    assert everything.column("title").tolist() == [
        None if product == 77 else f"title {product}" for product in products
    ]


def test_a_server_opens_the_folder_without_feast(ours: FeatureStore) -> None:
    folder = view_dir(ours.config, "short")
    snapshot = Snapshot.open(folder)
    assert snapshot.version == current_version(folder)
    rows = snapshot.rows([2, 77])
    assert snapshot.matrix(["clicks"])[rows[0], 0] == 2.0
    assert rows[1] == -1
    push(ours, (2, NOON + HOUR, NOON + HOUR, 6.0))
    assert snapshot.version != current_version(folder)
    assert Snapshot.open(folder, since=snapshot).read([2], ["clicks"]).column("clicks") == 6.0
    assert snapshot.read([2], ["clicks"]).column("clicks") == 2.0


def test_a_view_that_was_never_written_has_no_rows(ours: FeatureStore) -> None:
    product = ours.get_entity("product")
    source = ours.get_feature_view("sellers").batch_source
    schema = [Field(name="clicks", dtype=Float32)]
    ours.apply(FeatureView(name="empty", entities=[product], schema=schema, source=source))
    response = ours.get_online_features(["empty:clicks"], [{"product_id": 1}]).to_dict()
    assert response["clicks"] == [None]
    with pytest.raises(FeatureStoreError, match=r"empty has no online rows .* materialise it"):
        read_arrays(ours.config, "empty", [1])


def test_a_deleted_view_leaves_nothing_behind(ours: FeatureStore) -> None:
    folder = view_dir(ours.config, "sellers")
    assert folder.exists()
    view = ours.get_feature_view("sellers")
    ours.apply([], objects_to_delete=[view], partial=False)
    assert not folder.exists()
    assert clicks(ours, 1) == [1.0]


def test_a_feature_added_to_a_view_is_null_until_the_next_write(ours: FeatureStore) -> None:
    view = ours.get_feature_view("sellers")
    ours.apply(
        FeatureView(
            name="sellers",
            entities=[ours.get_entity("seller")],
            schema=[*view.features, Field(name="product_id", dtype=Int64)],
            source=view.batch_source,
        )
    )
    features, rows = ["sellers:clicks", "sellers:product_id"], [{"seller": "s-2"}]
    before = ours.get_online_features(features, rows).to_dict()
    assert (before["clicks"], before["product_id"]) == ([2.0], [None])
    ours.materialize(NOON - 12 * HOUR, NOON, ["sellers"])
    after = ours.get_online_features(features, rows).to_dict()
    assert (after["clicks"], after["product_id"]) == ([2.0], [2])


def test_reading_and_pushing_work_from_an_event_loop(ours: FeatureStore) -> None:
    async def push_and_read() -> list[float]:
        frame = pd.DataFrame(
            {
                "seller": ["s-1"],
                "event_timestamp": [NOON + HOUR],
                "created": [NOON + HOUR],
                "clicks": np.array([6.5], np.float32),
            }
        )
        await ours.write_to_online_store_async("sellers", frame)
        response = await ours.get_online_features_async(["sellers:clicks"], [{"seller": "s-1"}])
        return list(response.to_dict()["clicks"])

    assert asyncio.run(push_and_read()) == [6.5]


def test_a_key_of_the_wrong_kind_names_the_view(ours: FeatureStore) -> None:
    with pytest.raises(FeatureStoreError, match="keys of this view are integers, got"):
        read_arrays(ours.config, "short", ["one"])


def test_the_engine_refuses_another_online_store(tmp_path: Path) -> None:
    store = FeatureStore(
        config=RepoConfig(
            project="market",
            provider="local",
            registry={"registry_type": "file", "path": str(tmp_path / "registry.db")},
            online_store=ONLINE["sqlite"],
            batch_engine={"type": f"{PLUGINS}.engine.SnapshotComputeEngine"},
            repo_path=tmp_path,
            entity_key_serialization_version=3,
        )
    )
    with pytest.raises(FeatureStoreError, match="got SqliteOnlineStore; set batch_engine to local"):
        store.apply(Entity(name="product", value_type=ValueType.INT64))

"""One contract for Feast stores, held against ours and against those that Feast brings.

Where a store of Feast's breaks the contract today, the case is marked ``xfail(strict)`` with what
it does instead: the day an upgrade repairs it, the suite says so.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource
from feast.errors import SavedDatasetLocationAlreadyExists
from feast.infra.offline_stores.file_source import SavedDatasetFileStorage
from feast.on_demand_feature_view import on_demand_feature_view
from feast.repo_config import RepoConfig
from feast.types import Float32, Float64, Int64
from feast.value_type import ValueType
from pydantic import ValidationError

from driftline.features.feast_plugins.errors import FeatureStoreError
from driftline.features.feast_plugins.offline import AsofOfflineStore

pytestmark = [
    # Feast 0.67 on pandas 2.3, ibis 12 and DuckDB 2.0; none of these is ours to repair.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:On demand feature view is an experimental:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Merging dataframes with merge column:UserWarning"),
]

PLUGINS = "driftline.features.feast_plugins"
OFFLINE: dict[str, dict[str, Any]] = {
    "asof": {"type": f"{PLUGINS}.offline.AsofOfflineStore", "threads": 1, "slice_rows": 3},
    "duckdb": {"type": "duckdb"},
    "dask": {"type": "dask"},
}
SNAPSHOTS = {"type": f"{PLUGINS}.online.SnapshotOnlineStore", "path": "online"}
DAY = datetime(2026, 3, 1, tzinfo=UTC)
TIME = pa.timestamp("us", tz="UTC")


def at(clock: str) -> datetime:
    hours, minutes, *seconds = clock.split(":")
    return DAY + timedelta(
        hours=int(hours), minutes=int(minutes), seconds=float(seconds[0]) if seconds else 0
    )


ROWS = [  # product, event time, written at, clicks
    (1, "08:00", "08:01", 1.0),
    (1, "09:00", "09:01", 2.0),
    (1, "10:00", "10:01", 3.0),
    (1, "10:00", "10:30", 4.0),  # a correction
    (1, "09:00", "10:45", 2.5),  # a late correction of an older hour
    (2, "10:00", "10:01", 5.0),
    (3, "12:00", "12:01", 9.0),
]


def write_sources(folder: Path) -> None:
    table = pa.table(
        {
            "product_id": pa.array([row[0] for row in ROWS], pa.int64()),
            "event_timestamp": pa.array([at(row[1]) for row in ROWS], TIME),
            "created": pa.array([at(row[2]) for row in ROWS], TIME),
            "clicks": pa.array([row[3] for row in ROWS], pa.float32()),
            "rate_y": pa.array([row[3] / 10 for row in ROWS], pa.float32()),
        }
    )
    for path in ["short.parquet", "parts/day=1/a.parquet"]:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, folder / path)
    sellers = table.append_column("seller", pa.array([f"s-{row[0]}" for row in ROWS]))
    pq.write_table(sellers.drop_columns(["product_id"]), folder / "sellers.parquet")
    nanoseconds = table["event_timestamp"].cast(pa.timestamp("ns", tz="UTC"))
    pq.write_table(table.set_column(1, "event_timestamp", nanoseconds), folder / "ns.parquet")
    renamed = table.rename_columns(["pid", "happened", "created", "n", "rate_y"])
    pq.write_table(renamed, folder / "renamed.parquet")


def view_of(
    name: str,
    path: str,
    *,
    entity: Entity,
    feature: str = "clicks",
    ttl: timedelta = timedelta(hours=2),
    **source: Any,
) -> FeatureView:
    settings = {"timestamp_field": "event_timestamp", "created_timestamp_column": "created"}
    return FeatureView(
        name=name,
        entities=[entity],
        ttl=ttl,
        schema=[Field(name=feature, dtype=Float32)],
        source=FileSource(name=f"{name}_source", path=path, **{**settings, **source}),
    )


def objects(folder: Path) -> list[Any]:
    product = Entity(name="product", join_keys=["product_id"], value_type=ValueType.INT64)
    seller = Entity(name="seller", join_keys=["seller"], value_type=ValueType.STRING)
    file = str(folder / "short.parquet")
    short = view_of("short", file, entity=product)
    mapping = {"pid": "product_id", "happened": "event_timestamp", "n": "clicks"}
    return [
        product,
        seller,
        short,
        view_of("forever", file, entity=product, ttl=timedelta(0)),
        view_of("odd", file, entity=product, feature="rate_y"),
        view_of("relative", "short.parquet", entity=product),
        view_of("folder", str(folder / "parts"), entity=product),
        view_of("glob", str(folder / "parts" / "**" / "*.parquet"), entity=product),
        view_of("sellers", str(folder / "sellers.parquet"), entity=seller),
        view_of("nanoseconds", str(folder / "ns.parquet"), entity=product),
        view_of("renamed", str(folder / "renamed.parquet"), entity=product, field_mapping=mapping),
        FeatureService(
            name="pair",
            features=[
                short.with_name("page").with_join_key_map({"product_id": "page_product_id"}),
                short.with_name("ad").with_join_key_map({"product_id": "ad_product_id"}),
            ],
        ),
    ]


def store_in(folder: Path, offline: dict[str, Any], online: dict[str, Any]) -> FeatureStore:
    engine = f"{PLUGINS}.engine.SnapshotComputeEngine"
    ours = online["type"].startswith(PLUGINS)
    return FeatureStore(
        config=RepoConfig(
            project="market",
            provider="local",
            registry={"registry_type": "file", "path": str(folder / "registry.db")},
            offline_store=offline,
            online_store=online,
            batch_engine={"type": engine if ours else "local"},
            repo_path=folder,
            entity_key_serialization_version=3,
        )
    )


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    write_sources(folder)
    return folder


@pytest.fixture(scope="module")
def offline_stores(
    sources: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, FeatureStore]:
    stores = {}
    for name, offline in OFFLINE.items():
        folder = tmp_path_factory.mktemp(name)
        (folder / "short.parquet").symlink_to(sources / "short.parquet")
        stores[name] = store_in(folder, offline, SNAPSHOTS)
        stores[name].apply(objects(sources))
    return stores


Retrieve = Callable[..., pd.DataFrame]


@pytest.fixture(params=list(OFFLINE))
def retrieve(request: pytest.FixtureRequest, offline_stores: dict[str, FeatureStore]) -> Retrieve:
    """Historical features of ``(key, clock)`` rows, as a data frame in the order that came."""
    store = offline_stores[request.param]
    case = request.node.name.split("[")[0]
    reason = BROKEN.get((request.param, case))
    if reason is not None:
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))

    def run(rows: list[tuple[Any, ...]], features: Any, *names: str, **how: Any) -> pd.DataFrame:
        columns = [*(names or ["product_id"]), "event_timestamp"]
        listed = [(*row[:-1], at(row[-1])) for row in rows]
        frame = pd.DataFrame(listed, columns=columns)
        frame["place"] = range(len(frame))
        if features == "pair":
            features, how = store.get_feature_service("pair"), {"full_feature_names": True, **how}
        return store.get_historical_features(frame, features, **how).to_df()

    return run


BROKEN = {
    ("dask", "test_ads_of_one_page_view_keep_their_rows"): "keeps one row per (key, time)",
    ("dask", "test_a_value_past_its_time_to_live_is_null"): "drops the entity row",
    ("dask", "test_a_value_from_the_future_is_null"): "drops the entity row",
    ("dask", "test_repeated_entity_rows_stay_repeated"): "keeps one row per (key, time)",
    ("dask", "test_rows_come_back_in_their_order"): "sorts by time",
    ("duckdb", "test_a_feature_may_be_called_anything"): "drops columns that end in _y",
    ("duckdb", "test_a_relative_path_is_found_from_the_repository"): "looks in the cwd",
    ("duckdb", "test_a_folder_of_files_is_a_source"): "AttributeError: None.mutate",
}


def values(frame: pd.DataFrame, name: str = "clicks") -> list[float | None]:
    ordered = frame.sort_values("place")[name]
    return [None if pd.isna(value) else round(float(value), 4) for value in ordered]


def test_ads_of_one_page_view_keep_their_rows(retrieve: Retrieve) -> None:
    rows = [(1, 1, "11:00"), (1, 2, "11:00"), (1, 7, "11:00")]
    frame = retrieve(rows, "pair", "page_product_id", "ad_product_id")
    assert values(frame, "page__clicks") == [4.0, 4.0, 4.0]
    assert values(frame, "ad__clicks") == [4.0, 5.0, None]


def test_a_value_past_its_time_to_live_is_null(retrieve: Retrieve) -> None:
    assert values(retrieve([(1, "13:00"), (1, "11:00")], ["short:clicks"])) == [None, 4.0]


def test_a_value_from_the_future_is_null(retrieve: Retrieve) -> None:
    assert values(retrieve([(3, "11:00"), (2, "11:00")], ["short:clicks"])) == [None, 5.0]


def test_a_value_counts_from_its_own_moment_on(retrieve: Retrieve) -> None:
    assert values(retrieve([(2, "10:00")], ["short:clicks"])) == [5.0]


def test_a_value_counts_until_the_edge_of_its_time_to_live(retrieve: Retrieve) -> None:
    assert values(retrieve([(2, "12:00")], ["short:clicks"])) == [5.0]


def test_of_equal_event_times_the_one_written_last_counts(retrieve: Retrieve) -> None:
    assert values(retrieve([(1, "11:00")], ["short:clicks"])) == [4.0]


def test_an_unknown_product_is_null(retrieve: Retrieve) -> None:
    assert values(retrieve([(77, "11:00"), (1, "11:00")], ["short:clicks"])) == [None, 4.0]


def test_repeated_entity_rows_stay_repeated(retrieve: Retrieve) -> None:
    assert values(retrieve([(1, "11:00"), (1, "11:00")], ["short:clicks"])) == [4.0, 4.0]


def test_a_row_without_a_product_stays(retrieve: Retrieve) -> None:
    assert values(retrieve([(None, "11:00"), (2, "11:00")], ["short:clicks"])) == [None, 5.0]


def test_rows_come_back_in_their_order(retrieve: Retrieve) -> None:
    rows = [(1, "11:00"), (2, "10:30"), (1, "08:30"), (2, "11:30"), (1, "09:30")]
    assert retrieve(rows, ["short:clicks"])["place"].tolist() == [0, 1, 2, 3, 4]


def test_a_replay_sees_what_was_written_by_then(retrieve: Retrieve, request: Any) -> None:
    if "dask" in request.node.name:
        pytest.skip("Feast's dask store has no filter_by_created_timestamp")
    rows = [(1, "10:15"), (1, "10:00:30"), (1, "10:30"), (1, "10:50"), (1, "08:00")]
    frame = retrieve(rows, ["short:clicks"], filter_by_created_timestamp=True)
    assert values(frame) == [3.0, 2.0, 4.0, 4.0, None]


def test_a_feature_may_be_called_anything(retrieve: Retrieve) -> None:
    assert values(retrieve([(1, "11:00")], ["odd:rate_y"]), "rate_y") == [0.4]


def test_a_relative_path_is_found_from_the_repository(retrieve: Retrieve) -> None:
    assert values(retrieve([(1, "11:00")], ["relative:clicks"])) == [4.0]


def test_a_folder_of_files_is_a_source(retrieve: Retrieve) -> None:
    assert values(retrieve([(1, "11:00")], ["folder:clicks"])) == [4.0]


def test_string_keys_join(retrieve: Retrieve) -> None:
    rows = [("s-1", "11:00"), ("s-9", "11:00"), ("s-2", "11:00")]
    assert values(retrieve(rows, ["sellers:clicks"], "seller")) == [4.0, None, 5.0]


def test_without_a_time_to_live_a_value_never_expires(retrieve: Retrieve) -> None:
    assert values(retrieve([(1, "23:00")], ["forever:clicks"])) == [4.0]


def test_columns_of_the_file_may_have_other_names(retrieve: Retrieve) -> None:
    assert values(retrieve([(1, "11:00")], ["renamed:clicks"])) == [4.0]


def test_nanoseconds_in_files_join(retrieve: Retrieve) -> None:
    assert values(retrieve([(1, "11:00")], ["nanoseconds:clicks"])) == [4.0]


# What only our store promises.


@pytest.fixture
def ours(offline_stores: dict[str, FeatureStore]) -> FeatureStore:
    return offline_stores["asof"]


def entities(*rows: tuple[int | None, str], **columns: list[Any]) -> pa.Table:
    return pa.table(
        {
            "product_id": pa.array([row[0] for row in rows], pa.int64()),
            "event_timestamp": pa.array([at(row[1]) for row in rows], TIME),
            **columns,
        }
    )


def test_arrow_entities_come_back_untouched_and_uncopied(ours: FeatureStore) -> None:
    table = entities((1, "11:00"), (2, "13:00"), (1, "08:30"), (None, "11:00"), note=list("abcd"))
    result = ours.get_historical_features(table, ["short:clicks"]).to_arrow()
    assert result.select(table.column_names).equals(table)
    before, after = table.column("product_id").chunk(0), result.column("product_id").chunk(0)
    assert before.buffers()[1].address == after.buffers()[1].address
    assert result["clicks"].to_pylist() == [4.0, None, 1.0, None]
    assert result["clicks"].type == pa.float32()


def test_threads_join_at_the_same_time(ours: FeatureStore) -> None:
    table = entities(*[(product, "11:00") for product in (1, 2, 3, 77)] * 5)
    expected = ours.get_historical_features(table, ["short:clicks"]).to_arrow()
    job = ours.get_historical_features(table, ["short:clicks"])

    def join(_: int) -> bool:
        return bool(job.to_arrow().equals(expected))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(join, range(20)))


def test_a_job_names_what_was_asked(ours: FeatureStore) -> None:
    table = entities((1, "11:00"), (2, "13:00"))
    metadata = ours.get_historical_features(table, ["short:clicks"]).metadata
    assert metadata is not None
    assert metadata.features == ["short:clicks"]
    assert metadata.keys == ["product_id"]
    assert (metadata.min_event_timestamp, metadata.max_event_timestamp) == (
        at("11:00"),
        at("13:00"),
    )


def test_a_result_is_saved_once(ours: FeatureStore, tmp_path: Path) -> None:
    job = ours.get_historical_features(entities((1, "11:00")), ["short:clicks"])
    storage = SavedDatasetFileStorage(path=str(tmp_path / "saved" / "rows.parquet"))
    job.persist(storage)
    assert pq.read_table(tmp_path / "saved" / "rows.parquet")["clicks"].to_pylist() == [4.0]
    with pytest.raises(SavedDatasetLocationAlreadyExists, match=r"rows\.parquet"):
        job.persist(storage)
    job.persist(storage, allow_overwrite=True)
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["rows.parquet"]


@pytest.mark.parametrize("path", ["short.parquet", "ns.parquet"])
def test_pulls_read_closed_ranges(ours: FeatureStore, sources: Path, path: str) -> None:
    store, columns = AsofOfflineStore, ("product_id", "clicks", "event_timestamp", "created")
    asked: dict[str, Any] = {
        "config": ours.config,
        "data_source": FileSource(path=str(sources / path)),
        "join_key_columns": ["product_id"],
        "feature_name_columns": ["clicks"],
        "timestamp_field": "event_timestamp",
        "created_timestamp_column": "created",
        "start_date": at("09:00"),
        "end_date": at("10:00").astimezone(timezone(timedelta(hours=-5))),
    }
    newest = store.pull_latest_from_table_or_query(**asked).to_arrow()
    assert sorted(newest.column_names) == sorted(columns)
    clicks = dict(zip(newest["product_id"].to_pylist(), newest["clicks"].to_pylist(), strict=True))
    assert clicks == {1: 4.0, 2: 5.0}
    every = store.pull_all_from_table_or_query(**asked).to_df()
    assert sorted(every["clicks"]) == [2.0, 2.5, 3.0, 4.0, 5.0]
    asked |= {"start_date": None, "end_date": None}
    assert len(store.pull_all_from_table_or_query(**asked).to_df()) == len(ROWS)


@pytest.fixture(scope="module")
def unusual(sources: Path, offline_stores: dict[str, FeatureStore]) -> FeatureStore:
    """Our store with views that nobody can answer for."""
    store = offline_stores["asof"]
    product, short = store.get_entity("product"), store.get_feature_view("short")
    file = str(sources / "short.parquet")
    both = view_of("both", file, entity=product)
    both.entities = ["product", "other"]
    both.entity_columns = [*short.entity_columns, Field(name="other_id", dtype=Int64)]
    twice = on_demand_feature_view(sources=[short], schema=[Field(name="twice", dtype=Float64)])
    store.apply(
        [
            Entity(name="other", join_keys=["other_id"], value_type=ValueType.INT64),
            both,
            twice(doubled),
            view_of("gone", str(sources / "gone.parquet"), entity=product),
            view_of("wrong", file, entity=product, feature="ctr"),
        ]
    )
    return store


def doubled(inputs: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({"twice": inputs["clicks"] * 2})


@pytest.mark.parametrize(
    ("features", "table", "message"),
    [
        (["short:clicks"], None, "entity_df must be a pandas DataFrame or a pyarrow Table"),
        (
            ["short:clicks"],
            entities((1, "11:00"), clicks=[1]),
            "column clicks of short is already in the result; ask for full_feature_names=True",
        ),
        (["sellers:clicks"], entities((1, "11:00")), "sellers joins on seller, which the entity"),
        (["gone:clicks"], entities((1, "11:00")), r"gone\.parquet cannot be read"),
        (["wrong:ctr"], entities((1, "11:00")), "column ctr is not in feature source .*clicks"),
        (["both:clicks"], entities((1, "11:00")), "both must have exactly one join key, got"),
        (["doubled:twice"], entities((1, "11:00")), "on-demand feature views doubled are not"),
        (
            ["short:clicks"],
            entities((1, "11:00")).drop_columns(["event_timestamp"]),
            "entity table must have a column event_timestamp or exactly one timestamp, got no",
        ),
    ],
)
def test_what_cannot_be_answered_is_refused_with_its_name(
    unusual: FeatureStore, features: list[str], table: Any, message: str
) -> None:
    with pytest.raises(FeatureStoreError, match=message):
        unusual.get_historical_features(table, features).to_arrow()


def test_an_unknown_setting_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"slices\n.*Extra inputs are not permitted"):
        store_in(tmp_path, {**OFFLINE["asof"], "slices": 3}, SNAPSHOTS)

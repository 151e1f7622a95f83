"""The point-in-time join against the slow and obvious version: look at every row, keep the best."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from driftline.features.feast_plugins.errors import FeatureStoreError
from driftline.features.feast_plugins.history import newest_rows
from driftline.features.feast_plugins.joins import JoinPlan, ViewJoin, join_features
from driftline.features.feast_plugins.scan import UNKNOWN_US, DuckDbSettings, FeatureSource

SECOND = 1_000_000
START_US = 1_700_000_000 * SECOND
UTC_US = pa.timestamp("us", tz="UTC")
ONE_THREAD = DuckDbSettings(threads=1, memory_limit="200MB")


@dataclass(frozen=True)
class Row:
    product: int | None
    event: int
    created: int | None
    value: float | None


@dataclass(frozen=True)
class Case:
    rows: list[Row]
    questions: list[tuple[int | None, int | None, int | None]]
    """``(page product, ad product, moment)``; any may be null."""
    page_ttl: int
    ad_ttl: int
    slice_rows: int
    fold_rows: int
    texts: bool
    has_created: bool
    as_known: bool


products = st.none() | st.integers(0, 3)
asked = st.none() | st.integers(0, 5)
moments = st.integers(0, 12)
rows_of_features = st.builds(
    Row,
    products,
    moments,
    st.none() | st.integers(0, 14),
    st.none() | st.integers(0, 99).map(float),
)
cases = st.builds(
    Case,
    rows=st.lists(rows_of_features, max_size=25),
    questions=st.lists(
        st.tuples(asked, asked, st.none() | moments),
        max_size=12,
    ),
    page_ttl=st.integers(0, 5),
    ad_ttl=st.integers(0, 5),
    slice_rows=st.integers(1, 13),
    fold_rows=st.integers(1, 30),
    texts=st.booleans(),
    has_created=st.booleans(),
    as_known=st.booleans(),
)


def values_known_then(
    case: Case, product: int | None, at: int | None, ttl: int
) -> set[float | None]:
    """The values that may be served: more than one only where two rows are equally new."""
    candidates = [
        row
        for row in case.rows
        if product is not None
        and at is not None
        and row.product == product
        and row.event <= at
        and (ttl == 0 or at - row.event <= ttl)
        and not (case.as_known and case.has_created and (row.created is None or row.created > at))
    ]
    if not candidates:
        return {None}

    def age(row: Row) -> tuple[int, int]:
        written = -1 if row.created is None or not case.has_created else row.created
        return row.event, written

    newest = max(map(age, candidates))
    return {row.value for row in candidates if age(row) == newest}


def key(product: int | None, *, texts: bool) -> int | str | None:
    return f"product/{'é' * product}{product}" if texts and product is not None else product


def us(second: int | None) -> int | None:
    return None if second is None else START_US + second * SECOND


def write_features(case: Case, path: Path) -> FeatureSource:
    kind = pa.string() if case.texts else pa.int64()
    table = pa.table(
        {
            "product_id": pa.array([key(row.product, texts=case.texts) for row in case.rows], kind),
            "event_timestamp": pa.array([us(row.event) for row in case.rows], UTC_US),
            "created": pa.array([us(row.created) for row in case.rows], UTC_US),
            "value": pa.array([row.value for row in case.rows], pa.float32()),
        }
    )
    pq.write_table(table, path)
    created = "created" if case.has_created else None
    return FeatureSource(str(path), "product_id", "event_timestamp", created)


def joined(case: Case, source: FeatureSource) -> pa.Table:
    kind = pa.string() if case.texts else pa.int64()
    entities = pa.table(
        {
            name: pa.array([key(row[place], texts=case.texts) for row in case.questions], kind)
            for place, name in enumerate(["page_id", "ad_id"])
        }
    )
    at_us = [UNKNOWN_US if at is None else START_US + at * SECOND for _, _, at in case.questions]
    plan = JoinPlan(
        views=(
            ViewJoin("page", source, "page_id", (("value", "page"),), case.page_ttl * SECOND),
            ViewJoin("ad", source, "ad_id", (("value", "ad"),), case.ad_ttl * SECOND),
        ),
        as_known=case.as_known,
        duckdb=ONE_THREAD,
        slice_rows=case.slice_rows,
        fold_rows=case.fold_rows,
    )
    return join_features(entities, np.array(at_us, np.int64), plan)


LATE_CORRECTION_OF_AN_OLD_VALUE = Case(
    rows=[Row(1, 2, 2, 20.0), Row(1, 4, 4, 40.0), Row(1, 2, 6, 21.0), Row(1, 3, 9, 30.0)],
    questions=[(1, 1, at) for at in range(12)],
    page_ttl=0,
    ad_ttl=5,
    slice_rows=3,
    fold_rows=2,
    texts=False,
    has_created=True,
    as_known=True,
)

AN_OLD_VALUE_ON_THE_EDGE_IN_A_LATER_SLICE = Case(
    rows=[Row(1, 2, 2, 20.0), Row(2, 3, 3, 30.0)],
    questions=[(1, 2, 3), (1, 2, 5), (1, 2, 6)],
    page_ttl=3,
    ad_ttl=2,
    slice_rows=1,
    fold_rows=1,
    texts=False,
    has_created=True,
    as_known=False,
)


@settings(max_examples=100)
@given(case=cases)
@example(case=LATE_CORRECTION_OF_AN_OLD_VALUE)
@example(case=AN_OLD_VALUE_ON_THE_EDGE_IN_A_LATER_SLICE)
def test_every_row_gets_the_newest_value_known_at_its_moment(case: Case) -> None:
    with TemporaryDirectory() as folder:
        table = joined(case, write_features(case, Path(folder) / "features.parquet"))
    assert table.num_rows == len(case.questions)
    found = table.to_pydict()
    for place, (page, ad, at) in enumerate(case.questions):
        assert found["page"][place] in values_known_then(case, page, at, case.page_ttl)
        assert found["ad"][place] in values_known_then(case, ad, at, case.ad_ttl)


@settings(max_examples=50)
@given(case=cases, start=moments, length=st.integers(0, 12))
def test_a_pull_holds_the_newest_row_of_each_product(case: Case, start: int, length: int) -> None:
    end = start + length
    with TemporaryDirectory() as folder:
        source = write_features(case, Path(folder) / "features.parquet")
        within = (START_US + start * SECOND, START_US + end * SECOND)
        pulled = newest_rows(source, ["value"], within, ONE_THREAD)
    inside = Case(
        **{
            **case.__dict__,
            "rows": [row for row in case.rows if row.event >= start],
            "as_known": False,
        }
    )
    expected = {
        key(row.product, texts=case.texts): values_known_then(inside, row.product, end, 0)
        for row in inside.rows
        if row.product is not None and row.event <= end
    }
    found = dict(zip(pulled["product_id"].to_pylist(), pulled["value"].to_pylist(), strict=True))
    assert found.keys() == expected.keys()
    assert len(found) == pulled.num_rows
    for product, value in found.items():
        assert value in expected[product]


@pytest.mark.parametrize(
    "written",
    [
        pa.timestamp("ns", "UTC"),
        pa.timestamp("ns"),
        pa.timestamp("us"),
        pa.timestamp("ms"),
        pa.timestamp("us", "America/New_York"),
    ],
    ids=str,
)
def test_all_ways_of_writing_a_time_mean_the_same(tmp_path: Path, written: pa.DataType) -> None:
    moments_us = pa.array([START_US, START_US + SECOND], pa.int64()).cast(pa.timestamp("us"))
    times = moments_us.cast(pa.timestamp(written.unit)).cast(pa.int64()).cast(written)
    table = pa.table({"product_id": [1, 1], "event_timestamp": times, "value": [1.0, 2.0]})
    pq.write_table(table, tmp_path / "features.parquet")
    source = FeatureSource(str(tmp_path / "features.parquet"), "product_id", "event_timestamp")
    plan = JoinPlan((ViewJoin("v", source, "id", (("value", "value"),)),), duckdb=ONE_THREAD)
    at_us = np.array([START_US - 1, START_US, START_US + SECOND - 1, START_US + SECOND])
    found = join_features(pa.table({"id": [1, 1, 1, 1]}), at_us, plan)
    assert found["value"].to_pylist() == [None, 1.0, 1.0, 2.0]


def test_keys_of_the_other_kind_are_refused(tmp_path: Path) -> None:
    times = pa.array([START_US], UTC_US)
    table = pa.table({"product_id": [1], "event_timestamp": times, "value": [1.0]})
    pq.write_table(table, tmp_path / "features.parquet")
    source = FeatureSource(str(tmp_path / "features.parquet"), "product_id", "event_timestamp")
    plan = JoinPlan((ViewJoin("short", source, "id", (("value", "value"),)),), duckdb=ONE_THREAD)
    with pytest.raises(FeatureStoreError, match=r"id of the entity table \(short\) holds string"):
        join_features(pa.table({"id": ["1"]}), np.array([START_US]), plan)


@pytest.mark.ray
def test_a_plan_travels_to_ray_tasks_and_gives_the_same_rows(
    tmp_path: Path, local_ray: None
) -> None:
    from driftline.features.feast_plugins.slices import historical_slices

    rng = np.random.default_rng(0)
    num_rows, num_questions = 4_000, 3_000
    table = pa.table(
        {
            "product_id": rng.integers(0, 50, num_rows),
            "event_timestamp": pa.array(START_US + rng.integers(0, 10**9, num_rows), UTC_US),
            "value": rng.normal(size=num_rows),
        }
    )
    pq.write_table(table, tmp_path / "features.parquet")
    source = FeatureSource(str(tmp_path / "features.parquet"), "product_id", "event_timestamp")
    view = ViewJoin("v", source, "id", (("value", "value"),), 100 * SECOND)
    plan = JoinPlan((view,), duckdb=ONE_THREAD, slice_rows=1_000)
    entities = pa.table({"id": rng.integers(0, 60, num_questions)})
    at_us = START_US + rng.integers(0, 10**9, num_questions)
    here = join_features(entities, at_us, plan)
    assert here["value"].null_count < num_questions
    assert historical_slices(entities, at_us, plan).equals(here)

"""The tabular half of a student: the same row always gives the same inputs."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from driftline.platform.columns import HeadColumn
from driftline.platform.errors import BundleError
from driftline.platform.tabular import NumberScaler, TabularEncoder

COLUMNS = (
    HeadColumn("ad__category", "categorical", "medium", "category", "ad"),
    HeadColumn("depth", "numeric", "medium", "depth", None),
    HeadColumn("ad__ctr_1h", "numeric", "short", "ctr_1h", "ad"),
    HeadColumn("ad__clicks_1h", "numeric", "short", "clicks_1h", "ad"),
)

rows = st.lists(
    st.tuples(
        st.none() | st.sampled_from(["a", "b", "c", "d"]),
        st.none() | st.floats(-5, 5, width=32),
        st.none() | st.floats(0, 1, width=32),
        st.none() | st.integers(0, 1000).map(float),
    ),
    min_size=1,
    max_size=30,
)


def frame(values: list[tuple[object, ...]]) -> pa.Table:
    kinds = [pa.string(), pa.float32(), pa.float32(), pa.float32()]
    columns = [pa.array([row[i] for row in values], kind) for i, kind in enumerate(kinds)]
    return pa.table(columns, names=[column.name for column in COLUMNS])


@given(values=rows, seed=st.integers(0, 99))
def test_order_and_company_of_rows_do_not_matter(
    values: list[tuple[object, ...]], seed: int
) -> None:
    encoder = TabularEncoder.fit(frame(values), COLUMNS, num_bins=4)
    order = np.random.default_rng(seed).permutation(len(values))
    categories, numbers = encoder.encode(frame(values))
    moved_categories, moved_numbers = encoder.encode(frame([values[i] for i in order]))
    np.testing.assert_array_equal(moved_categories, categories[order])
    np.testing.assert_array_equal(moved_numbers, numbers[order])
    one_category, one_number = encoder.encode(frame(values[:1]))
    np.testing.assert_array_equal(one_category, categories[:1])
    np.testing.assert_array_equal(one_number, numbers[:1])


@given(values=rows)
def test_it_reads_back_from_json(values: list[tuple[object, ...]]) -> None:
    encoder = TabularEncoder.fit(frame(values), COLUMNS, num_bins=4)
    assert TabularEncoder.from_json(encoder.to_json()) == encoder


@given(values=rows)
def test_inputs_are_finite_and_have_the_promised_shape(values: list[tuple[object, ...]]) -> None:
    encoder = TabularEncoder.fit(frame(values), COLUMNS, num_bins=4)
    odd = frame([("zzz", None, None, 1e30), (None, float("inf"), 0.0, 0.0)])
    for table in (frame(values), odd):
        categories, numbers = encoder.encode(table)
        assert np.isfinite(numbers).all()
        assert numbers.shape == (table.num_rows, encoder.num_numbers)
        assert (categories >= 0).all()
        assert (categories < np.array(encoder.cardinalities)).all()


def test_values_are_standardised_after_their_transform() -> None:
    clicks = [1.0, 5.0, 20.0, 400.0]
    table = frame([("a", 0.0, 0.1 * i, c) for i, c in enumerate(clicks)])
    encoder = TabularEncoder.fit(table, COLUMNS)
    _, numbers = encoder.encode(table)
    logs = np.log1p(clicks)
    np.testing.assert_allclose(numbers[:, 2], (logs - logs.mean()) / logs.std(), rtol=1e-5)
    assert [n.transform for n in encoder.numbers] == ["log1p", "logit", "log1p"]


def test_a_missing_value_is_flagged_and_lies_at_the_mean() -> None:
    encoder = TabularEncoder.fit(frame([("a", 1.0, 0.2, 3.0), ("b", 2.0, 0.4, 5.0)]), COLUMNS)
    _, numbers = encoder.encode(frame([(None, None, 0.3, 4.0)]))
    assert numbers[0, 0] == 0
    assert numbers[0, 3] == 1
    assert numbers[0, 4:].tolist() == [0, 0]


@given(
    edges=st.lists(st.integers(-50, 50), min_size=3, max_size=8, unique=True).map(sorted),
    value=st.floats(-60, 60),
)
def test_pieces_fill_from_the_left_like_a_thermometer(edges: list[int], value: float) -> None:
    scaler = NumberScaler("x", "identity", 0.0, 1.0, edges=tuple(float(e) for e in edges))
    (found,) = scaler.pieces(np.array([value]))
    for piece, low, high in zip(found, edges[:-1], edges[1:], strict=True):
        expected = 0 if value <= low else 1 if value >= high else (value - low) / (high - low)
        assert piece == pytest.approx(expected)


def test_refitting_keeps_known_categories_and_the_shape_of_the_inputs() -> None:
    old = TabularEncoder.fit(frame([("a", 1.0, 0.2, 3.0), ("b", 2.0, 0.4, 5.0)]), COLUMNS)
    new = old.refitted(frame([("c", 9.0, 0.9, 50.0), ("a", 7.0, 0.8, 70.0)]))
    assert new.cardinalities == old.cardinalities
    assert new.num_numbers == old.num_numbers
    before, _ = old.encode(frame([("a", 0.0, 0.0, 0.0), ("b", 0.0, 0.0, 0.0)]))
    after, _ = new.encode(frame([("a", 0.0, 0.0, 0.0), ("b", 0.0, 0.0, 0.0)]))
    np.testing.assert_array_equal(before, after)
    fresh, _ = new.encode(frame([("c", 0.0, 0.0, 0.0)]))
    assert fresh[0, 0] not in {0, *before[:, 0]}


def test_spare_rows_run_out_without_harm() -> None:
    encoder = TabularEncoder.fit(frame([("a", 1.0, 0.2, 3.0)]), COLUMNS)
    many = frame([(f"new{i}", 1.0, 0.2, 3.0) for i in range(100)])
    refitted = encoder.refitted(many)
    categories, _ = refitted.encode(many)
    assert categories.max() < refitted.cardinalities[0]
    assert (categories == 0).any()


def test_a_missing_column_is_named() -> None:
    encoder = TabularEncoder.fit(frame([("a", 1.0, 0.2, 3.0)]), COLUMNS)
    with pytest.raises(BundleError, match=r"\['depth'\] are missing"):
        encoder.encode(frame([("a", 1.0, 0.2, 3.0)]).drop_columns(["depth"]))

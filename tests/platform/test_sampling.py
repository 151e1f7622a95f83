"""A request never changes sides, and thinning loses no click."""

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from driftline.platform.sampling import part_mask, thinned, unit_hash
from driftline.platform.settings import SplitSettings

SPLIT = SplitSettings()


def frame(num: int, *, requests: int, seed: int) -> pa.Table:
    random = np.random.default_rng(seed)
    return pa.table(
        {
            "impression_id": [f"i{seed}-{row}" for row in range(num)],
            "request_id": pa.array(
                [f"r{r}" for r in random.integers(0, requests, num)], pa.string()
            ),
            "clicked": random.random(num) < 0.1,
        }
    )


@given(num=st.integers(1, 300), seed=st.integers(0, 50))
def test_every_row_has_one_part_and_a_request_stays_together(num: int, seed: int) -> None:
    table = frame(num, requests=20, seed=seed)
    masks = np.array([part_mask(table, p, split=SPLIT) for p in ("train", "validation", "gate")])
    assert (masks.sum(axis=0) == 1).all()
    part = masks.argmax(axis=0)
    for request in set(table["request_id"].to_pylist()):
        assert len(set(part[np.array(table["request_id"]) == request])) == 1


def test_parts_have_their_shares() -> None:
    table = frame(20_000, requests=20_000, seed=1)
    for part, share in (("train", 0.8), ("validation", 0.1), ("gate", 0.1)):
        found = part_mask(table, part, split=SPLIT).mean()  # type: ignore[arg-type]
        assert abs(found - share) < 0.02  # five standard deviations of a binomial share


@given(num=st.integers(1, 200), rate=st.floats(0.01, 1), seed=st.integers(0, 20))
def test_thinning_keeps_every_click_and_does_not_depend_on_order(
    num: int, rate: float, seed: int
) -> None:
    table = frame(num, requests=10, seed=seed)
    kept = thinned(table, keep_rate=rate, seed=seed)
    assert kept[np.array(table["clicked"])].all()
    order = np.random.default_rng(seed).permutation(num)
    np.testing.assert_array_equal(
        thinned(table.take(order), keep_rate=rate, seed=seed), kept[order]
    )


def test_hashes_are_spread_evenly_and_the_same_for_good() -> None:
    values = unit_hash(pa.array([f"x{i}" for i in range(10_000)]), salt="salt")
    assert abs(values.mean() - 0.5) < 0.02
    assert values.min() >= 0
    assert values.max() < 1
    fixed = unit_hash(pa.array(["a", "b", "a"]), salt="driftline-part")
    assert fixed[0] == fixed[2]


def test_integers_hash_like_their_digits() -> None:
    numbers = unit_hash(pa.array([1, 22]), salt="s")
    np.testing.assert_array_equal(numbers, unit_hash(pa.array(["1", "22"]), salt="s"))

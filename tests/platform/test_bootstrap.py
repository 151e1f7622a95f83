from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from driftline.platform.bootstrap import (
    ClusterBootstrap,
    Interval,
    Metric,
    paired_bootstrap,
    percentile_interval,
)
from driftline.platform.metrics import (
    FloatArray,
    calibration_ratio,
    mean_auc_by_group,
    normalised_entropy,
    roc_auc,
    sigmoid,
)

METRICS: tuple[Metric, ...] = ("auc", "mean_auc", "ne", "calibration")


def slow_measure(metric: Metric, labels: FloatArray, p: FloatArray, groups: NDArray[Any]) -> float:
    match metric:
        case "auc":
            return roc_auc(labels, p)
        case "mean_auc":
            return mean_auc_by_group(labels, p, groups)
        case "ne":
            return normalised_entropy(labels, p)
        case "calibration":
            return calibration_ratio(labels, p)


@pytest.mark.parametrize("metric", METRICS)
@given(
    rows=st.lists(
        st.tuples(st.booleans(), st.integers(1, 5).map(lambda n: n / 6), st.integers(0, 4)),
        min_size=1,
        max_size=25,
    ),
    seed=st.integers(0, 99),
)
def test_resamples_equal_copying_the_rows_of_the_drawn_clusters(
    metric: Metric, rows: list[tuple[bool, float, int]], seed: int
) -> None:
    labels, p, groups = (np.array(column) for column in zip(*rows, strict=True))
    bootstrap = ClusterBootstrap(labels, groups=groups, num_samples=4, seed=seed)
    fast = bootstrap.resample(metric, p)
    names = np.unique(groups)
    drawn = np.random.default_rng(seed).integers(len(names), size=(4, len(names)))
    for value, draw in zip(fast, drawn, strict=True):
        copies = [np.flatnonzero(groups == names[k]) for k in draw]
        chosen = np.concatenate(copies)
        group_of_copy = np.repeat(np.arange(len(copies)), [len(rows) for rows in copies])
        slow = slow_measure(metric, labels[chosen], p[chosen], group_of_copy)
        assert value == pytest.approx(slow, nan_ok=True)


def market(
    seed: int, *, num_requests: int = 300
) -> tuple[FloatArray, FloatArray, NDArray[np.int_]]:
    """Labels, true log-odds, request of each row; requests differ, so rows are not independent."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(num_requests), 8)
    logits = rng.normal(-2, 1, len(groups)) + rng.normal(0, 1, num_requests)[groups]
    labels = (rng.random(len(groups)) < sigmoid(logits)).astype(np.float64)
    return labels, logits, groups


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    truth = roc_auc(*market(10_000, num_requests=40_000)[:2])
    covered = 0
    for seed in range(100):
        labels, logits, groups = market(seed)
        bootstrap = ClusterBootstrap(labels, groups=groups, num_samples=200, seed=seed)
        interval = bootstrap.interval("auc", logits)
        covered += interval.low <= truth <= interval.high
    assert 88 <= covered <= 100  # binomial(100, 0.95) falls below 88 once in 300


def test_clustered_intervals_are_wider_than_those_that_take_rows_for_independent() -> None:
    labels, _, groups = market(1)
    constant = np.full(len(labels), labels.mean())
    widths = []
    for clusters in (groups, None):
        bootstrap = ClusterBootstrap(labels, groups=clusters, num_samples=500, seed=0)
        interval = bootstrap.interval("calibration", constant)
        widths.append(interval.high - interval.low)
    assert widths[0] > 1.2 * widths[1]


@pytest.mark.parametrize("metric", METRICS)
def test_a_model_does_not_differ_from_itself(metric: Metric) -> None:
    labels, logits, groups = market(2)
    p = sigmoid(logits)
    interval = paired_bootstrap(labels, p, p, groups=groups, metric=metric, num_samples=20, seed=0)
    assert interval == Interval(value=0, low=0, high=0)
    assert not interval.excludes(0)


@pytest.mark.parametrize("metric", METRICS)
def test_swapping_the_models_flips_the_sign(metric: Metric) -> None:
    labels, logits, groups = market(3)
    noisy = sigmoid(logits + np.random.default_rng(0).normal(0, 1, len(logits)))
    bootstrap = ClusterBootstrap(labels, groups=groups, num_samples=50, seed=0)
    there = bootstrap.paired(metric, sigmoid(logits), noisy)
    back = bootstrap.paired(metric, noisy, sigmoid(logits))
    assert (there.value, there.low, there.high) == pytest.approx(
        (-back.value, -back.high, -back.low)
    )


def test_pairing_sees_a_difference_that_single_intervals_hide() -> None:
    labels, logits, groups = market(4)
    worse = logits + np.random.default_rng(0).normal(0, 0.6, len(logits))
    bootstrap = ClusterBootstrap(labels, groups=groups, num_samples=300, seed=0)
    better_alone, worse_alone = (bootstrap.interval("auc", s) for s in (logits, worse))
    assert better_alone.low < worse_alone.high
    paired = bootstrap.paired("auc", logits, worse)
    assert paired.low > 0
    assert paired.excludes(0)
    assert paired.difference == paired.value


def test_the_seed_alone_decides() -> None:
    labels, logits, groups = market(5, num_requests=50)
    one, same, other = (
        ClusterBootstrap(labels, groups=groups, num_samples=30, seed=s).resample("auc", logits)
        for s in (1, 1, 2)
    )
    assert (one == same).all()
    assert (one != other).any()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("labels", [[], [0, 0, 0]])
def test_too_little_to_say_gives_nan_bounds(metric: Metric, labels: list[int]) -> None:
    bootstrap = ClusterBootstrap(labels, num_samples=10, seed=0)
    interval = bootstrap.interval(metric, [0.5] * len(labels))
    assert np.isnan([interval.value, interval.low, interval.high]).all()
    assert not interval.excludes(0)


def test_an_interval_needs_half_of_its_resamples() -> None:
    some = np.array([0.5, np.nan, np.nan])
    assert np.isnan(percentile_interval(0.5, some).low)
    assert percentile_interval(0.5, some[:2]).low == 0.5


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        ClusterBootstrap([0, 1], num_samples=0, seed=0)
    with pytest.raises(ValueError, match="groups must have 2 rows, got 1"):
        ClusterBootstrap([0, 1], groups=["a"], num_samples=1, seed=0)

from itertools import product
from math import log

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from driftline.platform.metrics import (
    Platt,
    auc_by_group,
    calibration_ratio,
    entropy,
    fit_platt,
    log_loss,
    logit,
    mean_auc_by_group,
    normalised_entropy,
    prior_correct,
    prior_correct_logits,
    relative_delta,
    roc_auc,
    sigmoid,
    soft_auc,
)

# Few distinct scores, so that ties are common.
scored_rows = st.lists(
    st.tuples(st.booleans(), st.integers(0, 5).map(lambda n: n / 5), st.integers(0, 3)),
    min_size=1,
    max_size=30,
)
ScoredRows = list[tuple[bool, float, int]]


def all_pairs_auc(
    scores: list[float], clicks: list[float], misses: list[float], *, self_pairs: bool = True
) -> float:
    won = total = 0.0
    rows = list(enumerate(zip(scores, clicks, misses, strict=True)))
    for (i, (s_i, click, _)), (j, (s_j, _, miss)) in product(rows, repeat=2):
        if i == j and not self_pairs:
            continue
        won += click * miss * ((s_i > s_j) + 0.5 * (s_i == s_j))
        total += click * miss
    return won / total if total else float("nan")


@given(rows=scored_rows)
def test_auc_equals_a_count_over_all_pairs_with_ties_as_halves(rows: ScoredRows) -> None:
    labels, scores, _ = map(list, zip(*rows, strict=True))
    clicks = [float(label) for label in labels]
    expected = all_pairs_auc(scores, clicks, [1 - c for c in clicks])
    assert roc_auc(labels, scores) == pytest.approx(expected, abs=1e-12, nan_ok=True)


@given(rows=scored_rows)
def test_a_weight_counts_like_that_many_copies_of_the_row(rows: ScoredRows) -> None:
    labels, scores, weights = map(np.array, zip(*rows, strict=True))
    copied = roc_auc(np.repeat(labels, weights), np.repeat(scores, weights))
    assert roc_auc(labels, scores, weights=weights) == pytest.approx(copied, nan_ok=True)
    losses = log_loss(np.repeat(labels, weights), np.repeat(scores, weights))
    assert log_loss(labels, scores, weights=weights) == pytest.approx(losses, nan_ok=True)


@given(scores=st.lists(st.floats(0, 1), min_size=2, max_size=30), seed=st.integers(0, 999))
def test_soft_auc_equals_a_count_over_all_pairs(scores: list[float], seed: int) -> None:
    teacher = np.random.default_rng(seed).uniform(0.01, 0.99, len(scores))
    expected = all_pairs_auc(scores, list(teacher), list(1 - teacher))
    assert soft_auc(scores, teacher) == pytest.approx(expected, abs=1e-9)


def test_soft_auc_of_the_fixture_is_as_published() -> None:
    scores, teacher = [0.9, 0.7, 0.4, 0.2], [0.8, 0.3, 0.6, 0.1]
    misses = [1 - p for p in teacher]
    assert soft_auc(scores, teacher) == pytest.approx(0.727273, abs=1e-6)
    assert all_pairs_auc(scores, teacher, misses, self_pairs=False) == pytest.approx(
        0.776074, abs=1e-6
    )
    assert roc_auc(np.array(teacher) >= 0.5, scores) == 0.75


@given(rows=scored_rows)
def test_soft_auc_with_hard_labels_is_the_ordinary_auc(rows: ScoredRows) -> None:
    labels, scores, _ = map(list, zip(*rows, strict=True))
    assert soft_auc(scores, labels) == pytest.approx(roc_auc(labels, scores), nan_ok=True)


@given(rows=scored_rows)
def test_auc_by_group_equals_auc_of_each_group_alone(rows: ScoredRows) -> None:
    labels, scores, groups = map(np.array, zip(*rows, strict=True))
    alone = [roc_auc(labels[groups == g], scores[groups == g]) for g in np.unique(groups)]
    assert auc_by_group(labels, scores, groups) == pytest.approx(alone, nan_ok=True)
    known = [auc for auc in alone if not np.isnan(auc)]
    expected = np.mean(known) if known else float("nan")
    assert mean_auc_by_group(labels, scores, groups) == pytest.approx(expected, nan_ok=True)


def test_groups_may_be_named_by_strings_in_any_order() -> None:
    values = auc_by_group([1, 0, 0, 1], [0.9, 0.5, 0.1, 0.2], ["b", "a", "b", "a"])
    assert values == pytest.approx([0.0, 1.0])


@pytest.mark.parametrize("labels", [[], [0, 0], [1, 1]])
def test_rows_of_one_class_give_nan_and_no_error(labels: list[int]) -> None:
    scores = [0.5] * len(labels)
    assert np.isnan(roc_auc(labels, scores))
    assert np.isnan(normalised_entropy(labels, scores))
    assert np.isnan(mean_auc_by_group(labels, scores, labels))
    assert np.isnan(calibration_ratio(labels, scores)) == (1 not in labels)


@given(rows=scored_rows)
def test_normalised_entropy_is_log_loss_over_that_of_the_click_rate(rows: ScoredRows) -> None:
    labels, scores, _ = map(np.array, zip(*rows, strict=True))
    probabilities = 0.01 + 0.98 * scores
    loss = -np.mean(
        [log(p) if y else log(1 - p) for y, p in zip(labels, probabilities, strict=True)]
    )
    assert log_loss(labels, probabilities) == pytest.approx(loss)
    if 0 < labels.mean() < 1:
        constant = np.full(len(labels), labels.mean())
        assert normalised_entropy(labels, constant) == pytest.approx(1)
        expected = loss / log_loss(labels, constant)
        assert normalised_entropy(labels, probabilities) == pytest.approx(expected)


def test_entropy_is_zero_at_certainty_and_log_two_at_a_coin() -> None:
    assert entropy([0, 0.5, 1]) == pytest.approx([0, log(2), 0])


def test_certainty_that_is_wrong_costs_much_but_not_infinity() -> None:
    assert 20 < log_loss([1], [0.0]) < 40


def test_calibration_ratio_is_predicted_clicks_per_click() -> None:
    assert calibration_ratio([1, 0, 0, 0], [0.2, 0.1, 0.1, 0.1]) == pytest.approx(0.5)


def test_relative_delta_is_the_papers() -> None:
    delta = relative_delta(0.66, baseline=0.6)
    assert delta.percent == pytest.approx(10)
    assert delta.points == pytest.approx(6)
    assert delta.improvement_percent == pytest.approx(60)
    assert np.isnan(relative_delta(0.6, baseline=0.5).improvement_percent)


def test_prior_correction_of_the_fixture_is_as_published() -> None:
    corrected = prior_correct([0.5, 0.8], keep_rate=5 / 95)
    assert corrected == pytest.approx([0.05, 0.17391], abs=1e-5)


@given(p=st.floats(0.001, 0.999), keep_rate=st.floats(0.01, 1))
def test_prior_correction_undoes_thinning_exactly(p: float, keep_rate: float) -> None:
    thinned = p / (p + (1 - p) * keep_rate)
    assert prior_correct([thinned], keep_rate=keep_rate) == pytest.approx([p])
    logits = prior_correct_logits(logit([thinned]), keep_rate=keep_rate)
    assert sigmoid(logits) == pytest.approx([p])


def test_platt_recovers_the_line_that_made_the_clicks() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(-2, 1, 200_000)
    labels = rng.random(len(logits)) < sigmoid(0.7 * logits - 0.4)
    line = fit_platt(labels, logits)
    assert line.slope == pytest.approx(0.7, abs=0.03)  # four standard errors
    assert line.intercept == pytest.approx(-0.4, abs=0.06)
    assert calibration_ratio(labels, sigmoid(line(logits))) == pytest.approx(1, abs=1e-3)


def test_platt_without_rows_changes_nothing_and_with_few_changes_little() -> None:
    assert fit_platt([], []) == Platt(slope=1.0, intercept=0.0)
    separable = fit_platt([0, 0, 1, 1], [-9.0, -8.0, 8.0, 9.0])
    assert separable.slope == pytest.approx(1, abs=0.01)
    never_clicked = fit_platt([0] * 20, [0.0] * 20)
    assert -4 < never_clicked.intercept < -1


@given(rows=scored_rows, shift=st.floats(-30, 30))
def test_platt_is_at_the_bottom_of_its_cost(rows: ScoredRows, shift: float) -> None:
    labels, scores, _ = map(np.array, zip(*rows, strict=True))
    logits = shift + 10 * scores
    line = fit_platt(labels, logits)
    residual = sigmoid(line(logits)) - labels
    assert residual.sum() + line.intercept == pytest.approx(0, abs=1e-6)
    assert residual @ logits + line.slope - 1 == pytest.approx(0, abs=1e-5)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"labels must be 0 or 1, got 2\.0 in row 1"):
        roc_auc([0, 2], [0.1, 0.2])
    with pytest.raises(ValueError, match="values must be finite, got nan in row 0"):
        roc_auc([0, 1], [float("nan"), 0.2])
    with pytest.raises(ValueError, match=r"probability must lie in \[0, 1\], got 1\.5 in row 1"):
        log_loss([0, 1], [0.5, 1.5])
    with pytest.raises(ValueError, match="need two vectors of one length"):
        roc_auc([0, 1], [0.5])
    with pytest.raises(ValueError, match=r"keep_rate must lie in \(0, 1\], got 0"):
        prior_correct([0.5], keep_rate=0)

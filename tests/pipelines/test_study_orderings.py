"""Verdicts on claims: exact against slow versions, right on data whose truth is known."""

from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from driftline.pipelines.study_orderings import judge_orderings, straightness
from driftline.pipelines.study_results import StudyResults, Trial, TrialFolder
from driftline.pipelines.study_statistics import Sample, combine, estimate, t_quantile
from driftline.platform.bootstrap import ClusterBootstrap
from driftline.platform.study_contrasts import parse_contrast
from driftline.platform.study_settings import StudySettings

SEEDS = (1, 2, 3)


def make_study(*orderings: dict[str, Any], **changes: Any) -> StudySettings:
    raw: dict[str, Any] = {
        "name": "made",
        "title": "Made",
        "market": "market.yaml",
        "variants": {name: {"x": place} for place, name in enumerate("abc")},
        "baseline": "a",
        "columns": ["id_auc"],
        "orderings": [{"claim": "claim", "source": "S0.1", **each} for each in orderings],
    }
    return StudySettings.model_validate(raw | changes)


def results_of(values: dict[str, list[float]], measure: str = "id_auc") -> StudyResults:
    return StudyResults(
        Trial(cell, seed, {measure: value})
        for cell, each in values.items()
        for seed, value in zip(SEEDS, each, strict=False)
    )


# --- statistics ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("degrees", "printed"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (10, 2.2281), (60, 2.0003), (1e9, 1.96)],
)
def test_t_quantiles_are_those_of_the_printed_tables(degrees: float, printed: float) -> None:
    assert t_quantile(degrees) == pytest.approx(printed, abs=1e-4)


def test_without_requests_the_interval_is_the_paired_t_interval() -> None:
    values = np.array([0.3, 0.5, 0.1])
    found = estimate(Sample(SEEDS, values)).interval
    deviation = sqrt(sum((v - 0.3) ** 2 for v in values) / 2)
    assert (found.value, found.high) == pytest.approx((0.3, 0.3 + 4.30265 * deviation / sqrt(3)))


def test_the_luck_of_requests_widens_the_interval_but_softens_the_t() -> None:
    values = np.array([0.3, 0.5, 0.1])
    noise = np.random.default_rng(0).normal(0, 0.4, 500)
    found = estimate(Sample(SEEDS, values, values[:, None] + noise)).interval
    by_seeds, by_requests = values.var(ddof=1) / 3, noise.var(ddof=1)
    degrees = (by_seeds + by_requests) ** 2 / (by_seeds**2 / 2)
    expected = t_quantile(degrees) * sqrt(by_seeds + by_requests)
    assert found.high - found.value == pytest.approx(expected)
    assert expected > 4.30265 * sqrt(by_seeds) * 0.9


def test_one_seed_is_judged_by_its_requests_and_says_nothing_without_them() -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, 400)
    alone = Sample((1,), np.array([0.3]))
    assert not estimate(alone).interval.is_known
    assert estimate(alone, exact=True).interval.low == 0.3
    found = estimate(Sample((1,), np.array([0.3]), 0.3 + noise[None])).interval
    assert found.high - found.value == pytest.approx(1.96 * noise.std(ddof=1), rel=1e-3)


def test_the_summary_gives_mean_and_median() -> None:
    found = estimate(Sample(SEEDS, np.array([1.0, 2.0, 6.0])))
    assert (found.mean, found.median, found.lowest, found.highest) == (3, 2, 1, 6)


def test_differences_are_paired_by_seed_and_by_resample() -> None:
    """Whatever seeds and requests do to both models alike must cancel."""
    rng = np.random.default_rng(1)
    luck, drawn = rng.normal(0, 10, 3), rng.normal(0, 10, 50)
    common = luck[:, None] + drawn
    one, other = Sample(SEEDS, luck, common), Sample(SEEDS[::-1], luck[::-1] + 1, common[::-1] + 1)
    found = combine({"a": one, "b": other}, lambda a, b: b - a)
    assert found is not None
    assert estimate(found).interval.low == pytest.approx(1)
    assert estimate(found).interval.high == pytest.approx(1)


def test_seeds_that_only_one_side_has_are_left_out() -> None:
    one, other = Sample((1, 2), np.array([1.0, 2])), Sample((2, 3), np.array([5.0, 9]))
    found = combine({"a": one, "b": other}, lambda a, b: b - a)
    assert found is not None
    assert (found.seeds, found.values.tolist()) == ((2,), [3.0])
    assert combine({"a": one, "b": other.at([3])}, lambda a, b: b - a) is None


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """Models with seed luck, judged on shared requests: 95 % intervals of the difference."""
    rng = np.random.default_rng(7)
    truth, hits, trials = 0.05, 0, 300
    for _ in range(trials):
        requests = rng.normal(0, 1, (60, 2))  # each model's luck with each request
        drawn = rng.integers(60, size=(100, 60))
        quality = rng.normal(0, 0.1, (3, 2)) + np.array([0, truth])
        values = quality + requests.mean(axis=0)
        resampled = quality[:, None] + requests[drawn].mean(axis=1)
        samples = {n: Sample(SEEDS, values[:, i], resampled[:, :, i]) for i, n in enumerate("ab")}
        found = combine(samples, lambda a, b: b - a)
        assert found is not None
        hits += not estimate(found).interval.excludes(truth)
    assert 0.92 <= hits / trials <= 0.99  # four standard errors below 95 %, and not far too wide


def test_resamples_of_real_scores_give_the_bootstrap_interval_of_one_seed() -> None:
    rng = np.random.default_rng(3)
    labels = (rng.uniform(size=400) < 0.3).astype(float)
    groups = np.repeat(np.arange(100), 4)
    scores = {n: labels * s + rng.normal(size=400) for n, s in (("a", 0.5), ("b", 1.0))}
    bootstrap = ClusterBootstrap(labels, groups=groups, num_samples=400, seed=0)
    trials = [
        Trial(
            name,
            1,
            {"id_auc": bootstrap.measure("auc", each)},
            {"id_auc": bootstrap.resample("auc", each)},
        )
        for name, each in scores.items()
    ]
    found = StudyResults(trials).contrast(parse_contrast("b:id_auc - a:id_auc"))
    assert found is not None
    ours, theirs = estimate(found).interval, bootstrap.paired("auc", scores["b"], scores["a"])
    assert ours.value == pytest.approx(theirs.value)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)


# --- claims -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("b", "outcome", "agrees"),
    [
        ([0.71, 0.72, 0.70], "held", True),
        ([0.61, 0.62, 0.60], "not shown", True),
        ([0.59, 0.60, 0.61], "not shown", False),
        ([0.51, 0.52, 0.50], "reversed", False),
    ],
)
def test_a_claim_is_held_reversed_or_not_shown(b: list[float], outcome: str, agrees: bool) -> None:
    study = make_study({"order": ["a", "b"]})
    (verdict,) = judge_orderings(study, results_of({"a": [0.60, 0.60, 0.61], "b": b}))
    assert (verdict.outcome, verdict.agrees_in_mean) == (outcome, agrees)


def test_one_seed_shows_no_claim_however_sure_its_requests_are() -> None:
    study = make_study({"order": ["a", "b"]})
    noise = np.random.default_rng(0).normal(0, 0.001, 50)

    def verdict(num_seeds: int) -> tuple[str, bool]:
        trials = (
            Trial(name, seed, {"id_auc": value}, {"id_auc": value + noise})
            for name, value in (("a", 0.6), ("b", 0.7))
            for seed in range(num_seeds)
        )
        (found,) = judge_orderings(study, StudyResults(trials))
        return found.outcome, found.agrees_in_mean

    assert verdict(1) == ("not shown", True)
    assert verdict(2) == ("held", True)


def test_a_chain_holds_only_if_every_step_does_and_fails_if_one_is_reversed() -> None:
    study = make_study({"order": ["a", "b", "c"]})
    steady = {"a": [0.1, 0.1, 0.11], "b": [0.2, 0.2, 0.21]}
    held = judge_orderings(study, results_of(steady | {"c": [0.3, 0.3, 0.31]}))[0]
    unsure = judge_orderings(study, results_of(steady | {"c": [0.1, 0.4, 0.2]}))[0]
    reverse = judge_orderings(study, results_of(steady | {"c": [0.15, 0.15, 0.16]}))[0]
    assert [v.outcome for v in (held, unsure, reverse)] == ["held", "not shown", "reversed"]
    assert [step.outcome for step in reverse.steps] == ["held", "reversed"]


def test_better_means_lower_for_a_loss_and_by_asks_for_a_distance() -> None:
    better = {"better": "a", "than": "b", "measure": "log_loss"}
    study = make_study(better, better | {"by": 0.2}, {"order": ["a", "b"], "measure": "log_loss"})
    results = results_of({"a": [0.3, 0.31, 0.3], "b": [0.4, 0.41, 0.4]}, "log_loss")
    verdicts = judge_orderings(study, results)
    assert [v.outcome for v in verdicts] == ["held", "reversed", "held"]


def test_a_share_of_a_gain_can_be_claimed() -> None:
    """S1.13: word embeddings alone bring less than 24 % of the gain."""
    study = make_study({"order": ["b - a", "0.24 * (c - a)"]})
    values = {"a": [0.5, 0.51, 0.5], "c": [0.7, 0.71, 0.7]}
    small, large = ([v + gain for v in values["a"]] for gain in (0.01, 0.1))
    outcomes = [
        judge_orderings(study, results_of(values | {"b": b}))[0].outcome for b in (small, large)
    ]
    assert outcomes == ["held", "reversed"]


def test_what_was_not_measured_is_said_so() -> None:
    study = make_study({"order": ["a", "b"]})
    (verdict,) = judge_orderings(study, results_of({"a": [0.1, 0.1, 0.1]}))
    assert verdict.outcome == "not measured"
    assert not verdict.agrees_in_mean


def test_a_ranking_is_compared_in_the_direction_of_the_measure_that_is_sure() -> None:
    study = make_study({"measure": "ood_auc", "agrees_with": "id_auc", "among": ["a", "b"]})

    def outcome(ood_gain: float, id_gain: float) -> str:
        trials = [
            Trial(cell, seed, {"ood_auc": luck + g * ood_gain, "id_auc": luck + g * id_gain})
            for seed, luck in zip(SEEDS, (0.5, 0.6, 0.4), strict=True)
            for g, cell in enumerate("ab")
        ]
        jitter = [Trial(t.cell, t.seed, {k: v + 1e-4 * t.seed * (t.cell == "a") for k, v in
                  t.measures.items()}) for t in trials]  # fmt: skip
        return judge_orderings(study, StudyResults(jitter))[0].outcome

    assert outcome(0.1, 0.1) == outcome(-0.1, -0.1) == "held"
    assert outcome(0.1, -0.1) == outcome(-0.1, 0.1) == "reversed"
    assert outcome(0.0002, 0.1) == "not shown"  # the leading measure does not know


def test_a_grid_is_judged_in_its_mean_or_at_each_value() -> None:
    claim = {"order": ["a", "b"]}
    grid = {"small": {"label": "S", "x": 1}, "large": {"label": "L", "x": 2}}
    gap = {"order": ["b@large - a@large", "b@small - a@small"]}
    study = make_study(claim, claim | {"at": "each"}, gap, each=grid)
    results = results_of(
        {
            "a@small": [0.1, 0.11, 0.1],
            "b@small": [0.3, 0.31, 0.3],
            "a@large": [0.5, 0.51, 0.5],
            "b@large": [0.4, 0.41, 0.4],
        }
    )
    mean, small, large, gap_shrinks = judge_orderings(study, results)
    assert mean.steps[0].difference.value == pytest.approx((0.2 - 0.1) / 2)
    assert (small.claim, small.outcome) == ("claim · S", "held")
    assert (large.claim, large.outcome) == ("claim · L", "reversed")
    assert gap_shrinks.steps[0].difference.value == pytest.approx(0.3)


@given(
    x=st.lists(st.integers(0, 50), min_size=3, max_size=8, unique=True),
    slope=st.floats(-3, 3),
    seed=st.integers(0, 99),
)
def test_straightness_is_the_squared_correlation(x: list[int], slope: float, seed: int) -> None:
    y = slope * np.array(x) + np.random.default_rng(seed).normal(size=len(x))
    expected = np.corrcoef(x, y)[0, 1] ** 2
    found = straightness(np.array(x, float), np.stack([y, 3 - 2 * y], axis=1))
    assert found == pytest.approx([expected, expected], abs=1e-9)


def test_a_straight_line_is_recognised_over_seeds() -> None:
    study = make_study({"measure": "core_seconds", "linear": ["a", "b", "c"]})
    straight = {"a": [1, 1.1, 1], "b": [3, 3.1, 3], "c": [5, 5, 5.1]}
    bent = straight | {"b": [1, 1.1, 1]}
    outcomes = [
        judge_orderings(study, results_of(values, "core_seconds"))[0].outcome
        for values in (straight, bent)
    ]
    assert outcomes == ["held", "reversed"]


# --- trial files --------------------------------------------------------------------------


def test_a_trial_read_back_is_the_trial_written(tmp_path: Path) -> None:
    folder = TrialFolder(tmp_path / "trials")
    trial = Trial(
        "kd@tiny", 2, {"id_auc": 0.5, "log_loss": np.nan}, {"id_auc": np.array([0.1])}, {"n": 1}
    )
    folder.write(trial, key="k")
    back = folder.read("kd@tiny", 2, key="k")
    assert back is not None
    assert back.measures["id_auc"] == 0.5
    assert np.isnan(back.measures["log_loss"])
    assert back.resamples["id_auc"].tolist() == [0.1]
    assert back.notes == {"n": 1}
    assert folder.read("kd@tiny", 2, key="other settings") is None
    assert folder.read("kd@tiny", 1, key="k") is None

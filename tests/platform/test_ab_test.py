"""A/B statistics against slow versions and against simulated tests that are looked at often."""

from collections.abc import Callable
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from driftline.platform import metrics
from driftline.platform.ab_test import (
    ArmSums,
    Estimate,
    boundary,
    compare,
    log_calibration,
    log_click_rate,
    normalised_entropy,
    rate_evidence,
)

Float64 = NDArray[np.float64]


class Market:
    """Keys with tastes of their own, who come back: rows of one key are alike."""

    def __init__(self, seed: int, *, num_rows: int, num_keys: int) -> None:
        random = np.random.default_rng(seed)
        taste = random.normal(0, 1.0, num_keys)
        self.keys = np.sort(random.integers(0, num_keys, num_rows))
        random.shuffle(self.keys)
        self.logits = -2.5 + taste[self.keys] + random.normal(0, 0.5, num_rows)
        self.in_canary = (random.random(num_keys) < 0.3)[self.keys]
        self.predicted = 1 / (1 + np.exp(-(self.logits + random.normal(0, 0.3, num_rows))))
        self.random = random

    def clicks(self, *, effect: float = 0.0) -> Float64:
        """Drawn anew; ``effect`` is added to the log-odds in the canary's arm."""
        chance = 1 / (1 + np.exp(-(self.logits + effect * self.in_canary)))
        return (self.random.random(len(chance)) < chance).astype(np.float64)

    def arms(self, clicks: Float64, *, until: int | None = None) -> list[ArmSums]:
        """Champion's and canary's sums over the first rows."""
        seen = slice(None, until)
        keys, inside = self.keys[seen], self.in_canary[seen]
        rows = (clicks[seen], self.predicted[seen], keys)
        return [ArmSums.of(*(part[mask] for part in rows)) for mask in (~inside, inside)]


# --- figures ------------------------------------------------------------------------------


def test_figures_are_those_of_the_rows() -> None:
    market = Market(1, num_rows=3_000, num_keys=200)
    clicks = market.clicks()
    found = compare(*market.arms(clicks), confidence=0.95)
    for arm, mask in enumerate((~market.in_canary, market.in_canary)):
        own = clicks[mask], market.predicted[mask]
        assert found.click_rates[arm].value == pytest.approx(own[0].mean())
        assert found.ne[arm].value == pytest.approx(metrics.normalised_entropy(*own))
        assert found.calibration[arm].value == pytest.approx(metrics.calibration_ratio(*own))
    rates = [interval.value for interval in found.click_rates]
    assert found.lift.value == pytest.approx(rates[1] / rates[0] - 1)
    assert found.ne_excess.value == pytest.approx(found.ne[1].value - found.ne[0].value)


@pytest.mark.parametrize("figure", [log_click_rate, log_calibration, normalised_entropy])
def test_the_variance_is_that_of_leaving_out_one_key_after_the_other(
    figure: Callable[[ArmSums], Estimate],
) -> None:
    market = Market(2, num_rows=4_000, num_keys=300)
    sums = market.arms(market.clicks())[0]
    columns = [sums.rows, sums.clicks, sums.predicted, sums.loss]
    num_keys = sums.num_keys
    without = [
        figure(ArmSums(*(np.delete(column, key) for column in columns))).value
        for key in range(num_keys)
    ]
    jackknife = (num_keys - 1) * np.var(without)
    assert figure(sums).variance == pytest.approx(jackknife, rel=0.05)


def test_rows_of_one_key_tell_less_than_rows_of_many() -> None:
    market = Market(3, num_rows=6_000, num_keys=100)
    clicks = market.clicks()
    by_key = log_click_rate(ArmSums.of(clicks, market.predicted, market.keys))
    by_row = log_click_rate(ArmSums.of(clicks, market.predicted, np.arange(6_000)))
    assert by_key.value == by_row.value
    assert by_key.variance > 2 * by_row.variance


@pytest.mark.parametrize("clicks", [[0.0, 0.0], [1.0, 1.0], []])
def test_rows_that_tell_nothing_give_no_number_and_no_error(clicks: list[float]) -> None:
    none = ArmSums.of(clicks, [0.5] * len(clicks), list(range(len(clicks))))
    found = compare(none, none, confidence=0.95)
    assert not found.ne_excess.is_known
    assert not found.lift.is_known or clicks == [1.0, 1.0]


# --- looking again and again --------------------------------------------------------------


def test_the_boundary_falls_towards_its_best_and_then_rises_slowly() -> None:
    widths = [boundary(num, alpha=0.05) for num in (10, 100, 1_000, 5_000, 50_000, 500_000)]
    best = widths.index(min(widths))
    assert widths[: best + 1] == sorted(widths[: best + 1], reverse=True)
    assert widths[best:] == sorted(widths[best:])
    assert 1.96 < min(widths) < 3.2
    assert max(widths[best:]) < 4.5
    assert boundary(5_000, alpha=0.01) > boundary(5_000, alpha=0.05)
    assert boundary(0, alpha=0.05) == np.inf


LOOKS = np.linspace(600, 8_000, 25).astype(int)


def ever_wrong(num_markets: int, *, effect: float = 0.0) -> tuple[int, int]:
    """Markets in which a look found a lift: with our interval, and with one for a single look."""
    ours = single = 0
    for seed in range(num_markets):
        market = Market(seed, num_rows=8_000, num_keys=1_500)
        clicks = market.clicks(effect=effect)
        found = naive = False
        for look in LOOKS:
            arms = market.arms(clicks, until=int(look))
            found |= compare(*arms, confidence=0.9).lift.excludes(0)
            rates = [log_click_rate(sums) for sums in arms]
            error = np.sqrt(rates[0].variance + rates[1].variance)
            naive |= bool(abs(rates[1].value - rates[0].value) > 1.645 * error)
        ours += found
        single += naive
    return ours, single


def test_without_a_difference_25_looks_seldom_find_one() -> None:
    num = 60
    ours, single = ever_wrong(num)
    assert ours <= num * 0.1 + 2.5 * np.sqrt(num * 0.1 * 0.9)
    assert single > 0.2 * num  # what stopping at the first look that pleases would do


def test_a_real_difference_is_found() -> None:
    ours, _ = ever_wrong(15, effect=0.8)
    assert ours >= 13


@pytest.mark.slow
def test_without_a_difference_25_looks_hold_their_promise_in_many_markets() -> None:
    num = 600
    ours, single = ever_wrong(num)
    assert ours <= num * 0.1 + 2.5 * np.sqrt(num * 0.1 * 0.9)
    assert single > 0.2 * num


@pytest.mark.slow
@pytest.mark.parametrize("effect", [0.0, 0.3])
def test_intervals_of_all_figures_cover_the_truth_at_every_look(effect: float) -> None:
    """The truth is what a hundred times as many rows give."""
    missed = {"lift": 0, "ne_excess": 0}
    large = Market(77, num_rows=800_000, num_keys=150_000)
    truth = compare(*large.arms(large.clicks(effect=effect)), confidence=0.9)
    num = 150
    for seed in range(num):
        market = Market(seed, num_rows=8_000, num_keys=1_500)
        clicks = market.clicks(effect=effect)
        outside = dict.fromkeys(missed, False)
        for look in LOOKS:
            found = compare(*market.arms(clicks, until=int(look)), confidence=0.9)
            for name in missed:
                interval, true = getattr(found, name), getattr(truth, name).value
                outside[name] |= not interval.low <= true <= interval.high
        for name, was in outside.items():
            missed[name] += was
    for count in missed.values():
        assert count <= num * 0.1 + 2.5 * np.sqrt(num * 0.1 * 0.9)


# --- rare events --------------------------------------------------------------------------


@pytest.mark.parametrize("allowed", [0.001, 0.01, 0.3])
@pytest.mark.parametrize("trials", [1, 7, 60])
def test_evidence_is_worth_one_on_average_at_the_allowed_rate(allowed: float, trials: int) -> None:
    """The property that makes it safe to look always, summed over all outcomes."""

    def mean(rate: float) -> float:
        chances = [
            comb(trials, x) * rate**x * (1 - rate) ** (trials - x) for x in range(trials + 1)
        ]
        values = [rate_evidence(x, trials, allowed=allowed) for x in range(trials + 1)]
        return float(np.dot(chances, values))

    assert mean(allowed) == pytest.approx(1)
    assert mean(allowed / 2) < 1


@given(events=st.integers(0, 50), more=st.integers(1, 2_000))
def test_evidence_grows_with_events_and_falls_with_trials(events: int, more: int) -> None:
    now = rate_evidence(events, events + more, allowed=0.01)
    assert rate_evidence(events + 1, events + 1 + more, allowed=0.01) > now
    assert rate_evidence(0, more + 1, allowed=0.01) < rate_evidence(0, more, allowed=0.01)


def test_a_bundle_that_always_fails_is_found_out_at_once_and_a_good_one_never() -> None:
    assert rate_evidence(3, 3, allowed=0.001) > 1e4
    assert rate_evidence(10, 10_000, allowed=0.001) < 2
    assert rate_evidence(100, 10_000, allowed=0.001) > 1e4
    assert np.isfinite(rate_evidence(10**6, 10**6, allowed=0.001))


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="alpha must lie between 0 and 1"):
        boundary(10, alpha=1.5)
    with pytest.raises(ValueError, match="allowed must lie between 0 and 1, got 0"):
        rate_evidence(0, 1, allowed=0)
    with pytest.raises(ValueError, match="between 0 and 3 trials, got 4"):
        rate_evidence(4, 3, allowed=0.1)

"""Statistics of an A/B test that is looked at again and again, on rows that belong together.

*Clusters.* Keys (users, sessions) are drawn into the arms, not impressions, and the rows of a key
are alike, so the key is the unit of chance. Every figure here is a ratio of sums over keys, or made
of such ratios, and gets its standard error from what each key contributes (the delta method; Deng,
Knoblich and Lu, "Applying the delta method in metric analytics", KDD 2018).

*Looks.* An interval that is right once is wrong sooner or later when one stops at the first look
that pleases. The intervals here hold at all looks together: asymptotic confidence sequences with
Robbins' normal mixture (Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas, "Time-uniform central
limit theory and asymptotic confidence sequences", Annals of Statistics 2024, theorem 2.2); the test
they amount to is the mixture SPRT of Johari, Koomen, Pekelis and Walsh ("Always valid inference",
Operations Research 2022). They are wider than an interval for a single look, by a factor of 1.5 or
so. *Asymptotic* means that the first look must not come too early: the caller sets a minimum. The
theorem is about keys that come one after the other; ours may come back and add to their sums, which
the tests simulate.

Rare events (errors, slow answers) are too few for that; :func:`rate_evidence` is exact.

Which to report: papers.md S0.37 asks for the click rate's lift, also on tail products.

Suffixes: N rows, K keys of one arm.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from driftline.platform.bootstrap import Interval
from driftline.platform.metrics import FloatArray, entropy, log_losses, roc_auc

TIGHTEST_AT_KEYS: Final = 5_000
"""Number of keys at which the mixture makes the intervals tightest; they hold at any."""
EXCESSES: Final = (1.5, 2.0, 4.0, 8.0, 16.0, 64.0, 256.0)
"""Multiples of the allowed rate that :func:`rate_evidence` looks out for."""

LARGEST_LOG: Final = 600.0
"""Beyond it, ``exp`` would overflow; what large means here, it says well enough."""


@dataclass(frozen=True)
class ArmSums:
    """What each key of one arm contributed: sums over its rows. ``[K]`` each.

    Enough for every figure of :class:`Comparison`, so rows need not be kept.
    """

    rows: FloatArray
    clicks: FloatArray
    predicted: FloatArray
    """Sum of predicted probabilities."""
    loss: FloatArray
    """Sum of log losses, in nats."""

    @classmethod
    def of(cls, labels: ArrayLike, probabilities: ArrayLike, keys: ArrayLike) -> "ArmSums":
        """Sum rows up by key.

        Args:
            labels: Clicks, 0/1. ``[N]``.
            probabilities: As served. ``[N]``.
            keys: What was drawn into the arm. ``[N]``.
        """
        labels_N = np.asarray(labels, np.float64)
        probabilities_N = np.asarray(probabilities, np.float64)
        places_N: NDArray[np.int64] = np.unique(np.asarray(keys), return_inverse=True)[1]

        def sums(values_N: FloatArray) -> FloatArray:
            return np.bincount(places_N, weights=values_N).astype(np.float64)

        return cls(
            rows=sums(np.ones_like(labels_N)),
            clicks=sums(labels_N),
            predicted=sums(probabilities_N),
            loss=sums(log_losses(labels_N, probabilities_N)),
        )

    @property
    def num_keys(self) -> int:
        """Keys that were drawn into the arm and showed up."""
        return len(self.rows)

    @property
    def num_rows(self) -> int:
        """Impressions."""
        return int(self.rows.sum())

    @property
    def num_clicks(self) -> int:
        """Clicks."""
        return int(self.clicks.sum())


@dataclass(frozen=True)
class Estimate:
    """A figure of one arm, and how far each key moves it. NaN where the rows cannot give it."""

    value: float
    influence: FloatArray
    """Centred; the figure's error is about the mean of these."""

    @property
    def variance(self) -> float:
        """Of the value."""
        num_keys = len(self.influence)
        if num_keys < 2:
            return float("nan")
        return float((self.influence**2).sum()) / (num_keys * (num_keys - 1))


@dataclass(frozen=True)
class Comparison:
    """Canary beside champion on the same kind of rows; see :func:`compare`."""

    click_rates: list[Interval]
    """Champion's and canary's."""
    lift: Interval
    """Canary's click rate / champion's - 1."""
    ne: list[Interval]
    """Normalised entropy, each on the arm's own rows and with their own click rate."""
    ne_excess: Interval
    """Canary's - champion's."""
    calibration: list[Interval]
    """Mean prediction / click rate."""


def compare(champion: ArmSums, canary: ArmSums, *, confidence: float) -> Comparison:
    """All figures, each with an interval that holds at every look.

    Args:
        champion: Sums of the champion's arm.
        canary: The same for the canary's.
        confidence: Of each interval by itself, over all looks together, e.g. 0.95.
    """
    arms = (champion, canary)
    width = boundary(champion.num_keys + canary.num_keys, alpha=1 - confidence)
    rates = [log_click_rate(sums) for sums in arms]
    ne = [normalised_entropy(sums) for sums in arms]
    levels = [log_calibration(sums) for sums in arms]
    return Comparison(
        click_rates=[_exponential(interval) for interval in _alone(rates, confidence)],
        lift=_exponential(_difference(rates, width), less=1.0),
        ne=_alone(ne, confidence),
        ne_excess=_difference(ne, width),
        calibration=[_exponential(interval) for interval in _alone(levels, confidence)],
    )


def boundary(num_keys: int, *, alpha: float, tightest_at: int = TIGHTEST_AT_KEYS) -> float:
    """Half the width of a confidence sequence after so many keys, in standard errors.

    ``sqrt(2 (n r + 1) / (n r) * log(sqrt(n r + 1) / alpha))`` with ``r`` the variance of the
    mixture, chosen to be tightest at ``tightest_at`` keys (appendix B.2 of Waudby-Smith et al.).
    Infinite without keys.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie between 0 and 1, got {alpha}")
    if num_keys < 1:
        return float("inf")
    spread = (-2 * np.log(alpha) + np.log(1 - 2 * np.log(alpha))) / tightest_at
    scaled = num_keys * spread
    return float(np.sqrt(2 * (scaled + 1) / scaled * np.log(np.sqrt(scaled + 1) / alpha)))


def rate_evidence(events: int, trials: int, *, allowed: float) -> float:
    """Evidence that events are more frequent than allowed; act when it exceeds 1 / alpha.

    An e-value: whatever the true rate up to ``allowed``, the chance that it *ever* exceeds
    ``1 / alpha``, over all looks, is at most alpha (Ville). It is the mean likelihood ratio against
    the rates ``allowed`` x ``EXCESSES`` (a mixture SPRT; Ramdas, Gruenwald, Vovk and Shafer,
    "Game-theoretic statistics and safe anytime-valid inference", 2023). Exact for any number of
    trials, unlike an interval that leans on the normal law.

    Args:
        events: Errors, or answers that were too slow.
        trials: Requests.
        allowed: Largest rate that is in order, between 0 and 1.
    """
    if not 0 < allowed < 1:
        raise ValueError(f"allowed must lie between 0 and 1, got {allowed}")
    if not 0 <= events <= trials:
        raise ValueError(f"events must lie between 0 and {trials} trials, got {events}")
    rates = np.array([min(allowed * times, (1 + allowed) / 2) for times in EXCESSES])
    logs = events * np.log(rates / allowed)
    logs += (trials - events) * np.log((1 - rates) / (1 - allowed))
    largest = float(logs.max())
    return float(np.exp(min(largest, LARGEST_LOG)) * np.exp(logs - largest).mean())


# --- figures of one arm -------------------------------------------------------------------


def log_click_rate(sums: ArmSums) -> Estimate:
    """Logarithm of the click rate, whose error is nearer to normal than the rate's."""
    return _log_ratio(sums.clicks, sums.rows)


def log_calibration(sums: ArmSums) -> Estimate:
    """Logarithm of mean prediction / click rate."""
    return _log_ratio(sums.predicted, sums.clicks)


def normalised_entropy(sums: ArmSums) -> Estimate:
    """Log loss / entropy of the arm's own click rate.

    With ``L`` the mean loss, ``p`` the click rate and ``H`` its entropy, a key that adds ``l`` of
    loss and ``s`` clicks in ``m`` rows moves ``L / H`` by
    ``((l - L m) - L / H * log((1 - p) / p) (s - p m)) / (H * mean m)``.
    """
    rows = sums.num_rows
    rate = sums.num_clicks / rows if rows else 0.0
    if not 0 < rate < 1:
        return _unknown(sums.num_keys)
    loss = float(sums.loss.sum()) / rows
    height = float(entropy(rate))
    ne = loss / height
    moved = (sums.loss - loss * sums.rows) - ne * np.log((1 - rate) / rate) * (
        sums.clicks - rate * sums.rows
    )
    return Estimate(ne, moved / (height * rows / sums.num_keys))


def auc(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Of the rows as served, for information: no sum over keys, so no interval for all looks."""
    return roc_auc(labels, probabilities)


def _log_ratio(numerator_K: FloatArray, denominator_K: FloatArray) -> Estimate:
    top, bottom = float(numerator_K.sum()), float(denominator_K.sum())
    if top <= 0 or bottom <= 0:
        return _unknown(len(numerator_K))
    num_keys = len(numerator_K)
    moved = num_keys * (numerator_K / top - denominator_K / bottom)
    return Estimate(float(np.log(top / bottom)), moved)


def _unknown(num_keys: int) -> Estimate:
    return Estimate(float("nan"), np.full(num_keys, np.nan))


# --- intervals ----------------------------------------------------------------------------


def _difference(estimates: list[Estimate], width: float) -> Interval:
    """Canary minus champion. The arms hold different keys, so their variances add."""
    champion, canary = estimates
    value = canary.value - champion.value
    half = width * float(np.sqrt(champion.variance + canary.variance))
    return Interval(value, value - half, value + half)


def _alone(estimates: list[Estimate], confidence: float) -> list[Interval]:
    """Each arm by itself, over its own keys."""
    intervals = []
    for estimate in estimates:
        width = boundary(len(estimate.influence), alpha=1 - confidence)
        half = width * float(np.sqrt(estimate.variance))
        intervals.append(Interval(estimate.value, estimate.value - half, estimate.value + half))
    return intervals


def _exponential(interval: Interval, *, less: float = 0.0) -> Interval:
    """The interval of ``exp(x) - less``."""
    ends = np.minimum([interval.value, interval.low, interval.high], LARGEST_LOG)
    value, low, high = (np.exp(ends) - less).tolist()
    return Interval(value, low, high)

"""Intervals by resampling whole requests, fast enough to be drawn after every refresh.

Ads shown together share a page, a moment and a user, so rows are not independent; requests nearly
are. A *resample* draws as many requests as there are, with replacement: request k then counts
``w[k]`` times. Every measure is computed from those weights, without copying rows: AUC from one
sort per model, the others from sums per request. One ``ClusterBootstrap`` gives every model the
same resamples, so differences of its results are *paired*: they see the same luck.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from driftline.platform.metrics import (
    FloatArray,
    auc_by_group,
    calibration_ratio,
    entropy,
    log_losses,
    mean_auc_by_group,
    normalised_entropy,
    roc_auc,
)

Metric = Literal["auc", "mean_auc", "ne", "calibration"]

WEIGHTS_AT_ONCE = 2_000_000
"""Rows times resamples held in memory together."""
WEIGHTS_KEPT = 4_000_000
"""Clusters times resamples up to which the weights are drawn once and kept."""


@dataclass(frozen=True)
class Interval:
    """A measured value with its percentile interval; NaN bounds mean "too little to say"."""

    value: float
    low: float
    high: float

    @property
    def difference(self) -> float:
        """The value, for an interval of a difference."""
        return self.value

    @property
    def is_known(self) -> bool:
        """Whether the rows could tell."""
        return bool(np.isfinite([self.value, self.low, self.high]).all())

    def excludes(self, number: float) -> bool:
        """Whether the whole interval lies on one side of ``number``."""
        return self.low > number or self.high < number

    def to_json(self) -> dict[str, float | None]:
        """Value and bounds; NaN, which JSON lacks, becomes null."""
        return {name: json_number(value) for name, value in vars(self).items()}


class ClusterBootstrap:
    """The same resamples of clusters (requests) for any number of models and measures.

    Args:
        labels: Clicks, 0/1. ``[N]``.
        groups: Cluster of each row; each row is its own when not given. ``[N]``.
        num_samples: Resamples; 200 to see, 500 to publish.
        seed: The same seed gives the same resamples.
    """

    def __init__(
        self,
        labels: ArrayLike,
        *,
        groups: ArrayLike | None = None,
        num_samples: int,
        seed: int,
    ) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        self.labels_N = np.asarray(labels, dtype=np.float64)
        num_rows = len(self.labels_N)
        if groups is None:
            self.codes_N = np.arange(num_rows)
        else:
            self.codes_N = np.unique(np.asarray(groups), return_inverse=True)[1]
        if len(self.codes_N) != num_rows:
            raise ValueError(f"groups must have {num_rows} rows, got {len(self.codes_N)}")
        self.num_clusters = int(self.codes_N.max()) + 1 if num_rows else 0
        self.num_samples = num_samples
        self.seed = seed
        self._kept: list[NDArray[np.int32]] | None = None

    def measure(self, metric: Metric, predictions: ArrayLike) -> float:
        """The measure on the rows as they are."""
        match metric:
            case "auc":
                return roc_auc(self.labels_N, predictions)
            case "mean_auc":
                return mean_auc_by_group(self.labels_N, predictions, self.codes_N)
            case "ne":
                return normalised_entropy(self.labels_N, predictions)
            case "calibration":
                return calibration_ratio(self.labels_N, predictions)

    def resample(self, metric: Metric, predictions: ArrayLike) -> FloatArray:
        """The measure on every resample, NaN where a resample has one class only. ``[S]``."""
        if not self.num_clusters:
            return np.full(self.num_samples, np.nan)
        match metric:
            case "auc":
                return self._resample_auc(np.asarray(predictions, dtype=np.float64))
            case "mean_auc":
                values = auc_by_group(self.labels_N, predictions, self.codes_N)
                known = np.isfinite(values)
                return self._ratio_of_sums(np.where(known, values, 0), known)
            case "ne":
                return self._resample_ne(log_losses(self.labels_N, predictions))
            case "calibration":
                predicted = self._sum(np.asarray(predictions, dtype=np.float64))
                return self._ratio_of_sums(predicted, self._sum(self.labels_N))

    def interval(self, metric: Metric, predictions: ArrayLike) -> Interval:
        """The measure of one model with its 95 % interval."""
        samples = self.resample(metric, predictions)
        return percentile_interval(self.measure(metric, predictions), samples)

    def paired(self, metric: Metric, first: ArrayLike, second: ArrayLike) -> Interval:
        """First model minus second with its 95 % interval."""
        samples = self.resample(metric, first) - self.resample(metric, second)
        value = self.measure(metric, first) - self.measure(metric, second)
        return percentile_interval(value, samples)

    # --- how ------------------------------------------------------------------------------

    def _weights(self) -> Iterator[NDArray[np.int32]]:
        """How often each cluster is drawn, some resamples at a time. ``[*, K]``."""
        if self.num_clusters * self.num_samples > WEIGHTS_KEPT:
            return self._draw()
        if self._kept is None:
            self._kept = list(self._draw())
        return iter(self._kept)

    def _draw(self) -> Iterator[NDArray[np.int32]]:
        rng = np.random.default_rng(self.seed)
        at_once = max(1, WEIGHTS_AT_ONCE // max(1, len(self.labels_N)))
        for start in range(0, self.num_samples, at_once):
            count = min(at_once, self.num_samples - start)
            drawn = rng.integers(self.num_clusters, size=(count, self.num_clusters))
            drawn += np.arange(count)[:, None] * self.num_clusters
            weights = np.bincount(drawn.ravel(), minlength=count * self.num_clusters)
            yield weights.reshape(count, self.num_clusters).astype(np.int32)

    def _sum(self, values_N: FloatArray) -> FloatArray:
        sums = np.bincount(self.codes_N, weights=values_N, minlength=self.num_clusters)
        return sums.astype(np.float64)

    def _ratio_of_sums(self, numerator_K: ArrayLike, denominator_K: ArrayLike) -> FloatArray:
        both_K2 = np.column_stack([numerator_K, denominator_K]).astype(np.float64)
        sums_S2 = np.concatenate([weights @ both_K2 for weights in self._weights()])
        return _divide(sums_S2[:, 0], sums_S2[:, 1])

    def _resample_ne(self, losses_N: FloatArray) -> FloatArray:
        rows = self._sum(np.ones_like(losses_N))
        sums_K3 = np.column_stack([self._sum(losses_N), self._sum(self.labels_N), rows])
        losses, clicks, rows = np.concatenate([w @ sums_K3 for w in self._weights()]).T
        return _divide(losses / rows, entropy(clicks / rows))

    def _resample_auc(self, scores_N: FloatArray) -> FloatArray:
        """Sort once; then a resample is one running sum over the non-clicks.

        With ``below(s)`` the weight of non-clicks under s, the wins of a click at s are the mean
        of ``below(s)`` taken strictly and with ties.
        """
        clicked = self.labels_N == 1
        order = np.argsort(scores_N[~clicked], kind="stable")
        misses = self.codes_N[~clicked][order]
        missed_scores = scores_N[~clicked][order]
        clicks, scores = self.codes_N[clicked], scores_N[clicked]
        strictly = np.searchsorted(missed_scores, scores, side="left")
        with_ties = np.searchsorted(missed_scores, scores, side="right")
        samples = []
        for weights in self._weights():
            running = np.zeros((len(weights), len(misses) + 1), dtype=np.int32)
            np.cumsum(np.take(weights, misses, axis=1), axis=1, out=running[:, 1:])
            won = (running[:, strictly] + running[:, with_ties]).astype(np.float64)
            drawn = weights[:, clicks].astype(np.float64)
            wins = np.einsum("sn,sn->s", won, drawn) / 2
            samples.append(_divide(wins, drawn.sum(axis=1) * running[:, -1]))
        return np.concatenate(samples)


def paired_bootstrap(
    labels: ArrayLike,
    first: ArrayLike,
    second: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    metric: Metric = "auc",
    num_samples: int,
    seed: int,
) -> Interval:
    """Difference of a measure, first model minus second, with its 95 % interval.

    Requests (``groups``) are resampled whole. Use ``ClusterBootstrap`` for several models or
    measures on the same rows.
    """
    bootstrap = ClusterBootstrap(labels, groups=groups, num_samples=num_samples, seed=seed)
    return bootstrap.paired(metric, first, second)


def json_number(value: float | None) -> float | None:
    """The number, or null where there is none."""
    return None if value is None or not np.isfinite(value) else float(value)


def percentile_interval(value: float, samples: FloatArray) -> Interval:
    """The central 95 % of the resamples; NaN bounds when over half of them say nothing."""
    known = samples[np.isfinite(samples)]
    if not np.isfinite(value) or 2 * len(known) < len(samples) or not len(known):
        return Interval(value=value, low=float("nan"), high=float("nan"))
    low, high = np.quantile(known, [0.025, 0.975])
    return Interval(value=value, low=float(low), high=float(high))


def _divide(numerator: FloatArray, denominator: FloatArray) -> FloatArray:
    result = np.full(len(numerator), np.nan)
    return np.divide(numerator, denominator, out=result, where=denominator > 0)

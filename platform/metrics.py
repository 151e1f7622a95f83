"""How good predictions are: ranking (AUC), fit (log loss, NE), level (calibration).

Labels are 0/1 (or booleans), probabilities lie in [0, 1], scores are any finite numbers; all are
one-dimensional and of one length. A measure that the rows cannot give, such as AUC without a
click, is NaN and never an error: hours without clicks are a fact of life. Intervals are in
``bootstrap.py``.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]

SMALLEST_PROBABILITY = 1e-12
"""Log loss takes no probability for more extreme than this, so that one row cannot make it inf."""


# --- ranking ------------------------------------------------------------------------------


def roc_auc(labels: ArrayLike, scores: ArrayLike, *, weights: ArrayLike | None = None) -> float:
    """Probability that a click outranks a non-click; ties count one half (papers.md S0.27).

    Raises:
        ValueError: lengths differ, or a value is not finite, or a label is neither 0 nor 1.
    """
    labels_N, scores_N = _checked(labels, scores)
    _check_binary(labels_N)
    weights_N = np.ones_like(labels_N) if weights is None else _checked(weights, scores_N)[0]
    return _weighted_auc(scores_N, labels_N * weights_N, (1 - labels_N) * weights_N)


def soft_auc(scores: ArrayLike, soft_labels: ArrayLike) -> float:
    """AUC against labels in [0, 1]: a row is a click by p and a non-click by 1 - p.

    Every row enters twice, so it also meets itself, as a tie; with hard labels this is
    ``roc_auc``. The teacher's soft labels on recent data are the paper's "ID soft" column.

    Source: papers.md S0.29, fixture T.3.

    Raises:
        ValueError: lengths differ, a value is not finite, or a label lies outside [0, 1].
    """
    labels_N, scores_N = _checked(soft_labels, scores)
    _check_unit(labels_N, "soft label")
    return _weighted_auc(scores_N, labels_N, 1 - labels_N)


def auc_by_group(labels: ArrayLike, scores: ArrayLike, groups: ArrayLike) -> FloatArray:
    """AUC within each group, in order of the sorted distinct groups; NaN where one class lacks."""
    labels_N, scores_N = _checked(labels, scores)
    _check_binary(labels_N)
    names, codes_N = np.unique(np.asarray(groups), return_inverse=True)
    if len(codes_N) != len(labels_N):
        raise ValueError(f"groups must have {len(labels_N)} rows like the labels")
    if not len(labels_N):
        return np.empty(0)
    order = np.lexsort((scores_N, codes_N))
    codes, values, clicks = codes_N[order], scores_N[order], labels_N[order]
    new_tie = np.r_[True, (np.diff(codes) != 0) | (np.diff(values) != 0)]
    ties = np.cumsum(new_tie) - 1
    tie_starts = np.flatnonzero(new_tie)
    misses_before = np.cumsum(1 - clicks) - (1 - clicks)  # over all groups
    misses_in_tie = np.bincount(ties, weights=1 - clicks)
    group_starts = np.flatnonzero(np.r_[True, np.diff(codes) != 0])
    beaten = misses_before[tie_starts][ties] - misses_before[group_starts][codes]
    beaten = beaten + misses_in_tie[ties] / 2
    won = np.bincount(codes, weights=clicks * beaten, minlength=len(names))
    num_clicks = np.bincount(codes, weights=clicks, minlength=len(names))
    pairs = num_clicks * (np.bincount(codes, minlength=len(names)) - num_clicks)
    return np.divide(won, pairs, out=np.full(len(names), np.nan), where=pairs > 0)


def mean_auc_by_group(labels: ArrayLike, scores: ArrayLike, groups: ArrayLike) -> float:
    """Mean AUC over the groups (requests) that hold a click and a non-click; NaN if none does."""
    values = auc_by_group(labels, scores, groups)
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


@dataclass(frozen=True)
class RelativeDelta:
    """How one AUC compares with a baseline's (papers.md S0.28)."""

    percent: float
    """100 (AUC / AUC of the baseline - 1), the paper's figure."""
    points: float
    """100 (AUC - AUC of the baseline)."""
    improvement_percent: float
    """RelaImpr: the same as ``percent`` after 0.5, the AUC of a coin, is taken off both."""


def relative_delta(auc: float, *, baseline: float) -> RelativeDelta:
    """Compare an AUC with the baseline's on the same rows."""
    above_coin = baseline - 0.5
    return RelativeDelta(
        percent=100 * (auc / baseline - 1) if baseline else float("nan"),
        points=100 * (auc - baseline),
        improvement_percent=100 * ((auc - 0.5) / above_coin - 1) if above_coin else float("nan"),
    )


# --- fit and level ------------------------------------------------------------------------


def log_losses(labels: ArrayLike, probabilities: ArrayLike) -> FloatArray:
    """Negative log-likelihood of each row, in nats. Labels may be soft."""
    labels_N, probabilities_N = _checked(labels, probabilities)
    _check_unit(labels_N, "label")
    _check_unit(probabilities_N, "probability")
    p = np.clip(probabilities_N, SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY)
    return np.asarray(-(labels_N * np.log(p) + (1 - labels_N) * np.log1p(-p)))


def log_loss(
    labels: ArrayLike, probabilities: ArrayLike, *, weights: ArrayLike | None = None
) -> float:
    """Mean negative log-likelihood in nats; NaN without rows."""
    losses = log_losses(labels, probabilities)
    weights_N = np.ones_like(losses) if weights is None else _checked(weights, losses)[0]
    return _ratio(float(weights_N @ losses), float(weights_N.sum()))


def entropy(rate: ArrayLike) -> FloatArray:
    """Entropy in nats of a click that happens with this probability; 0 at 0 and at 1."""
    rates = np.asarray(rate, dtype=np.float64)
    inside = (rates > 0) & (rates < 1)
    p = np.where(inside, rates, 0.5)
    return np.where(inside, -(p * np.log(p) + (1 - p) * np.log1p(-p)), 0.0)


def normalised_entropy(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Log loss divided by the entropy of these rows' own click rate (NE).

    1 is as good as always predicting the click rate; lower is better. NaN with one class only.
    """
    labels_N = np.asarray(labels, dtype=np.float64)
    loss = log_loss(labels_N, probabilities)
    return _ratio(loss, float(entropy(labels_N.mean())) if len(labels_N) else 0.0)


def calibration_ratio(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Predicted clicks per click: above 1 promises too much. NaN without a click."""
    labels_N, probabilities_N = _checked(labels, probabilities)
    return _ratio(float(probabilities_N.sum()), float(labels_N.sum()))


def expected_calibration_error(
    labels: ArrayLike, probabilities: ArrayLike, *, num_bins: int = 15
) -> float:
    """Mean gap between prediction and click rate, over bins of equally many rows (ECE).

    Rows are cut into bins in order of their prediction; each bin counts by its rows. Bins of equal
    width would put nearly all rows of a click model into the first. NaN without rows.

    Raises:
        ValueError: lengths differ, or a label or a probability lies outside [0, 1].
    """
    labels_N, probabilities_N = _checked(labels, probabilities)
    _check_unit(labels_N, "label")
    _check_unit(probabilities_N, "probability")
    order = np.argsort(probabilities_N, kind="stable")
    gaps = (probabilities_N - labels_N)[order]
    total = sum(abs(float(part.sum())) for part in np.array_split(gaps, num_bins))
    return _ratio(total, float(len(gaps)))


# --- from the training prior to the market's ----------------------------------------------


def prior_correct(probabilities: ArrayLike, *, keep_rate: float) -> FloatArray:
    """Undo the thinning of non-clicks: q / (q + (1 - q) / w) (papers.md S0.25, fixture T.2).

    Args:
        probabilities: What a model says that was trained with a share ``keep_rate`` of the
            non-clicks and all clicks.
        keep_rate: Share of non-clicks that was kept, in (0, 1].
    """
    q = np.asarray(probabilities, dtype=np.float64)
    return q / (q + (1 - q) / _check_keep_rate(keep_rate))


def prior_correct_logits(logits: ArrayLike, *, keep_rate: float) -> FloatArray:
    """The same on the log-odds, where it is one addition: logit + log w."""
    return np.asarray(logits, dtype=np.float64) + np.log(_check_keep_rate(keep_rate))


def sigmoid(logits: ArrayLike) -> FloatArray:
    """Probability of log-odds, without overflow."""
    z = np.asarray(logits, dtype=np.float64)
    small = np.exp(-np.abs(z))
    return np.where(z >= 0, 1 / (1 + small), small / (1 + small))


def logit(probabilities: ArrayLike) -> FloatArray:
    """Log-odds, finite also at 0 and 1 (see ``SMALLEST_PROBABILITY``)."""
    p = np.asarray(probabilities, dtype=np.float64)
    p = np.clip(p, SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY)
    return np.log(p) - np.log1p(-p)


@dataclass(frozen=True)
class Platt:
    """Calibration of log-odds by a straight line."""

    slope: float = 1.0
    intercept: float = 0.0

    def __call__(self, logits: ArrayLike) -> FloatArray:
        """Calibrated log-odds."""
        return self.slope * np.asarray(logits, dtype=np.float64) + self.intercept


def fit_platt(labels: ArrayLike, logits: ArrayLike, *, prior_strength: float = 1.0) -> Platt:
    """Fit slope and intercept by logistic regression of the click on the log-odds.

    Without a prior, rows of one class or perfectly ranked rows would drive the line to infinity;
    a penalty ``prior_strength / 2 * ((slope - 1)^2 + intercept^2)`` holds it near "no change" and
    is forgotten as rows come in. No rows give the identity.

    Args:
        labels: Clicks, or soft labels in [0, 1].
        logits: Log-odds on the prior that shall be calibrated (the market's, so correct first).
        prior_strength: In units of log-likelihood; 1 is worth a handful of clicks.
    """
    labels_N, logits_N = _checked(labels, logits)
    _check_unit(labels_N, "label")
    if prior_strength <= 0:
        raise ValueError(f"prior_strength must be positive, got {prior_strength}")
    inputs_N2 = np.column_stack([logits_N, np.ones_like(logits_N)])
    identity = np.array([1.0, 0.0])

    def cost(line: FloatArray) -> float:
        z = inputs_N2 @ line
        likelihood = np.logaddexp(0, z).sum() - labels_N @ z
        return float(likelihood + prior_strength / 2 * ((line - identity) ** 2).sum())

    line = identity
    for _ in range(50):  # Newton with step halving; strictly convex, a few steps are enough
        p = sigmoid(inputs_N2 @ line)
        gradient = inputs_N2.T @ (p - labels_N) + prior_strength * (line - identity)
        curvature = (inputs_N2.T * (p * (1 - p))) @ inputs_N2 + prior_strength * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        before, size = cost(line), 1.0
        while size > 1e-6 and cost(line - size * step) > before:
            size /= 2
        line = line - size * step
        if np.abs(step).max() < 1e-10:
            break
    return Platt(slope=float(line[0]), intercept=float(line[1]))


# --- arithmetic and checks ----------------------------------------------------------------


def _weighted_auc(scores_N: FloatArray, positive_N: FloatArray, negative_N: FloatArray) -> float:
    """AUC where row i counts as ``positive_N[i]`` clicks and ``negative_N[i]`` non-clicks."""
    _, ties_N = np.unique(scores_N, return_inverse=True)
    positive = np.bincount(ties_N, weights=positive_N)
    negative = np.bincount(ties_N, weights=negative_N)
    below = np.cumsum(negative) - negative
    return _ratio(float(positive @ (below + negative / 2)), float(positive.sum() * negative.sum()))


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else float("nan")


def _checked(first: ArrayLike, second: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Both as finite vectors of one length."""
    pair = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if pair[0].ndim != 1 or pair[0].shape != pair[1].shape:
        raise ValueError(f"need two vectors of one length, got {pair[0].shape}, {pair[1].shape}")
    for values in pair:
        if not np.isfinite(values).all():
            row = int(np.flatnonzero(~np.isfinite(values))[0])
            raise ValueError(f"values must be finite, got {values[row]} in row {row}")
    return pair


def _check_binary(labels_N: FloatArray) -> None:
    wrong = (labels_N != 0) & (labels_N != 1)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise ValueError(f"labels must be 0 or 1, got {labels_N[row]} in row {row}")


def _check_unit(values_N: FloatArray, name: str) -> None:
    wrong = (values_N < 0) | (values_N > 1)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise ValueError(f"{name} must lie in [0, 1], got {values_N[row]} in row {row}")


def _check_keep_rate(keep_rate: float) -> float:
    if not 0 < keep_rate <= 1:
        raise ValueError(f"keep_rate must lie in (0, 1], got {keep_rate}")
    return keep_rate

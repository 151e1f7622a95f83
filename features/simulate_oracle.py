"""How well the true click probabilities rank the clicks: the ceiling of every model."""

from collections import defaultdict
from typing import Any, Final

import numpy as np

from driftline.features.simulate_market import Floats

Counts = np.ndarray[Any, np.dtype[np.int64]]

NUM_BINS: Final = 65_536
LOGIT_RANGE: Final = (-16.0, 16.0)


class OracleTally:
    """Counts rows and clicks by log-odds in narrow bins, so memory does not grow with the log."""

    def __init__(self) -> None:
        self._rows: dict[int, Counts] = defaultdict(_no_counts)
        self._clicks: dict[int, Counts] = defaultdict(_no_counts)
        self._loss = 0.0

    def add(self, day: int, logits: Floats, clicked: np.ndarray[Any, np.dtype[np.bool_]]) -> None:
        """Count some rows of a day, with their true log-odds."""
        low, high = LOGIT_RANGE
        bins = ((logits - low) * (NUM_BINS / (high - low))).astype(np.int64)
        bins = np.clip(bins, 0, NUM_BINS - 1)
        self._rows[day] += np.bincount(bins, minlength=NUM_BINS)
        self._clicks[day] += np.bincount(bins[clicked], minlength=NUM_BINS)
        self._loss += float(np.logaddexp(0, np.where(clicked, -logits, logits)).sum())

    @property
    def num_rows(self) -> int:
        """Rows counted."""
        return int(sum(counts.sum() for counts in self._rows.values()))

    @property
    def num_clicks(self) -> int:
        """Clicks counted."""
        return int(sum(counts.sum() for counts in self._clicks.values()))

    def auc(self) -> float:
        """AUC over all days; rows of one bin count as ties. NaN without a click or a non-click."""
        return _auc(
            sum(self._rows.values(), _no_counts()), sum(self._clicks.values(), _no_counts())
        )

    def auc_by_day(self) -> dict[int, float]:
        """The same for each day."""
        return {day: _auc(rows, self._clicks[day]) for day, rows in sorted(self._rows.items())}

    def log_loss(self) -> float:
        """Mean negative log-likelihood of the clicks, in nats."""
        return self._loss / self.num_rows


def _no_counts() -> Counts:
    return np.zeros(NUM_BINS, dtype=np.int64)


def _auc(rows: Counts, clicks: Counts) -> float:
    others = rows - clicks
    below = np.cumsum(others) - others
    pairs = float(clicks.sum()) * float(others.sum())
    return float((clicks * (below + 0.5 * others)).sum() / pairs) if pairs else float("nan")

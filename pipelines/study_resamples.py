"""What the choice of test requests does to the measures of one model.

Every trial of a study resamples the same requests in the same way, so differences of trials are
paired resample by resample. Measures without a quick resampling (calibration error, accuracy of
masked words) have none; their intervals rest on the seeds alone.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from driftline.pipelines.laboratory import Laboratory
from driftline.pipelines.strategy import TrainedStudent
from driftline.pipelines.strategy_measures import MAX_SOFT_ROWS, TestRows, TestSets
from driftline.pipelines.student_forms import StudentForm
from driftline.platform.bootstrap import ClusterBootstrap
from driftline.platform.metrics import FloatArray, log_losses

Resamples = dict[str, FloatArray]


@dataclass
class StudyRows(TestRows):
    """Test rows that remember what a student said about them: measuring asks more than once."""

    def __post_init__(self) -> None:
        self._said: dict[tuple[Path, ...], FloatArray] = {}

    def probabilities(self, form: StudentForm, *weights: Path) -> FloatArray:
        """See ``TestRows``; computed once for each set of weights."""
        if weights not in self._said:
            self._said[weights] = super().probabilities(form, *weights)
        return self._said[weights]


@dataclass
class StudyTests(TestSets):
    """The test rows of a study."""

    laboratory: Laboratory

    @cached_property
    def ood(self) -> TestRows:
        """Of the stale window."""
        return StudyRows(self.laboratory, "ood", self.laboratory.ood_test)

    def slice(self, number: int) -> TestRows:
        """A slice after ``as_of``, by number."""
        window = self.laboratory.next_window(number)
        return StudyRows(self.laboratory, f"slice {window}", self.laboratory.next_slice(number))


@dataclass(frozen=True)
class Luck:
    """Resampled requests of a study's test rows."""

    tests: TestSets
    num_samples: int
    seed: int = 0

    def of_student(self, student: TrainedStudent) -> Resamples:
        """Resamples of what ``measure_student`` measures, by the same names."""
        form, tests = student.form, self.tests
        found = self._on_next(tests.next.probabilities(form, *student.files))
        found["ood_auc"] = self._auc(tests.ood, tests.ood.probabilities(form, *student.files))
        if student.distilled:
            before = self._on_next(tests.next.probabilities(form, *student.distilled))
            found |= {f"distilled_{n}": before[n] for n in ("id_auc", "id_soft_auc")}
            on_ood = tests.ood.probabilities(form, *student.distilled)
            found["distilled_ood_auc"] = self._auc(tests.ood, on_ood)
        return found

    def of_teacher(self) -> Resamples:
        """Resamples of what ``measure_teacher`` measures."""
        found = self._on_next(self.tests.next.teacher)
        found["ood_auc"] = self._auc(self.tests.ood, self.tests.ood.teacher)
        return found | {"distilled_ood_auc": found["ood_auc"]}

    def _auc(self, rows: TestRows, p_N: FloatArray) -> FloatArray:
        return self._bootstrap(rows).resample("auc", p_N)

    def _on_next(self, p_N: FloatArray) -> Resamples:
        rows = self.tests.next
        bootstrap = self._bootstrap(rows)
        found = {
            "id_auc": bootstrap.resample("auc", p_N),
            "normalised_entropy": bootstrap.resample("ne", p_N),
            "log_loss": resample_mean(
                log_losses(rows.clicked, p_N), self._draw(rows), requests=_codes(rows)
            ),
        }
        for name, mask_N in rows.slices.items():
            part = ClusterBootstrap(
                rows.clicked[mask_N],
                groups=rows.requests[mask_N],
                num_samples=self.num_samples,
                seed=self.seed,
            )
            found[f"{name}_auc"] = part.resample("auc", p_N[mask_N])
        first = slice(0, MAX_SOFT_ROWS)
        found["id_soft_auc"] = resample_soft_auc(
            p_N[first], rows.teacher[first], self._draw(rows), requests=_codes(rows)[first]
        )
        return found

    def _bootstrap(self, rows: TestRows) -> ClusterBootstrap:
        return ClusterBootstrap(
            rows.clicked, groups=rows.requests, num_samples=self.num_samples, seed=self.seed
        )

    def _draw(self, rows: TestRows) -> NDArray[np.int64]:
        """How often each request is drawn. ``[R, K]``."""
        num_requests = int(_codes(rows).max()) + 1
        rng = np.random.default_rng(self.seed)
        return np.stack(
            [
                np.bincount(rng.integers(num_requests, size=num_requests), minlength=num_requests)
                for _ in range(self.num_samples)
            ]
        )


def resample_mean(
    values_N: FloatArray, drawn_RK: NDArray[np.int64], *, requests: NDArray[np.int64]
) -> FloatArray:
    """Mean of a value of each row, on every resample. ``[R]``."""
    num_requests = drawn_RK.shape[1]
    sums = np.bincount(requests, weights=values_N, minlength=num_requests)
    counts = np.bincount(requests, minlength=num_requests)
    return np.asarray((drawn_RK @ sums) / (drawn_RK @ counts), dtype=np.float64)


def resample_soft_auc(
    scores_N: FloatArray,
    soft_N: FloatArray,
    drawn_RK: NDArray[np.int64],
    *,
    requests: NDArray[np.int64],
) -> FloatArray:
    """``metrics.soft_auc`` with each row as often as its request was drawn. ``[R]``."""
    _, ties_N = np.unique(scores_N, return_inverse=True)
    found = np.full(len(drawn_RK), np.nan)
    for place, drawn_K in enumerate(drawn_RK):
        weights_N = drawn_K[requests].astype(np.float64)
        positive = np.bincount(ties_N, weights=weights_N * soft_N)
        negative = np.bincount(ties_N, weights=weights_N * (1 - soft_N))
        pairs = positive.sum() * negative.sum()
        below = np.cumsum(negative) - negative
        if pairs > 0:
            found[place] = (positive @ (below + negative / 2)) / pairs
    return found


def _codes(rows: TestRows) -> NDArray[np.int64]:
    return np.asarray(np.unique(rows.requests, return_inverse=True)[1], np.int64)

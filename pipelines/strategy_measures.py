"""What a trained student is worth and what it cost (papers.md S0.27-S0.29, C28).

Ranking, fit and level on rows that no student learned from; prior-corrected, not calibrated. Two
students are compared by ``relative_delta`` and by their scores, row by row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from driftline.pipelines.laboratory import Laboratory
from driftline.pipelines.laboratory_nodes import Node
from driftline.pipelines.laboratory_rows import Rows
from driftline.pipelines.strategy import TrainedStudent
from driftline.pipelines.student_forms import StudentForm
from driftline.platform.metrics import (
    FloatArray,
    calibration_ratio,
    expected_calibration_error,
    log_loss,
    normalised_entropy,
    prior_correct_logits,
    roc_auc,
    sigmoid,
    soft_auc,
)
from driftline.platform.models.build import count_parameters
from driftline.platform.models.spec import parse_spec
from driftline.platform.sampling import request_keys

MAX_SOFT_ROWS: Final = 20_000
NEW_ITEM_HOURS: Final = 24


@dataclass
class TestRows:
    """Labelled rows that nobody learned from, and the teacher's opinion of them."""

    __test__ = False  # not a test class, whatever pytest thinks of its name

    laboratory: Laboratory
    name: str
    frame: pa.Table

    @property
    def clicked(self) -> FloatArray:
        """Clicks, 0/1. ``[N]``."""
        return self.frame["clicked"].to_numpy().astype(np.float64)

    @cached_property
    def requests(self) -> NDArray[np.object_]:
        """Request of each row, the unit of resampling. ``[N]``."""
        return request_keys(self.frame).to_numpy()

    @cached_property
    def slices(self) -> dict[str, NDArray[np.bool_]]:
        """Rows of often and of rarely shown ads, and of new ones (papers.md S0.37)."""
        return product_slices(self.frame)

    @cached_property
    def rows(self) -> Rows:
        """The same in the form that students read."""
        return Rows(self.key, self.laboratory.test_texts, lambda: self.frame)

    @property
    def key(self) -> str:
        """Decides the content: slices lie after the moment up to which a laboratory's keys know."""
        return self.laboratory.key("test", self.name, self.laboratory.test_texts.key)

    def probabilities(self, form: StudentForm, *weights: Path) -> FloatArray:
        """A student's click probabilities on the natural click rate. ``[N]``."""
        logits = form.logits(self.rows, *weights)
        keep_rate = self.laboratory.settings.labels.negative_keep_rate
        return sigmoid(prior_correct_logits(logits[:, 1] - logits[:, 0], keep_rate=keep_rate))

    @cached_property
    def teacher(self) -> FloatArray:
        """The teacher's click probabilities on the natural click rate. ``[N]``."""
        laboratory = self.laboratory
        path = laboratory.make(
            "teacher.npy",
            lambda path: _save(path, laboratory.soft_labels(self.frame)),
            key=(self.key, laboratory.store.hash),
        )
        logits = np.load(path)
        keep_rate = laboratory.settings.labels.negative_keep_rate
        return sigmoid(prior_correct_logits(logits[:, 1] - logits[:, 0], keep_rate=keep_rate))


@dataclass
class TestSets:
    """The rows that strategies are measured on in one laboratory."""

    __test__ = False

    laboratory: Laboratory

    @cached_property
    def ood(self) -> TestRows:
        """Of the stale window."""
        return TestRows(self.laboratory, "ood", self.laboratory.ood_test)

    @cached_property
    def next(self) -> TestRows:
        """The slice after ``as_of``: AUC under drift."""
        return self.slice(0)

    def slice(self, number: int) -> TestRows:
        """A slice after ``as_of``, by number."""
        window = self.laboratory.next_window(number)
        return TestRows(self.laboratory, f"slice {window}", self.laboratory.next_slice(number))


def measure_student(
    student: TrainedStudent, tests: TestSets, *, soft: bool = True
) -> tuple[dict[str, float], FloatArray]:
    """All measures of a student, and its probabilities on the next slice. ``[N]``.

    ``ood_auc``, ``id_auc`` (the next slice), ``id_soft_auc`` and so on are of the finished student.
    ``distilled_*`` are of the student before fine-tuning, which is where the paper measures its
    OOD and ID-soft columns (papers.md A0.19, S0.31); they are missing if that was no whole student.

    Args:
        student: From ``train_strategy``.
        tests: Rows of its laboratory.
        soft: Also measure against the teacher's soft labels, which then must exist.
    """
    final = tests.next.probabilities(student.form, *student.files)
    measures = _on_next(final, tests, soft=soft)
    measures["ood_auc"] = _auc(tests.ood, tests.ood.probabilities(student.form, *student.files))
    if student.distilled:
        before = tests.next.probabilities(student.form, *student.distilled)
        found = _on_next(before, tests, soft=soft)
        measures |= {
            f"distilled_{name}": found[name] for name in ("id_auc", "id_soft_auc") if name in found
        }
        measures["distilled_ood_auc"] = _auc(
            tests.ood, tests.ood.probabilities(student.form, *student.distilled)
        )
    measures["num_parameters"] = float(count_parameters(student.form.spec))
    return measures | costs(student.nodes) | language_measures(student.nodes), final


def measure_teacher(tests: TestSets) -> tuple[dict[str, float], FloatArray]:
    """The same measures of the frozen teacher, the reference row of Tables 2 and 3."""
    teacher = tests.laboratory.teacher
    final = tests.next.teacher
    measures = _on_next(final, tests, soft=True)
    measures["ood_auc"] = measures["distilled_ood_auc"] = _auc(tests.ood, tests.ood.teacher)
    measures["core_seconds"] = float(teacher.manifest["core_seconds"])
    measures["num_parameters"] = float(count_parameters(parse_spec(teacher.manifest["spec"])))
    return measures, final


def costs(nodes: Sequence[Node]) -> dict[str, float]:
    """Core-seconds of everything, as if alone, and of what was not there yet."""
    new = [node for node in nodes if node.made_now]
    return {
        "core_seconds": sum(node.core_seconds for node in nodes),
        "new_core_seconds": sum(node.core_seconds for node in new),
        "num_stages": float(sum(node.result is not None for node in nodes)),
        "num_stages_trained": float(sum(node.result is not None for node in new)),
        "teacher_passes": float(sum(node.teacher_passes for node in nodes)),
        "new_teacher_passes": float(sum(node.teacher_passes for node in new)),
    }


def language_measures(nodes: Sequence[Node]) -> dict[str, float]:
    """Loss and accuracy of masked-language training at its best step, where there was some."""
    for node in nodes:
        if node.name == "mlm" and node.result is not None:
            steps = {row["step"]: row for row in node.result.history}
            best: Mapping[str, float] = steps.get(float(node.result.best_step), {})
            return {f"mlm_{name}": best[name] for name in ("loss", "accuracy") if name in best}
    return {}


def product_slices(frame: pa.Table) -> dict[str, NDArray[np.bool_]]:
    """Ads shown at least as often as the median row's, ads shown less, and new ads."""
    shown = [name for name in frame.column_names if name.startswith("ad__impressions_")]
    longest = max(shown, key=lambda name: int(name.removeprefix("ad__impressions_")[:-1]))
    impressions = frame[longest].fill_null(0.0).to_numpy()
    age = frame["ad__hours_since_first"].fill_null(0.0).to_numpy()
    median = float(np.median(impressions)) if len(impressions) else 0.0
    return {
        "head": impressions >= median,
        "tail": impressions < median,
        "new": age < NEW_ITEM_HOURS,
    }


def _on_next(p_N: FloatArray, tests: TestSets, *, soft: bool) -> dict[str, float]:
    rows = tests.next
    measures = {
        "id_auc": _auc(rows, p_N),
        "log_loss": log_loss(rows.clicked, p_N),
        "normalised_entropy": normalised_entropy(rows.clicked, p_N),
        "calibration_error": expected_calibration_error(rows.clicked, p_N),
        "calibration_ratio": calibration_ratio(rows.clicked, p_N),
    }
    for name, mask_N in rows.slices.items():
        measures[f"{name}_auc"] = roc_auc(rows.clicked[mask_N], p_N[mask_N])
    if soft:
        measures["id_soft_auc"] = soft_auc(p_N[:MAX_SOFT_ROWS], rows.teacher[:MAX_SOFT_ROWS])
    return measures


def _auc(rows: TestRows, p_N: FloatArray) -> float:
    return roc_auc(rows.clicked, p_N)


def _save(path: Path, values: NDArray[Any]) -> None:
    with path.open("wb") as stream:
        np.save(stream, values)

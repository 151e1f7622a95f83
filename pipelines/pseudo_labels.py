"""Rows that a student labels itself, for self-training (papers.md S0.20).

Shape suffix: B rows.
"""

from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from driftline.pipelines.laboratory_rows import Rows, with_clicks
from driftline.pipelines.student_forms import StudentForm
from driftline.pipelines.training_sets import clicks, newest
from driftline.platform.artefacts import hash_file
from driftline.platform.contract import TIME
from driftline.platform.metrics import sigmoid
from driftline.platform.settings import ArmsRefreshSettings, ArmsSelfTrainingSettings
from driftline.platform.teacher_memory import Labelled


def own_rows(form: StudentForm, strategy: ArmsRefreshSettings, finetuned: Path) -> Rows:
    """Stale rows, recent rows or both, labelled by a fine-tuned student.

    Args:
        form: What the student is.
        strategy: Says which rows, as many as its distillation and its fine-tuning may see.
        finetuned: The student's weights.
    """
    laboratory, rounds = form.laboratory, strategy.self_training
    assert strategy.finetune is not None
    labels = rounds.model_dump(include={"on", "labels", "min_confidence", "true_labels"})
    distil = strategy.distil
    limits = (distil.max_rows if distil is not None else None, strategy.finetune.max_rows)
    key = f"own.{hash_file(finetuned)}.{limits}.{labels}.{rounds.true_label_share}"

    @cache
    def labelled() -> tuple[pa.Table, NDArray[np.float32] | None]:
        stale = newest(laboratory.asked(laboratory.ood.train), limits[0])
        recent = newest(laboratory.id.train, limits[1])
        if rounds.on == "both":  # no row twice
            earlier = pa.scalar(laboratory.id_window.start, TIME)
            stale = stale.filter(pc.less(stale["event_time"], earlier))
        parts = {"ood": [stale], "id": [recent], "both": [stale, recent]}[rounds.on]
        frame = pa.concat_tables(parts)
        is_recent = np.full(frame.num_rows, rounds.on == "id")
        if rounds.on == "both":
            is_recent[stale.num_rows :] = True
        asked = Rows(f"{key}.asked", laboratory.texts, lambda: frame)
        own = form.logits(asked, finetuned)
        return pseudo_labelled(frame, own, is_recent=is_recent, rounds=rounds)

    def soft() -> Labelled | None:
        logits = labelled()[1]
        return None if logits is None else Labelled(logits, None)

    return Rows(laboratory.key("self_training", key), laboratory.texts, lambda: labelled()[0], soft)


def pseudo_labelled(
    frame: pa.Table,
    own_B2: NDArray[np.float64],
    *,
    is_recent: NDArray[np.bool_],
    rounds: ArmsSelfTrainingSettings,
) -> tuple[pa.Table, NDArray[np.float32] | None]:
    """Rows with the student's labels beside, or mixed into, their clicks (papers.md S0.20).

    Args:
        frame: Rows with true clicks.
        own_B2: The labelling student's logits. ``[B, 2]``.
        is_recent: Which rows are recent. ``[B]``.
        rounds: Soft or hard labels, how confident they must be, whose clicks count as well.

    Returns:
        The rows that are left, and their soft labels; None when labels are hard, since these stand
        in ``clicked``: cross-entropy is linear in the label, so a mixture of labels is the mixture
        of the losses.
    """
    share = rounds.true_label_share
    p_B = sigmoid(own_B2[:, 1] - own_B2[:, 0])
    sure_B = np.maximum(p_B, 1 - p_B) >= rounds.min_confidence
    true_B = clicks(frame).copy()
    told_B = (is_recent | (rounds.true_labels == "both")) & (share > 0)
    true_B[~told_B] = np.nan
    if rounds.labels == "soft":
        logits_B2 = own_B2.astype(np.float32)
        logits_B2[~sure_B] = np.nan
        clicked_B, soft_B2 = true_B, logits_B2
    else:
        hard_B = (p_B >= 0.5).astype(np.float32)
        mixed_B = np.where(told_B, share * true_B + (1 - share) * hard_B, hard_B)
        clicked_B, soft_B2 = np.where(sure_B, mixed_B, true_B).astype(np.float32), None
    kept = sure_B | told_B
    labelled = with_clicks(frame, clicked_B).filter(pa.array(kept))
    return labelled, None if soft_B2 is None else soft_B2[kept]

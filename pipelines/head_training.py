"""Train a head by the recipe of the hourly refresh: from some head, over cached vectors.

The hourly refresh does it from the champion's head, an arms refresh to catch up with the last
hours.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from driftline.pipelines.labels import SoftLabels
from driftline.pipelines.student import soft_labels
from driftline.pipelines.training_sets import split_rows, write_pair_examples
from driftline.platform.bundle import HEAD, Calibration, VectorCache
from driftline.platform.models.spec import HeadOnlySpec
from driftline.platform.ray_runtime import fit
from driftline.platform.scorer import Scorer, load_head
from driftline.platform.settings import DriftlineSettings
from driftline.platform.stages import StageJob
from driftline.platform.tabular import TabularEncoder

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class HeadStart:
    """The head to begin with, and what it reads."""

    weights: Path
    spec: HeadOnlySpec
    tabular: TabularEncoder
    vectors: Path


@dataclass(frozen=True)
class HeadResult:
    """The head that came of it, not calibrated; its weights lie in the scratch folder's HEAD."""

    scorer: Scorer
    weights: Path
    num_rows: int
    core_seconds: float


def train_head(
    settings: DriftlineSettings,
    start: HeadStart,
    frame: pa.Table,
    *,
    scratch: Path,
    progress: Progress | None = None,
) -> HeadResult:
    """Fine-tune on clicks and teacher labels, then, if asked for, on its own labels.

    Args:
        settings: ``student.head_refresh`` is the recipe.
        start: Where to begin; its scales are fitted to the rows anew.
        frame: Known rows in order of time, see ``replayed_frame``.
        scratch: Folder for examples, checkpoints and weights.
        progress: Called with steps done and in all.

    Raises:
        EmptyWindowError: the frame holds no row of one of the outcomes.
    """
    refresh = settings.student.head_refresh
    rows = split_rows(settings, frame, max_rows=refresh.finetune.max_rows)
    tabular = start.tabular.refitted(rows.train)
    cache = VectorCache.load(start.vectors)
    teacher = None
    if refresh.objective.needs_teacher:
        teacher = soft_labels(settings, rows.train, SoftLabels.open(settings))
    validation = write_pair_examples(
        scratch / "validation.arrow", rows.validation, tabular=tabular, text_ids=cache.text_id
    )

    def run(
        name: str, labels: NDArray[np.float32] | None, output: Path, **changes: object
    ) -> float:
        examples = write_pair_examples(
            scratch / f"{name}.arrow",
            rows.train,
            tabular=tabular,
            text_ids=cache.text_id,
            teacher_logits=labels,
        )
        job = StageJob(
            name=f"head.{name}",
            model=start.spec,
            task="clicks",
            examples=examples,
            validation=validation,
            texts=None,
            vectors=start.vectors if start.spec.head.vector_size else None,
            objective=refresh.objective,
            stage=refresh.finetune,
            initial=(start.weights,),
            output=output,
            checkpoints=scratch / f"{name}.checkpoints",
            stop_on="auc",
            seed=settings.seed,
            trainable="head",
        )
        job = replace(job, **changes)  # type: ignore[arg-type]
        result = fit(job, num_workers=refresh.num_workers, ray=settings.ray, progress=progress)
        return result.core_seconds

    def scorer_of(weights: Path) -> Scorer:
        keep_rate = settings.labels.negative_keep_rate
        return Scorer(load_head(start.spec, weights), cache, tabular, Calibration(keep_rate))

    output = scratch / HEAD
    if not refresh.self_training.enabled:
        core_seconds = run("finetune", teacher, output)
        return HeadResult(scorer_of(output), output, rows.train.num_rows, core_seconds)
    core_seconds = run("finetune", teacher, scratch / "finetuned.safetensors")
    own = scorer_of(scratch / "finetuned.safetensors").logit_pairs(rows.train)
    core_seconds += run(
        "self_training",
        own.astype(np.float32),
        output,
        stage=refresh.self_training.stage,
        objective=refresh.self_training.objective,
    )
    return HeadResult(scorer_of(output), output, rows.train.num_rows, core_seconds)

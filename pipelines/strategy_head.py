"""The end of a strategy: the head once more, over the finished vectors and every recent row."""

from pathlib import Path

import numpy as np

from driftline.pipelines.laboratory import Laboratory
from driftline.pipelines.strategy_stages import REPLACED, Stages
from driftline.pipelines.student import soft_labels
from driftline.pipelines.student_forms import TwinForm
from driftline.pipelines.training_sets import split_rows, write_pair_examples
from driftline.platform.artefacts import hash_file
from driftline.platform.bundle import VectorCache
from driftline.platform.inference import encode_texts, load_model
from driftline.platform.models.spec import HeadOnlySpec, ModelSpec, TwinSpec
from driftline.platform.settings import StageSettings
from driftline.platform.stages import StageJob


def text_vectors(laboratory: Laboratory, spec: ModelSpec, weights: Path) -> Path:
    """Vectors of every known text in both roles, from these arms; none without arms."""
    if not isinstance(spec, TwinSpec):
        empty = VectorCache(
            np.empty(0, np.int64), np.empty((0, 0), np.float32), np.empty((0, 0), np.float32)
        )
        return laboratory.make("none.vectors", empty.save, key="none")
    texts = laboratory.text_file(laboratory.texts)

    def encode(destination: Path) -> None:
        encode_texts(load_model(spec, weights), spec, texts, destination)

    return laboratory.make("vectors", encode, key=(hash_file(weights), hash_file(texts)))


def train_head(stages: Stages, weights: Path, stage: StageSettings) -> Path:
    """A head over the vectors of these arms, from the student's own; it may see rows repeatedly."""
    laboratory, form = stages.laboratory, stages.form
    assert isinstance(form, TwinForm)
    settings = laboratory.settings
    objective = settings.student.head_refresh.objective
    vectors = text_vectors(laboratory, form.spec, weights)
    teacher = laboratory.store.hash if objective.needs_teacher else None
    key = laboratory.key("head", stage.max_rows, form.spec.model_dump(mode="json"), teacher)

    def write(destination: Path) -> None:
        rows = split_rows(settings, laboratory.id_frame, max_rows=stage.max_rows)
        soft = None
        if objective.needs_teacher:
            with laboratory.labelling():
                soft = soft_labels(settings, rows.train, laboratory.store)
        write_pair_examples(
            destination,
            rows.train,
            tabular=form.tabular,
            text_ids=laboratory.texts.table["text_id"].to_numpy(),
            teacher_logits=soft,
        )

    _, validation = laboratory.click_rows("id", max_rows=None)
    job = StageJob(
        name="head",
        model=HeadOnlySpec(head=form.head),
        task="clicks",
        examples=laboratory.make("head.arrow", write, key=key),
        validation=form.examples(validation),
        vectors=vectors if isinstance(form.spec, TwinSpec) else None,
        objective=objective,
        stage=stage,
        initial=(weights,),
        stop_on="auc",
        seed=laboratory.seed,
        output=REPLACED,
        checkpoints=REPLACED,
    )
    return stages.train(job)

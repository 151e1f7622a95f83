"""A student of several outcomes, distilled from a teacher of each (papers.md C14)."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from safetensors.torch import load_file

from driftline.features.log import ImpressionLog
from driftline.features.texts import known_texts
from driftline.pipelines.labels import SoftLabels
from driftline.pipelines.prepare import prepare_features
from driftline.pipelines.student import soft_labels, student_tokenizer, write_student_texts
from driftline.pipelines.teachers import find_member
from driftline.pipelines.training_sets import (
    known_frame,
    newest,
    split_rows,
    with_outcome,
    write_pair_examples,
)
from driftline.platform.checkpoints import save_weights
from driftline.platform.columns import head_columns
from driftline.platform.errors import SettingsError
from driftline.platform.models.spec import (
    HeadOnlySpec,
    ModelSpec,
    TwinSpec,
    encoder_spec,
    head_spec,
)
from driftline.platform.multi_task import FIRST_TASK, TaskExamples, task_shares, weights_of_task
from driftline.platform.ray_runtime import fit
from driftline.platform.settings import (
    DriftlineSettings,
    MultiTaskSettings,
    ObjectiveSettings,
    OutcomeSettings,
)
from driftline.platform.stages import StageJob
from driftline.platform.tabular import TabularEncoder
from driftline.platform.windows import Window
from driftline.platform.workspace import Workspace

logger = logging.getLogger(__name__)

MAX_VALIDATION_ROWS = 5_000


@dataclass(frozen=True)
class TaskReport:
    """What a student of several outcomes learned."""

    weights: dict[str, Path]
    """A plain student for each outcome, for a model of spec ``model``."""
    model: ModelSpec
    num_rows: dict[str, int]
    """Training rows of each outcome."""
    shares: dict[str, float]
    """How often each outcome is drawn."""
    measures: dict[str, float]
    """Of the best evaluation: ``NAME.auc``, ``NAME.loss`` and so on, on validation rows."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "weights": {name: str(path) for name, path in self.weights.items()},
            "model": self.model.model_dump(mode="json"),
            "num_rows": self.num_rows,
            "shares": self.shares,
            "measures": self.measures,
        }


@dataclass(frozen=True)
class _Prepared:
    """What the example files of all outcomes share."""

    settings: DriftlineSettings
    frame: pa.Table
    tabular: TabularEncoder
    texts: pa.Table
    folder: Path

    def write(self, name: str, outcome: OutcomeSettings | None) -> tuple[Path, Path, int]:
        """Examples of one outcome, training and validation, and the number of the former."""
        frame = with_outcome(self.frame, outcome.label if outcome else None)
        assert self.settings.student.tasks is not None
        max_rows = self.settings.student.tasks.stage.max_rows
        rows = split_rows(self.settings, frame, max_rows=max_rows)
        validation = newest(rows.validation, MAX_VALIDATION_ROWS)
        store = self._labels(outcome)
        paths = []
        for part, table in (("train", rows.train), ("validation", validation)):
            logits = None if store is None else soft_labels(self.settings, table, store)
            paths.append(
                write_pair_examples(
                    self.folder / f"{name}.{part}.arrow",
                    table,
                    tabular=self.tabular,
                    text_ids=self.texts["text_id"].to_numpy(),
                    teacher_logits=logits,
                )
            )
        return paths[0], paths[1], rows.train.num_rows

    def _labels(self, outcome: OutcomeSettings | None) -> SoftLabels | None:
        if outcome is None:
            needed = self.settings.student.arms_refresh.objective.needs_soft_labels
            return SoftLabels.open(self.settings) if needed else None
        if outcome.teacher is None:
            return None
        return SoftLabels.open(self.settings, teacher=outcome.teacher)


def train_tasks(
    settings: DriftlineSettings, *, progress: Callable[[int, int], None] | None = None
) -> TaskReport:
    """Distil the teachers of click and further outcomes into one student, on the stale rows.

    Done before with the same settings and rows, it gives its result at once.

    Raises:
        SettingsError: ``student.tasks`` is not given, or names what is not there.
        MissingArtefactError: a teacher has not been trained.
        EmptyWindowError: an outcome has no rows, or only one value.
    """
    tasks = check_tasks_settings(settings)
    prepare_features(settings)
    workspace = Workspace.of(settings)
    ood = ImpressionLog.open(workspace.clean, settings).split.ood
    prepared = _prepare(settings, ood, workspace.scratch / "tasks")
    names = [FIRST_TASK, *(outcome.label for outcome in tasks.outcomes)]
    files = [
        prepared.write(name, outcome)
        for name, outcome in zip(names, (None, *tasks.outcomes), strict=True)
    ]
    output = workspace.tasks / "all.safetensors"
    job = StageJob(
        name="tasks",
        model=_model(settings, prepared.tabular),
        task="clicks",
        examples=files[0][0],
        validation=files[0][1],
        texts=write_student_texts(settings, prepared.texts, prepared.folder / "texts.arrow"),
        output=output,
        checkpoints=prepared.folder / "checkpoints",
        stage=tasks.stage,
        seed=settings.seed,
        objective=settings.student.arms_refresh.objective,
        tasks=tuple(
            TaskExamples(outcome.label, train, validation, _objective(outcome))
            for outcome, (train, validation, _) in zip(tasks.outcomes, files[1:], strict=True)
        ),
        tau=tasks.tau,
    )
    result = fit(
        job,
        num_workers=settings.student.arms_refresh.num_workers,
        ray=settings.ray,
        progress=progress,
    )
    weights = {}
    for name in names:
        weights[name] = workspace.tasks / f"{name}.safetensors"
        save_weights(weights[name], weights_of_task(load_file(output), name))
    num_rows = [count for _, _, count in files]
    best = next(row for row in result.history if row["step"] == result.best_step)
    return TaskReport(
        weights=weights,
        model=job.model,
        num_rows=dict(zip(names, num_rows, strict=True)),
        shares=dict(zip(names, task_shares(num_rows, tau=tasks.tau).tolist(), strict=True)),
        measures={key: value for key, value in best.items() if "." in key},
    )


def check_tasks_settings(settings: DriftlineSettings) -> MultiTaskSettings:
    """Find what is wrong with ``student.tasks`` before anything is trained; see ``train_tasks``."""
    tasks = settings.student.tasks
    if tasks is None:
        raise SettingsError(
            "student.tasks is not given; name the outcomes beside the click, for example "
            "{outcomes: [{label: purchased, teacher: buyers}]}"
        )
    if settings.student.arms_refresh.objective.matches:
        raise SettingsError(
            "student.tasks: matches are not offered where a student learns several outcomes; "
            "leave student.arms_refresh.objective.matches out"
        )
    labels = [label.name for label in settings.select(kind="label")]
    for outcome in tasks.outcomes:
        if outcome.label not in labels:
            raise SettingsError(
                f"student.tasks: {outcome.label!r} is no feature of kind label, got {labels}; "
                "declare it in `features:`"
            )
        if outcome.teacher is not None:
            learned = find_member(settings, outcome.teacher).label
            if learned != outcome.label:
                raise SettingsError(
                    f"student.tasks: teacher {outcome.teacher!r} learned "
                    f"{learned or 'clicks'}, not {outcome.label!r}; give it label: {outcome.label}"
                )
    return tasks


def _objective(outcome: OutcomeSettings) -> ObjectiveSettings | None:
    if outcome.teacher is None:
        return None
    return outcome.objective or ObjectiveSettings()


def _prepare(settings: DriftlineSettings, window: Window, folder: Path) -> _Prepared:
    frame = known_frame(settings, window, as_of=window.end)
    tabular = TabularEncoder.fit(
        split_rows(settings, frame).train,
        head_columns(settings),
        num_bins=settings.student.head.num_bins,
    )
    texts = known_texts(settings, as_of=window.end).sort_by("text_id")
    return _Prepared(settings, frame, tabular, texts, folder)


def _model(settings: DriftlineSettings, tabular: TabularEncoder) -> ModelSpec:
    has_text = bool(settings.select(kind="text"))
    encoder = None
    if has_text:
        size = student_tokenizer(settings).vocabulary_size
        encoder = encoder_spec(settings.student.encoder, vocabulary_size=size)
    head = head_spec(
        settings.student.head,
        vector_size=encoder.hidden_size if encoder else 0,
        cardinalities=tabular.cardinalities,
        num_numbers=tabular.num_numbers,
    )
    if encoder is None:
        return HeadOnlySpec(head=head)
    return TwinSpec(encoder=encoder, tie_arms=settings.student.tie_arms, head=head)

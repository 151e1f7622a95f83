"""The stages of a strategy: each becomes a job over rows of the laboratory, and a node of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from driftline.pipelines.laboratory import Laboratory
from driftline.pipelines.laboratory_rows import Rows, Source
from driftline.pipelines.student_forms import StudentForm
from driftline.platform.models.spec import ModelSpec, TeacherSpec
from driftline.platform.settings import DistilSettings, ObjectiveSettings, StageSettings
from driftline.platform.stage_teacher import FrozenTeacher
from driftline.platform.stages import StageJob
from driftline.platform.tasks import StopOn
from driftline.platform.training import Report

REPLACED: Final = Path("replaced")  # the laboratory gives a node its place

Tell = Callable[[str, Mapping[str, float]], None]
"""Called with a stage's name and its measures after each evaluation."""


@dataclass(frozen=True)
class Stages:
    """Trains a form of student in a laboratory, stage by stage."""

    laboratory: Laboratory
    form: StudentForm
    tell: Tell | None = None

    @property
    def teacher_spec(self) -> TeacherSpec:
        """What the frozen teacher is."""
        return TeacherSpec.model_validate(self.laboratory.teacher.manifest["spec"])

    def language(
        self, stage: StageSettings, spec: ModelSpec | None = None, *, keep_head: bool = False
    ) -> Path:
        """Masked-language training of the student, or of another model over its texts."""
        job = self._language_job(stage)
        return self.train(replace(job, model=spec or job.model, keep_head=keep_head))

    def imitate(
        self,
        teacher: FrozenTeacher,
        objective: ObjectiveSettings,
        *,
        stage: StageSettings,
        start: tuple[Path, ...],
    ) -> Path:
        """Masked-language distillation of the student (papers.md S3.5)."""
        return self.train(
            replace(
                self._language_job(stage),
                name="mlm_distil",
                task="mlm_distil",
                teacher=teacher,
                objective=objective,
                initial=start,
            )
        )

    def _language_job(self, stage: StageSettings) -> StageJob:
        examples, validation = self.form.language()
        return StageJob(
            name="mlm",
            model=self.form.spec,
            task="mlm",
            examples=examples,
            validation=validation,
            stage=stage,
            seed=self.laboratory.seed,
            output=REPLACED,
            checkpoints=REPLACED,
        )

    def clicks(
        self, name: str, source: Source, stage: StageSettings, *, start: tuple[Path, ...]
    ) -> Path:
        """Training on clicks alone."""
        rows = self.laboratory.click_rows(source, max_rows=stage.max_rows)
        return self.rows(name, stage, *rows, start=start)

    def distil(
        self, distil: DistilSettings, objective: ObjectiveSettings, *, start: tuple[Path, ...]
    ) -> Path:
        """Distillation, with the teacher's stored tensors where the objective matches any."""
        features = self.laboratory.features if objective.matches else None
        rows = self.laboratory.distil_rows(distil, features=features is not None)
        return self.rows(
            "distil",
            distil.stage,
            *rows,
            start=start,
            objective=objective,
            stop_on="soft_loss",
            features=features,
        )

    def rows(
        self,
        name: str,
        stage: StageSettings,
        train: Rows,
        validation: Rows,
        *,
        start: tuple[Path, ...],
        objective: ObjectiveSettings | None = None,
        stop_on: StopOn = "auc",
        features: Path | None = None,
    ) -> Path:
        """One stage on clicks or soft labels, stopped on its own target (papers.md S0.21)."""
        job = StageJob(
            name=name,
            model=self.form.spec,
            task="clicks",
            examples=self.form.examples(train),
            validation=self.form.examples(validation),
            texts=self.form.texts(train.texts),
            objective=objective,
            stage=stage,
            initial=start,
            stop_on=stop_on,
            seed=self.laboratory.seed,
            teacher=None if features is None else FrozenTeacher(self.teacher_spec),
            features=features,
            label_teacher=None if features is None else self.laboratory.teacher.hash,
            output=REPLACED,
            checkpoints=REPLACED,
        )
        return self.train(job)

    def train(self, job: StageJob) -> Path:
        """Any stage, as a node of the laboratory."""
        report: Report | None = None
        if (tell := self.tell) is not None:

            def report(measures: Mapping[str, float]) -> None:
                tell(job.name, measures)

        return self.laboratory.train(job, report=report)

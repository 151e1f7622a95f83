"""A student whose encoders learned a teacher's language (papers.md S3.3-S3.5, C11).

This module is read with the settings and loads no torch; the stage is ``token_distillation``.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, Self

from pydantic import PositiveInt, model_validator

from driftline.platform.errors import SettingsError
from driftline.platform.initialisers import Initialiser, Nursery, RandomStart, Recipe
from driftline.platform.objective_settings import ObjectiveSettings
from driftline.platform.training_settings import StageSettings

if TYPE_CHECKING:
    from driftline.platform.models.spec import ModelSpec, TeacherSpec

OTHER_WAYS: Final = "take teacher 'deeper', or init: mlm"


class MlmDistilStart(Initialiser):
    """Masked-language distillation: a language model's distribution over tokens beside the tokens.

    On the texts that ``init: mlm`` learns from, before any click: the task-agnostic way of the
    thesis and of DistilBERT (S3.4). Both models read the same tokens, so they need one vocabulary:
    a student with a small one of its own takes teacher ``deeper``, or ``dual_vocabulary``. We
    differ from the thesis in that the market's own texts are the corpus.
    """

    kind: Literal["mlm_distil"] = "mlm_distil"
    teacher: Literal["masked_teacher", "deeper"] = "masked_teacher"
    """The market's teacher as it was before its clicks, with the prediction head of that time; or a
    deeper model like the student, pre-trained for this on the same texts."""
    num_layers: PositiveInt | None = None
    """Depth of the deeper model, 12 when not given; the market's teacher has its own."""
    start: Initialiser = RandomStart()
    """Where the student starts from: ``{kind: layers, source: masked_teacher, layers: [1, 3, 5, 8,
    10, 12]}`` in the thesis (S3.3)."""
    objective: ObjectiveSettings = ObjectiveSettings.model_validate({"preset": "thesis"})
    """A third each of tokens, soft tokens and cosine of the last layers; whatever is given
    replaces all of it, so repeat ``preset: thesis`` beside a change of a part."""
    stage: StageSettings | None = None
    """Recipe; the strategy's ``mlm`` when not given, so that the two starts cost the same updates.
    The thesis: ``{learning_rate: 5e-4, betas: [0.9, 0.98], epsilon: 1e-6, schedule: one_cycle,
    warmup_share: 0.05, clip_norm: 5, num_epochs: 3}`` (S3.6)."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.teacher != "deeper" and self.num_layers is not None:
            raise ValueError(
                f"num_layers is for teacher 'deeper', {self.teacher!r} has its own depth; leave it "
                "out"
            )
        if not self.objective.needs_teacher:
            raise ValueError(
                "the objective learns nothing from the teacher: that is init: mlm; raise "
                "soft_weight or alpha, or take that"
            )
        self.objective.check_task("tokens")
        return self

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """See ``Initialiser``."""
        own: tuple[Recipe, ...] = ("mlm",) if self.stage is None or self.teacher == "deeper" else ()
        return tuple(dict.fromkeys((*own, *self.start.recipes)))

    def check(self, spec: "ModelSpec", teacher: "TeacherSpec | None" = None) -> None:
        """See ``Initialiser``."""
        from driftline.platform.distillation.token_models import (
            check_language_matches,
            check_language_teacher,
        )
        from driftline.platform.transplant import encoder_of

        encoder_of(spec)
        self.start.check(spec, teacher)
        other = self._deeper(spec) if self.teacher == "deeper" else teacher
        if other is not None:
            try:
                check_language_teacher(spec, other)
                check_language_matches(spec, other, self.objective.matches)
            except SettingsError as error:
                raise SettingsError(f"init.mlm_distil: {error}; or {OTHER_WAYS}") from error

    def check_sources(self, nursery: Nursery) -> None:
        """See ``Initialiser``."""
        from driftline.platform.distillation.token_models import has_head

        own = self.teacher == "deeper"
        self.check(nursery.spec, None if own else nursery.teacher[0])
        self.start.check_sources(nursery)
        if own:
            return
        theirs, students = nursery.tokenizers
        if theirs.hash != students.hash:
            raise SettingsError(
                "init.mlm_distil: the student cuts texts by another tokeniser than the teacher, so "
                f"token {theirs.vocabulary_size - 1} of one is not that of the other; leave out "
                f"student.vocabulary_size or {OTHER_WAYS}"
            )
        masked = nursery.masked_teacher
        if masked is None or not has_head(masked):
            lack = "no masked-language stage" if masked is None else "kept no prediction head of it"
            raise SettingsError(
                f"init.mlm_distil: teacher 'masked_teacher' is the language model that teacher.mlm "
                f"trains, and this teacher had {lack}; set teacher.mlm and train a teacher in a "
                f"new workspace, or {OTHER_WAYS}"
            )

    def weights(self, nursery: Nursery) -> tuple[Path, ...]:
        """Encoders only."""
        from driftline.platform.stage_teacher import FrozenTeacher

        self.check_sources(nursery)
        if self.teacher == "deeper":
            spec = self._deeper(nursery.spec)
            teacher = FrozenTeacher(spec, (nursery.pretrain(spec, keep_head=True),))
        else:
            masked = nursery.masked_teacher
            assert masked is not None, "check_sources"
            teacher = FrozenTeacher(nursery.teacher[0], (masked,))
        start = self.start.weights(nursery)
        return (nursery.imitate(teacher, self.objective, stage=self.stage, start=start),)

    def _deeper(self, spec: "ModelSpec") -> "ModelSpec":
        from driftline.platform.transplant import of_depth

        return of_depth(spec, self.num_layers or 12)

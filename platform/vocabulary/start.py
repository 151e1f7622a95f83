"""A student with a small vocabulary of its own, started by dual training (papers.md section 5).

This module is read with the settings and loads no torch.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, model_validator

from driftline.platform.artefacts import hash_value
from driftline.platform.errors import SettingsError
from driftline.platform.initialisers import Initialiser, Nursery
from driftline.platform.training_settings import StageSettings

if TYPE_CHECKING:
    from driftline.platform.models.spec import ModelSpec, TeacherSpec
    from driftline.platform.stages import StageResult

Share = Annotated[float, Field(ge=0, le=1)]
HeldOutShare = Annotated[float, Field(gt=0, le=0.5)]


class DualVocabulary(Initialiser):
    """Dual training of the student with a copy of the teacher, in two vocabularies.

    Needs ``student.vocabulary_size``. The variants are those of the paper (papers.md S4.9):
    ``none`` is masked language from scratch in the small vocabulary (``NoKD``), ``dual`` adds the
    teacher, ``dual_down`` and ``dual_up`` add the shared projections. The frozen teacher of the
    market is only read. Held-out texts give masked-word accuracy (S4.11), the same words masked in
    the same way for every variant of a seed.
    """

    kind: Literal["dual_vocabulary"] = "dual_vocabulary"
    variant: Literal["none", "dual", "dual_down", "dual_up"] = "dual_up"
    student_share: Share = 0.5
    """Probability p_DT that a word of the teacher's text is written in the student's vocabulary."""
    teacher_start: Literal["mlm", "frozen", "random"] = "mlm"
    """The teacher's copy starts from its masked-language weights (the paper's task-agnostic way),
    from the weights frozen after supervised training, or from noise."""
    bridge: Literal["affine", "separate"] = "affine"
    """How the teacher embeds the student's pieces: by an affine map of the student's table, or by a
    table of its own that only L_p ties to the student's (papers.md A4.1)."""
    cross_entropy_weight: PositiveFloat = 1.0
    """``eps`` of equation (4): of both cross-entropies, against L_p (papers.md S4.8)."""
    reduction: Literal["mean", "sum"] = "mean"
    """Squared differences of L_p: their mean within each variable, or their sum as printed."""
    share: Literal["shape", "axis"] = "shape"
    """One (U, V) for each shape of variable, or one matrix for each axis (papers.md S4.7)."""
    layer_map: tuple[NonNegativeInt, ...] | None = None
    """The teacher's layer for each of the student's, counted from 0; evenly spread, the last onto
    the last, when not given."""
    detach_teacher: bool = False
    """L_p does not change the teacher (papers.md A4.7); its cross-entropy still does."""
    detach_bridge: bool = False
    """The teacher reads the student's table without changing it: what is left is L_p alone."""
    held_out_share: HeldOutShare = 0.1
    """Share of the texts that are not learned from; they end the stage early and judge it."""
    stage: StageSettings = StageSettings(optimizer="lamb", learning_rate=1.25e-3, epsilon=1e-6)
    """The paper's optimiser and rate (papers.md S4.10); its batch is 4096 texts."""

    @model_validator(mode="after")
    def _something_ties_the_models(self) -> Self:
        if self.variant == "dual" and self.bridge == "separate":
            raise ValueError(
                "variant 'dual' with bridge 'separate' leaves teacher and student without a shared "
                "weight, so the student would learn as with variant 'none'; choose bridge 'affine' "
                "or variant 'dual_up'"
            )
        if self.variant == "dual" and self.detach_bridge:
            raise ValueError(
                "variant 'dual' with detach_bridge keeps the teacher from changing the student; "
                "choose variant 'none', or 'dual_up' for L_p alone"
            )
        if self.bridge == "separate" and self.detach_bridge:
            raise ValueError("detach_bridge is for bridge 'affine'; a separate table is no bridge")
        return self

    @property
    def direction(self) -> Literal["down", "up"] | None:
        """Of the shared projections; None without them."""
        if self.variant == "dual_down":
            return "down"
        return "up" if self.variant == "dual_up" else None

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher takes part."""
        return self.variant != "none"

    def layers(self, num_student: int, num_teacher: int) -> tuple[int, ...]:
        """The teacher's layer for each of the student's, counted from 0.

        Raises:
            SettingsError: ``layer_map`` has another number of layers, or names one too many.
        """
        if self.layer_map is None:
            return tuple(
                -(-(place + 1) * num_teacher // num_student) - 1 for place in range(num_student)
            )
        if len(self.layer_map) != num_student or max(self.layer_map) >= num_teacher:
            raise SettingsError(
                f"dual_vocabulary.layer_map must name {num_student} layers of the teacher's 0 to "
                f"{num_teacher - 1}, one for each of the student's, got {list(self.layer_map)}"
            )
        return self.layer_map

    def check(self, spec: "ModelSpec", teacher: "TeacherSpec | None" = None) -> None:
        """See ``Initialiser``."""
        from driftline.platform.vocabulary.dual_training import check_models

        check_models(spec, teacher, recipe=self)

    def check_sources(self, nursery: Nursery) -> None:
        """See ``Initialiser``."""
        self.check(nursery.spec, nursery.teacher[0])
        if self.has_teacher:
            self._teacher(nursery)

    def weights(self, nursery: Nursery) -> tuple[Path, ...]:
        """Encoders only.

        Raises:
            SettingsError: the student has no smaller vocabulary of its own, or the weights that
                the teacher's copy is to start from do not exist.
        """
        from driftline.platform.vocabulary.dual_training import DualJob, run_dual

        self.check_sources(nursery)
        teacher, start = self._teacher(nursery) if self.has_teacher else (None, None)
        corpus, held_out = self._corpora(nursery)
        job = DualJob(
            name="dual_vocabulary",
            student=nursery.spec,
            teacher=teacher,
            recipe=self,
            corpus=corpus,
            held_out=held_out,
            start=start,
            seed=nursery.seed,
        )

        def run(output: Path, checkpoints: Path) -> "StageResult":
            return run_dual(job, output=output, checkpoints=checkpoints)

        return (nursery.train(job.name, run, key=job.identity()),)

    def _corpora(self, nursery: Nursery) -> tuple[Path, Path]:
        """Texts to learn from and held-out ones, both in words; the same for every variant."""
        from driftline.platform.vocabulary.words import WordTexts, hold_out

        theirs, own = nursery.tokenizers

        def corpus(name: str, texts: list[str]) -> Path:
            def write(path: Path) -> None:
                WordTexts.of(texts, teacher=theirs, student=own).save(path)

            key = [hash_value(texts), theirs.hash, own.hash]
            return nursery.make(f"dual_vocabulary.{name}", write, key=key)

        train, held_out = hold_out(nursery.texts, share=self.held_out_share)
        return corpus("texts", train), corpus("held_out", held_out)

    def _teacher(self, nursery: Nursery) -> "tuple[TeacherSpec, Path | None]":
        """The teacher's shape and the weights its copy starts from."""
        spec, frozen = nursery.teacher
        if self.teacher_start == "random":
            return spec, None
        start = frozen if self.teacher_start == "frozen" else nursery.masked_teacher
        if start is None:
            raise SettingsError(
                "dual_vocabulary.teacher_start 'mlm' needs the teacher's masked-language weights, "
                "and this teacher has none; set teacher.mlm in a new workspace, or teacher_start "
                "to 'frozen' or 'random'"
            )
        return spec, start

"""Run a strategy: initialise, distil, fine-tune, self-train, and once more the head.

The one way to run a strategy: the arms refresh, ``driftline search`` and ``driftline study`` call
it. Every stage is a node of the laboratory, so what was trained before is not trained again.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from driftline.pipelines.laboratory import Laboratory, Node, Rows, with_clicks
from driftline.pipelines.student import soft_labels
from driftline.pipelines.student_forms import FormName, StudentForm, TwinForm, student_form
from driftline.pipelines.teacher import open_tokenizer
from driftline.pipelines.training_sets import clicks, newest, split_rows, write_pair_examples
from driftline.platform.artefacts import hash_file, hash_value
from driftline.platform.bundle import VectorCache
from driftline.platform.contract import TIME
from driftline.platform.inference import encode_texts, load_model
from driftline.platform.initialisers import LayersStart, RandomStart
from driftline.platform.metrics import sigmoid
from driftline.platform.models.spec import HeadOnlySpec, ModelSpec, TeacherSpec, TwinSpec
from driftline.platform.settings import (
    ArmsRefreshSettings,
    ArmsSelfTrainingSettings,
    ObjectiveSettings,
    StageSettings,
)
from driftline.platform.stages import StageJob, StageResult
from driftline.platform.tasks import StopOn
from driftline.platform.text import Tokenizer, serialise_table
from driftline.platform.training import Report

logger = logging.getLogger(__name__)

MASKED: Final = "masked.safetensors"
REPLACED: Final = Path("replaced")  # the laboratory gives a node its place


@dataclass(frozen=True)
class TrainedStudent:
    """What a strategy ends with."""

    form: StudentForm
    distilled: tuple[Path, ...]
    """Weights before fine-tuning; empty when nothing but encoders was trained until then."""
    weights: Path
    """Weights of the whole student after its last stage."""
    head: Path | None
    """Weights of the head trained over the finished vectors, in place of the student's."""
    nodes: tuple[Node, ...]
    """Everything it needed, in order, each once."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Weights to load, later ones win."""
        return (self.weights,) if self.head is None else (self.weights, self.head)


def train_strategy(
    laboratory: Laboratory,
    strategy: ArmsRefreshSettings,
    *,
    form: FormName = "twin",
    report: Callable[[str, dict[str, float]], None] | None = None,
) -> TrainedStudent:
    """Train a student by a strategy; what was trained before is found.

    Args:
        laboratory: Rows, texts, teacher.
        strategy: Which stages, with which recipes.
        form: What kind of student.
        report: Called with the stage's name and measures after each evaluation of each stage.

    Raises:
        MissingArtefactError: the strategy needs a teacher and there is none.
        EmptyWindowError: a stage has no row to learn from.
        ValueError: the form cannot be trained like this.
    """
    return StrategyRun(laboratory, strategy, student_form(form, laboratory), report).run()


def prepare_strategy(
    laboratory: Laboratory, strategy: ArmsRefreshSettings, *, form: FormName = "twin"
) -> None:
    """Write and label the rows that the strategy starts with, and train nothing.

    A search does so before its trials: then the teacher is asked in one place, and what cannot
    work fails before anything is trained.

    Raises:
        ValueError: the rows give the distillation nothing to learn from, or the initialiser's
            source does not fit the student.
    """
    run = StrategyRun(laboratory, strategy, student_form(form, laboratory), None)
    run.check()
    for rows in run.starting_rows():
        run.form.examples(rows)
        run.form.texts(rows.texts)


@dataclass
class StrategyRun:
    """One run of a strategy; also the nursery of its initialiser."""

    laboratory: Laboratory
    strategy: ArmsRefreshSettings
    form: StudentForm
    report: Callable[[str, dict[str, float]], None] | None = None

    def run(self) -> TrainedStudent:
        """Stage after stage."""
        self.check()
        before = len(self.laboratory.nodes)
        strategy = self.strategy
        weights = self.start()
        whole = strategy.init.kind == "supervised"
        if strategy.distil is not None:
            weights, whole = (self._distil(weights),), True
        distilled = weights if whole else ()
        if strategy.finetune is not None:
            finetuned = self._clicks("finetune", "id", strategy.finetune, start=weights)
            if strategy.self_training.enabled:
                finetuned = self._self_train(finetuned, weights)
            weights = (finetuned,)
        final = weights[-1]
        head = self._head(final) if strategy.head is not None else None
        nodes = {node.identity: node for node in reversed(self.laboratory.nodes[before:])}
        return TrainedStudent(self.form, distilled, final, head, tuple(reversed(nodes.values())))

    def check(self) -> None:
        """What can be known to fail before anything is trained.

        Raises:
            ValueError: see ``prepare_strategy``.
        """
        init = self.strategy.init
        init.check(self.spec, self.teacher[0] if isinstance(init, LayersStart) else None)
        distil = self.strategy.distil
        if distil is None or asks_teacher(self.strategy.objective):
            return
        if distil.transfer.kind != "natural":
            train, _ = self.laboratory.distil_rows(distil)
            if np.isnan(clicks(train.content[0])).all():
                raise ValueError(
                    f"distil.transfer {distil.transfer.kind!r} makes rows without clicks and the "
                    "objective gives soft labels no weight: there is nothing to learn; raise "
                    "objective.alpha or take another transfer set"
                )

    def starting_rows(self) -> list[Rows]:
        """Rows known before anything is trained."""
        strategy, laboratory = self.strategy, self.laboratory
        found: list[Rows] = []
        if strategy.init.kind == "supervised":
            found += laboratory.click_rows("ood", max_rows=strategy.supervised.max_rows)
        if strategy.distil is not None:
            found += laboratory.distil_rows(strategy.distil)
        if strategy.finetune is not None:
            found += laboratory.click_rows("id", max_rows=strategy.finetune.max_rows)
        return found

    # --- nursery --------------------------------------------------------------------------

    @property
    def spec(self) -> ModelSpec:
        """The student."""
        return self.form.spec

    @property
    def seed(self) -> int:
        """Of everything random."""
        return self.laboratory.seed

    @property
    def teacher(self) -> tuple[TeacherSpec, Path]:
        """The frozen teacher and its weights."""
        teacher = self.laboratory.teacher
        return TeacherSpec.model_validate(teacher.manifest["spec"]), teacher.weights

    def pretrain(self, spec: ModelSpec | None = None) -> Path:
        """Masked-language training of the student, or of another model over its texts."""
        examples, validation = self.form.language()
        job = StageJob(
            name="mlm",
            model=spec or self.spec,
            task="mlm",
            examples=examples,
            validation=validation,
            stage=self.strategy.mlm,
            seed=self.seed,
            output=REPLACED,
            checkpoints=REPLACED,
        )
        return self._train(job)

    def supervise(self) -> Path:
        """Supervised training on stale clicks, from noise."""
        return self._clicks("supervised", "ood", self.strategy.supervised, start=())

    def make(self, name: str, write: Callable[[Path], None], *, key: object) -> Path:
        """A file of the laboratory."""
        return self.laboratory.make(name, write, key=key)

    def train(self, name: str, run: Callable[[Path, Path], StageResult], *, key: object) -> Path:
        """A stage of the initialiser's own, as a node of the laboratory."""
        identity = hash_value(["initialiser", name, key])
        return self.laboratory.train_node(name, run, identity=identity)

    @property
    def texts(self) -> Sequence[str]:
        """All product texts known, as the arms read them."""
        names = [feature.name for feature in self.laboratory.settings.select(kind="text")]
        table = self.laboratory.texts.table.select(names)
        return serialise_table(table).to_pylist() if names else []

    @property
    def tokenizers(self) -> tuple[Tokenizer, Tokenizer]:
        """The teacher's and the student's."""
        return open_tokenizer(self.laboratory.settings), self.laboratory.tokenizer

    @property
    def masked_teacher(self) -> Path | None:
        """The teacher's encoder after masked-language training, if its folder keeps it."""
        path = self.laboratory.teacher.path / MASKED
        return path if path.exists() else None

    # --- stages ---------------------------------------------------------------------------

    def start(self) -> tuple[Path, ...]:
        """Weights to start from; without an encoder there is nothing to pre-train."""
        init = self.strategy.init
        if init.kind != "supervised" and not isinstance(init, RandomStart):
            if not self.form.has_encoder:
                logger.info("init %s: no encoder to initialise, starting from noise", init.kind)
                return ()
            if self.laboratory.texts.table.num_rows == 0:
                logger.info("init %s: no text is known yet, starting from noise", init.kind)
                return ()
        return init.weights(self)

    def _distil(self, start: tuple[Path, ...]) -> Path:
        distil = self.strategy.distil
        assert distil is not None
        train, validation = self.laboratory.distil_rows(distil)
        return self._stage(
            "distil",
            distil.stage,
            train,
            validation,
            start=start,
            objective=self.strategy.objective,
            stop_on="soft_loss",
        )

    def _clicks(
        self, name: str, source: str, stage: StageSettings, *, start: tuple[Path, ...]
    ) -> Path:
        rows = self.laboratory.click_rows(
            "ood" if source == "ood" else "id", max_rows=stage.max_rows
        )
        return self._stage(name, stage, *rows, start=start)

    def _self_train(self, finetuned: Path, before: tuple[Path, ...]) -> Path:
        """Learn again from the fine-tuned student's own labels (papers.md S0.20)."""
        rounds = self.strategy.self_training
        _, validation = self.laboratory.click_rows("id", max_rows=None)
        rows = self._own_rows(finetuned, rounds)
        start = before if rounds.start == "distilled" and before else (finetuned,)
        return self._stage(
            "self_training",
            rounds.stage,
            rows,
            validation,
            start=start,
            objective=rounds.objective if rounds.labels == "soft" else None,
        )

    def _own_rows(self, finetuned: Path, rounds: ArmsSelfTrainingSettings) -> Rows:
        """Stale rows, recent rows or both, labelled by the student."""
        laboratory = self.laboratory
        finetune = self.strategy.finetune
        assert finetune is not None
        labels = rounds.model_dump(include={"on", "labels", "min_confidence", "true_labels"})
        distil = self.strategy.distil
        limits = (distil.max_rows if distil is not None else None, finetune.max_rows)
        key = f"own.{hash_file(finetuned)}.{limits}.{labels}.{rounds.true_label_share}"

        def read() -> tuple[pa.Table, NDArray[np.float32] | None]:
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
            asked = Rows(f"{key}.asked", laboratory.texts, lambda: (frame, None))
            own = self.form.logits(asked, finetuned)
            return pseudo_labelled(frame, own, is_recent=is_recent, rounds=rounds)

        return Rows(laboratory.key("self_training", key), laboratory.texts, read)

    def _head(self, weights: Path) -> Path | None:
        """The head alone over the finished vectors, on every recent row, several times."""
        if not isinstance(self.form, TwinForm):
            return None
        assert self.strategy.head is not None
        vectors = self.vectors(weights)
        return self.train_head(weights, vectors, self.strategy.head)

    def vectors(self, weights: Path) -> Path:
        """Vectors of every known text in both roles, from these arms."""
        laboratory, spec = self.laboratory, self.spec
        if not isinstance(spec, TwinSpec):
            empty = VectorCache(
                np.empty(0, np.int64), np.empty((0, 0), np.float32), np.empty((0, 0), np.float32)
            )
            return laboratory.make("none.vectors", empty.save, key="none")
        texts = laboratory.text_file(laboratory.texts)

        def encode(destination: Path) -> None:
            encode_texts(load_model(spec, weights), spec, texts, destination)

        return laboratory.make("vectors", encode, key=(hash_file(weights), hash_file(texts)))

    def train_head(self, weights: Path, vectors: Path, stage: StageSettings) -> Path:
        """A head over these vectors, from the student's own."""
        laboratory, form = self.laboratory, self.form
        assert isinstance(form, TwinForm)
        settings = laboratory.settings
        objective = settings.student.head_refresh.objective
        key = laboratory.key("head", stage.max_rows, form.spec.model_dump(mode="json"))

        def write(destination: Path) -> None:
            rows = split_rows(settings, laboratory.id_frame, max_rows=stage.max_rows)
            soft = None
            if asks_teacher(objective):
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
            seed=self.seed,
            output=REPLACED,
            checkpoints=REPLACED,
        )
        return self._train(job)

    def _stage(
        self,
        name: str,
        stage: StageSettings,
        train: Rows,
        validation: Rows,
        *,
        start: tuple[Path, ...],
        objective: ObjectiveSettings | None = None,
        stop_on: StopOn = "auc",
    ) -> Path:
        """One stage on clicks or soft labels, stopped on its own target (papers.md S0.21)."""
        job = StageJob(
            name=name,
            model=self.spec,
            task="clicks",
            examples=self.form.examples(train),
            validation=self.form.examples(validation),
            texts=self.form.texts(train.texts),
            objective=objective,
            stage=stage,
            initial=start,
            stop_on=stop_on,
            seed=self.seed,
            output=REPLACED,
            checkpoints=REPLACED,
        )
        return self._train(job)

    def _train(self, job: StageJob) -> Path:
        report: Report | None = None
        if (tell := self.report) is not None:

            def report(measures: object) -> None:
                assert isinstance(measures, dict)
                tell(job.name, measures)

        return self.laboratory.train(job, report=report)


def asks_teacher(objective: ObjectiveSettings) -> bool:
    """Whether soft labels or inner features of the teacher count in this objective."""
    return objective.needs_teacher


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

"""Run a strategy: initialise, distil, fine-tune, self-train, and once more the head.

The one way to run a strategy: the arms refresh, ``driftline search`` and ``driftline study`` call
it. Every stage is a node of the laboratory, so what was trained before is not trained again.
"""

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from driftline.pipelines.laboratory import Laboratory
from driftline.pipelines.laboratory_nodes import Node
from driftline.pipelines.laboratory_rows import Rows
from driftline.pipelines.pseudo_labels import own_rows
from driftline.pipelines.strategy_head import train_head
from driftline.pipelines.strategy_matches import match_keys
from driftline.pipelines.strategy_nursery import StudentNursery
from driftline.pipelines.strategy_stages import Stages, Tell
from driftline.pipelines.student_forms import FormName, StudentForm, TwinForm, student_form
from driftline.pipelines.training_sets import clicks
from driftline.platform.initialisers import LayersStart, RandomStart
from driftline.platform.settings import ArmsRefreshSettings

logger = logging.getLogger(__name__)


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
    report: Tell | None = None,
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
        ValueError: the form cannot be trained like this; see ``check_strategy``.
    """
    return StrategyRun(laboratory, strategy, student_form(form, laboratory), report).run()


def check_strategy(
    laboratory: Laboratory, strategy: ArmsRefreshSettings, *, form: FormName = "twin"
) -> None:
    """Refuse what can be known to fail, before the teacher is asked and anything is trained.

    Raises:
        ValueError: a match is impossible between student and teacher, the initialiser's source
            does not fit the student, or the rows give the distillation nothing to learn from.
    """
    StrategyRun(laboratory, strategy, student_form(form, laboratory)).check()


def prepare_strategy(
    laboratory: Laboratory, strategy: ArmsRefreshSettings, *, form: FormName = "twin"
) -> None:
    """Write and label the rows that the strategy starts with, and train nothing.

    A search does so before its trials: then the teacher is asked in one place, and what cannot
    work fails before anything is trained. Of several strategies, let ``keep_features`` know all and
    prepare those with matches first: then each row goes through the teacher once.

    Raises:
        ValueError: see ``check_strategy``.
    """
    run = StrategyRun(laboratory, strategy, student_form(form, laboratory))
    run.check()
    for rows in run.starting_rows():
        run.form.examples(rows)
        run.form.texts(rows.texts)


@dataclass
class StrategyRun:
    """One run of a strategy."""

    laboratory: Laboratory
    strategy: ArmsRefreshSettings
    form: StudentForm
    report: Tell | None = None

    @cached_property
    def stages(self) -> Stages:
        """Trains one stage."""
        return Stages(self.laboratory, self.form, self.report)

    def run(self) -> TrainedStudent:
        """Stage after stage."""
        self.check()
        before = len(self.laboratory.nodes)
        strategy = self.strategy
        weights = self.start()
        whole = strategy.init.is_whole
        if strategy.distil is not None:
            distilled = self.stages.distil(strategy.distil, strategy.objective, start=weights)
            weights, whole = (distilled,), True
        before_finetuning = weights if whole else ()
        if strategy.finetune is not None:
            finetuned = self.stages.clicks("finetune", "id", strategy.finetune, start=weights)
            if strategy.self_training.enabled:
                finetuned = self._self_train(finetuned, weights)
            weights = (finetuned,)
        final = weights[-1]
        head = None
        if strategy.head is not None and isinstance(self.form, TwinForm):
            head = train_head(self.stages, final, strategy.head)
        nodes = {node.identity: node for node in reversed(self.laboratory.nodes[before:])}
        return TrainedStudent(
            self.form, before_finetuning, final, head, tuple(reversed(nodes.values()))
        )

    def check(self) -> None:
        """See ``check_strategy``; the laboratory will keep what the strategy's matches need."""
        strategy = self.strategy
        self.laboratory.keep(match_keys(self.form, strategy))
        needs_teacher = isinstance(strategy.init, LayersStart)
        strategy.init.check(self.form.spec, self.stages.teacher_spec if needs_teacher else None)
        strategy.init.check_sources(StudentNursery(self.stages, strategy))
        distil = strategy.distil
        if distil is None or strategy.objective.needs_teacher:
            return
        if distil.transfer.kind != "natural":
            train, _ = self.laboratory.distil_rows(distil)
            if np.isnan(clicks(train.frame)).all():
                raise ValueError(
                    f"distil.transfer {distil.transfer.kind!r} makes rows without clicks and the "
                    "objective gives soft labels no weight: there is nothing to learn; raise "
                    "objective.alpha or take another transfer set"
                )

    def starting_rows(self) -> list[Rows]:
        """Rows known before anything is trained."""
        strategy, laboratory = self.strategy, self.laboratory
        found: list[Rows] = []
        if "supervised" in strategy.init.recipes:
            found += laboratory.click_rows("ood", max_rows=strategy.supervised.max_rows)
        if strategy.distil is not None:
            features = bool(strategy.objective.matches)
            found += laboratory.distil_rows(strategy.distil, features=features)
        if strategy.finetune is not None:
            found += laboratory.click_rows("id", max_rows=strategy.finetune.max_rows)
        return found

    def start(self) -> tuple[Path, ...]:
        """Weights to start from; without an encoder there is nothing to pre-train."""
        init = self.strategy.init
        if not init.is_whole and not isinstance(init, RandomStart):
            if not self.form.has_encoder:
                logger.info("init %s: no encoder to initialise, starting from noise", init.kind)
                return ()
            if self.laboratory.texts.table.num_rows == 0:
                logger.info("init %s: no text is known yet, starting from noise", init.kind)
                return ()
        return init.weights(StudentNursery(self.stages, self.strategy))

    def _self_train(self, finetuned: Path, before: tuple[Path, ...]) -> Path:
        """Learn again from the fine-tuned student's own labels (papers.md S0.20)."""
        rounds = self.strategy.self_training
        _, validation = self.laboratory.click_rows("id", max_rows=None)
        start = before if rounds.start == "distilled" and before else (finetuned,)
        return self.stages.rows(
            "self_training",
            rounds.stage,
            own_rows(self.form, self.strategy, finetuned),
            validation,
            start=start,
            objective=rounds.objective if rounds.labels == "soft" else None,
        )

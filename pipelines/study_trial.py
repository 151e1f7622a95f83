"""One trial of a study: train a cell's model with a seed, measure it, resample the requests."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from driftline.pipelines.labels import SoftLabels
from driftline.pipelines.laboratory import Laboratory
from driftline.pipelines.laboratory_nodes import Node
from driftline.pipelines.market_moment import default_moment
from driftline.pipelines.provenance import NOT_MODEL_SETTINGS
from driftline.pipelines.strategy import prepare_strategy, train_strategy
from driftline.pipelines.strategy_matches import match_keys
from driftline.pipelines.strategy_measures import measure_student, measure_teacher
from driftline.pipelines.student_forms import student_form
from driftline.pipelines.study_resamples import Luck, StudyTests
from driftline.pipelines.study_results import Trial
from driftline.pipelines.study_sizes import measure_size
from driftline.pipelines.training_sets import newest
from driftline.platform.artefacts import hash_value
from driftline.platform.distillation.keys import FeatureKey
from driftline.platform.kinds import foreign_code
from driftline.platform.settings import DistilSettings, DriftlineSettings, parse_settings
from driftline.platform.stages import StageResult
from driftline.platform.study_parts import Form
from driftline.platform.transfer.sets import TransferSource
from driftline.platform.transfer.similarity import corpus_similarity, frame_words
from driftline.platform.workspace import Workspace

FORMAT: Final = 1  # raise when the same trial would give other numbers
LABORATORY: Final = "laboratory"


@dataclass(frozen=True)
class TrialJob:
    """What to train and measure, as a value that travels to a worker."""

    cell: str
    seed: int
    form: Form
    teacher: str | None
    """Listen to this member of the ensemble alone."""
    settings: DriftlineSettings
    test_hours: float
    num_bootstrap: int
    keys: tuple[FeatureKey, ...] = ()
    """Inner tensors that the teacher keeps for all trials of the market."""

    @property
    def key(self) -> str:
        """Changes whenever the trial would give other numbers."""
        settings = self.settings.model_dump(mode="json", exclude=set(NOT_MODEL_SETTINGS))
        deciding = {name: value for name, value in self.to_json().items() if name != "keys"}
        if code := foreign_code(self.settings):
            deciding["code"] = code
        return hash_value([FORMAT, deciding | {"settings": settings}])[:16]

    def to_json(self) -> dict[str, Any]:
        """Plain values; inverse of ``from_json``."""
        keys = [[key.kind, key.place] for key in self.keys]
        return vars(self) | {"settings": self.settings.model_dump(mode="json"), "keys": keys}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "TrialJob":
        """Read what ``to_json`` gave."""
        settings = parse_settings(raw["settings"], origin=f"trial {raw['cell']}")
        keys = tuple(FeatureKey(kind, place) for kind, place in raw["keys"])
        return cls(**{**raw, "settings": settings, "keys": keys})


def laboratory_of(job: TrialJob) -> Laboratory:
    """The laboratory of a trial; all trials of one market share their files."""
    settings = job.settings
    as_of = default_moment(settings, slice_hours=job.test_hours, num_slices=1)
    laboratory = Laboratory.open(
        settings,
        as_of=as_of,
        folder=Workspace.of(settings).root / LABORATORY,
        seed=job.seed,
        slice_hours=job.test_hours,
    )
    if job.teacher is not None:
        laboratory.store = SoftLabels.open(settings, teacher=job.teacher)
    laboratory.keep(job.keys)
    return laboratory


def trial_keys(job: TrialJob) -> tuple[FeatureKey, ...]:
    """Inner tensors of the teacher that the matches of a trial compare with; none without matches.

    Raises:
        SettingsError: a match is impossible; nothing was labelled or trained then.
    """
    strategy = job.settings.student.arms_refresh
    if job.form == "teacher" or job.form == "encoder" or not strategy.objective.matches:
        return ()
    return match_keys(student_form(job.form, laboratory_of(job)), strategy)


def check_tests(job: TrialJob, *, checked: set[str]) -> None:
    """Make sure that the test rows of a trial can rank students; equal rows are looked at once.

    Args:
        job: The trial.
        checked: Names of rows that were found good, to which those of this trial are added.

    Raises:
        SettingsError: the rows lack a click or a non-click.
    """
    if job.form == "encoder":
        return
    laboratory = laboratory_of(job)
    name = laboratory.key(job.test_hours)
    if name not in checked:
        laboratory.check_judges(num_slices=1)
        checked.add(name)


def prepare_trial(job: TrialJob) -> None:
    """Label the rows of a trial and find what is wrong with it, before anything is trained.

    Raises:
        DriftlineError: the trial cannot be run; so does a ``ValueError``.
    """
    if job.form == "teacher" or job.form == "encoder":
        return
    strategy = job.settings.student.arms_refresh
    prepare_strategy(laboratory_of(job), strategy, form=job.form)


def run_trial(job: TrialJob) -> Trial:
    """Train and measure; what other trials have trained is found."""
    if job.form == "encoder":
        return measure_size(job.settings, cell=job.cell, seed=job.seed)
    laboratory = laboratory_of(job)
    tests = StudyTests(laboratory)
    luck = Luck(tests, job.num_bootstrap)
    if job.form == "teacher":
        measures, _ = measure_teacher(tests)
        return Trial(job.cell, job.seed, measures, luck.of_teacher(), {"form": "teacher"})
    strategy = job.settings.student.arms_refresh
    student = train_strategy(laboratory, strategy, form=job.form)
    measures, _ = measure_student(student, tests)
    rows: dict[str, float] = {}
    provenance: dict[str, Any] | None = None
    if strategy.distil is not None:
        rows, provenance = transfer_measures(laboratory, strategy.distil)
    notes = {
        "form": job.form,
        "strategy": strategy.model_dump(mode="json"),
        "nodes": [node.to_json() for node in student.nodes],
        "transfer": provenance,
    }
    found = measures | stage_measures(student.nodes) | rows
    return Trial(job.cell, job.seed, found, luck.of_student(student), notes)


def transfer_measures(
    laboratory: Laboratory, distil: DistilSettings
) -> tuple[dict[str, float], dict[str, Any]]:
    """Size of the transfer set, and how far its words lie from those of the recent rows.

    The similarity is the one of papers.md S1.18 between the transfer set and the rows that the
    student is fine-tuned on. The set is made again, which takes less time than to label it.
    """
    asked = newest(laboratory.asked(laboratory.training_rows(distil.on).train), distil.max_rows)
    source = TransferSource(asked, laboratory.texts.table, laboratory.tokenizer)
    rows = distil.transfer.build(source, seed=laboratory.seed)
    measures = {
        "transfer_rows": float(rows.provenance["num_rows"]),
        "transfer_tokens": float(rows.provenance["num_tokens"]),
    }
    own = frame_words(rows.frame, rows.texts)
    target = frame_words(laboratory.id.train, laboratory.texts.table)
    if own and target and len(own | target) > 1:
        measures["similarity"] = corpus_similarity(own, target)
    return measures, rows.provenance


def stage_measures(nodes: Sequence[Node]) -> dict[str, float]:
    """Updates and core-seconds of the distillation; masked-word accuracy of dual training."""
    found: dict[str, float] = {}
    for node in nodes:
        if node.result is None:
            continue
        if node.name == "distil":
            found["updates"] = float(node.result.num_steps)
            found["distil_seconds"] = node.core_seconds
        if node.name == "dual_vocabulary":
            found |= _at_best(node.result)
    return found


def _at_best(result: StageResult) -> dict[str, float]:
    for row in result.history:
        if row.get("step") == result.best_step and "accuracy" in row:
            return {"mlm_accuracy": row["accuracy"]}
    return {}

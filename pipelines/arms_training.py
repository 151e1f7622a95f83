"""What an arms refresh adds to a strategy: it ends with a head that knows the last hours."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from driftline.features.log import ImpressionLog
from driftline.pipelines.head_training import HeadStart, train_head
from driftline.pipelines.laboratory import Laboratory
from driftline.pipelines.laboratory_rows import Rows
from driftline.pipelines.strategy import StrategyRun, TrainedStudent
from driftline.pipelines.strategy_head import text_vectors
from driftline.pipelines.student_forms import TwinForm
from driftline.pipelines.training_sets import replayed_frame
from driftline.platform.bundle import Calibration, VectorCache
from driftline.platform.errors import EmptyWindowError
from driftline.platform.examples import open_pairs
from driftline.platform.models.spec import HeadOnlySpec
from driftline.platform.ray_runtime import fit
from driftline.platform.scorer import Scorer, load_head
from driftline.platform.settings import DriftlineSettings
from driftline.platform.stages import StageJob, StageResult
from driftline.platform.tabular import TabularEncoder
from driftline.platform.training import Report
from driftline.platform.windows import Window, format_time
from driftline.platform.workspace import Workspace

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class FreshArms:
    """New arms, their vectors, and the head they are born with."""

    student: TrainedStudent
    vectors: Path
    head: Path
    """Weights from the strategy; the head refresh may start over from these."""
    tabular: TabularEncoder
    scorer: Scorer
    """Of the head to publish, not calibrated: caught up, if the settings say so."""
    published_head: Path
    """Its weights."""
    num_rows: int
    core_seconds: float


def arms_laboratory(
    settings: DriftlineSettings, *, as_of: datetime, progress: Progress | None
) -> Laboratory:
    """A laboratory in the scratch folder of one refresh, whose stages run through Ray Train."""
    num_workers = settings.student.arms_refresh.num_workers

    def run(job: StageJob, report: Report | None) -> StageResult:
        return fit(job, num_workers=num_workers, ray=settings.ray, progress=progress)

    folder = Workspace.of(settings).scratch / f"arms-{format_time(as_of).replace(':', '')}"
    return Laboratory.open(settings, as_of=as_of, folder=folder, seed=settings.seed, run=run)


def train_arms(laboratory: Laboratory, *, progress: Progress | None = None) -> FreshArms:
    """Run the strategy of the settings, encode every known text, let the head catch up.

    Raises:
        MissingArtefactError: the strategy needs a teacher and there is none.
        EmptyWindowError: no matured impression to learn from.
    """
    strategy = laboratory.settings.student.arms_refresh
    form = TwinForm(laboratory)
    run = StrategyRun(laboratory, strategy, form)
    logger.debug("the frozen teacher is %s", laboratory.teacher.hash)  # or there is none: fail now
    student = run.run()
    vectors = text_vectors(laboratory, form.spec, student.weights)
    head = student.head or student.weights
    spec = HeadOnlySpec(head=form.head)
    born = Scorer(
        load_head(spec, head),
        VectorCache.load(vectors),
        form.tabular,
        Calibration(laboratory.settings.labels.negative_keep_rate),
    )
    arms = FreshArms(
        student=student,
        vectors=vectors,
        head=head,
        tabular=form.tabular,
        scorer=born,
        published_head=head,
        num_rows=sum(len(open_pairs(form.examples(rows))) for rows in _learned(run)),
        core_seconds=sum(node.core_seconds for node in student.nodes if node.result is not None),
    )
    return _caught_up(laboratory, arms, spec, progress=progress) if strategy.catch_up else arms


def _learned(run: StrategyRun) -> list[Rows]:
    """The rows that count as learned from: of distillation and of fine-tuning."""
    return run.starting_rows()[::2]


def _caught_up(
    laboratory: Laboratory, arms: FreshArms, spec: HeadOnlySpec, *, progress: Progress | None
) -> FreshArms:
    """One head refresh on top: the champion has had one every hour."""
    settings = laboratory.settings
    refresh = settings.student.head_refresh
    start = ImpressionLog.open(Workspace.of(settings).clean, settings).span.start
    length = timedelta(hours=refresh.window_hours)
    frame = replayed_frame(
        settings,
        Window(start, laboratory.as_of).last(length),
        as_of=laboratory.as_of,
        replay_share=refresh.replay_share,
    )
    try:
        result = train_head(
            settings,
            HeadStart(arms.head, spec, arms.tabular, arms.vectors),
            frame,
            scratch=laboratory.folder / "catch-up",
            progress=progress,
        )
    except EmptyWindowError as error:
        logger.info("the new head does not catch up: %s", error)
        return arms
    return FreshArms(
        student=arms.student,
        vectors=arms.vectors,
        head=arms.head,
        tabular=arms.tabular,
        scorer=result.scorer,
        published_head=result.weights,
        num_rows=arms.num_rows,
        core_seconds=arms.core_seconds + result.core_seconds,
    )

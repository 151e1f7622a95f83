"""The cadence service: values, head and arms on the schedules of ``driftline plan``.

A scheduler (APScheduler, its state in SQLite) decides when; a warm Ray actor for each kind of job
does the work, so that the hourly refresh pays for imports once. Each run has a row in the run log
and a log file of its own.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import ray
from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.jobstores.sqlalchemy import SQLAlchemyJobStore
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.date import DateTrigger
from apscheduler.triggers.interval import IntervalTrigger

from driftline.pipelines.records import read_records
from driftline.pipelines.run_log import Outcome, RunLog
from driftline.pipelines.schedules import JOB_KINDS, Clock, JobKind, intervals
from driftline.platform.priority import step_back
from driftline.platform.registry import read_champion
from driftline.platform.settings import DriftlineSettings, parse_settings
from driftline.platform.windows import floor_time, format_time, parse_time
from driftline.platform.workspace import Workspace

logger = logging.getLogger(__name__)

Step = Callable[[DriftlineSettings, datetime], str]
"""Does one job as of a moment of event time; gives one line about the outcome."""

RAY_NAMESPACE: Final = "driftline"
RUN_DUE: Final = "driftline.pipelines.cadence:run_due"
"""Named, because the scheduler keeps its jobs in a file."""


# --- the work -----------------------------------------------------------------------------


def materialize(settings: DriftlineSettings, as_of: datetime) -> str:
    """Bring the newest values online, and the vectors of texts that came with them."""
    from driftline.pipelines.catalogue_vectors import encode_catalogue
    from driftline.pipelines.prepare import materialize_features

    materialize_features(settings, as_of=as_of)
    if read_champion(Workspace.of(settings).bundles) is None:
        return "online"
    report = encode_catalogue(settings, as_of=as_of)
    return f"online; {report.num_encoded:,} new texts encoded"


def head(settings: DriftlineSettings, as_of: datetime) -> str:
    """Refresh the head."""
    from driftline.pipelines.refresh_head import refresh_head

    record = refresh_head(settings, as_of=as_of)
    return f"{record.decision}: {'; '.join(record.reasons)}"


def arms(settings: DriftlineSettings, as_of: datetime) -> str:
    """Refresh the arms, and the head with them."""
    from driftline.pipelines.refresh_arms import refresh_arms

    record = refresh_arms(settings, as_of=as_of)
    return f"{record.decision}: {'; '.join(record.reasons)}"


STEPS: Final[Mapping[JobKind, Step]] = {"materialize": materialize, "head": head, "arms": arms}
WORKERS: Final[Mapping[JobKind, str]] = {"materialize": "hourly", "head": "hourly", "arms": "arms"}
"""Which worker does a job. What is due each hour takes turns, because both need new counters."""


class CadenceWorker:
    """Runs jobs one after the other; stays warm in between. A Ray actor."""

    def __init__(self, market: dict[str, Any]) -> None:
        step_back()
        self._settings = parse_settings(market, origin="of the cadence service")

    def run(self, kind: JobKind, as_of: str, log: str) -> str:
        """Do the job, logging to a file of its own; gives one line about the outcome."""
        handler = logging.FileHandler(log)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
        ours = logging.getLogger("driftline")
        ours.setLevel(logging.INFO)
        ours.addHandler(handler)
        try:
            return STEPS[kind](self._settings, parse_time(as_of))
        except Exception:
            ours.exception("failed")  # and the caller gets it, too
            raise
        finally:
            ours.removeHandler(handler)
            handler.close()


# --- the schedule -------------------------------------------------------------------------


@dataclass(frozen=True)
class CadencePaths:
    """Where the service keeps its state, below ``Workspace.state``."""

    root: Path

    @property
    def scheduler(self) -> Path:
        """APScheduler's SQLite file: which job is due when."""
        return self.root / "scheduler.db"

    @property
    def runs(self) -> Path:
        """The run log."""
        return self.root / "runs.db"

    def log(self, kind: JobKind, as_of: datetime, *, now: datetime) -> Path:
        """Log of one run."""
        stamps = [format_time(moment.replace(microsecond=0)) for moment in (as_of, now)]
        name = f"{kind}-{'-at-'.join(stamps)}.log".replace(":", "")
        return self.root / "logs" / name


class CadenceService:
    """Schedules the jobs of one market; Ray must be connected.

    Args:
        settings: The tiers give the intervals.
        clock: Event time as a function of wall time.
    """

    def __init__(self, settings: DriftlineSettings, *, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._intervals = intervals(settings)
        self._paths = CadencePaths(Workspace.of(settings).state)
        self._runs = RunLog(self._paths.runs)
        self._workers: dict[str, Any] = {}
        self._workers_lock = threading.Lock()
        self._paths.root.mkdir(parents=True, exist_ok=True)
        (self._paths.root / "logs").mkdir(exist_ok=True)
        store = SQLAlchemyJobStore(url=f"sqlite:///{self._paths.scheduler}")
        self._scheduler = BackgroundScheduler(
            jobstores={"default": store},
            executors={"default": ThreadPoolExecutor(len(JOB_KINDS))},
            timezone=UTC,
        )

    def start(self, *, now: datetime) -> None:
        """Start the scheduler; jobs that fell due while nothing ran are run once."""
        if interrupted := self._runs.interrupt_unfinished(now=now):
            logger.warning("%d runs of an earlier service were interrupted", interrupted)
        _SERVICES[self._settings.name] = self
        self._scheduler.start(paused=True)
        for kind in JOB_KINDS:
            self._plan(kind, now=now)
        self._scheduler.resume()

    def stop(self) -> None:
        """Stop the scheduler. A run under way ends with its actor and is repeated later."""
        self._scheduler.shutdown(wait=False)
        _SERVICES.pop(self._settings.name, None)

    def run(self, kind: JobKind, *, now: datetime) -> None:
        """Do one job now and write down how it went; a failure is recorded, not raised."""
        as_of = self._clock.as_of(now, interval=self._intervals[kind])
        log = self._paths.log(kind, as_of, now=now)
        run_id = self._runs.begin(kind, as_of=as_of, now=now, log=log)
        logger.info("%s as of %s started", kind, format_time(as_of))
        outcome: Outcome = "failed"
        try:
            message = ray.get(self._worker(kind).run.remote(kind, format_time(as_of), str(log)))
        except ray.exceptions.RayTaskError as error:
            message = f"{type(error.cause).__name__}: {error.cause}"
        except ray.exceptions.RayError as error:
            message = f"{type(error).__name__}: {error}"
            self._workers.pop(WORKERS[kind], None)
        else:
            outcome = "done"
        self._runs.end(run_id, outcome, message, now=datetime.now(UTC))
        logger.info("%s as of %s %s: %s", kind, format_time(as_of), outcome, message)

    def _plan(self, kind: JobKind, *, now: datetime) -> None:
        """Keep the job's due time from before, unless its interval or the clock has changed.

        Runs stand on whole intervals of event time; one that is overdue is run at once, beside
        that raster.
        """
        interval = self._clock.wall_interval(self._intervals[kind])
        arguments = (self._settings.name, kind, self._clock.identity)
        known = self._scheduler.get_job(kind)
        if known is not None and (known.trigger.interval, known.args) == (interval, arguments):
            return
        origin = self._clock.wall_time(floor_time(self._clock.start, self._intervals[kind]))
        due = self._due(kind, now=now)
        self._scheduler.add_job(
            RUN_DUE,
            IntervalTrigger(seconds=interval.total_seconds(), start_date=origin),
            args=arguments,
            id=kind,
            replace_existing=True,
            next_run_time=origin + -((origin - max(due, now)) // interval) * interval,
            coalesce=True,
            max_instances=1,
            misfire_grace_time=max(1, round(interval.total_seconds())),
        )
        if due <= now:
            once = {"id": f"{kind}-once", "replace_existing": True, "misfire_grace_time": None}
            self._scheduler.add_job(RUN_DUE, DateTrigger(now), args=arguments, **once)

    def _due(self, kind: JobKind, *, now: datetime) -> datetime:
        """When a job that was never scheduled runs first.

        Values at once. A model when its part of the champion gets older than it may be: at once if
        it is already, or if there are no arms yet; the head waits for arms.
        """
        if kind == "materialize":
            return now
        kinds = ("arms",) if kind == "arms" else ("arms", "head")
        records = [r for r in read_records(Workspace.of(self._settings)) if r.kind in kinds]
        if not records:
            return now if kind == "arms" else now + self._clock.wall_interval(self._intervals[kind])
        newest = max(parse_time(record.as_of) for record in records)
        return self._clock.wall_time(newest + self._intervals[kind])

    def _worker(self, kind: JobKind) -> Any:
        name = WORKERS[kind]
        with self._workers_lock:
            if name not in self._workers:
                actor = ray.remote(num_cpus=0, max_restarts=-1)(CadenceWorker)
                options = actor.options(
                    name=f"{self._settings.name}-{name}",
                    namespace=RAY_NAMESPACE,
                    get_if_exists=True,
                )
                self._workers[name] = options.remote(self._settings.model_dump(mode="json"))
            return self._workers[name]


_SERVICES: dict[str, CadenceService] = {}
"""The running service by market: a stored job can only name a function, not hold an object."""


def run_due(name: str, kind: JobKind, clock: str) -> None:
    """What the scheduler calls. ``clock`` only tells schedules of different clocks apart."""
    _SERVICES[name].run(kind, now=datetime.now(UTC))

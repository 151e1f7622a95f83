"""``driftline study``: run one study and write its table, its plot and what became of the claims.

A study is killed and called again without loss: finished trials are kept one file each, and what
unfinished ones had trained lies in the market's laboratory.
"""

import logging
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from driftline.pipelines.provenance import code_version, machine
from driftline.pipelines.study_market import (
    ProgressBar,
    cell_settings,
    market_name,
    prepare_market,
)
from driftline.pipelines.study_plot import draw_study
from driftline.pipelines.study_results import StudyResults, Trial, TrialFolder
from driftline.pipelines.study_table import StudyTable, markdown
from driftline.pipelines.study_trial import (
    TrialJob,
    check_tests,
    prepare_trial,
    run_trial,
    trial_keys,
)
from driftline.platform.artefacts import whole_file, write_json
from driftline.platform.distillation.keys import FeatureKey
from driftline.platform.errors import DriftlineError, SettingsError
from driftline.platform.settings import Feature
from driftline.platform.study_settings import StudySettings, load_study

logger = logging.getLogger(__name__)

PRESETS: Final = Path(__file__).parents[1] / "configs" / "studies"
FOLDER: Final = Path("runs/studies")


@dataclass(frozen=True)
class StudyRequest:
    """What the command was asked for."""

    path: Path
    folder: Path = FOLDER
    """Markets, trials and results of all studies."""
    results: Path | None = None
    """Another folder for table, JSON and plot, such as ``configs/studies/results``."""
    overrides: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    only: tuple[str, ...] = ()
    """Variants or cells; all when empty."""
    at_once: int = 1
    """Trials that run at the same time, each in a Ray worker of one processor; 1 needs no Ray."""

    @property
    def command(self) -> str:
        """The same as a person would type it."""
        words = ["driftline", "study", str(self.path)]
        words += [f"--set={override}" for override in self.overrides]
        words += [f"--seeds={','.join(map(str, self.seeds))}"] if self.seeds else []
        words += [f"--only={name}" for name in self.only]
        words += [f"--at-once={self.at_once}"] if self.at_once != 1 else []
        return shlex.join(words)


@dataclass(frozen=True)
class StudyReport:
    """What a study gave, and where it was written."""

    table: StudyTable
    markdown: Path
    json: Path
    picture: Path | None


@dataclass(frozen=True)
class _Planned:
    """A trial, and the name under which its result is kept."""

    job: TrialJob
    key: str
    """Of the settings as written; the job's own may know more (tiers measured on the log)."""


def run_study(request: StudyRequest, *, progress_bar: ProgressBar) -> StudyReport:
    """Train what is missing, measure, judge, write.

    Raises:
        SettingsError: the study, its market or a variant is wrong; nothing was started then.
        DriftlineError: a trial cannot be run; what other trials finished is kept.
    """
    request = replace(request, path=find_study(request.path))
    study = load_study(request.path, seeds=request.seeds)
    planned = [_Planned(job, job.key) for job in plan_trials(study, request)]
    folder = TrialFolder(request.folder / study.name / "trials")
    trials = {each.key: _read(folder, each) for each in planned}
    missing = [each for each in planned if trials[each.key] is None]
    num_done = len(planned) - len(missing)
    logger.info("study %s: %d trials, %d done before", study.name, len(planned), num_done)
    ready = _prepared(missing, progress_bar=progress_bar)
    with progress_bar(study.name) as progress:
        progress(num_done, len(planned))
        for each, trial in _run(ready, at_once=request.at_once):
            folder.write(trial, key=each.key)
            trials[each.key] = trial
            num_done += 1
            logger.info(
                "%s, seed %d: done (%d of %d)", trial.cell, trial.seed, num_done, len(planned)
            )
            progress(num_done, len(planned))
    results = StudyResults(trial for trial in trials.values() if trial is not None)
    return write_report(study, results, request)


def plan_trials(study: StudySettings, request: StudyRequest) -> Iterator[TrialJob]:
    """All trials of the cells asked for, checked as far as settings can be.

    Raises:
        SettingsError: ``only`` names nothing, or a variant's settings are wrong.
    """
    known = {*study.cells, *study.variants}
    if unknown := [name for name in request.only if name not in known]:
        raise SettingsError(f"--only {unknown[0]}: no such variant, there are {sorted(known)}")
    for cell in study.cells.values():
        if request.only and not {cell.name, cell.variant} & set(request.only):
            continue
        settings = cell_settings(
            study,
            request.path,
            cell,
            overrides=request.overrides,
            root=request.folder.absolute() / "markets",
        )
        for seed in study.seeds:
            yield TrialJob(
                cell=cell.name,
                seed=seed,
                form=cell.form,
                teacher=cell.teacher,
                settings=settings,
                test_hours=study.test_hours,
                num_bootstrap=study.num_bootstrap,
            )


def _read(folder: TrialFolder, planned: _Planned) -> Trial | None:
    return folder.read(planned.job.cell, planned.job.seed, key=planned.key)


def _prepared(planned: Sequence[_Planned], *, progress_bar: ProgressBar) -> list[_Planned]:
    """Markets, teachers and labelled rows of all trials, before the first one is trained."""
    markets: dict[str, tuple[Feature, ...]] = {}
    ready = []
    for each in planned:
        settings = each.job.settings
        if each.job.form != "encoder":
            ensemble = [member.model_dump(mode="json") for member in settings.teacher.ensemble]
            name = f"{market_name(settings)} {ensemble}"
            if name not in markets:
                markets[name] = prepare_market(settings, progress_bar=progress_bar).features
            settings = settings.model_copy(update={"features": markets[name]})
        ready.append(replace(each, job=replace(each.job, settings=settings)))
    checked: set[str] = set()
    for each in ready:
        with _naming(each.job):
            check_tests(each.job, checked=checked)
    ready = _matching_first(ready)
    with progress_bar("rows and soft labels") as progress:
        for number, each in enumerate(ready):
            with _naming(each.job):
                prepare_trial(each.job)
            progress(number + 1, len(ready))
    return ready


def _matching_first(planned: Sequence[_Planned]) -> list[_Planned]:
    """Trials that match inner features first; all know what the others of their market need.

    So one pass of the teacher serves all.
    """
    wanted: dict[tuple[Path, str | None], set[FeatureKey]] = {}
    own = []
    for each in planned:
        with _naming(each.job):
            own.append(trial_keys(each.job))
        market = (each.job.settings.workspace, each.job.teacher)
        wanted.setdefault(market, set()).update(own[-1])
    found = []
    for each, keys in sorted(zip(planned, own, strict=True), key=lambda pair: not pair[1]):
        shared = wanted[each.job.settings.workspace, each.job.teacher] if keys else ()
        found.append(replace(each, job=replace(each.job, keys=tuple(sorted(shared, key=str)))))
    return found


@contextmanager
def _naming(job: TrialJob) -> Iterator[None]:
    """What is wrong with a trial is said with its variant."""
    try:
        yield
    except ValueError as error:
        raise SettingsError(f"variant {job.cell!r}: {error}") from error


def _run(planned: Sequence[_Planned], *, at_once: int) -> Iterator[tuple[_Planned, Trial]]:
    if at_once == 1 or len(planned) < 2:
        for each in planned:
            yield each, run_trial(each.job)
        return
    yield from _run_in_ray(planned, at_once=at_once)


def _run_in_ray(planned: Sequence[_Planned], *, at_once: int) -> Iterator[tuple[_Planned, Trial]]:
    """Trials in Ray workers. Two that begin alike do not train it twice: one waits for the other.

    The first error ends the study; what was finished before is kept.
    """
    import ray
    from ray.exceptions import RayTaskError

    from driftline.platform.ray_runtime import ray_session

    settings = planned[0].job.settings.ray
    with ray_session(settings.model_copy(update={"num_cpus": settings.num_cpus or at_once})):
        train = ray.remote(num_cpus=1)(_run_in_worker)
        waiting = {train.remote(each.job.to_json()): each for each in planned}
        while waiting:
            (ready, *_), _ = ray.wait(list(waiting))
            each = waiting.pop(ready)
            try:
                trial = ray.get(ready)
            except RayTaskError as error:
                for other in waiting:
                    ray.cancel(other)
                cause = getattr(error, "cause", None)
                raise cause if isinstance(cause, DriftlineError) else error  # noqa: B904
            yield each, trial


def _run_in_worker(raw: dict[str, Any]) -> Trial:
    return run_trial(TrialJob.from_json(raw))


# --- files --------------------------------------------------------------------------------


def write_report(study: StudySettings, results: StudyResults, request: StudyRequest) -> StudyReport:
    """Table, JSON and plot of the trials there are, in the study's folder and in ``results``."""
    table = StudyTable.of(study, results)
    picture = draw_study(study, results)
    origin = _origin(results, request)
    lines = [
        f"{origin['date']}, commit {origin['commit']}, {origin['machine']['cores']} cores of "
        f"{origin['machine']['model']}: `{request.command}`; {table.num_trials} trials, "
        f"{origin['core_seconds']:,.0f} core-seconds of training, "
        f"{origin['num_stages_trained']:,} of {origin['num_stages']:,} stages trained, the others "
        f"shared."
    ]
    page = markdown(table, origin=lines, picture=f"{study.name}.png" if picture else None)
    places = [request.folder / study.name, *([request.results] if request.results else [])]
    for place in places:
        with whole_file(place / f"{study.name}.md") as scratch:
            scratch.write_text(page)
        write_json(place / f"{study.name}.json", origin | table.to_json())
        if picture is not None:
            picture.write_png(place)
    return StudyReport(
        table,
        places[-1] / f"{study.name}.md",
        places[-1] / f"{study.name}.json",
        places[-1] / f"{study.name}.png" if picture is not None else None,
    )


def _origin(results: StudyResults, request: StudyRequest) -> dict[str, Any]:
    """Where the numbers come from."""
    totals = {
        name: sum(trial.measures.get(measure, 0.0) for trial in results.trials)
        for name, measure in (
            ("core_seconds", "new_core_seconds"),
            ("num_stages", "num_stages"),
            ("num_stages_trained", "num_stages_trained"),
        )
    }
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "commit": code_version(),
        "command": request.command,
        "machine": machine(),
        "core_seconds": round(totals["core_seconds"], 1),
        "num_stages": int(totals["num_stages"]),
        "num_stages_trained": int(totals["num_stages_trained"]),
    }


def find_study(path: Path) -> Path:
    """The file, or the preset of that name.

    Raises:
        SettingsError: there is neither.
    """
    preset = PRESETS / f"{path.name}.yaml"
    if not path.exists() and not path.suffix and preset.exists():
        return preset
    if not path.exists():
        raise SettingsError(
            f"study {path}: there is no such file, nor a study of that name; "
            "`driftline study --list` names them"
        )
    return path


def list_studies() -> list[tuple[str, str]]:
    """Name and title of every preset."""
    studies = [load_study(path) for path in sorted(PRESETS.glob("*.yaml"))]
    return [(study.name, study.title) for study in studies]

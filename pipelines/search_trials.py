"""Trials of a search on Ray Tune: each trains and measures one strategy with one seed.

A trial trains in its own process, unless the strategy asks for a worker group; then the trial
holds a sliver of a processor and the group holds the rest. What a trial found stands in one JSON
file, so a search that was killed reads what is there.
"""

import io
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import ray
import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from driftline.pipelines.laboratory import Laboratory
from driftline.pipelines.laboratory_nodes import Runner, run_here
from driftline.pipelines.strategy import train_strategy
from driftline.pipelines.strategy_measures import TestSets, measure_student
from driftline.pipelines.student_forms import FormName
from driftline.platform.artefacts import hash_value, read_json, whole_file, write_json
from driftline.platform.errors import ResourceError, TrainingError
from driftline.platform.ray_runtime import cpus_per_worker, fit
from driftline.platform.search_settings import Range
from driftline.platform.settings import (
    ArmsRefreshSettings,
    DriftlineSettings,
    SearchSettings,
    TuningSettings,
    load_settings,
)
from driftline.platform.stages import StageJob, StageResult
from driftline.platform.training import Report
from driftline.platform.windows import parse_time

Progress = Callable[[int, int], None]

SLIVER: Final = 0.1
"""Processors of a trial whose worker group trains; Tune refuses 0."""
PERIOD_SECONDS: Final = 0.5
RESULTS, SETTINGS, TUNE = "results", "settings.yaml", "tune"


@dataclass(frozen=True)
class Trial:
    """One strategy with one seed."""

    name: str
    """For people: the options, joined by slashes."""
    strategy: ArmsRefreshSettings
    seed: int
    form: FormName = "twin"

    def to_json(self) -> dict[str, Any]:
        """Plain values; inverse of ``from_json``."""
        return asdict(self) | {"strategy": self.strategy.model_dump(mode="json")}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "Trial":
        """Read what ``to_json`` gave."""
        strategy = ArmsRefreshSettings.model_validate(raw["strategy"])
        return cls(**{**raw, "strategy": strategy})


@dataclass(frozen=True)
class Place:
    """Where a search works, as values that travel to a trial."""

    folder: Path
    """Of this search: settings, results, Tune's own records."""
    laboratory: Path
    as_of: str

    @property
    def settings(self) -> DriftlineSettings:
        """Those that the search began with."""
        return load_settings(self.folder / SETTINGS)

    def open(self, *, seed: int) -> Laboratory:
        """The laboratory of a seed; kept in this process."""
        return _laboratory(self, seed)

    def result_path(self, trial: Trial) -> Path:
        """Where the trial's result lies."""
        identity = hash_value([trial.to_json(), self.as_of])[:16]
        return self.folder / RESULTS / f"{identity}-{trial.seed}.json"

    def result(self, trial: Trial) -> dict[str, Any] | None:
        """What came of a trial; None before it is done."""
        path = self.result_path(trial)
        return read_json(path) if path.exists() else None

    def finished(self, trial: Trial) -> dict[str, Any]:
        """The result of a trial that was run."""
        result = self.result(trial)
        assert result is not None, trial.name
        return result


@lru_cache(maxsize=4)
def _laboratory(place: Place, seed: int) -> Laboratory:
    settings = place.settings
    search = settings.search or SearchSettings()
    return Laboratory.open(
        settings,
        as_of=parse_time(place.as_of),
        folder=place.laboratory,
        seed=seed,
        slice_hours=search.slice_hours,
        num_slices=2,
        run=_runner(settings),
    )


def _runner(settings: DriftlineSettings) -> Runner:
    num_workers = settings.student.arms_refresh.num_workers
    if num_workers == 0:
        return run_here

    def run(job: StageJob, report: Report | None) -> StageResult:
        return fit(job, num_workers=num_workers, ray=settings.ray)

    return run


# --- in the trial's process ---------------------------------------------------------------


def run_trial(config: dict[str, Any]) -> None:
    """What Tune calls: train, measure, write the result, report it.

    With ``values`` of hyper-parameters it reports ``score`` after each evaluation of the tuned
    stage: the best AUC on its validation rows so far, or minus the loss of a masked-language
    stage. Never through ``ray.train``, which refuses inside Tune.
    """
    place = Place(Path(config["folder"]), Path(config["laboratory"]), config["as_of"])
    torch.set_num_threads(config["num_threads"])
    settings = place.settings
    search = settings.search or SearchSettings()
    values = config.get("values")
    if values is None:
        trial = Trial.from_json(config["trial"])
        tune.report(evaluate(place, trial)["measures"])
        return
    strategy = search.tuned(values, settings.student.arms_refresh)
    trial = Trial(f"tuned {values}", strategy, search.seeds[0])
    telling = _Telling(search.tuning)
    result = evaluate(place, trial, report=telling)
    score = telling.score_of(result["history"])
    tune.report({"score": score, "evaluation": len(result["history"]), **result["measures"]})


@dataclass
class _Telling:
    """Reports to Tune how the tuned stage stands."""

    tuning: TuningSettings
    num_evaluations: int = 0
    best: float = -np.inf

    def __call__(self, stage: str, measures: Mapping[str, float]) -> None:
        if stage == self.tuning.stage:
            self.num_evaluations += 1
            self.best = max(self.best, _score(measures))
            tune.report({"score": self.best, "evaluation": self.num_evaluations})

    def score_of(self, history: Sequence[Mapping[str, float]]) -> float:
        """The best of a finished stage, also of one that an earlier run trained."""
        return max((_score(row) for row in history), default=0.0)


def _score(measures: Mapping[str, float]) -> float:
    return measures["auc"] if "auc" in measures else -measures.get("loss", measures["train_loss"])


def evaluate(
    place: Place,
    trial: Trial,
    *,
    report: Callable[[str, Mapping[str, float]], None] | None = None,
) -> dict[str, Any]:
    """The result of a trial: measures, nodes, scores on the next slice; found if it was done."""
    done = place.result(trial)
    if done is not None:
        return done
    laboratory = place.open(seed=trial.seed)
    student = train_strategy(laboratory, trial.strategy, form=trial.form, report=report)
    tests = TestSets(laboratory)
    measures, scores = measure_student(student, tests, soft=_has_teacher(place.settings))
    path = place.result_path(trial)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path.with_suffix(".npy")) as scratch, scratch.open("wb") as stream:
        np.save(stream, scores)
    search = place.settings.search or SearchSettings()
    tuned = [n for n in student.nodes if n.result and n.name == search.tuning.stage]
    history = [list(node.result.history) for node in tuned if node.result]
    result = {
        **trial.to_json(),
        "measures": measures,
        "nodes": [node.to_json() for node in student.nodes],
        "history": history[0] if history else [],
        "scores": path.with_suffix(".npy").name,
    }
    write_json(path, result)
    return result


def _has_teacher(settings: DriftlineSettings) -> bool:
    from driftline.platform.workspace import Workspace

    return Workspace.of(settings).teacher.exists()


# --- in the command's process -------------------------------------------------------------


def run_trials(
    place: Place, trials: Sequence[Trial], *, step: str, resume: bool, progress: Progress | None
) -> list[dict[str, Any]]:
    """Run trials side by side; gives their results in order.

    Args:
        place: Of the search.
        trials: In an order in which neighbours share little that is still to be trained.
        step: Name of Tune's record; a search may have several, one after the other.
        resume: Continue Tune's record of this step, if a killed search left one.
        progress: Called with trials done and in all.

    Raises:
        ResourceError: a trial needs more than the cluster has; without this check Tune waits
            forever.
        TrainingError: trials failed; the others are done, and ``resume`` tries these again.
    """
    missing = [trial for trial in trials if place.result(trial) is None]
    if missing:
        with _followed(place, trials, progress):
            space = {"trial": tune.grid_search([trial.to_json() for trial in missing])}
            _fit(place, space, step=step, resume=resume, config=tune.TuneConfig())
    if progress is not None:
        progress(len(trials), len(trials))
    return [place.finished(trial) for trial in trials]


def run_tuning(
    place: Place, *, resume: bool, progress: Progress | None
) -> list[tuple[dict[str, Any], dict[str, float]]]:
    """Sample hyper-parameters of one stage with Optuna, ending weak trials early.

    Sampler and scheduler learn from the validation rows of the tuned stage, not from the slice
    that decides: so that slice is looked at once for each finished trial, and steers nothing.

    Returns:
        Values and measures of every finished trial.

    Raises:
        ResourceError: see ``run_trials``.
        TrainingError: a trial failed.
    """
    from ray.tune.search.optuna import OptunaSearch

    settings = place.settings
    search = settings.search or SearchSettings()
    tuning = search.tuning
    config = tune.TuneConfig(
        search_alg=OptunaSearch(metric="score", mode="max", seed=search.seeds[0]),
        num_samples=tuning.num_trials,
        scheduler=_scheduler(tuning),
    )
    space = {"values": {name: _domain(part) for name, part in tuning.space.items()}}
    with _followed(place, None, progress, total=tuning.num_trials):
        grid = _fit(place, space, step="tuning", resume=resume, config=config)
    found = [
        (result.config["values"], result.metrics)
        for result in grid
        if result.config and result.metrics and "id_auc" in result.metrics
    ]
    if not found:
        raise TrainingError("no trial of the tuning finished; give it more trials")
    return found


def _scheduler(tuning: TuningSettings) -> ASHAScheduler | None:
    if not tuning.early_stopping:
        return None
    return ASHAScheduler(
        time_attr="evaluation",
        metric="score",
        mode="max",
        max_t=1_000_000,  # the stage itself says when it ends
        grace_period=tuning.grace_evaluations,
        reduction_factor=tuning.reduction_factor,
    )


def _domain(part: Any) -> Any:
    if not isinstance(part, Range):
        return tune.choice(list(part.choices))
    return tune.loguniform(part.low, part.high) if part.log else tune.uniform(part.low, part.high)


def _fit(
    place: Place, space: dict[str, Any], *, step: str, resume: bool, config: tune.TuneConfig
) -> Any:
    settings = place.settings
    search = settings.search or SearchSettings()
    cpus, at_once = trial_resources(settings)
    trainable = tune.with_resources(run_trial, {"cpu": cpus})
    folder = place.folder / TUNE / step
    if resume and tune.Tuner.can_restore(str(folder)):
        tuner = tune.Tuner.restore(
            str(folder), trainable, resume_unfinished=True, restart_errored=True
        )
    else:
        shutil.rmtree(folder, ignore_errors=True)
        config.reuse_actors = True  # a new process needs seconds for its imports
        config.max_concurrent_trials = at_once
        config.trial_dirname_creator = _trial_folder
        tuner = tune.Tuner(
            trainable,
            param_space={
                **space,
                "folder": str(place.folder),
                "laboratory": str(place.laboratory),
                "as_of": place.as_of,
                "num_threads": max(1, int(search.cpus_per_trial)),
            },
            tune_config=config,
            run_config=tune.RunConfig(name=step, storage_path=str(folder.parent), verbose=0),
        )
    with redirect_stdout(io.StringIO()):  # Tune prints a table, however silent it is asked to be
        grid = tuner.fit()
    if grid.errors:
        reasons = [str(error).strip().splitlines()[-1] for error in grid.errors]
        raise TrainingError(
            f"{len(reasons)} of {len(grid)} trials failed, the first with: {reasons[0]}; "
            "mend the cause and run the search again with --resume"
        )
    return grid


def _trial_folder(trial: Any) -> str:
    """Tune would put all hyper-parameters into the name."""
    return str(trial.trial_id)


def trial_resources(settings: DriftlineSettings) -> tuple[float, int]:
    """Processors that Tune reserves for a trial, and how many trials run at a time.

    Raises:
        ResourceError: not even one fits.
    """
    search = settings.search or SearchSettings()
    available = float(ray.cluster_resources().get("CPU", 0.0))
    num_workers = settings.student.arms_refresh.num_workers
    cpus = search.cpus_per_trial
    needed = cpus
    if num_workers:
        cpus = SLIVER
        needed = SLIVER + num_workers * cpus_per_worker(settings.ray, num_workers)
    if needed > available:
        raise ResourceError(
            f"a trial needs {needed:g} processors, the cluster has {available:g}; lower "
            "search.cpus_per_trial or ray.num_cpus_per_worker"
        )
    fitting = max(1, int(available // needed))
    return cpus, min(fitting, search.max_concurrent or fitting)


@contextmanager
def _followed(
    place: Place,
    trials: Sequence[Trial] | None,
    progress: Progress | None,
    *,
    total: int | None = None,
) -> Iterator[None]:
    """Count result files while the block runs; works for a restored Tune as well."""
    if progress is None:
        yield
        return
    ended = threading.Event()
    before = set((place.folder / RESULTS).glob("*.json"))

    def done() -> int:
        if trials is not None:
            return sum(place.result_path(trial).exists() for trial in trials)
        return len(set((place.folder / RESULTS).glob("*.json")) - before)

    def follow() -> None:
        while not ended.wait(PERIOD_SECONDS):
            progress(done(), len(trials) if trials is not None else total or 0)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()

"""Runs the trials of a search on Ray Tune, side by side, from the command's process.

The trial of a strategy with a worker group holds a sliver of a processor and the group holds the
rest. A search that was killed reads the results that are there.
"""

import io
import math
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, Final

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from driftline.pipelines.search_place import Place, Trial
from driftline.pipelines.search_trials import FINISHED, TUNED, run_trial
from driftline.platform.errors import ResourceError, TrainingError
from driftline.platform.ray_runtime import cpus_per_worker
from driftline.platform.search_settings import Range
from driftline.platform.settings import DriftlineSettings, SearchSettings, TuningSettings

Progress = Callable[[int, int], None]

SLIVER: Final = 0.1
"""Processors of a trial whose worker group trains; Tune refuses 0."""
PERIOD_SECONDS: Final = 0.5
TUNE: Final = "tune"


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
        with _followed(progress, lambda: _num_done(place, trials), total=len(trials)):
            space = {"trial": tune.grid_search([trial.to_json() for trial in missing])}
            _fit(place, space, step=step, resume=resume, config=tune.TuneConfig())
    if progress is not None:
        progress(len(trials), len(trials))
    return [place.finished(trial) for trial in trials]


def run_tuning(
    place: Place, *, resume: bool, progress: Progress | None
) -> list[tuple[dict[str, Any], float]]:
    """Sample hyper-parameters of one stage with Optuna, ending weak trials early.

    Sampler, scheduler and whoever takes the best see the validation rows of the tuned stage. The
    slice that decides between strategies is not looked at here.

    Returns:
        Values and score of every finished trial that has one.

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
    before = set((place.folder / TUNED).glob("*.json"))

    def num_done() -> int:
        return len(set((place.folder / TUNED).glob("*.json")) - before)

    with _followed(progress, num_done, total=tuning.num_trials):
        grid = _fit(place, space, step="tuning", resume=resume, config=config)
    found = [
        (result.config["values"], float(result.metrics["score"]))
        for result in grid
        if result.config and result.metrics and FINISHED in result.metrics
    ]
    found = [(values, score) for values, score in found if math.isfinite(score)]
    if not found:
        raise TrainingError(
            "no trial of the tuning finished with a score; give it more trials, or the tuned stage "
            "validation rows with clicks and non-clicks"
        )
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


def _num_done(place: Place, trials: Sequence[Trial]) -> int:
    return sum(place.result_path(trial).exists() for trial in trials)


@contextmanager
def _followed(
    progress: Progress | None, num_done: Callable[[], int], *, total: int
) -> Iterator[None]:
    """Count what trials have written while the block runs; works for a restored Tune as well."""
    if progress is None:
        yield
        return
    ended = threading.Event()

    def follow() -> None:
        while not ended.wait(PERIOD_SECONDS):
            progress(num_done(), total)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()

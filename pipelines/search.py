"""``driftline search``: find the strategy that ranks best after the log has drifted on.

Prepare once, run trials, write a table like Table 3 of CTR-BERT, and a settings file whose arms
refresh is the winner.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from driftline.pipelines.market_moment import check_recent_rows, default_moment
from driftline.pipelines.search_place import OWN, SETTINGS, Place, Trial, forget, tried_strategies
from driftline.pipelines.search_table import (
    SearchTable,
    make_table,
    table_json,
    table_markdown,
)
from driftline.pipelines.search_tune import run_trials, run_tuning, trial_resources
from driftline.pipelines.strategy import check_strategy, prepare_strategy, train_strategy
from driftline.pipelines.strategy_measures import TestSets, measure_teacher
from driftline.pipelines.strategy_names import strategy_of
from driftline.platform.artefacts import read_json, whole_file, write_json
from driftline.platform.errors import SettingsError
from driftline.platform.metrics import roc_auc
from driftline.platform.settings import ArmsRefreshSettings, DriftlineSettings, SearchSettings
from driftline.platform.windows import format_time
from driftline.platform.workspace import Workspace

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]

BASELINE: Final = "MLP baseline"
PLAN, TABLE, FIGURES, WINNER = "plan.json", "table.md", "search.json", "winner.yaml"
Combination = tuple[str, str, str]


@dataclass(frozen=True)
class SearchResult:
    """What a search found, and where it stands."""

    folder: Path
    text: str
    """Markdown."""
    figures: dict[str, Any]
    winner: ArmsRefreshSettings
    """The best strategy."""


def run_search(
    settings: DriftlineSettings, *, resume: bool = False, progress: Progress | None = None
) -> SearchResult:
    """Search as ``settings.search`` says. Needs Ray; see ``ray_session``.

    What was trained before by a search or a study of this workspace is found, whether ``resume``
    is given or not; ``resume`` also continues Tune's own record of a killed search.

    Raises:
        SettingsError: something cannot be tried; a slice lies outside the log, cannot rank
            anything, or leaves no recent rows before it; or, with ``resume``, the search was begun
            with other settings. Nothing was trained then.
        MissingArtefactError: a strategy needs a teacher and there is none.
        ResourceError: a trial does not fit on the cluster.
        TrainingError: trials failed.
    """
    search = settings.search or SearchSettings()
    settings = settings.model_copy(update={"search": search})
    base = settings.student.arms_refresh
    _check(search, base)
    trial_resources(settings)
    place = _begin(settings, search, resume=resume)
    _prepare(place, search, progress=progress)
    finder = _Search(place, search, base, resume=resume, progress=progress)
    trials = finder.run()
    reference = [place.finished(_baseline(base, seed)) for seed in search.seeds]
    table = make_table(trials, reference, folder=place.folder, search=search, tests=_tests(place))
    return _write(place, table, trials)


def _check(search: SearchSettings, base: ArmsRefreshSettings) -> None:
    try:
        search.check(base)
    except ValueError as error:
        raise SettingsError(f"search.{error}") from error
    if search.method == "optuna" and base.num_workers and search.tuning.early_stopping:
        raise SettingsError(
            "search.tuning.early_stopping needs trials that train in their own process; set "
            "student.arms_refresh.num_workers: 0, or early_stopping: false"
        )


def _begin(settings: DriftlineSettings, search: SearchSettings, *, resume: bool) -> Place:
    """The place of this search, with its settings written down."""
    workspace = Workspace.of(settings)
    forget()
    as_of = search.as_of
    if as_of is None:
        as_of = default_moment(settings, slice_hours=search.slice_hours, num_slices=2)
    else:
        check_recent_rows(settings, as_of, slice_hours=search.slice_hours)
    folder = workspace.searches / search.name
    plan = {"as_of": format_time(as_of), "settings": settings.model_dump(mode="json")}
    written = folder / PLAN
    if resume and written.exists() and read_json(written) != plan:
        raise SettingsError(
            f"search {folder} was begun with other settings; run it without --resume, which keeps "
            "what can be kept, or give it another search.name"
        )
    place = Place(folder, workspace.laboratory, format_time(as_of))
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / SETTINGS) as scratch:
        scratch.write_text(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False))
    laboratory = place.open(seed=search.seeds[0])  # slices that lie outside the log fail here
    laboratory.check_judges(num_slices=2)
    write_json(written, plan)
    return place


def _prepare(place: Place, search: SearchSettings, *, progress: Progress | None) -> None:
    """Check every strategy, then label the rows of all, before the first one is trained.

    Those with matches go first: the rows that they share with others are then paid once, with the
    tensors that the matches need.
    """
    strategies = tried_strategies(place.settings)
    first = place.open(seed=search.seeds[0])
    for name, strategy in strategies.items():
        try:
            check_strategy(first, strategy)
        except ValueError as error:
            raise SettingsError(f"strategy {name}: {error}") from error
    for has_matches in (True, False):
        for seed in search.seeds:
            laboratory = place.open(seed=seed)
            laboratory.progress = progress
            for strategy in strategies.values():
                if bool(strategy.objective.matches) == has_matches:
                    prepare_strategy(laboratory, strategy)


def _baseline(base: ArmsRefreshSettings, seed: int) -> Trial:
    """The row that deltas are measured against: the MLP on recent clicks (papers.md A0.4)."""
    strategy = strategy_of(("random", "none", "vanilla"), base)
    return Trial(BASELINE, strategy, seed, form="mlp")


@dataclass(frozen=True)
class _Search:
    place: Place
    search: SearchSettings
    base: ArmsRefreshSettings
    resume: bool
    progress: Progress | None

    def run(self) -> list[dict[str, Any]]:
        """Results of all trials."""
        match self.search.method:
            case "grid":
                return self._try(list(self.search.combinations()), step="grid")
            case "greedy":
                return self._greedy()
            case "optuna":
                return self._tune()

    def _greedy(self) -> list[dict[str, Any]]:
        """Axis by axis: the best option so far, later axes at their first (papers.md S0.22)."""
        axes = (self.search.axes.init, self.search.axes.distil, self.search.axes.finetune)
        chosen = [next(iter(axis)) for axis in axes]
        results: dict[str, dict[str, Any]] = {}
        for number, axis in enumerate(axes):
            candidates: list[Combination] = []
            for option in axis:
                names = [*chosen[:number], option, *chosen[number + 1 :]]
                candidates.append((names[0], names[1], names[2]))
            found = self._try(candidates, step=f"greedy-{number + 1}")
            results |= {f"{result['name']} {result['seed']}": result for result in found}
            best = max(candidates, key=lambda names: _mean_auc(found, "/".join(names)))
            chosen = list(best)
            logger.info("step %d of 3: %s", number + 1, "/".join(best))
        return list(results.values())

    def _tune(self) -> list[dict[str, Any]]:
        """Tune one stage with the first seed, then compare with the settings' own on all seeds.

        The values are chosen on validation rows, so the slice that decides has not seen them.
        """
        found = run_tuning(self.place, resume=self.resume, progress=self.progress)
        values, score = max(found, key=lambda pair: pair[1])
        logger.info("best of %d finished trials: %s, score %s", len(found), values, score)
        tuned = self.search.tuned(values, self.base)
        trials = [
            Trial(name, strategy, seed)
            for seed in self.search.seeds
            for name, strategy in ((OWN, self.base), (f"tuned {values}", tuned))
        ]
        return self._run(trials, step="tuned")

    def _try(self, combinations: list[Combination], *, step: str) -> list[dict[str, Any]]:
        """Neighbours begin differently: see ``SearchSettings.combinations``."""
        order = {names: number for number, names in enumerate(self.search.combinations())}
        blocks: dict[tuple[str, str], list[Combination]] = {}
        for names in sorted(combinations, key=order.__getitem__):
            blocks.setdefault(names[1:], []).append(names)
        trials = [
            Trial("/".join(names), self.search.strategy(names, self.base), seed)
            for block in blocks.values()
            for seed in self.search.seeds
            for names in block
        ]
        return self._run(trials, step=step)

    def _run(self, trials: list[Trial], *, step: str) -> list[dict[str, Any]]:
        """The baseline goes with the first trials: starting Tune again costs seconds."""
        baseline = [_baseline(self.base, seed) for seed in self.search.seeds]
        found = run_trials(
            self.place,
            [*trials, *baseline],
            step=step,
            resume=self.resume,
            progress=self.progress,
        )
        return found[: len(trials)]


def _mean_auc(results: list[dict[str, Any]], name: str) -> float:
    values = [result["measures"]["id_auc"] for result in results if result["name"] == name]
    return sum(values) / len(values)


def _tests(place: Place) -> TestSets:
    search = place.settings.search
    assert search is not None
    return TestSets(place.open(seed=search.seeds[0]))


def _write(place: Place, table: SearchTable, trials: list[dict[str, Any]]) -> SearchResult:
    """Table, figures, and the winner's settings, ready to be used."""
    settings = place.settings
    names = [row.name for row in table.rows[:2]]
    later = {name: _later_auc(place, trials, name) for name in dict.fromkeys(names)}
    best = next(trial for trial in trials if trial["name"] == names[0])
    winner = ArmsRefreshSettings.model_validate(best["strategy"])
    teacher, _ = measure_teacher(_tests(place))
    figures = table_json(table) | {
        "as_of": place.as_of,
        "teacher": teacher,
        "later_slice": later,
        "winner": {"name": names[0], "strategy": winner.model_dump(mode="json")},
    }
    text = table_markdown(table, teacher=teacher, later=later, as_of=place.as_of)
    student = settings.student.model_copy(update={"arms_refresh": winner})
    chosen = settings.model_copy(update={"student": student})
    with whole_file(place.folder / WINNER) as scratch:
        head = f"# Found by driftline search {table.search.name}: {names[0]}\n"
        written = chosen.model_dump(mode="json", exclude={"search"})
        scratch.write_text(head + yaml.safe_dump(written, sort_keys=False))
    with whole_file(place.folder / TABLE) as scratch:
        scratch.write_text(text)
    write_json(place.folder / FIGURES, figures)
    return SearchResult(place.folder, text, figures, winner)


def _later_auc(place: Place, trials: list[dict[str, Any]], name: str) -> dict[int, float]:
    """AUC by seed on the slice after the one that decided, which favours whoever it chose."""
    found = {}
    for raw in trials:
        if raw["name"] == name:
            trial = Trial.from_json({key: raw[key] for key in ("name", "strategy", "seed", "form")})
            laboratory = place.open(seed=trial.seed)
            student = train_strategy(laboratory, trial.strategy, form=trial.form)
            rows = TestSets(laboratory).slice(1)
            found[trial.seed] = roc_auc(
                rows.clicked, rows.probabilities(student.form, *student.files)
            )
    return found

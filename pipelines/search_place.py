"""Where a search works and what it tries, as values that travel to its trials."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from driftline.pipelines.labels import SoftLabels
from driftline.pipelines.laboratory import Laboratory
from driftline.pipelines.laboratory_nodes import Runner, run_here
from driftline.pipelines.market_moment import MarketMoment
from driftline.pipelines.strategy_matches import match_keys
from driftline.pipelines.student_forms import FormName, student_form
from driftline.platform.artefacts import hash_file, hash_value, read_json
from driftline.platform.errors import SettingsError
from driftline.platform.kinds import foreign_code
from driftline.platform.ray_runtime import fit
from driftline.platform.settings import (
    ArmsRefreshSettings,
    DriftlineSettings,
    SearchSettings,
    load_settings,
)
from driftline.platform.stages import StageJob, StageResult
from driftline.platform.training import Report
from driftline.platform.windows import parse_time
from driftline.platform.workspace import Workspace

OWN: Final = "settings"
"""Name of the settings' own strategy."""
FORMAT: Final = 2  # raise when the same trial would give other measures
RESULTS, SETTINGS = "results", "settings.yaml"


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
        """The laboratory of a seed, which knows what all strategies need of the teacher.

        Kept in this process.

        Raises:
            SettingsError: a slice lies outside the log, or a match of a strategy is impossible.
        """
        return _laboratory(self, seed, self._settings_hash)

    @property
    def _settings_hash(self) -> str:
        return hash_file(self.folder / SETTINGS)

    def result_path(self, trial: Trial) -> Path:
        """Where the trial's result lies; its name is made of everything that decides it."""
        return self.folder / RESULTS / f"{self.identity(trial)}.json"

    def identity(self, trial: Trial) -> str:
        """Changes with the strategy and the seed, the market, the teacher and the test slices."""
        deciding: list[Any] = [FORMAT, trial.to_json(), _market(self, self._settings_hash)]
        if code := foreign_code(trial.strategy):
            deciding.append(code)
        return f"{hash_value(deciding)[:16]}-{trial.seed}"

    def result(self, trial: Trial) -> dict[str, Any] | None:
        """What came of a trial; None before it is done."""
        path = self.result_path(trial)
        return read_json(path) if path.exists() else None

    def finished(self, trial: Trial) -> dict[str, Any]:
        """The result of a trial that was run."""
        result = self.result(trial)
        assert result is not None, trial.name
        return result


def tried_strategies(settings: DriftlineSettings) -> dict[str, ArmsRefreshSettings]:
    """All strategies that a search may begin with, by name; tuning changes none of their matches.

    Raises:
        ValueError: options do not go together; see ``SearchSettings.strategy``.
    """
    search = settings.search or SearchSettings()
    base = settings.student.arms_refresh
    if search.method == "optuna":
        return {OWN: base}
    return {"/".join(names): search.strategy(names, base) for names in search.combinations()}


def forget() -> None:
    """Look at the markets anew: a log may have been replaced since a search in this process."""
    _laboratory.cache_clear()
    _market.cache_clear()


@lru_cache(maxsize=4)
def _market(place: Place, settings_hash: str) -> str:
    """What decides the measures of all trials alike: rows, texts, teacher, slices, head stage."""
    del settings_hash  # a part of the name under which it is kept
    settings = place.settings
    search = settings.search or SearchSettings()
    moment = MarketMoment(settings, parse_time(place.as_of), search.slice_hours)
    has_teacher = Workspace.of(settings).teacher.exists()
    return moment.key(
        "measures",
        search.slice_hours,
        moment.test_texts.key,
        settings.student.head_refresh.model_dump(mode="json"),
        SoftLabels.open(settings).hash if has_teacher else None,
    )


@lru_cache(maxsize=4)
def _laboratory(place: Place, seed: int, settings_hash: str) -> Laboratory:
    del settings_hash  # a part of the name under which the laboratory is kept
    settings = place.settings
    search = settings.search or SearchSettings()
    laboratory = Laboratory.open(
        settings,
        as_of=parse_time(place.as_of),
        folder=place.laboratory,
        seed=seed,
        slice_hours=search.slice_hours,
        num_slices=2,
        run=_runner(settings),
    )
    form = student_form("twin", laboratory)
    for name, strategy in tried_strategies(settings).items():
        try:
            laboratory.keep(match_keys(form, strategy))
        except SettingsError as error:
            raise SettingsError(f"strategy {name}: {error}") from error
    return laboratory


def _runner(settings: DriftlineSettings) -> Runner:
    num_workers = settings.student.arms_refresh.num_workers
    if num_workers == 0:
        return run_here

    def run(job: StageJob, report: Report | None) -> StageResult:
        return fit(job, num_workers=num_workers, ray=settings.ray)

    return run

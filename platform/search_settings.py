"""Settings of a search for a strategy: what is tried, how, and by what it is judged.

Import from ``settings``.
"""

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AwareDatetime,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from driftline.platform.data_settings import Settings, SliceHours
from driftline.platform.strategy_settings import ArmsRefreshSettings
from driftline.platform.training_settings import StageSettings

Overrides = dict[str, Any]
"""Part of ``student.arms_refresh``. Mappings are merged into it, everything else replaces, and so
does a mapping that says what it is by ``kind`` or ``preset``."""
Options = Annotated[dict[str, Overrides], Field(min_length=1)]
StageName = Literal["mlm", "supervised", "distil", "finetune", "self_training", "head"]

NOT_SEARCHED: Final = ("window_hours", "num_workers", "catch_up")
"""The same for all strategies: they share their rows, and no trial refreshes anything."""
OF_OBJECTIVE: Final = ("alpha", "temperature")
"""Hyper-parameters that stand in ``objective``, beside the recipe of ``distil``."""


_INIT: Final[dict[str, Overrides]] = {
    "random": {"init": "random"},
    "mlm": {"init": "mlm"},
    "supervised": {"init": "supervised"},
}
_DISTIL: Final[dict[str, Overrides]] = {
    "none": {"distil": None},
    "ood": {"distil": {"on": "ood"}},
    "id": {"distil": {"on": "id"}},
}
_FINETUNE: Final[dict[str, Overrides]] = {
    "vanilla": {"finetune": {}, "self_training": {"enabled": False}},
    "self_training": {"finetune": {}, "self_training": {"enabled": True}},
}


class Axes(Settings):
    """The three choices of a strategy, in order (papers.md S0.17-S0.19); 3 x 3 x 2 by default.

    Each maps an option's name to overrides of ``student.arms_refresh``. The first option of an
    axis stands in where a later choice is still open.
    """

    init: Options = _INIT
    distil: Options = _DISTIL
    finetune: Options = _FINETUNE


class Range(Settings):
    """Numbers between two bounds."""

    low: float
    high: float
    log: bool = False
    """Draw the logarithm evenly; for learning rates."""

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(
                f"low must be below high, and above 0 with log, got {self.low} and {self.high}"
            )
        return self


class Choices(Settings):
    """Some values."""

    choices: Annotated[tuple[Any, ...], Field(min_length=1)]


_SPACE: Final[dict[str, Range | Choices]] = {"learning_rate": Range(low=1e-4, high=3e-3, log=True)}


class TuningSettings(Settings):
    """Hyper-parameters inside one stage of the settings' own strategy (``method: optuna``).

    Values are sampled and chosen by the stage's own validation rows; only what was chosen is then
    compared with the settings' own on the slice that decides.
    """

    stage: StageName = "distil"
    space: Annotated[dict[str, Range | Choices], Field(min_length=1)] = _SPACE
    """Settings of the stage by name; for ``distil`` also ``alpha`` and ``temperature``."""
    num_trials: PositiveInt = 20
    early_stopping: bool = True
    """End trials that fall behind at one of their evaluations (ASHA)."""
    grace_evaluations: PositiveInt = 1
    """Evaluations that every trial may finish."""
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """One trial in so many goes on at each rung."""


class SearchSettings(Settings):
    """A search: strategies times seeds, judged by AUC on the slice after they were trained."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,40}$")] = "strategies"
    """Folder of the results, below ``search/`` of the workspace."""
    method: Literal["grid", "greedy", "optuna"] = "grid"
    """All combinations; or axis by axis, the best carried on (papers.md S0.22: 3 + 3 + 2 instead
    of 18); or Optuna inside one stage."""
    axes: Axes = Axes()
    tuning: TuningSettings = TuningSettings()
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (0, 1, 2)
    as_of: AwareDatetime | None = None
    """What is known. Without it the last hour after which the log holds two slices."""
    slice_hours: SliceHours = 24
    """Strategies are judged on so many hours after ``as_of``, the winner also on as many after
    that."""
    max_concurrent: PositiveInt | None = None
    """Trials at a time; as many as the processors hold when not given."""
    cpus_per_trial: PositiveFloat = 1
    num_bootstrap: PositiveInt = 200

    @model_validator(mode="after")
    def _seeds_differ(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must differ from each other, got {list(self.seeds)}")
        return self

    def combinations(self) -> Iterator[tuple[str, str, str]]:
        """Names of all combinations, the last axis slowest.

        So neighbours begin differently: trials that run side by side find the stages that they
        share with others trained, instead of waiting for them.
        """
        axes = self.axes
        for finetune, distil, init in product(axes.finetune, axes.distil, axes.init):
            yield init, distil, finetune

    def strategy(
        self, combination: tuple[str, str, str], base: ArmsRefreshSettings
    ) -> ArmsRefreshSettings:
        """The base with the overrides of the three options.

        Raises:
            ValueError: an override names no setting, or the options do not go together; the
                message has the path.
        """
        chosen = zip(("init", "distil", "finetune"), combination, strict=True)
        overrides = [
            (f"axes.{axis}.{name}", getattr(self.axes, axis)[name]) for axis, name in chosen
        ]
        return overridden(base, overrides)

    def tuned(self, values: Mapping[str, Any], base: ArmsRefreshSettings) -> ArmsRefreshSettings:
        """The base with these hyper-parameters in the tuned stage.

        Raises:
            ValueError: one of them is no setting of the stage, or has a value it may not have.
        """
        stage = self.tuning.stage
        inside = {name: value for name, value in values.items() if not self._of_objective(name)}
        outside = {name: value for name, value in values.items() if self._of_objective(name)}
        overrides: Overrides = {stage: inside}
        if outside:
            overrides["objective"] = outside
        return overridden(base, [("tuning.space", overrides)])

    def _of_objective(self, name: str) -> bool:
        return self.tuning.stage == "distil" and name in OF_OBJECTIVE

    def check(self, base: ArmsRefreshSettings) -> None:
        """Build everything that will be tried, so that a mistake is found before any training.

        Raises:
            ValueError: see ``strategy`` and ``tuned``.
        """
        if self.method != "optuna":
            for combination in self.combinations():
                self.strategy(combination, base)
            return
        trained = _trained_stages(base)
        if self.tuning.stage not in trained:
            raise ValueError(
                f"tuning.stage: student.arms_refresh with init {base.init.kind!r} has no stage "
                f"{self.tuning.stage!r} to tune; it trains {', '.join(trained)}"
            )
        for end in (0, -1):
            self.tuned({name: _ends(part)[end] for name, part in self.tuning.space.items()}, base)
        for name, part in self.tuning.space.items():
            for value in _ends(part):
                self.tuned({name: value}, base)


def overridden(
    base: ArmsRefreshSettings, overrides: list[tuple[str, Overrides]]
) -> ArmsRefreshSettings:
    """A strategy with parts replaced.

    Args:
        base: Gives whatever is not overridden.
        overrides: Where each comes from, for messages, and what it changes. Later ones win.

    Raises:
        ValueError: one names no setting, or the whole is no strategy.
    """
    raw = base.model_dump(mode="json")
    for origin, part in overrides:
        for name in NOT_SEARCHED:
            if name in part:
                raise ValueError(
                    f"{origin}.{name}: cannot be searched; set student.arms_refresh.{name}, "
                    "which is the same for all"
                )
        raw = _merged(raw, part, defaults=_DEFAULTS)
    try:
        return ArmsRefreshSettings.model_validate(raw)
    except ValidationError as error:
        raise ValueError("; ".join(_located(error, overrides))) from error


def _located(error: ValidationError, overrides: list[tuple[str, Overrides]]) -> Iterator[str]:
    """Each mistake with the override it comes from; with all of them where none alone is wrong."""
    for detail in error.errors(include_url=False):
        path = [str(part) for part in detail["loc"]]
        guilty = [origin for origin, part in overrides if path and path[0] in part]
        origin = guilty[-1] if guilty else " with ".join(origin for origin, _ in overrides)
        yield f"{'.'.join([origin, *path])}: {detail['msg']}"


_DEFAULTS: Final[Overrides] = {
    "distil": ArmsRefreshSettings().model_dump(mode="json")["distil"],
    "finetune": StageSettings().model_dump(mode="json"),
    "head": ArmsRefreshSettings().model_dump(mode="json")["head"],
}
"""What a mapping is merged into where the base leaves the stage out."""


def _merged(raw: Overrides, part: Mapping[str, Any], *, defaults: Overrides) -> Overrides:
    """Mappings merge; one with a ``kind`` or ``preset`` of its own, or any other value, replaces.

    Merged into an objective that is written out, a preset would lose to each of its values.

    ``alpha`` and the two weights of an objective stand for each other, so one takes the other out.
    """
    merged = dict(raw)
    for name, value in part.items():
        before = raw.get(name) or defaults.get(name)
        is_part = isinstance(value, Mapping) and not {"kind", "preset"} & value.keys()
        if is_part and isinstance(before, Mapping):
            merged[name] = _merged(dict(before), value, defaults={})
        else:
            merged[name] = value
    if part.get("alpha") is not None:
        merged |= {name: None for name in ("hard_weight", "soft_weight") if name in merged}
    elif "soft_weight" in part or "hard_weight" in part:
        merged["alpha"] = None
    return merged


def _trained_stages(base: ArmsRefreshSettings) -> list[str]:
    """Stages whose recipes the strategy follows, in order."""
    later = [name for name in ("distil", "finetune", "head") if getattr(base, name) is not None]
    if base.self_training.enabled:
        later.insert(later.index("finetune") + 1, "self_training")
    return [*base.init.recipes, *later]


def _ends(part: Range | Choices) -> tuple[Any, ...]:
    return (part.low, part.high) if isinstance(part, Range) else part.choices

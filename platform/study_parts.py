"""The parts of a study: its variants, the values of its grid, its columns and its picture."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from driftline.platform.data_settings import Settings
from driftline.platform.study_claims import MeasureName
from driftline.platform.study_measures import MEASURES

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=40)]
ValueName = Annotated[str, Field(pattern=r"^[a-z0-9_]+$", max_length=40)]
Overrides = dict[str, Any]
Start = Literal["own", "random", "mlm", "supervised"]
Distillation = Literal["none", "ood", "id"]
FineTuning = Literal["none", "vanilla", "self_training"]
StrategyName = str | int | tuple[Start, Distillation, FineTuning]
Form = Literal["twin", "twin_text", "single", "mlp", "teacher", "encoder"]


class StudyVariant(Settings):
    """One row of the table: how it differs from the market's settings."""

    label: str | None = None
    """What the table calls it; its name when not given."""
    form: Form = "twin"
    """``twin``: the student. ``twin_text``: the same without tabular features. ``single``: one
    tower over all features as text (papers.md S0.30). ``mlp``, ``teacher``: the reference rows of
    Table 3. ``encoder``: nothing is trained, only sizes and the time to encode are measured."""
    strategy: StrategyName | None = None
    """``basic``, ``KD``, ``PF``, ``PD`` or ``PD-F`` (papers.md S1.3); the number of an approach of
    Table 3 (S0.31); or start, distillation and fine-tuning, where the start ``own`` is that of the
    settings. It keeps the recipes of the stages. None takes the settings as they are."""
    teacher: str | None = None
    """Listen to this member of ``teacher.ensemble`` alone; to the mean of all if not given."""
    overrides: Overrides = Field(default={}, alias="set")
    """Settings by dotted path, as in ``--set``; a value replaces what was there."""
    x: float | None = None
    """Place on the plot's axis."""
    each: bool = True
    """Whether the grid ``each`` multiplies it; a reference row stands alone."""

    @model_validator(mode="after")
    def _trains_what_it_says(self) -> Self:
        if self.strategy is not None and self.form in ("teacher", "encoder"):
            raise ValueError(
                f"form {self.form} trains nothing, so strategy {self.strategy!r} would be ignored; "
                "leave one of them out"
            )
        return self


class StudyValue(Settings):
    """One value of the grid: what it changes in every variant."""

    label: str | None = None
    overrides: Overrides = Field(default={}, alias="set")
    x: float | None = None


Grid = dict[ValueName, StudyValue]


class StudyColumn(Settings):
    """One measure in the table; in YAML its name is enough."""

    measure: MeasureName
    baseline: str | None = None
    """Another baseline than the study's (the paper's "ID soft" column has its own, S0.29)."""
    show: Literal["delta", "value"] | None = None
    """Delta to the baseline in percent, or the value; what is usual for the measure if absent."""
    between: tuple[str, str] | None = None
    """Show how much of the way from the first variant to the second was gone, in percent: the
    attribution of papers.md S1.13."""

    @property
    def name(self) -> str:
        """Of the column in JSON; a measure may have two columns."""
        return self.measure if self.between is None else f"{self.measure}_share"

    @property
    def is_delta(self) -> bool:
        """Whether the table shows a delta to the baseline."""
        if self.between is not None:
            return False
        return MEASURES[self.measure].relative if self.show is None else self.show == "delta"


class StudyPlot(Settings):
    """The one picture of the study."""

    measure: MeasureName = "id_auc"
    kind: Literal["bars", "line"] = "bars"
    """``line`` goes over ``x``, one line a variant."""
    show: Literal["delta", "value"] | None = None
    log_x: bool = False
    log_y: bool = False
    x_label: str = ""
    x_measure: MeasureName | None = None
    """Take the place on the axis from a measure, such as ``num_parameters``."""

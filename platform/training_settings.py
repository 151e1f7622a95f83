"""Settings of one training stage: how long, how fast, when to stop. Import from ``settings``."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from driftline.platform.data_settings import Settings
from driftline.platform.objective_settings import ObjectiveSettings


class StageSettings(Settings):
    """One training stage (papers.md S0.9, S0.21)."""

    num_epochs: PositiveFloat = 1.0
    """Passes over the rows; fractions allowed."""
    batch_size: PositiveInt = 256
    learning_rate: PositiveFloat = 3e-4
    weight_decay: NonNegativeFloat = 0.01
    warmup_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    clip_norm: PositiveFloat = 1.0
    evaluations_per_epoch: PositiveInt = 2
    patience: PositiveInt = 3
    """Evaluations without improvement before the stage stops; the best weights are kept."""
    max_rows: PositiveInt | None = None
    """Upper limit of rows, newest first."""
    autocast: Literal["off", "bfloat16"] = "off"


class SelfTrainingSettings(StageSettings):
    """The last round: learn from the student's own labels (papers.md S0.20)."""

    enabled: bool = True
    start: Literal["distilled", "finetuned"] = "distilled"
    """Weights the round starts from."""
    true_label_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Weight of the true click beside the student's own soft label."""

    @property
    def stage(self) -> StageSettings:
        """The training part alone."""
        return StageSettings(**{name: getattr(self, name) for name in StageSettings.model_fields})

    @property
    def objective(self) -> ObjectiveSettings:
        """The student's own labels take the teacher's place, as they are."""
        return ObjectiveSettings(alpha=1 - self.true_label_share, temperature=1.0)

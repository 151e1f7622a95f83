"""Settings of one training stage: how long, how fast, when to stop. Import from ``settings``."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from driftline.platform.data_settings import Settings
from driftline.platform.objective_settings import ObjectiveSettings

Momentum = Annotated[float, Field(ge=0, lt=1)]


class StageSettings(Settings):
    """One training stage (papers.md S0.9, S0.21, S3.6, S4.10)."""

    num_epochs: PositiveFloat = 1.0
    """Passes over the rows; fractions allowed."""
    num_steps: PositiveInt | None = None
    """Updates of the whole stage, whatever the number of rows: part the effect of a transfer set's
    size from that of longer training (papers.md S3.11). Rows are then passed over as often as it
    takes, and the stage is evaluated ``num_epochs * evaluations_per_epoch`` times."""
    batch_size: PositiveInt = 256
    accumulation: PositiveInt = 1
    """Batches whose gradients make one update, as if they were one batch. Batches left over when
    a pass ends are carried into the next; the last update takes what there is."""
    optimizer: Literal["adamw", "lamb"] = "adamw"
    """LAMB is for large batches (papers.md S4.10)."""
    learning_rate: PositiveFloat = 3e-4
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    """Decay of the two moments; (0.9, 0.98) in papers.md S3.6."""
    epsilon: PositiveFloat = 1e-8
    """Added to the root of the second moment; 1e-6 in papers.md S3.6 and S4.10."""
    weight_decay: NonNegativeFloat = 0.01
    """Of matrices; biases, norms and other vectors do not decay."""
    schedule: Literal["linear", "one_cycle", "one_cycle_cosine", "constant"] = "linear"
    """After the warm-up the rate falls along a line (``linear`` rises in whole steps, ``one_cycle``
    is the continuous form of papers.md S3.6, A3.10) or a cosine, or stays ``constant``."""
    warmup_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the updates in which the rate rises from 0."""
    clip_norm: PositiveFloat = 1.0
    """Largest norm of all gradients together, those of projections included."""
    evaluations_per_epoch: PositiveInt = 2
    patience: PositiveInt = 3
    """Evaluations without improvement before the stage stops; the best weights are kept."""
    max_rows: PositiveInt | None = None
    """Upper limit of rows, newest first."""
    autocast: Literal["off", "bfloat16"] = "off"
    activation_checkpointing: bool = False
    """Forget what is inside an encoder layer and compute it again for the gradient: the same
    gradients, a third more time, a fraction of the memory."""
    sharding: Literal["off", "fsdp"] = "off"
    """With several workers: each holds a whole model, or (``fsdp``) its share of the weights,
    gradients and moments, for models that do not fit one accelerator. One worker ignores it."""


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

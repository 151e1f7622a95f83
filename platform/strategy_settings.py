"""A strategy: initialisation, distillation, fine-tuning. Import from ``settings``."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, model_validator

from driftline.platform.data_settings import Settings
from driftline.platform.distillation.language_start import MlmDistilStart as MlmDistilStart
from driftline.platform.initialisers import Initialiser, MlmStart
from driftline.platform.objective_settings import ObjectiveSettings
from driftline.platform.training_settings import SelfTrainingSettings, StageSettings
from driftline.platform.transfer.sets import Natural, TransferSet
from driftline.platform.vocabulary.start import DualVocabulary as DualVocabulary  # a kind of init


class DistilSettings(StageSettings):
    """Distillation as pre-fine-tuning (papers.md S0.18): on which rows, for how long."""

    on: Literal["ood", "id"] = "ood"
    """The stale rows the teacher was trained on, or the recent ones."""
    transfer: TransferSet = Natural()
    """What is made of those rows before the teacher labels them (papers.md S3.15-S3.17)."""

    @property
    def stage(self) -> StageSettings:
        """The training part alone."""
        return StageSettings(**{name: getattr(self, name) for name in StageSettings.model_fields})


class ArmsSelfTrainingSettings(SelfTrainingSettings):
    """Self-training of a whole student, with the options that papers.md S0.20 leaves open.

    Soft labels from the ``finetuned`` student itself, without true ones, say nothing new to it:
    all that then moves it is dropout.
    """

    on: Literal["ood", "id", "both"] = "both"
    """Rows that the student labels."""
    labels: Literal["soft", "hard"] = "soft"
    """Its logits, or the more probable class on the thinned prior."""
    min_confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.5
    """Probability that the more probable class must have, on the thinned prior; rows below keep
    their true label, if it counts at all, and are left out otherwise."""
    true_labels: Literal["id", "both"] = "both"
    """Whose true clicks count with ``true_label_share``: those of recent rows, or all."""


class ArmsRefreshSettings(Settings):
    """The slow refresh is a strategy: initialise, distil, fine-tune, self-train (papers.md S0.17).

    At its end the head is trained once more, over the finished vectors and all recent rows. The
    defaults are the paper's recommended recipe (S0.33); `driftline search` finds another.
    """

    window_hours: Annotated[int, Field(gt=0, le=1_000_000)] = 168
    """Length of the window of recent rows for fine-tuning."""
    init: Initialiser = MlmStart()
    mlm: StageSettings = StageSettings()
    """Recipe of masked-language pre-training, where ``init`` asks for it."""
    supervised: StageSettings = StageSettings()
    """Recipe of supervised training on stale clicks, where ``init`` asks for it."""
    distil: DistilSettings | None = DistilSettings(num_epochs=2)
    objective: ObjectiveSettings = ObjectiveSettings()
    """Of the distillation."""
    finetune: StageSettings | None = StageSettings()
    """On recent clicks; None stops after the distillation."""
    self_training: ArmsSelfTrainingSettings = ArmsSelfTrainingSettings()
    head: StageSettings | None = StageSettings(num_epochs=3, batch_size=1024, learning_rate=1e-3)
    """The head alone over the finished vectors: cheap, so it may see every row several times. None
    leaves the head as it is, as the papers do."""
    catch_up: bool = True
    """End an arms refresh with one head refresh by the recipe of ``student.head_refresh``, so that
    the new bundle knows the last hours as well as the champion it is compared with."""
    num_workers: NonNegativeInt = 0
    """Size of the worker group; 0 trains in a warm actor, right for one machine."""

    @model_validator(mode="after")
    def _trains_a_student(self) -> Self:
        self.objective.check_task("clicks")
        if self.finetune is None and self.self_training.enabled:
            raise ValueError(
                "self_training needs finetune, whose student gives the labels; set "
                "self_training.enabled: false, or give a finetune stage"
            )
        if self.distil is None and self.finetune is None and not self.init.is_whole:
            raise ValueError(
                f"init {self.init.kind!r} without distil and finetune trains no head; give one of "
                "both, or init: supervised"
            )
        return self

"""A strategy: initialisation, distillation, fine-tuning. Import from ``settings``."""

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from driftline.platform.data_settings import Settings
from driftline.platform.initialisers import Initialiser, MlmStart
from driftline.platform.objective_settings import ObjectiveSettings
from driftline.platform.training_settings import SelfTrainingSettings, StageSettings
from driftline.platform.transfer.sets import Natural, TransferSet


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


class ArmsRefreshSettings(Settings):
    """The slow refresh is a strategy: initialise, distil, fine-tune, self-train (papers.md S0.17).

    At its end the head is trained once more, over the finished vectors and all recent rows. The
    defaults are the paper's recommended recipe (S0.33); `driftline search` finds another.
    """

    window_hours: PositiveInt = 168
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
    self_training: SelfTrainingSettings = SelfTrainingSettings()
    head: StageSettings = StageSettings(num_epochs=3, batch_size=1024, learning_rate=1e-3)
    """The head alone over the finished vectors: cheap, so it may see every row several times."""
    num_workers: NonNegativeInt = 0
    """Size of the worker group; 0 trains in a warm actor, right for one machine."""

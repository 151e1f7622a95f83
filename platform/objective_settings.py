"""Settings of the objective: what a student is taught, and by how much of each.

Import from ``settings``; soft losses, matches, schedules and so on from ``distillation``.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from driftline.platform.data_settings import Settings
from driftline.platform.distillation.matches import Match
from driftline.platform.distillation.presets import expand_preset
from driftline.platform.distillation.schedules import Weight
from driftline.platform.distillation.soft_losses import BinaryLoss, KlLoss, SoftLoss
from driftline.platform.distillation.temperatures import ConstantTemperature, ExampleTemperature

ObjectiveTask = Literal["clicks", "tokens"]


class ObjectiveSettings(Settings):
    """w_hard CE + w_soft t^2 D(teacher, student; t) + sum of matches (papers.md section 6).

    In short form ``alpha``: w_hard is 1 - alpha and w_soft is alpha, equation (1) of CTR-BERT
    (S0.16, A0.10). In YAML ``preset: ctrbert`` (``turc``, ``textbrewer``, ``thesis``, ``zhao``)
    gives the defaults of a paper; what stands beside it wins. A preset is expanded on reading, so
    that an objective is the same however it was written.

    What is hard depends on the task: clicks or other labels, or the masked tokens of a
    masked-language stage, whose soft part is then the teacher's distribution over tokens.
    """

    alpha: Annotated[float, Field(ge=0, le=1)] | None = None
    """Weight of the frozen teacher's soft labels; 1 ignores the clicks. 0.5 unless the two
    weights below are given."""
    hard_weight: Weight | None = None
    """Of the cross-entropy of the labels. Give it with ``soft_weight``, instead of ``alpha``."""
    soft_weight: Weight | None = None
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2.0
    tau_squared: bool = True
    """Multiply the soft loss by t^2, so that its gradient does not fade with t."""
    soft: SoftLoss = KlLoss()
    """The loss D."""
    example_temperature: ExampleTemperature = ConstantTemperature()
    """Gives every row a temperature of its own around ``temperature``."""
    probability_shift: bool = False
    """Let the true class win in the teacher's logits, wherever the label is known."""
    matches: tuple[Match, ...] = ()
    """Of the student's inner features with the teacher's."""
    tokens: Literal["all", "masked"] = "all"
    """Where a masked-language stage asks the teacher: at every token or at the masked ones only
    (papers.md A3.3)."""

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, raw: Any) -> Any:
        if not isinstance(raw, Mapping):
            return raw
        values = expand_preset(raw)
        weights = [key for key in ("hard_weight", "soft_weight") if values.get(key) is not None]
        if values.get("alpha") is None and not weights:
            values["alpha"] = 0.5
        return values

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        weights = {"hard_weight": self.hard_weight, "soft_weight": self.soft_weight}
        given = [name for name, weight in weights.items() if weight is not None]
        if self.alpha is not None and given:
            raise ValueError(
                f"give either alpha or hard_weight and soft_weight, got alpha and "
                f"{' and '.join(given)}; set to null what is not meant"
            )
        if len(given) == 1:
            raise ValueError(
                f"give hard_weight and soft_weight together (0 leaves a part out), got only "
                f"{given[0]}"
            )
        if not (self.needs_labels or self.needs_teacher):
            raise ValueError("every weight is 0: nothing would be learned")
        lowest = self.example_temperature.lowest
        if lowest is not None and lowest > self.temperature:
            raise ValueError(
                f"example_temperature.minimum must be at most temperature ({self.temperature}), "
                f"got {lowest}"
            )
        if not self.needs_soft_labels and (
            self.probability_shift or self.example_temperature.lowest is not None
        ):
            raise ValueError(
                "probability_shift and example_temperature change soft labels, whose weight is 0; "
                "raise soft_weight or alpha, or leave them out"
            )
        return self

    def weights_at(self, progress: float) -> tuple[float, float]:
        """(hard, soft) after a share ``progress`` of the updates; 0 before the first."""
        if self.hard_weight is None or self.soft_weight is None:
            alpha = 0.5 if self.alpha is None else self.alpha
            return 1 - alpha, alpha
        return self.hard_weight.at(progress), self.soft_weight.at(progress)

    @property
    def needs_labels(self) -> bool:
        """Whether clicks (or other hard labels) count at all."""
        return self.alpha != 1 if self.hard_weight is None else self.hard_weight.base > 0

    @property
    def needs_soft_labels(self) -> bool:
        """Whether the teacher's logits count at all."""
        return self.alpha != 0 if self.soft_weight is None else self.soft_weight.base > 0

    @property
    def needs_teacher(self) -> bool:
        """Whether there must be a teacher: for soft labels or for matches."""
        return self.needs_soft_labels or self.needs_features

    @property
    def needs_features(self) -> bool:
        """Whether the teacher's inner tensors count at all."""
        return any(match.weight.base > 0 for match in self.matches)

    def check_task(self, task: ObjectiveTask) -> None:
        """Refuse parts that a task would ignore; call before the training starts.

        Args:
            task: ``clicks`` or other labels of rows, or ``tokens``: masked-language distillation.

        Raises:
            ValueError: a part that the task has not.
        """
        if task == "clicks" and self.tokens != "all":
            raise ValueError(
                f"objective.tokens concerns masked-language distillation, got {self.tokens!r} for "
                "a stage over clicks"
            )
        if task == "tokens" and isinstance(self.soft, BinaryLoss) and not self.soft.independent:
            raise ValueError(
                "objective.soft: binary is of a click, not of the many pieces of masked-language "
                "distillation; use kl"
            )
        if task == "tokens" and self.probability_shift:
            raise ValueError(
                "objective.probability_shift lets the clicked class win; leave it out of "
                "masked-language distillation"
            )

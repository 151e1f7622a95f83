"""Weights that change while a student learns: a base times a shape over the training's progress.

Differs from TextBrewer, whose schedule replaces the weight, and only from the second step on
(papers.md B11).
"""

import math
from abc import abstractmethod
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    ModelWrapValidatorHandler,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from driftline.platform.data_settings import Settings
from driftline.platform.kinds import Kind


class Schedule(Kind):
    """Base of all schedules."""

    @abstractmethod
    def factor(self, progress: float) -> float:
        """What the base is multiplied by after a share ``progress`` (0 to 1) of the updates."""


class ConstantSchedule(Schedule):
    """The base itself, at all times; TextBrewer's files say ``none``."""

    kind: Literal["constant", "none"] = "constant"

    def factor(self, progress: float) -> float:
        """1."""
        return 1.0


class Ramp(Schedule):
    """Base of the schedules that move between two moments and rest before and after."""

    start: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the updates before the movement begins."""
    end: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the updates after which it is over."""

    @model_validator(mode="after")
    def _starts_before_it_ends(self) -> Self:
        if self.start >= self.end:
            raise ValueError(f"start must lie before end, got {self.start} and {self.end}")
        return self

    def done(self, progress: float) -> float:
        """Share of the movement that is behind us, 0 to 1."""
        return min(max((progress - self.start) / (self.end - self.start), 0.0), 1.0)


class LinearDecay(Ramp):
    """1 to 0 in a straight line (papers.md 3.2)."""

    kind: Literal["linear_decay"] = "linear_decay"

    def factor(self, progress: float) -> float:
        """1 - x."""
        return 1.0 - self.done(progress)


class LinearGrowth(Ramp):
    """0 to 1 in a straight line (papers.md 3.2)."""

    kind: Literal["linear_growth"] = "linear_growth"

    def factor(self, progress: float) -> float:
        """The share itself."""
        return self.done(progress)


class CosineDecay(Ramp):
    """1 to 0 along half a cosine: slow at both ends."""

    kind: Literal["cosine_decay"] = "cosine_decay"

    def factor(self, progress: float) -> float:
        """(1 + cos(pi x)) / 2."""
        return 0.5 * (1.0 + math.cos(math.pi * self.done(progress)))


class CosineGrowth(Ramp):
    """0 to 1 along half a cosine: slow at both ends."""

    kind: Literal["cosine_growth"] = "cosine_growth"

    def factor(self, progress: float) -> float:
        """(1 - cos(pi x)) / 2."""
        return 0.5 * (1.0 - math.cos(math.pi * self.done(progress)))


class During(Ramp):
    """1 from ``start`` until before ``end``, else 0; until the very end where ``end`` is 1.

    Two of them make two stages in one training, as TinyBERT's: first the layers, then the labels.
    """

    kind: Literal["during"] = "during"

    def factor(self, progress: float) -> float:
        """1 inside, 0 outside."""
        return float(self.start <= progress < self.end or progress == self.end == 1.0)


class Weight(Settings):
    """A weight in the objective. In YAML a number, or ``{base: 0.5, schedule: linear_decay}``."""

    base: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    schedule: Schedule = ConstantSchedule()

    def at(self, progress: float) -> float:
        """Base times schedule, from the first update on.

        Raises:
            ValueError: ``progress`` is no share between 0 and 1.
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"progress must lie between 0 and 1, got {progress}")
        return self.base * self.schedule.factor(progress)

    @model_validator(mode="wrap")
    @classmethod
    def _from_number(cls, raw: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        is_number = isinstance(raw, int | float) and not isinstance(raw, bool)
        return handler({"base": raw} if is_number else raw)

    @model_serializer(mode="wrap")
    def _to_number(self, handler: SerializerFunctionWrapHandler) -> Any:
        return self.base if self.schedule == ConstantSchedule() else handler(self)

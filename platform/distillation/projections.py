"""Trainable maps from the student's width to the teacher's, thrown away after the training.

Shape suffixes: B rows, S the student's width, T the teacher's.
"""

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import Field

from driftline.platform.kinds import Kind

if TYPE_CHECKING:
    from torch import nn

INITIAL_DEVIATION: Final = 0.02


class Projection(Kind):
    """Base of all projections; they stand on the student's side (papers.md 3.2, S2.8)."""

    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Of the projection alone; None for that of the stage."""
    always: bool = False
    """Also between equal widths; by default a projection stands only where the widths differ."""

    @abstractmethod
    def build(self, student_width: int, teacher_width: int) -> "nn.Module":
        """A new module from ``[..., S]`` to ``[..., T]``, drawn from torch's random numbers."""


class LinearProjection(Projection):
    """Wx + b."""

    kind: Literal["linear"] = "linear"

    def build(self, student_width: int, teacher_width: int) -> "nn.Module":
        """One linear layer."""
        return initial_linear(student_width, teacher_width)


class ReluProjection(Projection):
    """max(0, Wx + b): for targets that are never negative."""

    kind: Literal["relu"] = "relu"

    def build(self, student_width: int, teacher_width: int) -> "nn.Module":
        """A linear layer and its activation."""
        from torch import nn

        return nn.Sequential(initial_linear(student_width, teacher_width), nn.ReLU())


class TanhProjection(Projection):
    """tanh(Wx + b): for targets between -1 and 1."""

    kind: Literal["tanh"] = "tanh"

    def build(self, student_width: int, teacher_width: int) -> "nn.Module":
        """A linear layer and its activation."""
        from torch import nn

        return nn.Sequential(initial_linear(student_width, teacher_width), nn.Tanh())


def initial_linear(student_width: int, teacher_width: int) -> "nn.Linear":
    """A linear layer with weights of N(0, 0.02) and no bias yet (papers.md 3.2)."""
    from torch import nn

    linear = nn.Linear(student_width, teacher_width)
    nn.init.normal_(linear.weight, std=INITIAL_DEVIATION)
    nn.init.zeros_(linear.bias)
    return linear

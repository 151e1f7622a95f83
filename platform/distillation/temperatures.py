"""Temperatures of single rows, and labels shifted where the teacher errs (papers.md C13).

Settings and arithmetic in one; torch is not imported. Shape suffixes: B rows, C classes.
"""

from abc import abstractmethod
from typing import TYPE_CHECKING, Literal

from pydantic import NonNegativeFloat, PositiveFloat

from driftline.platform.kinds import Kind

if TYPE_CHECKING:
    from torch import Tensor


class ExampleTemperature(Kind):
    """Base of the rules that give every row a temperature of its own."""

    @property
    def lowest(self) -> float | None:
        """The least temperature the rule gives, where it bounds it."""
        return None

    @abstractmethod
    def rows(
        self, student_BC: "Tensor", teacher_BC: "Tensor", known_B: "Tensor", *, base: float
    ) -> "float | Tensor":
        """Temperature of all rows, or of each; no gradient flows through it. ``[B]``.

        Args:
            student_BC: Logits. ``[B, C]``.
            teacher_BC: Logits; 0 in rows without. ``[B, C]``.
            known_B: Rows with a soft label: the others count in no mean. ``[B]``, bool.
            base: The temperature of the objective.
        """


class ConstantTemperature(ExampleTemperature):
    """The same for all rows; TextBrewer's files say ``none``."""

    kind: Literal["constant", "none"] = "constant"

    def rows(
        self, student_BC: "Tensor", teacher_BC: "Tensor", known_B: "Tensor", *, base: float
    ) -> "float | Tensor":
        """The base."""
        return base


class AroundTheMean(ExampleTemperature):
    """Base of T_i = T + beta (mean w - w_i), at least ``minimum``.

    The mean is over the rows with a soft label in this worker's part of the step. TextBrewer has no
    minimum, and with beta 4 and T 4 a quarter of its temperatures is negative (papers.md B14).
    """

    beta: NonNegativeFloat = 1.0
    minimum: PositiveFloat = 0.5

    @property
    def lowest(self) -> float:
        """The minimum."""
        return self.minimum

    @abstractmethod
    def spread(self, student_BC: "Tensor", teacher_BC: "Tensor") -> "Tensor":
        """w: rows with more of it are softened less. ``[B]``."""

    def rows(
        self, student_BC: "Tensor", teacher_BC: "Tensor", known_B: "Tensor", *, base: float
    ) -> "float | Tensor":
        """See ``ExampleTemperature``; at least two classes."""
        if student_BC.shape[-1] < 2:
            raise ValueError(
                f"example_temperature {self.kind} needs two or more classes, got "
                f"{student_BC.shape[-1]}; use constant for a head with one output"
            )
        weight_B = self.spread(student_BC.detach(), teacher_BC.detach())
        known_B = known_B.to(weight_B.dtype)
        mean = (weight_B * known_B).sum() / known_B.sum().clamp(min=1)
        return (base + self.beta * (mean - weight_B)).clamp(min=self.minimum)


class Flsw(AroundTheMean):
    """Focal: w = (1 - cos(student, teacher))^gamma; rows that differ most are softened least.

    Source: arXiv 1911.07471 as in TextBrewer (papers.md 3.2).
    """

    kind: Literal["flsw"] = "flsw"
    gamma: PositiveFloat = 1.0

    def spread(self, student_BC: "Tensor", teacher_BC: "Tensor") -> "Tensor":
        """See above; a vector of zeros differs from everything by 1."""
        student_BC = student_BC / (student_BC.norm(dim=-1, keepdim=True) + 1e-4)
        teacher_BC = teacher_BC / (teacher_BC.norm(dim=-1, keepdim=True) + 1e-4)
        # Rounding may give a cosine above 1, and a root of a negative number is none.
        return (1 - (student_BC * teacher_BC).sum(dim=-1)).clamp(min=0) ** self.gamma


class Cwsm(AroundTheMean):
    """Confidence: w = 1 / max softmax(student); rows the student is unsure of are softened least.

    Source: arXiv 1911.07471 as in TextBrewer (papers.md 3.2).
    """

    kind: Literal["cwsm"] = "cwsm"

    def spread(self, student_BC: "Tensor", teacher_BC: "Tensor") -> "Tensor":
        """See above."""
        return 1 / (student_BC.softmax(-1).amax(dim=-1) + 1e-3)


def probability_shift(teacher_BC: "Tensor", labels_B: "Tensor") -> "Tensor":
    """Logits in which the true class wins: it changes places with the largest entry. ``[B, C]``.

    A copy; TextBrewer writes into the teacher's logits and any cache of them (papers.md B19).

    Args:
        teacher_BC: Logits. ``[B, C]``, also with more dimensions before C.
        labels_B: True class; negative where not known, and the row stays as it is. ``[B]``, int64.

    Raises:
        ValueError: a class beyond C.
    """
    num_classes = teacher_BC.shape[-1]
    if labels_B.numel() and int(labels_B.max()) >= num_classes:
        raise ValueError(
            f"probability_shift: labels must be below {num_classes}, got {int(labels_B.max())}"
        )
    largest_B1 = teacher_BC.argmax(dim=-1, keepdim=True)
    label_B1 = labels_B.unsqueeze(-1)
    label_B1 = label_B1.where(label_B1 >= 0, largest_B1)
    of_largest_B1 = teacher_BC.gather(-1, largest_B1)
    of_label_B1 = teacher_BC.gather(-1, label_B1)
    return teacher_BC.scatter(-1, largest_B1, of_label_B1).scatter(-1, label_B1, of_largest_B1)

"""How far a student's logits are from the teacher's, softened by a temperature (papers.md C10).

Settings and arithmetic in one; torch is not imported. Shape suffixes: C classes; the dimensions
before it are free (rows, or rows and tokens), written B. A loss is that of each row, without the
factor t^2: see ``objective``.
"""

from abc import abstractmethod
from typing import TYPE_CHECKING, Literal

from driftline.platform.kinds import Kind

if TYPE_CHECKING:
    from torch import Tensor


class SoftLoss(Kind):
    """Base of all soft losses."""

    @abstractmethod
    def rows(
        self, student_BC: "Tensor", teacher_BC: "Tensor", temperature: "float | Tensor"
    ) -> "Tensor":
        """Loss of every row. ``[B]``.

        Args:
            student_BC: Logits. ``[B, C]``.
            teacher_BC: Logits at temperature 1. ``[B, C]``.
            temperature: Of all rows, or of each. Positive. ``[B]``.

        Raises:
            ValueError: the loss means nothing for this number of classes.
        """


class KlLoss(SoftLoss):
    """KL(teacher || student): the Hinton direction, covers all that the teacher holds possible.

    Source: papers.md S0.16, A0.10, A3.1.
    """

    kind: Literal["kl"] = "kl"

    def rows(
        self, student_BC: "Tensor", teacher_BC: "Tensor", temperature: "float | Tensor"
    ) -> "Tensor":
        """See ``SoftLoss``; at least two classes."""
        log_student_BC, log_teacher_BC = _log_softened(student_BC, teacher_BC, temperature)
        return (log_teacher_BC.exp() * (log_teacher_BC - log_student_BC)).sum(dim=-1)


class ReverseKlLoss(SoftLoss):
    """KL(student || teacher): settles on the teacher's main mode.

    The literal order of arguments in papers 000 and 003 (papers.md A0.10, A3.1).
    """

    kind: Literal["reverse_kl"] = "reverse_kl"

    def rows(
        self, student_BC: "Tensor", teacher_BC: "Tensor", temperature: "float | Tensor"
    ) -> "Tensor":
        """See ``SoftLoss``; at least two classes."""
        log_student_BC, log_teacher_BC = _log_softened(student_BC, teacher_BC, temperature)
        return (log_student_BC.exp() * (log_student_BC - log_teacher_BC)).sum(dim=-1)


class CeLoss(SoftLoss):
    """Cross-entropy of the student under the teacher: the gradient of ``kl``, a higher value.

    The value includes the teacher's own entropy; prefer ``kl``, whose value is 0 at agreement.
    Source: TURC and TextBrewer (papers.md 3.2, section 6).
    """

    kind: Literal["ce"] = "ce"

    def rows(
        self, student_BC: "Tensor", teacher_BC: "Tensor", temperature: "float | Tensor"
    ) -> "Tensor":
        """See ``SoftLoss``; at least two classes."""
        log_student_BC, log_teacher_BC = _log_softened(student_BC, teacher_BC, temperature)
        return -(log_teacher_BC.exp() * log_student_BC).sum(dim=-1)


class MseLoss(SoftLoss):
    """Mean squared difference of the softened logits, also of a single one.

    It sees the level of the logits, to which the probabilities of two or more classes are blind.
    Source: TextBrewer (papers.md 3.2, S3.21).
    """

    kind: Literal["mse"] = "mse"

    def rows(
        self, student_BC: "Tensor", teacher_BC: "Tensor", temperature: "float | Tensor"
    ) -> "Tensor":
        """See ``SoftLoss``; any number of outputs."""
        difference_BC = soften(student_BC - teacher_BC, temperature)
        return (difference_BC**2).mean(dim=-1)


class BinaryLoss(SoftLoss):
    """KL(teacher || student) of a yes or no told by one logit, or by the margin of two.

    For heads with one output, where a softmax would be 1 whatever the logit (papers.md B13). Of
    two logits it is ``kl``.
    """

    kind: Literal["binary"] = "binary"
    independent: bool = False
    """Every output is a yes or no of its own (several labels in a row); the mean over them."""

    def rows(
        self, student_BC: "Tensor", teacher_BC: "Tensor", temperature: "float | Tensor"
    ) -> "Tensor":
        """See ``SoftLoss``; one or two outputs, or any number of independent ones."""
        student_BC = soften(self._margins(student_BC), temperature)
        teacher_BC = soften(self._margins(teacher_BC), temperature)
        p_BC = teacher_BC.sigmoid()
        yes_BC = p_BC * (log_sigmoid(teacher_BC) - log_sigmoid(student_BC))
        no_BC = (1 - p_BC) * (log_sigmoid(-teacher_BC) - log_sigmoid(-student_BC))
        return (yes_BC + no_BC).mean(dim=-1)

    def _margins(self, logits_BC: "Tensor") -> "Tensor":
        num_outputs = logits_BC.shape[-1]
        if self.independent or num_outputs == 1:
            return logits_BC
        if num_outputs == 2:
            return logits_BC[..., 1:] - logits_BC[..., :1]
        raise ValueError(
            f"soft loss binary needs one or two outputs, got {num_outputs}; set independent: true "
            "where each is a label of its own, else use kl"
        )


def soften(logits_BC: "Tensor", temperature: "float | Tensor") -> "Tensor":
    """Logits divided by the temperature of all rows, or of each. ``[B, C]``."""
    if isinstance(temperature, float | int):
        return logits_BC / temperature
    return logits_BC / temperature.unsqueeze(-1)


def log_sigmoid(logits: "Tensor") -> "Tensor":
    """Logarithm of the probability of yes, exact far from 0."""
    return -(-logits).logaddexp(logits.new_zeros(()))


def _log_softened(
    student_BC: "Tensor", teacher_BC: "Tensor", temperature: "float | Tensor"
) -> "tuple[Tensor, Tensor]":
    num_classes = student_BC.shape[-1]
    if num_classes < 2:
        raise ValueError(
            f"a softmax over {num_classes} class is 1 whatever the logit and teaches nothing; use "
            "soft: {kind: binary} or mse for a head with one output"
        )
    return (
        soften(student_BC, temperature).log_softmax(-1),
        soften(teacher_BC, temperature).log_softmax(-1),
    )

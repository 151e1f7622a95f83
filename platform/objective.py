"""What a click model is taught: clicks, the frozen teacher's soft labels, or both.

Shape suffixes: B rows, 2 the classes (no click, click).
"""

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, mse_loss, softmax

from driftline.platform.settings import ObjectiveSettings


def click_loss(
    student_B2: Tensor,
    clicked_B: Tensor,
    teacher_B2: Tensor | None,
    settings: ObjectiveSettings | None,
) -> Tensor:
    """(1-a) CE + a t^2 KL(teacher || student) for every row.

    Rows without a soft label learn from the click alone, rows without a click from the soft label
    alone (papers.md A0.16); a row with neither counts nothing.

    Source: CTR-BERT, equation (1), with the Hinton direction and factor (papers.md S0.16, A0.10).

    Args:
        student_B2: Logits. ``[B, 2]``.
        clicked_B: 1 click, 0 none, between for a soft label, NaN when not known. ``[B]``.
        teacher_B2: The teacher's logits at temperature 1; NaN in rows without. ``[B, 2]``.
        settings: Mixture and temperature; None for clicks alone.

    Returns:
        Loss of each row, float32. ``[B]``.
    """
    student_B2 = student_B2.float()
    has_click_B = ~torch.isnan(clicked_B)
    hard_B = cross_entropy(student_B2, clicked_B.nan_to_num()) * has_click_B
    if teacher_B2 is None or settings is None:
        return hard_B
    has_soft_B = ~torch.isnan(teacher_B2).any(dim=1)
    soft_B = soft_loss(student_B2, teacher_B2.nan_to_num(), settings)
    alpha_B = torch.where(has_click_B, settings.alpha, 1.0) * has_soft_B
    return (1 - alpha_B) * hard_B + alpha_B * soft_B


def soft_loss(student_B2: Tensor, teacher_B2: Tensor, settings: ObjectiveSettings) -> Tensor:
    """The teacher's part of the objective for every row. ``[B]``."""
    temperature = settings.temperature
    match settings.divergence:
        case "kl":
            loss_B = kl_divergence(teacher_B2, student_B2, temperature=temperature)
        case "reverse_kl":
            loss_B = kl_divergence(student_B2, teacher_B2, temperature=temperature)
        case "logit_mse":
            loss_B = logit_mse(student_B2, teacher_B2, temperature=temperature)
    return loss_B * temperature**2 if settings.tau_squared else loss_B


def cross_entropy(logits_B2: Tensor, clicked_B: Tensor) -> Tensor:
    """Negative log-likelihood of a click that may be a share between 0 and 1. ``[B]``."""
    log_p_B2 = log_softmax(logits_B2, dim=1)
    return -(clicked_B * log_p_B2[:, 1] + (1 - clicked_B) * log_p_B2[:, 0])


def soft_cross_entropy(student_BC: Tensor, teacher_BC: Tensor, *, temperature: float) -> Tensor:
    """-sum p_teacher log p_student, both softened; its gradient is that of ``kl_divergence``."""
    target_BC = softmax(teacher_BC / temperature, dim=1)
    return -(target_BC * log_softmax(student_BC / temperature, dim=1)).sum(dim=1)


def kl_divergence(reference_BC: Tensor, other_BC: Tensor, *, temperature: float) -> Tensor:
    """KL(reference || other) of the softened distributions. ``[B]``."""
    log_reference_BC = log_softmax(reference_BC / temperature, dim=1)
    log_other_BC = log_softmax(other_BC / temperature, dim=1)
    return (log_reference_BC.exp() * (log_reference_BC - log_other_BC)).sum(dim=1)


def logit_mse(student_BC: Tensor, teacher_BC: Tensor, *, temperature: float) -> Tensor:
    """Mean squared difference of the softened logits. ``[B]``."""
    return mse_loss(student_BC / temperature, teacher_BC / temperature, reduction="none").mean(
        dim=1
    )

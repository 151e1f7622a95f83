"""What a model is taught row by row: labels, the frozen teacher's soft labels, or both.

Shape suffixes: B rows, C classes, 2 the classes (no click, click).
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from driftline.platform.distillation.temperatures import probability_shift
from driftline.platform.settings import ObjectiveSettings


def click_loss(
    student_BC: Tensor,
    clicked_B: Tensor,
    teacher_BC: Tensor | None,
    settings: ObjectiveSettings | None,
    *,
    progress: float = 0.0,
) -> Tensor:
    """w_hard CE + w_soft t^2 D for every row.

    Rows without a soft label learn from the click alone, rows without a click from the soft label
    alone, each with the weight of both (papers.md A0.16); a row with neither counts nothing.

    Source: CTR-BERT, equation (1), with the Hinton direction and factor (papers.md S0.16, A0.10),
    in the general form of papers.md section 6. Matches are not of rows: see ``Distiller``.

    Args:
        student_BC: Logits of no click and click, or the logit of a click alone. ``[B, 2 or 1]``.
        clicked_B: 1 click, 0 none, between for a soft label, NaN when not known. ``[B]``.
        teacher_BC: The teacher's logits at temperature 1; NaN in rows without. ``[B, 2 or 1]``.
        settings: Mixture and temperature; None for clicks alone.
        progress: Share of the updates that are done, for weights with a schedule.

    Returns:
        Loss of each row, at least float32. ``[B]``.
    """
    student_BC = wide(student_BC)
    has_click_B = ~torch.isnan(clicked_B)
    hard_B = cross_entropy(student_BC, clicked_B.nan_to_num()) * has_click_B
    if teacher_BC is None or settings is None:
        return hard_B * _whole_weight(settings, progress)
    is_hard_B = (clicked_B == 0) | (clicked_B == 1)
    labels_B = torch.where(is_hard_B, clicked_B.nan_to_num(), -1).long()
    soft_B, has_soft_B = _soft_rows(student_BC, teacher_BC, settings, labels_B=labels_B)
    return _mix(hard_B, has_click_B, soft_B, has_soft_B, settings.weights_at(progress))


def class_loss(
    student_BC: Tensor,
    labels_B: Tensor,
    teacher_BC: Tensor | None,
    settings: ObjectiveSettings | None,
    *,
    progress: float = 0.0,
) -> Tensor:
    """As ``click_loss``, for any number of classes.

    Args:
        student_BC: Logits. ``[B, C]``, two classes or more.
        labels_B: True class; negative when not known. ``[B]``, int64.
        teacher_BC: The teacher's logits at temperature 1; NaN in rows without. ``[B, C]``.
        settings: Mixture and temperature; None for labels alone.
        progress: Share of the updates that are done, for weights with a schedule.

    Returns:
        Loss of each row, at least float32. ``[B]``.
    """
    student_BC = wide(student_BC)
    has_label_B = labels_B >= 0
    log_p_BC = student_BC.log_softmax(-1)
    hard_B = -log_p_BC.gather(-1, labels_B.clamp(min=0).unsqueeze(-1)).squeeze(-1) * has_label_B
    if teacher_BC is None or settings is None:
        return hard_B * _whole_weight(settings, progress)
    soft_B, has_soft_B = _soft_rows(student_BC, teacher_BC, settings, labels_B=labels_B)
    return _mix(hard_B, has_label_B, soft_B, has_soft_B, settings.weights_at(progress))


def soft_loss(
    student_BC: Tensor,
    teacher_BC: Tensor,
    settings: ObjectiveSettings,
    *,
    labels_B: Tensor | None = None,
) -> Tensor:
    """The teacher's part of the objective for every row, with t^2 but not weighted. ``[B]``.

    Args:
        student_BC: Logits. ``[B, C]``, also with more dimensions before C.
        teacher_BC: The teacher's logits at temperature 1; a row with NaN gives 0. ``[B, C]``.
        settings: Soft loss and temperature.
        labels_B: True classes, negative when not known: for ``probability_shift``. ``[B]``.
    """
    return _soft_rows(student_BC, teacher_BC, settings, labels_B=labels_B)[0]


def cross_entropy(logits_BC: Tensor, clicked_B: Tensor) -> Tensor:
    """Negative log-likelihood of a click that may be a share between 0 and 1. ``[B]``.

    Raises:
        ValueError: neither one logit nor two.
    """
    num_outputs = logits_BC.shape[-1]
    if num_outputs not in (1, 2):
        raise ValueError(f"a click has one logit or two, got {num_outputs}; see class_loss")
    if num_outputs == 1:
        log_yes_B, log_no_B = logsigmoid(logits_BC[..., 0]), logsigmoid(-logits_BC[..., 0])
    else:
        log_no_B, log_yes_B = logits_BC.log_softmax(-1).unbind(-1)
    return -(clicked_B * log_yes_B + (1 - clicked_B) * log_no_B)


def wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _soft_rows(
    student_BC: Tensor,
    teacher_BC: Tensor,
    settings: ObjectiveSettings,
    *,
    labels_B: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Soft loss of each row, 0 where there is none, and where there is one."""
    has_soft_B = ~torch.isnan(teacher_BC).any(dim=-1)
    teacher_BC = teacher_BC.nan_to_num()
    if settings.probability_shift and labels_B is not None:
        teacher_BC = probability_shift(teacher_BC, labels_B)
    temperature = settings.example_temperature.rows(
        student_BC, teacher_BC, has_soft_B, base=settings.temperature
    )
    soft_B = settings.soft.rows(student_BC, teacher_BC, temperature)
    factor = temperature**2 if settings.tau_squared else 1.0
    return soft_B * factor * has_soft_B, has_soft_B


def _mix(
    hard_B: Tensor,
    has_hard_B: Tensor,
    soft_B: Tensor,
    has_soft_B: Tensor,
    weights: tuple[float, float],
) -> Tensor:
    """What is missing in a row gives its weight to what is there."""
    hard, soft = weights
    hard_weight_B = hard + soft * (~has_soft_B).to(hard_B.dtype)
    soft_weight_B = soft + hard * (~has_hard_B).to(soft_B.dtype)
    return hard_weight_B * hard_B + soft_weight_B * soft_B


def _whole_weight(settings: ObjectiveSettings | None, progress: float) -> float:
    return 1.0 if settings is None else sum(settings.weights_at(progress))

"""The rows' part of the objective: labels, soft labels, and what is missing."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from driftline.platform.distillation.schedules import LinearDecay, LinearGrowth, Weight
from driftline.platform.objective import class_loss, click_loss, cross_entropy, soft_loss
from driftline.platform.settings import ObjectiveSettings

# papers.md T.6
STUDENT = torch.tensor([[0.2, -1.1], [1.5, 0.3]], dtype=torch.float64)
TEACHER = torch.tensor([[2.0, -0.5], [-0.7, 0.9]], dtype=torch.float64)
LABELS = torch.tensor([0.0, 1.0], dtype=torch.float64)
LOGITS = st.lists(st.floats(-5, 5), min_size=4, max_size=4)


def test_the_cross_entropy_of_clicks_has_the_published_value() -> None:
    assert float(cross_entropy(STUDENT, LABELS).mean()) == pytest.approx(0.852145, abs=1e-6)


def softened(logits: list[float], temperature: float) -> list[float]:
    powers = [math.exp(logit / temperature) for logit in logits]
    return [power / sum(powers) for power in powers]


def slow_click_loss(
    student: list[float],
    clicked: float | None,
    teacher: list[float] | None,
    settings: ObjectiveSettings,
    *,
    weights: tuple[float, float],
) -> float:
    """Equation (1) in general weights; a part that is missing leaves its weight to the other."""
    w_hard, w_soft = weights
    if clicked is None:
        w_hard, w_soft = 0, w_hard + w_soft
    if teacher is None:
        w_hard, w_soft = 0 if clicked is None else w_hard + w_soft, 0
    p_student = softened(student, 1)
    c = clicked or 0
    hard = -c * math.log(p_student[1]) - (1 - c) * math.log(p_student[0])
    t = settings.temperature
    p, q = softened(teacher or student, t), softened(student, t)
    soft = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return w_hard * hard + w_soft * soft * (t * t if settings.tau_squared else 1)


def compared(
    logits: list[float],
    clicked: float,
    settings: ObjectiveSettings,
    weights: tuple[float, float],
    *,
    progress: float = 0.0,
) -> None:
    """Of four rows: with and without a click, with and without a soft label."""
    student, teacher, missing = logits[:2], logits[2:], [math.nan, math.nan]
    found = click_loss(
        torch.tensor([student] * 4, dtype=torch.float64),
        torch.tensor([clicked, clicked, math.nan, math.nan], dtype=torch.float64),
        torch.tensor([teacher, missing, teacher, missing], dtype=torch.float64),
        settings,
        progress=progress,
    )
    expected = [
        slow_click_loss(student, click, soft, settings, weights=weights)
        for click, soft in (
            (clicked, teacher),
            (clicked, None),
            (None, teacher),
            (None, None),
        )
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(
    logits=LOGITS,
    clicked=st.floats(0, 1),
    alpha=st.floats(0, 1),
    temperature=st.floats(0.5, 8),
    tau_squared=st.booleans(),
)
def test_click_loss_is_equation_one_in_every_row(
    logits: list[float], clicked: float, alpha: float, temperature: float, tau_squared: bool
) -> None:
    settings = ObjectiveSettings(alpha=alpha, temperature=temperature, tau_squared=tau_squared)
    compared(logits, clicked, settings, (1 - alpha, alpha))


@given(logits=LOGITS, hard=st.floats(0, 3), soft=st.floats(0.1, 3), progress=st.floats(0, 1))
def test_weights_are_base_times_schedule_from_the_first_update_on(
    logits: list[float], hard: float, soft: float, progress: float
) -> None:
    settings = ObjectiveSettings(
        hard_weight=Weight(base=hard, schedule=LinearGrowth()),
        soft_weight=Weight(base=soft, schedule=LinearDecay()),
    )
    weights = (hard * progress, soft * (1 - progress))
    compared(logits, 1.0, settings, weights, progress=progress)


def test_rows_without_a_click_learn_from_the_soft_label_alone() -> None:
    half = ObjectiveSettings(alpha=0.5)
    whole = ObjectiveSettings(alpha=1.0)
    unknown = torch.full((2,), math.nan)
    student, teacher = STUDENT.float(), TEACHER.float()
    without = click_loss(student, unknown, teacher, half)
    assert torch.equal(without, click_loss(student, LABELS.float(), teacher, whole))
    assert click_loss(student, unknown, None, half).tolist() == [0, 0]


def gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    point = at.clone().requires_grad_()
    return torch.autograd.grad(loss(point).sum(), point)[0]


@pytest.mark.parametrize("soft", ["kl", "reverse_kl", "ce", "mse", "binary"])
@pytest.mark.parametrize("rule", ["constant", "flsw", "cwsm"])
def test_missing_soft_labels_leave_no_trace(soft: str, rule: str) -> None:
    settings = ObjectiveSettings.model_validate(
        {"soft": soft, "example_temperature": rule, "temperature": 8}
    )
    labels, unknown = torch.tensor([1.0, 0.0, 1.0]), torch.full((1, 2), math.nan)
    student = torch.tensor([[0.3, -2.0], *STUDENT.tolist()])
    teacher = TEACHER.float()

    def loss(student: Tensor) -> Tensor:
        return click_loss(student, labels, torch.cat([unknown, teacher]), settings)

    assert torch.isfinite(gradient(loss, student)).all()
    alone = click_loss(student[1:], labels[1:], teacher, settings)
    assert torch.allclose(loss(student)[1:], alone)


def test_gradient_of_the_soft_loss_does_not_fade_with_temperature() -> None:
    norms = {}
    for squared in (True, False):
        settings = ObjectiveSettings(alpha=1, temperature=50, tau_squared=squared)
        found = gradient(partial(of_soft_labels, settings=settings), STUDENT)
        norms[squared] = float(found.norm())
    assert norms[True] == pytest.approx(2500 * norms[False], rel=1e-3)


def of_soft_labels(student: Tensor, *, settings: ObjectiveSettings) -> Tensor:
    return click_loss(student, LABELS, TEACHER, settings)


@given(logits=LOGITS, alpha=st.floats(0, 1))
def test_one_logit_learns_what_the_margin_of_two_learns(logits: list[float], alpha: float) -> None:
    pair = torch.tensor([logits[:2], logits[2:]], dtype=torch.float64)
    margin = pair[:, 1:] - pair[:, :1]
    clicked = torch.tensor([1.0], dtype=torch.float64)
    two = click_loss(pair[:1], clicked, pair[1:], ObjectiveSettings(alpha=alpha, soft="kl"))
    one = click_loss(
        margin[:1],
        clicked,
        margin[1:],
        ObjectiveSettings.model_validate({"alpha": alpha, "soft": "binary"}),
    )
    assert one.tolist() == pytest.approx(two.tolist(), abs=1e-9)


def test_a_softmax_over_one_logit_is_refused() -> None:
    one = torch.zeros(3, 1)
    with pytest.raises(ValueError, match=r"softmax over 1 class .* \{kind: binary\}"):
        click_loss(one, torch.zeros(3), one, ObjectiveSettings())
    with pytest.raises(ValueError, match="one logit or two, got 3; see class_loss"):
        cross_entropy(torch.zeros(1, 3), torch.zeros(1))


@given(logits=LOGITS, alpha=st.floats(0, 1), label=st.sampled_from([0, 1]))
def test_clicks_are_two_classes(logits: list[float], alpha: float, label: int) -> None:
    student, teacher = torch.tensor([logits[:2]]), torch.tensor([logits[2:]])
    settings = ObjectiveSettings(alpha=alpha)
    clicks = click_loss(student, torch.tensor([float(label)]), teacher, settings)
    assert torch.allclose(clicks, class_loss(student, torch.tensor([label]), teacher, settings))
    without = click_loss(student, torch.tensor([math.nan]), teacher, settings)
    assert torch.allclose(without, class_loss(student, torch.tensor([-1]), teacher, settings))


def test_many_classes_are_taught_alike() -> None:
    student = torch.tensor([[0.2, -1.1, 0.5], [1.5, 0.3, -0.4]], dtype=torch.float64)
    teacher = torch.tensor([[2.0, -0.5, 0.1], [-0.7, 0.9, 0.0]], dtype=torch.float64)
    labels = torch.tensor([2, -1])
    settings = ObjectiveSettings(alpha=0.25, temperature=2)
    soft = soft_loss(student, teacher, settings)
    hard = torch.nn.functional.cross_entropy(student[:1], labels[:1])
    found = class_loss(student, labels, teacher, settings)
    assert found.tolist() == pytest.approx([float(0.75 * hard + 0.25 * soft[0]), float(soft[1])])


def test_a_shifted_teacher_lets_the_click_win() -> None:
    plain = ObjectiveSettings(alpha=1.0)
    shifted = ObjectiveSettings(alpha=1.0, probability_shift=True)
    teacher = torch.tensor([[2.0, -0.5], [2.0, -0.5], [2.0, -0.5], [2.0, -0.5]])
    by_hand = torch.tensor([[2.0, -0.5], [-0.5, 2.0], [2.0, -0.5], [2.0, -0.5]])
    before = teacher.clone()
    student = torch.tensor([[0.2, -1.1]]).expand(4, 2)
    clicked = torch.tensor([0.0, 1.0, math.nan, 0.7])  # a share of a click says no class
    found = click_loss(student, clicked, teacher, shifted)
    assert torch.equal(found, click_loss(student, clicked, by_hand, plain))
    assert torch.equal(teacher, before)

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from driftline.platform.objective import (
    click_loss,
    cross_entropy,
    kl_divergence,
    logit_mse,
    soft_cross_entropy,
)
from driftline.platform.settings import ObjectiveSettings

# papers.md T.6: values of TextBrewer's own functions, float64
STUDENT = torch.tensor([[0.2, -1.1], [1.5, 0.3]], dtype=torch.float64)
TEACHER = torch.tensor([[2.0, -0.5], [-0.7, 0.9]], dtype=torch.float64)
LABELS = torch.tensor([0.0, 1.0], dtype=torch.float64)
LOGITS = st.lists(st.floats(-5, 5), min_size=4, max_size=4)


@pytest.mark.parametrize(
    ("temperature", "soft_ce", "mse", "kl", "reverse_kl"),
    [
        (1, 0.800664, 2.2, 0.440061, 0.483683),
        (2, 0.708142, 0.55, 0.133429, 0.137600),
        (8, 0.693642, 0.034375, 0.009012, 0.009031),
    ],
)
def test_losses_have_the_published_values(
    temperature: float, soft_ce: float, mse: float, kl: float, reverse_kl: float
) -> None:
    def mean(losses: torch.Tensor) -> float:
        return float(losses.mean())

    assert mean(soft_cross_entropy(STUDENT, TEACHER, temperature=temperature)) == pytest.approx(
        soft_ce, abs=1e-6
    )
    assert mean(logit_mse(STUDENT, TEACHER, temperature=temperature)) == pytest.approx(mse)
    assert mean(kl_divergence(TEACHER, STUDENT, temperature=temperature)) == pytest.approx(
        kl, abs=1e-6
    )
    assert mean(kl_divergence(STUDENT, TEACHER, temperature=temperature)) == pytest.approx(
        reverse_kl, abs=1e-6
    )
    assert mean(cross_entropy(STUDENT, LABELS)) == pytest.approx(0.852145, abs=1e-6)


def slow_click_loss(
    student: list[float], clicked: float, teacher: list[float] | None, settings: ObjectiveSettings
) -> float:
    def softened(logits: list[float], temperature: float) -> list[float]:
        powers = [math.exp(logit / temperature) for logit in logits]
        return [power / sum(powers) for power in powers]

    p_student = softened(student, 1)
    hard = -clicked * math.log(p_student[1]) - (1 - clicked) * math.log(p_student[0])
    if teacher is None:
        return hard
    t = settings.temperature
    p, q = softened(teacher, t), softened(student, t)
    soft = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    factor = t * t if settings.tau_squared else 1
    return (1 - settings.alpha) * hard + settings.alpha * factor * soft


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
    student, teacher = logits[:2], logits[2:]
    found = click_loss(
        torch.tensor([student, student]),
        torch.tensor([clicked, clicked]),
        torch.tensor([teacher, [math.nan, math.nan]]),
        settings,
    )
    expected = [
        slow_click_loss(student, clicked, teacher, settings),
        slow_click_loss(student, clicked, None, settings),
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-4)  # float32


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


def test_missing_soft_labels_leave_no_trace_in_the_gradient() -> None:
    teacher = torch.tensor([[math.nan, math.nan], [1.0, 2.0]])
    found = gradient(
        lambda student: click_loss(student, LABELS.float(), teacher, ObjectiveSettings()),
        STUDENT.float(),
    )
    assert torch.isfinite(found).all()


@given(logits=LOGITS, temperature=st.floats(0.5, 8))
def test_divergence_and_soft_cross_entropy_have_the_same_gradient(
    logits: list[float], temperature: float
) -> None:
    student = torch.tensor([logits[:2]], dtype=torch.float64)
    teacher = torch.tensor([logits[2:]], dtype=torch.float64)
    of_kl = gradient(lambda z: kl_divergence(teacher, z, temperature=temperature), student)
    of_ce = gradient(lambda z: soft_cross_entropy(z, teacher, temperature=temperature), student)
    assert torch.allclose(of_kl, of_ce, atol=1e-12)


def test_gradient_of_the_soft_loss_does_not_fade_with_temperature() -> None:
    norms = {}
    for squared in (True, False):
        settings = ObjectiveSettings(alpha=1, temperature=50, tau_squared=squared)
        found = gradient(partial(of_soft_labels, settings=settings), STUDENT)
        norms[squared] = float(found.norm())
    assert norms[True] == pytest.approx(2500 * norms[False], rel=1e-3)


def of_soft_labels(student: Tensor, *, settings: ObjectiveSettings) -> Tensor:
    return click_loss(student, LABELS, TEACHER, settings)

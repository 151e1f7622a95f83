"""Soft losses, temperatures of single rows, shifted labels: against slow versions and T.6."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from driftline.platform.distillation.soft_losses import (
    BinaryLoss,
    CeLoss,
    KlLoss,
    MseLoss,
    ReverseKlLoss,
    SoftLoss,
)
from driftline.platform.distillation.temperatures import (
    AroundTheMean,
    ConstantTemperature,
    Cwsm,
    ExampleTemperature,
    Flsw,
    probability_shift,
)

# papers.md T.6: values of textbrewer 0.2.1.post1's own functions, float64
STUDENT = torch.tensor([[0.2, -1.1], [1.5, 0.3]], dtype=torch.float64)
TEACHER = torch.tensor([[2.0, -0.5], [-0.7, 0.9]], dtype=torch.float64)
KNOWN = torch.tensor([True, True])


@pytest.mark.parametrize(
    ("loss", "published"),
    [
        (CeLoss(), {1: 0.800664, 2: 0.708142, 8: 0.693642}),
        (MseLoss(), {1: 2.2, 2: 0.55, 8: 0.034375}),
        (KlLoss(), {1: 0.440061, 2: 0.133429, 8: 0.009012}),
        (BinaryLoss(), {1: 0.440061, 2: 0.133429, 8: 0.009012}),  # of two logits it is kl
        (ReverseKlLoss(), {1: 0.483683, 2: 0.137600, 8: 0.009031}),
    ],
    ids=lambda value: value.kind if isinstance(value, SoftLoss) else "",
)
def test_soft_losses_have_the_published_values(
    loss: SoftLoss, published: dict[float, float]
) -> None:
    found = {t: float(loss.rows(STUDENT, TEACHER, t).mean()) for t in published}
    assert found == pytest.approx(published, abs=1e-6)


def softmax(logits: list[float], temperature: float) -> list[float]:
    powers = [math.exp(z / temperature) for z in logits]
    return [power / sum(powers) for power in powers]


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


def slow(kind: str, student: list[float], teacher: list[float], t: float) -> float:
    if kind == "mse":
        return sum((s / t - z / t) ** 2 for s, z in zip(student, teacher, strict=True)) / len(
            student
        )
    if kind == "binary":
        total = 0.0
        for s, z in zip(student, teacher, strict=True):
            p, q = sigmoid(z / t), sigmoid(s / t)
            total += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
        return total / len(student)
    p_T, p_S = softmax(teacher, t), softmax(student, t)
    pairs = list(zip(p_T, p_S, strict=True))
    if kind == "ce":
        return -sum(p * math.log(q) for p, q in pairs)
    if kind == "kl":
        return sum(p * math.log(p / q) for p, q in pairs)
    return sum(q * math.log(q / p) for p, q in pairs)


ROWS = st.integers(2, 5).flatmap(
    lambda c: st.lists(st.lists(st.floats(-6, 6), min_size=c, max_size=c), min_size=2, max_size=2)
)
LOSSES: list[SoftLoss] = [
    KlLoss(),
    ReverseKlLoss(),
    CeLoss(),
    MseLoss(),
    BinaryLoss(independent=True),
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.kind)
@given(rows=ROWS, temperatures=st.lists(st.floats(0.5, 8), min_size=2, max_size=2))
def test_a_soft_loss_is_that_of_every_row_at_its_temperature(
    loss: SoftLoss, rows: list[list[float]], temperatures: list[float]
) -> None:
    student = torch.tensor([rows[0], rows[1]], dtype=torch.float64)
    teacher = torch.tensor([rows[1], rows[0]], dtype=torch.float64)
    t = torch.tensor(temperatures, dtype=torch.float64)
    expected = [
        slow(loss.kind, rows[0], rows[1], temperatures[0]),
        slow(loss.kind, rows[1], rows[0], temperatures[1]),
    ]
    found = loss.rows(student, teacher, t)
    assert found.tolist() == pytest.approx(expected, abs=1e-9)
    # Tokens are rows too: a dimension more changes nothing.
    tokens = loss.rows(student[None], teacher[None], t[None])
    assert torch.equal(tokens, found[None])
    assert loss.rows(student, teacher, 2.0).tolist() == pytest.approx(
        [slow(loss.kind, rows[0], rows[1], 2.0), slow(loss.kind, rows[1], rows[0], 2.0)], abs=1e-9
    )


@pytest.mark.parametrize("loss", [KlLoss(), ReverseKlLoss(), CeLoss()], ids=lambda x: x.kind)
def test_a_softmax_over_one_class_is_an_error(loss: SoftLoss) -> None:
    one = torch.zeros(4, 1)
    with pytest.raises(ValueError, match=r"teaches nothing; use\s+soft: \{kind: binary\} or mse"):
        loss.rows(one, one, 1.0)


def test_a_single_logit_is_taught() -> None:
    student, teacher = torch.tensor([[0.5]], dtype=torch.float64), torch.tensor([[-2.0]])
    assert float(BinaryLoss().rows(student, teacher.double(), 2.0)) == pytest.approx(
        slow("binary", [0.5], [-2.0], 2.0)
    )
    assert gradient(lambda z: BinaryLoss().rows(z, teacher, 2.0), student).abs().min() > 0.1
    assert float(MseLoss().rows(student, teacher.double(), 2.0)) == pytest.approx(1.25**2)


def test_several_yes_or_no_must_be_said_to_be_independent() -> None:
    with pytest.raises(ValueError, match="one or two outputs, got 3; set independent: true"):
        BinaryLoss().rows(torch.zeros(1, 3), torch.zeros(1, 3), 1.0)


def gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    point = at.clone().requires_grad_()
    return torch.autograd.grad(loss(point).sum(), point)[0]


@given(rows=ROWS, temperature=st.floats(0.5, 8))
def test_kl_and_ce_have_the_same_gradient(rows: list[list[float]], temperature: float) -> None:
    student, teacher = (torch.tensor([row], dtype=torch.float64) for row in rows)
    of_kl = gradient(lambda z: KlLoss().rows(z, teacher, temperature), student)
    of_ce = gradient(lambda z: CeLoss().rows(z, teacher, temperature), student)
    assert torch.allclose(of_kl, of_ce, atol=1e-12)


def test_kl_the_other_way_round_has_another_gradient() -> None:
    there, back = (
        gradient(lambda z, loss=loss: loss.rows(z, TEACHER, 2.0), STUDENT)  # type: ignore[misc]
        for loss in (KlLoss(), ReverseKlLoss())
    )
    assert (there - back).abs().min() > 1e-3


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.kind)
@given(rows=ROWS, temperature=st.floats(0.7, 4))
def test_gradients_are_finite_differences(
    loss: SoftLoss, rows: list[list[float]], temperature: float
) -> None:
    student, teacher = (torch.tensor([row], dtype=torch.float64) for row in rows)
    found = gradient(lambda z: loss.rows(z, teacher, temperature), student)
    step = 1e-5
    for c in range(student.shape[1]):
        shift = torch.zeros_like(student)
        shift[0, c] = step
        up = loss.rows(student + shift, teacher, temperature)
        down = loss.rows(student - shift, teacher, temperature)
        assert float(found[0, c]) == pytest.approx(float(up - down) / (2 * step), abs=1e-6)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.kind)
def test_logits_far_apart_give_finite_losses_and_gradients(loss: SoftLoss) -> None:
    student, teacher = torch.tensor([[300.0, -300.0]]), torch.tensor([[-300.0, 300.0]])
    assert torch.isfinite(loss.rows(student, teacher, 1.0)).all()
    assert torch.isfinite(gradient(lambda z: loss.rows(z, teacher, 1.0), student)).all()


# --- temperatures ---------------------------------------------------------------------------


def test_large_logits_that_agree_have_a_temperature() -> None:
    logits = 3000 * torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    known = torch.ones(1000, dtype=torch.bool)
    temperatures = Flsw(gamma=0.5).rows(logits, logits.clone(), known, base=2.0)
    assert isinstance(temperatures, Tensor)
    assert temperatures.tolist() == pytest.approx([2.0] * 1000, abs=0.01)


def test_temperatures_of_rows_have_the_published_values() -> None:
    flsw = Flsw(beta=1, gamma=2).rows(STUDENT, TEACHER, KNOWN, base=8)
    cwsm = Cwsm(beta=1).rows(STUDENT, TEACHER, KNOWN, base=8)
    assert isinstance(flsw, Tensor)
    assert isinstance(cwsm, Tensor)
    assert flsw.tolist() == pytest.approx([8.874308, 7.125692], abs=1e-6)
    assert cwsm.tolist() == pytest.approx([8.014294, 7.985706], abs=1e-6)
    assert ConstantTemperature().rows(STUDENT, TEACHER, KNOWN, base=8) == 8


def slow_spread(rule: ExampleTemperature, student: list[float], teacher: list[float]) -> float:
    if isinstance(rule, Flsw):
        norm_S, norm_T = (math.sqrt(sum(z * z for z in row)) + 1e-4 for row in (student, teacher))
        cosine = sum(s / norm_S * (t / norm_T) for s, t in zip(student, teacher, strict=True))
        return float((1 - cosine) ** rule.gamma)
    return 1 / (max(softmax(student, 1)) + 1e-3)


@pytest.mark.parametrize("rule", [Flsw(beta=4, gamma=2), Cwsm(beta=40, minimum=1)])
@given(
    rows=st.lists(
        st.tuples(
            st.lists(st.floats(-4, 4), min_size=3, max_size=3),
            st.lists(st.floats(-4, 4), min_size=3, max_size=3),
            st.booleans(),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_temperatures_lie_around_the_mean_of_the_known_rows_and_above_the_minimum(
    rule: AroundTheMean, rows: list[tuple[list[float], list[float], bool]]
) -> None:
    student, teacher = (torch.tensor([r[i] for r in rows], dtype=torch.float64) for i in (0, 1))
    known = [row[2] for row in rows]
    found = rule.rows(student, teacher, torch.tensor(known), base=4)
    spreads = [slow_spread(rule, *row[:2]) for row in rows]
    counted = [w for w, is_known in zip(spreads, known, strict=True) if is_known]
    mean = sum(counted) / len(counted) if counted else 0.0
    expected = [max(4 + rule.beta * (mean - w), rule.minimum) for w in spreads]
    assert isinstance(found, Tensor)
    assert found.tolist() == pytest.approx(expected, abs=1e-9)
    assert found.min() >= rule.minimum > 0


def test_no_gradient_flows_through_a_temperature() -> None:
    student = STUDENT.clone().requires_grad_()
    found = Flsw().rows(student, TEACHER, KNOWN, base=8)
    assert isinstance(found, Tensor)
    assert not found.requires_grad


def test_a_single_logit_has_no_temperature_of_its_own() -> None:
    with pytest.raises(ValueError, match="cwsm needs two or more classes, got 1; use constant"):
        Cwsm().rows(STUDENT[:, :1], TEACHER[:, :1], KNOWN, base=8)


# --- shifted labels ---------------------------------------------------------------------------


@given(
    rows=st.lists(
        st.tuples(st.lists(st.floats(-4, 4), min_size=4, max_size=4), st.integers(-2, 3)),
        min_size=1,
        max_size=5,
    )
)
def test_the_true_class_changes_places_with_the_largest(
    rows: list[tuple[list[float], int]],
) -> None:
    teacher = torch.tensor([row for row, _ in rows], dtype=torch.float64)
    labels = torch.tensor([label for _, label in rows])
    expected = []
    for row, label in rows:
        shifted = list(row)
        if label >= 0:
            largest = row.index(max(row))
            shifted[largest], shifted[label] = row[label], row[largest]
        expected.append(shifted)
    before = teacher.clone()
    assert probability_shift(teacher, labels).tolist() == expected
    assert torch.equal(teacher, before)  # a copy: papers.md B19
    assert probability_shift(teacher[None], labels[None])[0].tolist() == expected


def test_a_class_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match="labels must be below 2, got 2"):
        probability_shift(TEACHER, torch.tensor([0, 2]))

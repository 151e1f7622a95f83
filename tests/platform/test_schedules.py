"""Weights over the training's progress."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from driftline.platform.distillation.schedules import (
    ConstantSchedule,
    CosineDecay,
    CosineGrowth,
    During,
    LinearDecay,
    LinearGrowth,
    Schedule,
    Weight,
)

SCHEDULES = [
    ConstantSchedule(),
    LinearDecay(),
    LinearGrowth(start=0.25),
    CosineDecay(end=0.5),
    CosineGrowth(),
    During(end=0.5),
]


@given(base=st.floats(0, 100), x=st.floats(0, 1))
def test_a_weight_is_its_base_times_its_shape(base: float, x: float) -> None:
    shapes: list[tuple[Schedule, float]] = [
        (ConstantSchedule(), 1),
        (LinearDecay(), 1 - x),
        (LinearGrowth(), x),
        (CosineDecay(), (1 + math.cos(math.pi * x)) / 2),
        (CosineGrowth(), (1 - math.cos(math.pi * x)) / 2),
        (LinearDecay(start=0.5), 1 if x < 0.5 else 2 - 2 * x),
        (LinearGrowth(end=0.5), 2 * x if x < 0.5 else 1),
        (During(start=0.25, end=0.5), 0.25 <= x < 0.5),
        (During(start=0.5), x >= 0.5),
    ]
    for schedule, factor in shapes:
        assert Weight(base=base, schedule=schedule).at(x) == pytest.approx(base * factor)


def test_the_base_is_never_replaced() -> None:
    """TextBrewer's 5 becomes 0.25, 0.5, 0.75 (papers.md B11)."""
    weight = Weight(base=5, schedule=LinearGrowth())
    assert [weight.at(step / 4) for step in range(5)] == [0, 1.25, 2.5, 3.75, 5]


@pytest.mark.parametrize("progress", [-0.1, 1.1, math.nan])
def test_progress_is_a_share(progress: float) -> None:
    with pytest.raises(ValueError, match="progress must lie between 0 and 1, got"):
        Weight(base=1).at(progress)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.kind)
def test_weights_survive_json(schedule: Schedule) -> None:
    weight = Weight(base=0.3, schedule=schedule)
    assert Weight.model_validate_json(weight.model_dump_json()) == weight
    assert Weight.model_validate(weight.model_dump()) == weight


def test_a_weight_without_a_schedule_is_written_as_a_number() -> None:
    assert Weight.model_validate(2).model_dump_json() == "2.0"
    assert Weight.model_validate({"base": 2, "schedule": "none"}).at(0.7) == 2


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (-1, "base.*greater than or equal to 0"),
        (math.inf, "base.*finite"),
        (True, "valid dictionary"),
        ({"base": 1, "schedule": "linear"}, "schedule.*kind must be one of constant, cosine_decay"),
        ({"base": 1, "schedule": None}, "schedule.*needs kind: one of"),
        (
            {"base": 1, "schedule": {"kind": "during", "start": 0.6, "end": 0.5}},
            "start must lie before end, got 0.6 and 0.5",
        ),
    ],
)
def test_a_wrong_weight_is_refused(raw: object, message: str) -> None:
    with pytest.raises(ValidationError, match=f"(?s){message}"):
        Weight.model_validate(raw)

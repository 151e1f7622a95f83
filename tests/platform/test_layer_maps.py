"""Which layers are matched, what is refused before training, and projections."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from driftline.platform.distillation.keys import FeatureKey
from driftline.platform.distillation.layer_maps import (
    TOP,
    ExplicitMap,
    LastMap,
    LayerMap,
    SkipMap,
    UniformMap,
)
from driftline.platform.distillation.matches import (
    AttentionCeMean,
    AttentionMse,
    Cos,
    EmbeddingMse,
    Fsp,
    HiddenMse,
    Match,
    ModelShape,
    ModuleMatch,
    Nst,
    Pkd,
    Point,
)
from driftline.platform.distillation.projections import (
    LinearProjection,
    Projection,
    ReluProjection,
    TanhProjection,
)


@pytest.mark.parametrize(
    ("layers", "student", "teacher", "expected"),
    [
        # TextBrewer's recipes (papers.md 3.2)
        (UniformMap(), 3, 12, [(0, 0), (1, 4), (2, 8), (3, 12)]),
        (UniformMap(), 4, 12, [(0, 0), (1, 3), (2, 6), (3, 9), (4, 12)]),
        (UniformMap(), 6, 12, [(0, 0), (1, 2), (2, 4), (3, 6), (4, 8), (5, 10), (6, 12)]),
        (UniformMap(), 1, 1, [(0, 0), (1, 1)]),
        (UniformMap(embeddings=False), 2, 4, [(1, 2), (2, 4)]),
        # PKD, 6 layers of 12 (papers.md A3.11)
        (SkipMap(), 6, 12, [(1, 2), (2, 4), (3, 6), (4, 8), (5, 10)]),
        (LastMap(), 6, 12, [(1, 7), (2, 8), (3, 9), (4, 10), (5, 11)]),
        (SkipMap(stride=3, num_layers=4), 4, 12, [(1, 3), (2, 6), (3, 9), (4, 12)]),
        (LastMap(num_layers=2), 6, 12, [(1, 10), (2, 11)]),
        (ExplicitMap(pairs=((0, 0), (2, -2), (-1, 12))), 4, 12, [(0, 0), (2, 11), (4, 12)]),
        (TOP, 3, 12, [(3, 12)]),
    ],
    ids=lambda value: value.kind if isinstance(value, LayerMap) else "",
)
def test_maps_give_the_papers_pairs(
    layers: LayerMap, student: int, teacher: int, expected: Sequence[tuple[int, int]]
) -> None:
    assert list(layers.resolve(student, teacher, first=0)) == list(expected)


@given(student=st.integers(1, 12), more=st.integers(0, 12))
def test_a_uniform_map_rises_from_end_to_end_near_the_ideal(student: int, more: int) -> None:
    teacher = student + more
    pairs = UniformMap().resolve(student, teacher, first=0)
    assert pairs[0] == (0, 0)
    assert pairs[-1] == (student, teacher)
    assert [s for s, _ in pairs] == list(range(student + 1))
    assert sorted({t for _, t in pairs}) == [t for _, t in pairs]  # strictly rising
    assert all(abs(t - s * teacher / student) <= 0.5 for s, t in pairs)
    assert UniformMap().resolve(student, teacher, first=1) == pairs[1:]


@pytest.mark.parametrize(
    ("layers", "student", "teacher", "first", "message"),
    [
        (UniformMap(), 6, 4, 0, r"uniform: the student \(6 layers\) is deeper than the teacher"),
        (SkipMap(), 5, 12, 0, "12 layers of the teacher are no multiple of the student's 5"),
        (SkipMap(stride=4, num_layers=4), 6, 12, 0, "ends at layer 16, the teacher has 12"),
        (SkipMap(num_layers=7), 6, 12, 0, "num_layers must be 1 to 6 for a student of 6 layers"),
        (SkipMap(), 1, 12, 0, "got 0; use uniform for a student of one layer"),
        (LastMap(num_layers=3), 4, 3, 0, "need a teacher of more layers, got 3"),
        (LastMap(num_layers=5), 4, 12, 0, "num_layers must be 1 to 4"),
        (ExplicitMap(pairs=()), 4, 12, 0, "at least one pair, got none"),
        (ExplicitMap(pairs=((5, 0),)), 4, 12, 0, "student has places 0 to 4 .* got 5"),
        (ExplicitMap(pairs=((0, -14),)), 4, 12, 0, "teacher has places 0 to 12 .* got -14"),
        (ExplicitMap(pairs=((0, 3),)), 4, 12, 1, "student has places 1 to 4 .* got 0"),
    ],
)
def test_impossible_maps_are_refused(
    layers: LayerMap, student: int, teacher: int, first: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        layers.resolve(student, teacher, first=first)


# --- points -----------------------------------------------------------------------------------

TINY = ModelShape(num_layers=2, width=8, num_heads=2, modules={"pooler": 8})
BIG = ModelShape(num_layers=4, width=16, num_heads=4, modules={"pooler": 16, "head.0": 8})


def as_text(points: Sequence[Point]) -> list[str]:
    return [
        " ".join(map(str, point.student)) + " ~ " + " ".join(map(str, point.teacher))
        for point in points
    ]


def test_points_name_the_tensors_of_both_sides() -> None:
    same = ModelShape(num_layers=4, width=8, num_heads=2)
    assert as_text(HiddenMse().points(TINY, same)) == [
        "hidden.0 ~ hidden.0",
        "hidden.1 ~ hidden.2",
        "hidden.2 ~ hidden.4",
    ]
    assert as_text(EmbeddingMse().points(TINY, same)) == ["hidden.0 ~ hidden.0"]
    assert as_text(Cos().points(TINY, same)) == ["hidden.2 ~ hidden.4"]
    assert as_text(Pkd(layers=SkipMap()).points(TINY, same)) == ["cls.1 ~ cls.2"]
    assert as_text(AttentionMse().points(TINY, same)) == [
        "scores.1 ~ scores.2",
        "scores.2 ~ scores.4",
    ]
    on = AttentionMse(on="probabilities", layers=TOP)
    assert as_text(on.points(TINY, same)) == ["attention.2 ~ attention.4"]
    assert as_text(ModuleMatch(student="pooler", teacher="head.0").points(TINY, BIG)) == [
        "module.pooler ~ module.head.0"
    ]
    assert as_text(Fsp(layers=TOP).points(TINY, same)) == ["hidden.2 hidden.2 ~ hidden.4 hidden.4"]
    assert as_text(Nst(flow="next").points(TINY, BIG)) == [
        "hidden.0 hidden.1 ~ hidden.0 hidden.2",
        "hidden.1 hidden.2 ~ hidden.2 hidden.4",
    ]


LINEAR = LinearProjection()


@pytest.mark.parametrize(
    ("match", "student", "teacher", "expected"),
    [
        (HiddenMse(projection=LINEAR), TINY, BIG, (8, 16)),
        (HiddenMse(projection=LINEAR), TINY, TINY, None),
        (HiddenMse(projection=LinearProjection(always=True)), TINY, TINY, (8, 8)),
        (Nst(), TINY, BIG, None),
        (Nst(projection=LINEAR), TINY, BIG, (8, 16)),
        (ModuleMatch(student="pooler", teacher="pooler", projection=LINEAR), TINY, BIG, (8, 16)),
        (ModuleMatch(student="pooler", teacher="head.0", projection=LINEAR), TINY, BIG, None),
        (AttentionCeMean(), TINY, BIG, None),
    ],
)
def test_projections_stand_where_the_widths_differ(
    match: Match, student: ModelShape, teacher: ModelShape, expected: tuple[int, int] | None
) -> None:
    assert {point.projection for point in match.points(student, teacher)} == {expected}


@pytest.mark.parametrize(
    ("match", "changes", "message"),
    [
        (HiddenMse(), {}, "hidden state is 8 wide in the student and 16 in the teacher; give proj"),
        (Pkd(), {}, "cls state is 8 wide in the student"),
        (Fsp(), {}, "fsp: hidden state is 8 wide"),
        (
            AttentionMse(),
            {},
            "as many heads on both sides, got 2 heads .* and 4 .*_mean allow numbers",
        ),
        (
            AttentionMse(),
            {"num_heads": 0},
            "needs attention .* got 2 heads .* and 0 in the teacher",
        ),
        (HiddenMse(), {"num_layers": 0}, "the teacher has no layers .* kind: module"),
        (HiddenMse(), {"num_layers": 1}, "hidden_mse: layer map uniform: the student .* deeper"),
        (Nst(flow="next", layers=TOP), {}, "flow: next needs two pairs of layers or more, got 1"),
        (
            ModuleMatch(student="poole", teacher="pooler"),
            {},
            "the student has no module 'poole'; it has pooler",
        ),
        (ModuleMatch(student="pooler", teacher="pooler"), {}, "pooler / pooler is 8 wide"),
        (HiddenMse(), {"tokens": "words"}, "student reads 'pieces' and the teacher 'words'"),
        (Nst(), {"tokens": "words"}, "token by token"),
        (AttentionMse(), {"tokens": "words"}, "token by token"),
        (
            ModuleMatch(student="pooler", teacher="head.0", tokens=True),
            {"tokens": "words"},
            "token by token",
        ),
    ],
)
def test_impossible_matches_are_refused_before_training(
    match: Match, changes: dict[str, Any], message: str
) -> None:
    student = ModelShape(**{**vars(TINY), "tokens": "pieces"})
    with pytest.raises(ValueError, match=message):
        match.points(student, ModelShape(**{**vars(BIG), **changes}))


def test_whole_rows_can_be_matched_across_vocabularies() -> None:
    student = ModelShape(2, 8, tokens="pieces")
    teacher = ModelShape(4, 8, tokens="words")
    top = Pkd(layers=TOP).points(student, teacher)
    assert top == (Point((FeatureKey("cls", 2),), (FeatureKey("cls", 4),)),)


def test_the_vectors_of_a_twin_student_may_be_wider_than_its_states() -> None:
    twin = ModelShape(2, 8, cls_width=16)
    (point,) = Pkd(layers=TOP, projection=LINEAR).points(twin, ModelShape(4, 8))
    assert point.projection == (16, 8)
    assert Pkd(layers=TOP).points(twin, ModelShape(4, 16))[0].projection is None


# --- projections --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("projection", "activation"),
    [
        (LinearProjection(), nn.Identity()),
        (ReluProjection(), nn.ReLU()),
        (TanhProjection(), nn.Tanh()),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_a_projection_starts_small_and_reaches_the_teachers_width(
    projection: Projection, activation: nn.Module
) -> None:
    torch.manual_seed(0)
    module = projection.build(100, 200)
    weight, bias = (parameter.detach() for parameter in module.parameters())
    assert float(weight.std()) == pytest.approx(0.02, rel=0.05)  # of 20 000 draws
    assert abs(float(weight.mean())) < 0.001
    assert bias.abs().sum() == 0
    x = torch.randn(3, 5, 100)
    assert torch.allclose(module(x), activation(x @ weight.T))

from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from driftline.platform.errors import SettingsError
from driftline.platform.vocabulary.dual_model import DualModel
from driftline.platform.vocabulary.shared_projections import (
    PairedVariable,
    SharedProjections,
    pair_variables,
    sizes_of,
    student_norm,
)
from driftline.platform.vocabulary.start import DualVocabulary

Direction = Literal["down", "up"]
Array = NDArray[np.float64]
H, F, D, E = 24, 96, 16, 64  # widths of the fixture's teacher and student


def dual(market: Any, **recipe: Any) -> DualModel:
    torch.manual_seed(4)
    return DualModel(market.student, market.teacher, recipe=DualVocabulary.model_validate(recipe))


def array(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy()


def slow_variables(model: nn.Module, prefix: str) -> dict[str, Array]:
    """Every parameter below a prefix, a Linear's weight turned to inputs x outputs."""
    linears = {name for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    found = {}
    for name, parameter in model.named_parameters():
        owner, _, last = name.rpartition(".")
        turned = last == "weight" and owner in linears
        if name.startswith(prefix):
            value = array(parameter)
            found[name.removeprefix(prefix)] = value.T if turned else value
    return found


def slow_projection(model: DualModel, direction: Direction, reduction: str) -> float:
    """Equations (1) and (2) variable by variable; which matrix is for what follows from sizes."""
    assert model.projections is not None
    uv = {name: array(matrix) for name, matrix in model.projections.matrices.items()}
    teacher = slow_variables(model, "teacher.encoder.backbone.")
    student = slow_variables(model, "encoders.0.backbone.")
    teacher |= {f"mlm.{n}": v for n, v in slow_variables(model, "teacher.predictor.").items()}
    student |= {f"mlm.{n}": v for n, v in slow_variables(model, "predictor.").items()}
    shapes = {(H, H): "hh", (H, F): "hf", (F, H): "fh", (512, H): "nh", (2, H): "nh"}
    shapes |= {(H,): "h", (F,): "f"}  # type: ignore[dict-item]
    total = 0.0
    for name, theta_s in student.items():
        if "word_embeddings" in name or name == "mlm.bias":
            continue  # no counterpart
        theirs = name.replace("layer.1.", "layer.2.").replace("layer.0.", "layer.1.")
        theta_t = teacher[theirs]
        axes = shapes[theta_t.shape]
        source, target = (theta_t, theta_s) if direction == "down" else (theta_s, theta_t)
        made = source @ uv[f"{axes}_right"]
        if axes in ("hh", "hf", "fh"):
            made = uv[f"{axes}_left"] @ made
        squares = [float(x) ** 2 for x in (made - target).flatten()]
        total += sum(squares) / (len(squares) if reduction == "mean" else 1)
    return total


@pytest.mark.parametrize("direction", ["down", "up"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_shared_projections_equal_a_sum_over_named_variables(
    market: Any, direction: Direction, reduction: str
) -> None:
    model = dual(market, variant=f"dual_{direction}", reduction=reduction)
    assert model.projections is not None
    loss = model.projections(model.pairs(0)).item()
    assert loss == pytest.approx(slow_projection(model, direction, reduction), rel=1e-5)


def test_matrices_have_the_shapes_of_the_table(market: Any) -> None:
    sizes = sizes_of(dual(market, variant="dual").pairs(0))
    assert sizes == {"h": (H, D), "f": (F, E)}
    down = SharedProjections(sizes, direction="down").matrices
    assert {name: tuple(matrix.shape) for name, matrix in down.items()} == {
        "hh_left": (D, H),
        "hh_right": (H, D),
        "hf_left": (D, H),
        "hf_right": (F, E),
        "fh_left": (E, F),
        "fh_right": (H, D),
        "h_right": (H, D),
        "f_right": (F, E),
        "nh_right": (H, D),
    }
    up = SharedProjections(sizes, direction="up").matrices
    assert {name: tuple(m.shape)[::-1] for name, m in up.items()} == {
        name: tuple(m.shape) for name, m in down.items()
    }
    by_axis = SharedProjections(sizes, direction="down", share="axis").matrices
    assert {name: tuple(matrix.shape) for name, matrix in by_axis.items()} == {
        "h": (H, D),
        "f": (F, E),
    }


@pytest.mark.parametrize("direction", ["down", "up"])
@pytest.mark.parametrize("share", ["shape", "axis"])
def test_the_loss_is_zero_where_the_target_is_the_projected_source(
    market: Any, direction: Direction, share: Literal["shape", "axis"]
) -> None:
    pairs = dual(market, variant="dual").pairs(0)
    projections = SharedProjections(sizes_of(pairs), direction=direction, share=share)
    assert projections(pairs).item() > 1e-3
    made = []
    for pair in pairs:
        projected = projections.project(pair).detach()
        values = (pair.teacher, projected) if direction == "down" else (projected, pair.student)
        made.append(PairedVariable(pair.name, pair.axes, *values))
    assert projections(made).item() == pytest.approx(0, abs=1e-9)


def test_variables_without_a_counterpart_are_left_out(market: Any) -> None:
    model = dual(market, variant="dual_up")
    names = [pair.name for pair in model.pairs(0)]
    assert len(names) == len(set(names)) == 2 * 16 + 8
    assert not [name for name in names if "word_embeddings" in name or name == "predictor.bias"]
    separate = dual(market, variant="dual_up", bridge="separate").pairs(0)
    assert [pair.name for pair in separate] == [*names, "token_table"]
    assert separate[-1].teacher.shape == (market.student.encoder.vocabulary_size, H)


def test_both_models_learn_from_it_unless_the_teacher_is_detached(market: Any) -> None:
    for detach in (False, True):
        for variant in ("dual_down", "dual_up"):
            model = dual(market, variant=variant, detach_teacher=detach)
            assert model.projections is not None
            assert model.teacher is not None
            model.projections(model.pairs(0)).backward()
            assert model.predictor.dense.weight.grad is not None
            assert (model.teacher.predictor.dense.weight.grad is None) == detach
            assert all(matrix.grad is not None for matrix in model.projections.parameters())


def test_down_has_its_trivial_minimum_and_the_norm_shows_it(market: Any) -> None:
    model = dual(market, variant="dual_down")
    pairs = model.pairs(0)
    assert model.projections is not None
    expected = sum(float(pair.student.detach().square().sum()) for pair in pairs) ** 0.5
    assert float(student_norm(pairs)) == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        for matrix in model.projections.parameters():
            matrix.zero_()
        for pair in pairs:
            pair.student.zero_()
    assert model.projections(pairs).item() == float(student_norm(pairs)) == 0


def test_layers_are_paired_evenly_or_as_told() -> None:
    even = DualVocabulary()
    assert even.layers(2, 3) == (1, 2)
    assert even.layers(3, 12) == (3, 7, 11)
    assert even.layers(4, 1) == (0, 0, 0, 0)
    assert even.layers(12, 12) == tuple(range(12))
    told = DualVocabulary(layer_map=(0, 2))
    assert told.layers(2, 3) == (0, 2)
    for student, teacher in ((3, 3), (2, 2)):
        with pytest.raises(SettingsError, match=r"one for each of the student's, got \[0, 2\]"):
            told.layers(student, teacher)


def test_an_encoder_that_is_no_bert_is_refused() -> None:
    empty = nn.ModuleDict({"encoder": nn.Linear(2, 2), "predictor": nn.Linear(2, 2)})
    with pytest.raises(SettingsError, match="pair the weights of two BERT encoders; the teacher"):
        pair_variables(empty, empty, layer_map=(0,))

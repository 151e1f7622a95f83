"""L_p: a small student's weights as projections of a large teacher's (papers.md S4.5-S4.7).

Each variable of the student is paired with one of the teacher. A pair of matrices (U, V) says how
the one becomes the other; there is one pair for each *shape* of variable, common to all layers, so
that the projections hold what the variables share. They exist only while L_p is trained.

Variables are written *inputs x outputs* here, as in the paper; PyTorch stores the weight of a
``Linear`` the other way round, so those are transposed. Which shape a variable has is told by the
letters of its axes: ``h`` width, ``f`` feed-forward width, ``n`` a number of ids or positions,
which is not projected. So ``hf`` is an inner feed-forward weight and ``h`` a bias.

With teacher sizes H, F and student sizes d, f (papers.md S4.7; up has the transposed shapes):

    axes   variables                               down                  up
    hh     W_q, W_k, W_v, W_o, MLM transform       U d x H, V H x d      V H x d, U d x H
    hf     feed-forward in                         U d x H, V F x f      V H x d, U f x F
    fh     feed-forward out                        U f x F, V H x d      V F x f, U d x H
    h      biases q, k, v, o, out; LayerNorms      V H x d               U d x H
    f      bias of feed-forward in                 V F x f               U f x F
    nh     position, segment, student's tokens     V H x d               U d x H
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor, nn

from driftline.platform.errors import SettingsError

UNPROJECTED: Final = "n"
LAYER_VARIABLES: Final = {
    **{f"attention.self.{name}.weight": "hh" for name in ("query", "key", "value")},
    **{f"attention.self.{name}.bias": "h" for name in ("query", "key", "value")},
    "attention.output.dense.weight": "hh",
    "attention.output.dense.bias": "h",
    "attention.output.LayerNorm.weight": "h",
    "attention.output.LayerNorm.bias": "h",
    "intermediate.dense.weight": "hf",
    "intermediate.dense.bias": "f",
    "output.dense.weight": "fh",
    "output.dense.bias": "h",
    "output.LayerNorm.weight": "h",
    "output.LayerNorm.bias": "h",
}
"""Below ``encoder.layer.N`` of a BERT."""
OTHER_VARIABLES: Final = {
    "encoder.backbone.embeddings.position_embeddings.weight": "nh",
    "encoder.backbone.embeddings.token_type_embeddings.weight": "nh",
    "encoder.backbone.embeddings.LayerNorm.weight": "h",
    "encoder.backbone.embeddings.LayerNorm.bias": "h",
    "predictor.dense.weight": "hh",
    "predictor.dense.bias": "h",
    "predictor.norm.weight": "h",
    "predictor.norm.bias": "h",
}
"""Token tables and the biases of both softmaxes have no counterpart and are left out (S4.7)."""


@dataclass(frozen=True)
class PairedVariable:
    """A variable of the teacher and the student's that answers to it, inputs x outputs."""

    name: str
    """The student's name of it."""
    axes: str
    teacher: Tensor
    student: Tensor


def pair_variables(
    teacher: nn.Module, student: nn.Module, *, layer_map: Sequence[int]
) -> list[PairedVariable]:
    """All variables with a counterpart.

    Args:
        teacher: A module with ``encoder`` (a BERT ``TextEncoder``) and ``predictor``.
        student: The same, smaller.
        layer_map: The teacher's layer for each of the student's, both counted from 0.

    Raises:
        SettingsError: an encoder is no BERT.
    """
    theirs, own = (dict(model.named_parameters()) for model in (teacher, student))
    layers = "encoder.backbone.encoder.layer"
    names = [(name, name, axes) for name, axes in OTHER_VARIABLES.items()]
    names += [
        (f"{layers}.{theirs_at}.{name}", f"{layers}.{place}.{name}", axes)
        for place, theirs_at in enumerate(layer_map)
        for name, axes in LAYER_VARIABLES.items()
    ]
    pairs = []
    for their_name, own_name, axes in names:
        for whose, variables, name in (("teacher", theirs, their_name), ("student", own, own_name)):
            if name not in variables:
                raise SettingsError(
                    f"shared projections pair the weights of two BERT encoders; the {whose} has no "
                    f"{name}; use variant 'dual', or an encoder of kind 'config'"
                )
        pairs.append(_pair(own_name, axes, theirs[their_name], own[own_name]))
    return pairs


def sizes_of(pairs: Sequence[PairedVariable]) -> dict[str, tuple[int, int]]:
    """Teacher's and student's size of each axis that is projected."""
    return {
        axis: (pair.teacher.shape[place], pair.student.shape[place])
        for pair in pairs
        for place, axis in enumerate(pair.axes)
        if axis != UNPROJECTED
    }


class SharedProjections(nn.Module):
    """L_p over pairs of variables, with one (U, V) for each shape or one matrix for each axis.

    Source: paper 004, equations (1) and (2) (papers.md S4.5, S4.6, A4.5). We differ in the default
    ``reduction``: raw sums make L_p a hundred times the cross-entropy (section 5.3-7).

    Down has a trivial minimum where projections and student shrink to nothing; only the
    cross-entropies oppose it. Watch ``student_norm`` in the stage's history, or prefer up.

    Args:
        sizes: Teacher's and student's size of each axis, from ``sizes_of``.
        direction: ``down`` projects the teacher's variables to the student's, ``up`` the student's
            to the teacher's.
        reduction: ``sum`` of squared differences (as printed), or the ``mean`` within each
            variable; either is summed over the variables.
        share: One pair of matrices for each ``shape``, or one matrix for each ``axis`` that is
            used on both sides (papers.md S4.7).
        detach_teacher: No gradient into the teacher's variables (papers.md A4.7).
    """

    def __init__(
        self,
        sizes: Mapping[str, tuple[int, int]],
        *,
        direction: Literal["down", "up"],
        reduction: Literal["mean", "sum"] = "mean",
        share: Literal["shape", "axis"] = "shape",
        detach_teacher: bool = False,
    ) -> None:
        super().__init__()
        self.direction = direction
        self.reduction = reduction
        self.share = share
        self.detach_teacher = detach_teacher
        shapes = ("hh", "hf", "fh", "h", "f", "nh")
        self.matrices = nn.ParameterDict()
        for axes in shapes:
            for side, axis in _sides(axes):
                name = self._name(axes, side, axis)
                if name in self.matrices:
                    continue
                large, small = sizes[axis]
                # On the right a matrix maps rows of its source to rows of its target.
                rows, columns = (large, small) if direction == "down" else (small, large)
                turned = side == "left" and share == "shape"
                shape = (columns, rows) if turned else (rows, columns)
                self.matrices[name] = nn.Parameter(nn.init.xavier_uniform_(torch.empty(shape)))

    def forward(self, pairs: Sequence[PairedVariable]) -> Tensor:
        """L_p, float32. Scalar."""
        device = pairs[0].student.device
        with torch.autocast(device.type, enabled=False):
            return torch.stack([self._loss(pair) for pair in pairs]).sum()

    def project(self, pair: PairedVariable) -> Tensor:
        """The source of a pair, projected to the shape of its target."""
        teacher = pair.teacher.detach() if self.detach_teacher else pair.teacher
        projected = teacher if self.direction == "down" else pair.student
        for side, axis in _sides(pair.axes):
            matrix = self.matrices[self._name(pair.axes, side, axis)]
            if side == "right":
                projected = projected @ matrix
            elif self.share == "shape":
                projected = matrix @ projected
            else:
                projected = matrix.T @ projected
        return projected

    def _loss(self, pair: PairedVariable) -> Tensor:
        teacher = pair.teacher.detach() if self.detach_teacher else pair.teacher
        target = pair.student if self.direction == "down" else teacher
        squares = (self.project(pair) - target).square()
        return squares.sum() if self.reduction == "sum" else squares.mean()

    def _name(self, axes: str, side: str, axis: str) -> str:
        return f"{axes}_{side}" if self.share == "shape" else axis


def student_norm(pairs: Sequence[PairedVariable]) -> Tensor:
    """Norm of all the student's paired variables: towards 0 when L_p down collapses. Scalar."""
    return (
        torch.stack([pair.student.detach().float().square().sum() for pair in pairs]).sum().sqrt()
    )


def _sides(axes: str) -> list[tuple[str, str]]:
    """Which sides of a variable are projected, and along which axis."""
    left = [("left", axes[0])] if len(axes) == 2 and axes[0] != UNPROJECTED else []
    return [*left, ("right", axes[-1])]


def _pair(name: str, axes: str, teacher: Tensor, student: Tensor) -> PairedVariable:
    if axes[0] == UNPROJECTED:  # the shorter of two tables of positions
        rows = min(len(teacher), len(student))
        return PairedVariable(name, axes, teacher[:rows], student[:rows])
    if len(axes) == 2:
        return PairedVariable(name, axes, teacher.T, student.T)
    return PairedVariable(name, axes, teacher, student)

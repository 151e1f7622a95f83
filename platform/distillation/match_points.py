"""What a match of the student's inner features with the teacher's is, and where it takes place.

A match is resolved against two models before any training: it gives *points*, each of one or two
tensors a side, or says why it is impossible. Import from ``matches``. Shape suffixes: B rows, T
tokens.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import field_validator

from driftline.platform.distillation.keys import FeatureKey, FeatureKind
from driftline.platform.distillation.layer_maps import LayerMap, Pairs, UniformMap
from driftline.platform.distillation.projections import Projection
from driftline.platform.distillation.schedules import Weight
from driftline.platform.kinds import Kind

if TYPE_CHECKING:
    from torch import Tensor

Side = Literal["student", "teacher"]


@dataclass(frozen=True)
class ModelShape:
    """What a match must know of a model."""

    num_layers: int
    """0 for a model whose layers are not known: then only its modules can be matched."""
    width: int
    """Of the hidden states."""
    num_heads: int = 0
    """Of every layer's attention; 0 for a model without."""
    tokens: str | None = None
    """Name of the way rows become tokens (vocabulary and serialisation). Two models that both
    tell theirs must agree before anything is matched token by token."""
    modules: Mapping[str, int] = field(default_factory=dict)
    """Last dimension of the output of each module that a match may name, by its path."""
    cls_width: int | None = None
    """Of the vector of a whole row, where it differs: a twin student has one of each product."""


@dataclass(frozen=True)
class Point:
    """One place where the student is compared with the teacher."""

    student: tuple[FeatureKey, ...]
    teacher: tuple[FeatureKey, ...]
    projection: tuple[int, int] | None = None
    """(student's width, teacher's width) of the projection through which each of the student's
    tensors goes; None without."""


class Match(Kind):
    """Base of all matches."""

    weight: Weight = Weight(base=1.0)
    """Of the sum over the match's points."""
    projection: Projection | None = None

    @field_validator("projection", mode="before")
    @classmethod
    def _none_by_name(cls, raw: Any) -> Any:
        return None if raw == "none" else raw

    @abstractmethod
    def points(self, student: ModelShape, teacher: ModelShape) -> tuple[Point, ...]:
        """Where the two models are compared.

        Raises:
            ValueError: impossible for these two models; the message says what to change.
        """

    @abstractmethod
    def loss(
        self,
        student: "Sequence[Tensor]",
        teacher: "Sequence[Tensor]",
        mask_BT: "Tensor | None" = None,
    ) -> "Tensor":
        """Loss of one point, the mean over what is compared. Scalar, not yet weighted.

        Args:
            student: The point's tensors, behind the projection.
            teacher: The same of the teacher, without gradient.
            mask_BT: 1 for tokens, 0 for padding; None where nothing is padded. ``[B, T]``.
        """

    def row_weights(self, lengths_B: "Tensor") -> "Tensor":
        """How much each row counts in the mean that ``loss`` is. ``[B]``.

        Workers that share a step join their means by it. Rows count alike unless a match says
        otherwise.

        Args:
            lengths_B: Tokens of each row. ``[B]``, floating point.
        """
        return lengths_B**0

    def projected(
        self, keys: str, student_width: int, teacher_width: int
    ) -> tuple[int, int] | None:
        """The projection's widths, or None where none is needed.

        Raises:
            ValueError: the widths differ and there is no projection.
        """
        if self.projection is not None and (
            self.projection.always or student_width != teacher_width
        ):
            return student_width, teacher_width
        if student_width != teacher_width:
            raise ValueError(
                f"match {self.kind}: {keys} is {student_width} wide in the student and "
                f"{teacher_width} in the teacher; give projection: {{kind: linear}}"
            )
        return None


class LayerMatch(Match):
    """Base of the matches between layers of a map. Derive from it for a loss of your own."""

    feature: ClassVar[FeatureKind] = "hidden"
    by_token: ClassVar[bool] = True
    """Position by position: both models must cut a row into the same tokens."""

    layers: LayerMap = UniformMap()

    def points(self, student: ModelShape, teacher: ModelShape) -> tuple[Point, ...]:
        """One point for each pair of layers."""
        if self.by_token:
            refuse_other_tokens(self.kind, student, teacher)
        pairs = layer_pairs(self.kind, self.layers, student, teacher, first=0)
        widths = self.projected(
            f"{self.feature} state", _width(student, self.feature), _width(teacher, self.feature)
        )
        return tuple(
            Point((FeatureKey(self.feature, s),), (FeatureKey(self.feature, t),), widths)
            for s, t in pairs
        )

    def row_weights(self, lengths_B: "Tensor") -> "Tensor":
        """By tokens, where these are compared."""
        return lengths_B if self.by_token else super().row_weights(lengths_B)


def layer_pairs(
    kind: str, layers: LayerMap, student: ModelShape, teacher: ModelShape, *, first: int
) -> Pairs:
    """(student's layer, teacher's layer) of a match.

    Raises:
        ValueError: the map is impossible, or the layers of a model are not known.
    """
    for side, shape in (("student", student), ("teacher", teacher)):
        if shape.num_layers < 1:
            raise ValueError(
                f"match {kind}: the {side} has no layers that can be found; match its modules by "
                "path with kind: module"
            )
    try:
        return layers.resolve(student.num_layers, teacher.num_layers, first=first)
    except ValueError as error:
        raise ValueError(f"match {kind}: {error}") from error


def refuse_other_tokens(kind: str, student: ModelShape, teacher: ModelShape) -> None:
    """Check that both models see the same tokens at the same positions.

    Raises:
        ValueError: they do not, so that position i of one has nothing to do with that of the other.
    """
    if None not in (student.tokens, teacher.tokens) and student.tokens != teacher.tokens:
        raise ValueError(
            f"match {kind} compares token by token, but the student reads {student.tokens!r} and "
            f"the teacher {teacher.tokens!r}; match whole rows instead (pkd, or module on pooled "
            "vectors), or give both the same vocabulary and input"
        )


def _width(shape: ModelShape, feature: FeatureKind) -> int:
    return shape.cls_width or shape.width if feature == "cls" else shape.width

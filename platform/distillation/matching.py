"""All matches of an objective between one student and one teacher, with their projections.

Shape suffixes: B rows, T tokens.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor, nn

from driftline.platform.distillation.keys import FeatureKey
from driftline.platform.distillation.matches import (
    LayerMatch,
    Match,
    ModelShape,
    ModuleMatch,
    Point,
)

Features = Mapping[FeatureKey, Tensor]
OF_TOKENS: Final = frozenset({"hidden", "attention", "scores"})


@dataclass(frozen=True)
class _Place:
    """One point of one match."""

    name: str
    """Of the match: its kind, numbered where there are several of a kind."""
    match: Match
    point: Point
    projection: str | None
    """Name of its module."""

    @property
    def by_token(self) -> bool:
        """Whether one of its tensors has an entry for each token."""
        kinds = {key.kind for key in self.point.teacher}
        return bool(kinds & OF_TOKENS) or (
            isinstance(self.match, ModuleMatch) and self.match.tokens
        )


class Matching:
    """Compares a student's tensors with a teacher's, in all the places that an objective names.

    Everything that can be wrong is found here, before any training. The projections are drawn from
    torch's random numbers; train them beside the student and throw them away.

    Args:
        matches: Of an objective.
        student: Layers and widths of the student; see ``anatomy.shape_of``.
        teacher: The same of the teacher.

    Raises:
        ValueError: a match is impossible between the two models.
    """

    def __init__(self, matches: Sequence[Match], student: ModelShape, teacher: ModelShape) -> None:
        self.projections = nn.ModuleDict()
        self.rates: dict[str, float] = {}
        """Learning rates of projections that have their own, by their name."""
        self._places: list[_Place] = []
        for name, match in _named(matches):
            _check_widths(match, student, teacher)
            for number, point in enumerate(match.points(student, teacher)):
                self._add(name, number, match, point)

    def _add(self, name: str, number: int, match: Match, point: Point) -> None:
        projection = None
        if point.projection is not None:
            assert match.projection is not None, f"{name}: a point is projected by nothing"
            projection = f"{name}-{number}"
            self.projections[projection] = match.projection.build(*point.projection)
            if match.projection.learning_rate is not None:
                self.rates[projection] = match.projection.learning_rate
        self._places.append(_Place(name, match, point, projection))

    def __len__(self) -> int:
        return len(self._places)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the matches."""
        return tuple(dict.fromkeys(place.name for place in self._places))

    @property
    def by_token(self) -> tuple[str, ...]:
        """Names of the matches that compare token by token."""
        return tuple(dict.fromkeys(place.name for place in self._places if place.by_token))

    @property
    def student_keys(self) -> tuple[FeatureKey, ...]:
        """Tensors needed of the student."""
        keys = (key for place in self._places for key in place.point.student)
        return tuple(dict.fromkeys(keys))

    @property
    def teacher_keys(self) -> tuple[FeatureKey, ...]:
        """Tensors needed of the teacher."""
        keys = (key for place in self._places for key in place.point.teacher)
        return tuple(dict.fromkeys(keys))

    def weights(self, progress: float) -> dict[str, float]:
        """Weight of each match after a share of the updates."""
        return {place.name: place.match.weight.at(progress) for place in self._places}

    @property
    def base_weights(self) -> dict[str, float]:
        """Weight of each match without its schedule."""
        return {place.name: place.match.weight.base for place in self._places}

    def losses(
        self, student: Features, teacher: Features, mask_BT: Tensor | None
    ) -> dict[str, Tensor]:
        """Loss of each match: the sum over its points, not yet weighted.

        Args:
            student: A tensor for each of ``student_keys``.
            teacher: A tensor for each of ``teacher_keys``, without gradient.
            mask_BT: 1 for tokens, 0 for padding; None where nothing is padded. ``[B, T]``.
        """
        found: dict[str, Tensor] = {}
        for place in self._places:
            own = [student[key] for key in place.point.student]
            if place.projection is not None:
                project = self.projections[place.projection]
                own = [project(tensor) for tensor in own]
            other = [teacher[key] for key in place.point.teacher]
            loss = place.match.loss(own, other, mask_BT)
            found[place.name] = found[place.name] + loss if place.name in found else loss
        return found

    def row_weights(self, lengths_B: Tensor) -> dict[str, Tensor]:
        """How much each row counts in the mean that each match is; see ``Match``. ``[B]``."""
        return {place.name: place.match.row_weights(lengths_B) for place in self._places}

    def nothing(self, student: Features) -> dict[str, Tensor]:
        """0 for each match with a gradient of 0, for a worker whose rows have no teacher tensor."""
        zero = sum((parameter.sum() * 0 for parameter in self.projections.parameters()), start=0)
        touched = sum((tensor.sum() * 0 for tensor in student.values()), start=zero)
        assert isinstance(touched, Tensor)
        return dict.fromkeys(self.names, touched)


def _named(matches: Sequence[Match]) -> Iterator[tuple[str, Match]]:
    seen: Counter[str] = Counter()
    for match in matches:
        seen[match.kind] += 1
        number = f"_{seen[match.kind]}" if seen[match.kind] > 1 else ""
        yield f"{match.kind}{number}", match


def _check_widths(match: Match, student: ModelShape, teacher: ModelShape) -> None:
    for side, shape in (("student", student), ("teacher", teacher)):
        if isinstance(match, LayerMatch) and shape.num_layers and not shape.width:
            raise ValueError(
                f"match {match.kind}: the {side}'s config does not tell the width of its hidden "
                "states (hidden_size, dim or d_model); match modules by path with kind: module"
            )

"""Which layer of the teacher a layer of the student is matched with (papers.md A3.11, 3.2).

A model of L layers has the places 0 (the embedding output, where there is one) to L.
"""

from abc import abstractmethod
from typing import Literal

from pydantic import PositiveInt

from driftline.platform.kinds import Kind

Pairs = tuple[tuple[int, int], ...]


class LayerMap(Kind):
    """Base of all layer maps."""

    @abstractmethod
    def resolve(self, num_student: int, num_teacher: int, *, first: int) -> Pairs:
        """(student's place, teacher's place), in order of the student's.

        Args:
            num_student: Layers of the student.
            num_teacher: Layers of the teacher.
            first: 0 where the embedding output can be matched (states), 1 where not (attention).

        Raises:
            ValueError: the map is impossible for these depths.
        """


class UniformMap(LayerMap):
    """Every layer of the student, spread evenly over the teacher's (TextBrewer's recipes).

    Student 4 of teacher 12: (0, 0), (1, 3), (2, 6), (3, 9), (4, 12). Where the depths do not
    divide, the nearest layer, the upper one of two.
    """

    kind: Literal["uniform"] = "uniform"
    embeddings: bool = True
    """Also match the embedding outputs, where the feature has them."""

    def resolve(self, num_student: int, num_teacher: int, *, first: int) -> Pairs:
        """See ``LayerMap``; the student must not be deeper than the teacher."""
        _not_deeper(self.kind, num_student, num_teacher)
        start = max(first, 0 if self.embeddings else 1)
        return tuple(
            (place, (2 * place * num_teacher + num_student) // (2 * num_student))
            for place in range(start, num_student + 1)
        )


class SkipMap(LayerMap):
    """Layer l of the student with layer stride x l of the teacher (PKD's *skip*, A3.11).

    Student 6 of teacher 12: (1, 2), (2, 4), ..., (5, 10).
    """

    kind: Literal["skip"] = "skip"
    stride: PositiveInt | None = None
    """By default the ratio of the depths, which must then be a whole number."""
    num_layers: PositiveInt | None = None
    """Matched layers of the student. By default all but the top one, as PKD leaves that one to
    the soft labels."""

    def resolve(self, num_student: int, num_teacher: int, *, first: int) -> Pairs:
        """See ``LayerMap``; neither model may end before the map does."""
        _not_deeper(self.kind, num_student, num_teacher)
        stride, num_layers = self.stride, self.num_layers or num_student - 1
        if stride is None:
            if num_teacher % num_student:
                raise ValueError(
                    f"layer map skip: {num_teacher} layers of the teacher are no multiple of the "
                    f"student's {num_student}; give stride, or use uniform"
                )
            stride = num_teacher // num_student
        _fits(self.kind, num_layers, num_student)
        if stride * num_layers > num_teacher:
            raise ValueError(
                f"layer map skip: stride {stride} x {num_layers} layers ends at layer "
                f"{stride * num_layers}, the teacher has {num_teacher}; lower one of them"
            )
        return tuple((place, stride * place) for place in range(1, num_layers + 1))


class LastMap(LayerMap):
    """The student's lower layers with the teacher's last ones below its top (PKD's *last*, A3.11).

    Layer l with l + M - (k + 1), for l = 1..k and a teacher of M layers: student 6 of teacher 12
    gives (1, 7), (2, 8), ..., (5, 11).
    """

    kind: Literal["last"] = "last"
    num_layers: PositiveInt | None = None
    """k; by default all layers of the student but the top one."""

    def resolve(self, num_student: int, num_teacher: int, *, first: int) -> Pairs:
        """See ``LayerMap``; both models must have k layers, the teacher one more."""
        num_layers = self.num_layers or num_student - 1
        _fits(self.kind, num_layers, num_student)
        if num_layers >= num_teacher:
            raise ValueError(
                f"layer map last: {num_layers} matched layers need a teacher of more layers, got "
                f"{num_teacher}; give fewer num_layers"
            )
        return tuple(
            (place, place + num_teacher - (num_layers + 1)) for place in range(1, num_layers + 1)
        )


class ExplicitMap(LayerMap):
    """Pairs as written: ``[[0, 0], [1, 3]]`` is (student, teacher); -1 is the last layer."""

    kind: Literal["explicit"] = "explicit"
    pairs: Pairs

    def resolve(self, num_student: int, num_teacher: int, *, first: int) -> Pairs:
        """See ``LayerMap``; every place must exist."""
        if not self.pairs:
            raise ValueError("layer map explicit: needs at least one pair, got none")
        return tuple(
            (
                _place(student, num_student, first=first, side="student"),
                _place(teacher, num_teacher, first=first, side="teacher"),
            )
            for student, teacher in self.pairs
        )


TOP = ExplicitMap(pairs=((-1, -1),))
"""The last layers only, as DistilBERT's cosine (papers.md A3.3)."""


def _place(place: int, num_layers: int, *, first: int, side: str) -> int:
    found = place + num_layers + 1 if place < 0 else place
    if not first <= found <= num_layers:
        raise ValueError(
            f"layer map explicit: the {side} has places {first} to {num_layers} for this feature, "
            f"got {place}"
        )
    return found


def _not_deeper(kind: str, num_student: int, num_teacher: int) -> None:
    if num_student > num_teacher:
        raise ValueError(
            f"layer map {kind}: the student ({num_student} layers) is deeper than the teacher "
            f"({num_teacher}); name the pairs with kind: explicit"
        )


def _fits(kind: str, num_layers: int, num_student: int) -> None:
    if not 1 <= num_layers <= num_student:
        raise ValueError(
            f"layer map {kind}: num_layers must be 1 to {num_student} for a student of "
            f"{num_student} layers, got {num_layers}; use uniform for a student of one layer"
        )

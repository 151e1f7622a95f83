"""Matches of hidden states. Import from ``matches``.

Each is a mean, so that padding, which the mask leaves out, does not change it. Shape suffixes: B
rows, T tokens, H width, N positions of any shape.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Literal

from driftline.platform.distillation.keys import FeatureKey, FeatureKind
from driftline.platform.distillation.layer_maps import TOP, ExplicitMap, LayerMap
from driftline.platform.distillation.match_points import (
    LayerMatch,
    Match,
    ModelShape,
    Point,
    layer_pairs,
    refuse_other_tokens,
)

if TYPE_CHECKING:
    from torch import Tensor


class HiddenMse(LayerMatch):
    """Mean squared difference of the states: the student's must become the teacher's.

    Masked: sum m (S - T)^2 / (sum m  H). Source: TextBrewer, TinyBERT, MobileBERT's feature map
    transfer (papers.md 3.2, S3.21).
    """

    kind: Literal["hidden_mse"] = "hidden_mse"

    def loss(
        self,
        student: "Sequence[Tensor]",
        teacher: "Sequence[Tensor]",
        mask_BT: "Tensor | None" = None,
    ) -> "Tensor":
        """See ``Match``. ``[B, T, H]``."""
        return squared_difference(wide(student[0]), wide(teacher[0]), mask_BT)


class EmbeddingMse(LayerMatch):
    """``hidden_mse`` of the embedding outputs alone (TinyBERT, papers.md S3.21)."""

    kind: Literal["embedding_mse"] = "embedding_mse"
    layers: LayerMap = ExplicitMap(pairs=((0, 0),))

    def loss(
        self,
        student: "Sequence[Tensor]",
        teacher: "Sequence[Tensor]",
        mask_BT: "Tensor | None" = None,
    ) -> "Tensor":
        """See ``Match``. ``[B, T, H]``."""
        return squared_difference(wide(student[0]), wide(teacher[0]), mask_BT)


class Cos(LayerMatch):
    """1 - cosine of the states: their direction, not their length (DistilBERT, S3.5, A3.3)."""

    kind: Literal["cos"] = "cos"
    layers: LayerMap = TOP

    def loss(
        self,
        student: "Sequence[Tensor]",
        teacher: "Sequence[Tensor]",
        mask_BT: "Tensor | None" = None,
    ) -> "Tensor":
        """See ``Match``. ``[B, T, H]``."""
        return cosine_distance(wide(student[0]), wide(teacher[0]), mask_BT)


class Pkd(LayerMatch):
    """Squared distance of the normalised [CLS] states: 2 - 2 cosine (PKD, papers.md 3.2, S3.21).

    Of one vector a row: the two models may read different tokens.
    """

    feature: ClassVar[FeatureKind] = "cls"
    by_token: ClassVar[bool] = False

    kind: Literal["pkd"] = "pkd"

    def loss(
        self,
        student: "Sequence[Tensor]",
        teacher: "Sequence[Tensor]",
        mask_BT: "Tensor | None" = None,
    ) -> "Tensor":
        """See ``Match``. ``[B, H]``, or ``[B, T, H]`` of which position 0 counts; no mask."""
        unit = [
            x_BH / x_BH.norm(dim=-1, keepdim=True).clamp(min=1e-12)
            for x_BH in (_first(wide(student[0])), _first(wide(teacher[0])))
        ]
        return ((unit[0] - unit[1]) ** 2).sum(dim=-1).mean()


class Gram(LayerMatch):
    """Base of the matches of products between two layers, or a layer and itself."""

    flow: Literal["same", "next"] = "same"
    """The product of each mapped layer with itself, or with the next mapped one."""

    def points(self, student: ModelShape, teacher: ModelShape) -> tuple[Point, ...]:
        """One point for each layer, or each step from a layer to the next."""
        singles = self.single_points(student, teacher)
        if self.flow == "same":
            return tuple(Point(p.student * 2, p.teacher * 2, p.projection) for p in singles)
        if len(singles) < 2:
            raise ValueError(
                f"match {self.kind}: flow: next needs two pairs of layers or more, got "
                f"{len(singles)} from layers: {self.layers.kind}"
            )
        return tuple(
            Point(a.student + b.student, a.teacher + b.teacher, a.projection)
            for a, b in pairwise(singles)
        )

    def single_points(self, student: ModelShape, teacher: ModelShape) -> tuple[Point, ...]:
        """The mapped layers one by one."""
        return super().points(student, teacher)


class Fsp(Gram):
    """Width x width products G = X_a^T X_b / length; mean (G_S - G_T)^2 (papers.md 3.2)."""

    kind: Literal["fsp", "gram"] = "fsp"

    def loss(
        self,
        student: "Sequence[Tensor]",
        teacher: "Sequence[Tensor]",
        mask_BT: "Tensor | None" = None,
    ) -> "Tensor":
        """See ``Match``. Twice ``[B, T, H]``."""
        gram_S, gram_T = (_width_products(side, mask_BT) for side in (student, teacher))
        return ((gram_S - gram_T) ** 2).mean()

    def row_weights(self, lengths_B: "Tensor") -> "Tensor":
        """One product a row."""
        return lengths_B**0


class Nst(Gram):
    """Token x token products G = X_a X_b^T / H; mean (G_S - G_T)^2. The widths may differ.

    Masked: sum m m^T (G_S - G_T)^2 / sum of squared lengths. Source: TextBrewer's, not the vision
    loss of that name (papers.md 3.2, A2.3).
    """

    kind: Literal["nst", "mmd"] = "nst"
    compat: bool = False
    """As textbrewer 0.2.1.post1: a masked product is divided by T and not by H (papers.md B2)."""

    def single_points(self, student: ModelShape, teacher: ModelShape) -> tuple[Point, ...]:
        """No projection unless asked for."""
        refuse_other_tokens(self.kind, student, teacher)
        pairs = layer_pairs(self.kind, self.layers, student, teacher, first=0)
        widths = None
        if self.projection is not None:
            widths = self.projected("hidden state", student.width, teacher.width)
        return tuple(
            Point((FeatureKey("hidden", s),), (FeatureKey("hidden", t),), widths) for s, t in pairs
        )

    def loss(
        self,
        student: "Sequence[Tensor]",
        teacher: "Sequence[Tensor]",
        mask_BT: "Tensor | None" = None,
    ) -> "Tensor":
        """See ``Match``. Twice ``[B, T, H]``."""
        by_length = self.compat and mask_BT is not None
        gram_S, gram_T = (_token_products(side, by_length) for side in (student, teacher))
        square_BTT = (gram_S - gram_T) ** 2
        if mask_BT is None:
            return square_BTT.mean()
        m_BT = mask_BT.to(square_BTT.dtype)
        num_pairs = (m_BT.sum(dim=1) ** 2).sum().clamp(min=1)
        return (square_BTT * m_BT[:, :, None] * m_BT[:, None, :]).sum() / num_pairs

    def row_weights(self, lengths_B: "Tensor") -> "Tensor":
        """By pairs of tokens."""
        return lengths_B**2


class ModuleMatch(Match):
    """Output of any module against that of any other, by their paths.

    For what the other matches cannot name, as a pooler, a head's layer, a recurrent network.
    TextBrewer's custom matches do not work (papers.md B3).
    """

    kind: Literal["module"] = "module"
    student: str
    """Path of the student's module, as in ``named_modules()``, for example ``head.layers.3``."""
    teacher: str
    measure: Literal["mse", "cos"] = "mse"
    tokens: bool = False
    """The outputs are ``[B, T, ...]``, one entry a token: padding is left out."""

    def points(self, student: ModelShape, teacher: ModelShape) -> tuple[Point, ...]:
        """One point."""
        if self.tokens:
            refuse_other_tokens(self.kind, student, teacher)
        widths = [
            _module_width(path, shape, side)
            for path, shape, side in (
                (self.student, student, "student"),
                (self.teacher, teacher, "teacher"),
            )
        ]
        return (
            Point(
                (FeatureKey("module", self.student),),
                (FeatureKey("module", self.teacher),),
                self.projected(f"{self.student} / {self.teacher}", *widths),
            ),
        )

    def loss(
        self,
        student: "Sequence[Tensor]",
        teacher: "Sequence[Tensor]",
        mask_BT: "Tensor | None" = None,
    ) -> "Tensor":
        """See ``Match``. ``[B, ..., H]``, of equal shapes behind the projection.

        Raises:
            ValueError: the shapes differ.
        """
        if student[0].shape != teacher[0].shape:
            raise ValueError(
                f"match module: {self.student} gives {list(student[0].shape)} behind the "
                f"projection and {self.teacher} {list(teacher[0].shape)}; they must be equal"
            )
        measure = squared_difference if self.measure == "mse" else cosine_distance
        return measure(wide(student[0]), wide(teacher[0]), mask_BT if self.tokens else None)

    def row_weights(self, lengths_B: "Tensor") -> "Tensor":
        """By tokens, where the outputs are of tokens."""
        return lengths_B if self.tokens else super().row_weights(lengths_B)


def squared_difference(student: "Tensor", teacher: "Tensor", mask: "Tensor | None") -> "Tensor":
    """Mean squared difference over the entries of unmasked positions. ``[N, H]``, mask ``[N]``."""
    return masked_mean((student - teacher) ** 2, mask)


def cosine_distance(student: "Tensor", teacher: "Tensor", mask: "Tensor | None") -> "Tensor":
    """Mean of 1 - cosine over unmasked positions. ``[N, H]``, mask ``[N]``."""
    squares = ((student**2).sum(dim=-1) + 1e-12) * ((teacher**2).sum(dim=-1) + 1e-12)
    return masked_mean(1 - (student * teacher).sum(dim=-1) / squares.sqrt(), mask)


def masked_mean(values: "Tensor", mask: "Tensor | None") -> "Tensor":
    """Mean of the values at positions with mask 1, of all without a mask. Scalar.

    Args:
        values: ``[B, T, ...]``.
        mask: ``[B, T]``; of zeros alone it gives 0.
    """
    if mask is None:
        return values.mean()
    while values.dim() > mask.dim():
        values = values.mean(dim=-1)
    mask = mask.to(values.dtype)
    return (values * mask).sum() / mask.sum().clamp(min=1)


def wide(x: "Tensor") -> "Tensor":
    """At least float32: sums of squares overflow or lose their digits in half precision."""
    return x.float() if x.element_size() < 4 else x


def _first(x: "Tensor") -> "Tensor":
    return x[:, 0] if x.dim() == 3 else x


def _width_products(layers: "Sequence[Tensor]", mask_BT: "Tensor | None") -> "Tensor":
    """``[B, H, H]``; padded positions count nothing."""
    a_BTH, b_BTH = (wide(x) for x in layers)
    if mask_BT is None:
        return a_BTH.transpose(1, 2) @ b_BTH / a_BTH.shape[1]
    m_BT1 = mask_BT.to(a_BTH.dtype).unsqueeze(-1)
    return (a_BTH * m_BT1).transpose(1, 2) @ (b_BTH * m_BT1) / m_BT1.sum(1, keepdim=True).clamp(1)


def _token_products(layers: "Sequence[Tensor]", by_length: bool) -> "Tensor":
    """``[B, T, T]``."""
    a_BTH, b_BTH = (wide(x) for x in layers)
    return a_BTH @ b_BTH.transpose(1, 2) / a_BTH.shape[1 if by_length else 2]


def _module_width(path: str, shape: ModelShape, side: str) -> int:
    if path not in shape.modules:
        raise ValueError(
            f"match module: the {side} has no module {path!r}; it has "
            f"{', '.join(sorted(shape.modules)) or 'none that can be matched'}"
        )
    return shape.modules[path]

"""Matches of attention. Import from ``matches``.

Each says in ``on`` whether it takes probabilities (after the softmax) or raw scores (before); its
keys are ``attention`` or ``scores`` accordingly. TextBrewer takes whatever the model gives: newer
transformers give probabilities, and it softens them a second time (papers.md B15).

A mask leaves out padding as query and as key, in the softmax too: padding changes nothing.
``compat`` computes as textbrewer 0.2.1.post1 does: without a mask it sets scores below -0.001 to
0, with one its softmax still runs over the padding. Both sides need tensors of the same T.

Shape suffixes: B rows, A heads, T tokens (queries, then keys).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Final, Literal, Self

from pydantic import model_validator

from driftline.platform.distillation.hidden_matches import masked_mean, wide
from driftline.platform.distillation.keys import FeatureKey
from driftline.platform.distillation.match_points import (
    LayerMatch,
    ModelShape,
    Point,
    layer_pairs,
    refuse_other_tokens,
)

if TYPE_CHECKING:
    from torch import Tensor

On = Literal["scores", "probabilities"]
THRESHOLD: Final = -1e-3
TINY: Final = 1e-12


class AttentionMatch(LayerMatch):
    """Base of the matches of attention."""

    by_head: ClassVar[bool] = True
    """Head by head: both models must have as many."""

    on: On = "scores"
    compat: bool = False
    """As textbrewer 0.2.1.post1 computes it; on scores only."""

    @model_validator(mode="after")
    def _fits_attention(self) -> Self:
        if self.compat and self.on != "scores":
            raise ValueError(f"match {self.kind}: compat needs on: scores, got {self.on}")
        if self.projection is not None:
            raise ValueError(
                f"match {self.kind}: attention has no projection, got {self.projection.kind}"
            )
        return self

    def points(self, student: ModelShape, teacher: ModelShape) -> tuple[Point, ...]:
        """One point for each pair of layers; the first is 1."""
        refuse_other_tokens(self.kind, student, teacher)
        heads = student.num_heads, teacher.num_heads
        if 0 in heads or (self.by_head and heads[0] != heads[1]):
            raise ValueError(
                f"match {self.kind}: needs attention{' with as many heads' * self.by_head} on "
                f"both sides, got {heads[0]} heads in the student and {heads[1]} in the teacher"
                + "; attention_mse_sum and attention_ce_mean allow numbers that differ"
                * all(heads)
            )
        pairs = layer_pairs(self.kind, self.layers, student, teacher, first=1)
        kind: Literal["scores", "attention"] = "scores" if self.on == "scores" else "attention"
        return tuple(Point((FeatureKey(kind, s),), (FeatureKey(kind, t),)) for s, t in pairs)


class AttentionMse(AttentionMatch):
    """Mean squared difference, head by head (TinyBERT, papers.md 3.2, S3.21).

    Masked: sum m_i m_j (S - T)^2 / (heads  sum of squared lengths).
    """

    kind: Literal["attention_mse"] = "attention_mse"

    def loss(
        self,
        student: "Sequence[Tensor]",
        teacher: "Sequence[Tensor]",
        mask_BT: "Tensor | None" = None,
    ) -> "Tensor":
        """See ``Match``. ``[B, A, T, T]``."""
        return mean_square(_heads(student[0]), _heads(teacher[0]), mask_BT, compat=self.compat)

    def row_weights(self, lengths_B: "Tensor") -> "Tensor":
        """By pairs of tokens."""
        return lengths_B**2


class AttentionMseSum(AttentionMatch):
    """``attention_mse`` of the sum over the heads, whose numbers may differ."""

    by_head: ClassVar[bool] = False

    kind: Literal["attention_mse_sum"] = "attention_mse_sum"

    def loss(
        self,
        student: "Sequence[Tensor]",
        teacher: "Sequence[Tensor]",
        mask_BT: "Tensor | None" = None,
    ) -> "Tensor":
        """See ``Match``. ``[B, A, T, T]``, or ``[B, T, T]`` already summed."""
        sum_S, sum_T = (_heads(x[0]).sum(dim=1, keepdim=True) for x in (student, teacher))
        return mean_square(sum_S, sum_T, mask_BT, compat=self.compat)

    def row_weights(self, lengths_B: "Tensor") -> "Tensor":
        """By pairs of tokens."""
        return lengths_B**2


class AttentionCe(AttentionMatch):
    """Cross-entropy of the student's attention under the teacher's, head by head.

    Mean over queries of -sum_j p_T log p_S (papers.md 3.2). Its gradient is that of
    ``attention_kl``.
    """

    kind: Literal["attention_ce"] = "attention_ce"

    def loss(
        self,
        student: "Sequence[Tensor]",
        teacher: "Sequence[Tensor]",
        mask_BT: "Tensor | None" = None,
    ) -> "Tensor":
        """See ``Match``. ``[B, A, T, T]``."""
        return cross_entropy(
            _heads(student[0]), _heads(teacher[0]), mask_BT, on=self.on, compat=self.compat
        )


class AttentionCeMean(AttentionMatch):
    """``attention_ce`` of the mean over the heads, whose numbers may differ."""

    by_head: ClassVar[bool] = False

    kind: Literal["attention_ce_mean"] = "attention_ce_mean"

    def loss(
        self,
        student: "Sequence[Tensor]",
        teacher: "Sequence[Tensor]",
        mask_BT: "Tensor | None" = None,
    ) -> "Tensor":
        """See ``Match``. ``[B, A, T, T]``, or ``[B, T, T]`` already averaged."""
        mean_S, mean_T = (_heads(x[0]).mean(dim=1, keepdim=True) for x in (student, teacher))
        return cross_entropy(mean_S, mean_T, mask_BT, on=self.on, compat=self.compat)


class AttentionKl(AttentionMatch):
    """KL(teacher || student) of the attention of every query, mean over heads and queries.

    0 where they agree. Source: MobileBERT's attention transfer (papers.md S3.21).
    """

    kind: Literal["attention_kl"] = "attention_kl"
    on: On = "probabilities"

    @model_validator(mode="after")
    def _has_no_model(self) -> Self:
        if self.compat:
            raise ValueError("match attention_kl: textbrewer has none, compat must be false")
        return self

    def loss(
        self,
        student: "Sequence[Tensor]",
        teacher: "Sequence[Tensor]",
        mask_BT: "Tensor | None" = None,
    ) -> "Tensor":
        """See ``Match``. ``[B, A, T, T]``."""
        p_BATT, log_p_BATT = distribution(_heads(teacher[0]), mask_BT, on=self.on)
        _, log_q_BATT = distribution(_heads(student[0]), mask_BT, on=self.on)
        return over_queries((p_BATT * (log_p_BATT - log_q_BATT)).sum(dim=-1), mask_BT)


def mean_square(
    student_BATT: "Tensor", teacher_BATT: "Tensor", mask_BT: "Tensor | None", *, compat: bool
) -> "Tensor":
    """Mean squared difference over heads and pairs of real tokens. Scalar."""
    if compat and mask_BT is None:
        student_BATT, teacher_BATT = (
            x.masked_fill(x <= THRESHOLD, 0.0) for x in (student_BATT, teacher_BATT)
        )
    if mask_BT is None:
        return ((student_BATT - teacher_BATT) ** 2).mean()
    m_BT = mask_BT.to(student_BATT.dtype)
    padding_B1TT = (m_BT[:, :, None] * m_BT[:, None, :]).unsqueeze(1) == 0
    # A score of padding may be infinite: it must not reach the difference, whose gradient, too,
    # would be no number.
    student_BATT, teacher_BATT = (
        x.masked_fill(padding_B1TT, 0.0) for x in (student_BATT, teacher_BATT)
    )
    num_pairs = student_BATT.shape[1] * (m_BT.sum(dim=1) ** 2).sum().clamp(min=1)
    return ((student_BATT - teacher_BATT) ** 2).sum() / num_pairs


def cross_entropy(
    student_BATT: "Tensor",
    teacher_BATT: "Tensor",
    mask_BT: "Tensor | None",
    *,
    on: On,
    compat: bool,
) -> "Tensor":
    """Cross-entropy of the student's attention, mean over heads and real queries. Scalar."""
    if not compat:
        p_BATT, _ = distribution(teacher_BATT, mask_BT, on=on)
        _, log_p_BATT = distribution(student_BATT, mask_BT, on=on)
    else:
        p_BATT, log_p_BATT = teacher_BATT.softmax(-1), student_BATT.log_softmax(-1)
        if mask_BT is None:
            p_BATT = p_BATT.masked_fill(teacher_BATT <= THRESHOLD, 0.0)
        else:
            p_BATT = p_BATT * mask_BT.to(p_BATT.dtype)[:, None, None, :]
    return over_queries(-(p_BATT * log_p_BATT).sum(dim=-1), mask_BT)


def distribution(x_BATT: "Tensor", mask_BT: "Tensor | None", *, on: On) -> "tuple[Tensor, Tensor]":
    """Probabilities over the real keys and their logarithms. ``[B, A, T, T]`` each.

    Keys that are padding have probability 0 and, so that sums stay finite, logarithm 0. What
    stands in queries that are padding, be it infinite, is not read.
    """
    padding_B11T = None if mask_BT is None else (mask_BT == 0)[:, None, None, :]
    if padding_B11T is not None:
        x_BATT = x_BATT.masked_fill(padding_B11T.transpose(2, 3), 0.0)
    if on == "probabilities":
        p_BATT = x_BATT if padding_B11T is None else x_BATT.masked_fill(padding_B11T, 0.0)
        log_p_BATT = x_BATT.clamp(min=TINY).log()
    else:
        if padding_B11T is not None:
            x_BATT = x_BATT.masked_fill(padding_B11T, -1e9)
        log_p_BATT = x_BATT.log_softmax(-1)
        p_BATT = log_p_BATT.exp()
    if padding_B11T is not None:
        log_p_BATT = log_p_BATT.masked_fill(padding_B11T, 0.0)
    return p_BATT, log_p_BATT


def over_queries(losses_BAT: "Tensor", mask_BT: "Tensor | None") -> "Tensor":
    """Mean over the heads and the real queries. Scalar."""
    return masked_mean(losses_BAT.mean(dim=1), mask_BT)


def _heads(x: "Tensor") -> "Tensor":
    """``[B, A, T, T]``, with one head where there was no such dimension."""
    return wide(x).unsqueeze(1) if x.dim() == 3 else wide(x)

"""A student with a small vocabulary and a teacher that reads both (papers.md S4.3, S4.4, A4.1).

The student is trained as ever: masked language in its own vocabulary. The teacher, a copy, reads
some words in the student's vocabulary and predicts them too. What it learns reaches the student
through the *bridge*: the teacher embeds the student's pieces by an affine map of the student's own
table, and by the same map it predicts them.

Shape suffixes: B texts, D student's width, H teacher's width, K masked positions, T tokens,
S pieces of the student's vocabulary, V pieces of the teacher's.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding, gelu, linear

from driftline.platform.checkpoints import load_weights
from driftline.platform.models.encoder import MaskedLanguageHead, MaskedTexts, TextEncoder
from driftline.platform.models.spec import EncoderSpec, ModelSpec, SingleSpec, TeacherSpec, TwinSpec
from driftline.platform.vocabulary.shared_projections import (
    PairedVariable,
    SharedProjections,
    pair_variables,
    sizes_of,
)
from driftline.platform.vocabulary.start import DualVocabulary
from driftline.platform.vocabulary.views import Views


class Predictions(NamedTuple):
    """Losses at the masked positions of one model, and whether its first guess was right."""

    losses: Tensor
    """``[K]``, float32."""
    hits: Tensor
    """``[K]``, bool."""


class DualOutput(NamedTuple):
    """What one step of dual training gives."""

    student: Predictions
    teacher: Predictions | None
    projection: Tensor
    """L_p, summed over the student's encoders; 0 without it. Scalar."""


class AffineBridge(nn.Module):
    """The student's pieces in the teacher's space: ``E_s A + b`` (papers.md section 5.3-3)."""

    def __init__(self, student: EncoderSpec, teacher: EncoderSpec, *, detach: bool) -> None:
        super().__init__()
        self.map = nn.Linear(student.hidden_size, teacher.hidden_size)
        nn.init.normal_(self.map.weight, std=student.hidden_size**-0.5)  # keeps the table's scale
        nn.init.zeros_(self.map.bias)
        self._detach = detach

    def forward(self, table_SD: Tensor) -> Tensor:
        """The student's table in the teacher's space. ``[S, H]``."""
        mapped: Tensor = self.map(table_SD.detach() if self._detach else table_SD)
        return mapped


class SeparateTable(nn.Module):
    """A table of the teacher's own for the student's pieces; only L_p ties it to the student's."""

    def __init__(self, student: EncoderSpec, teacher: EncoderSpec) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(student.vocabulary_size, teacher.hidden_size))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, table_SD: Tensor) -> Tensor:
        """That table, whatever the student's is. ``[S, H]``."""
        return self.weight


class DualTeacher(nn.Module):
    """The teacher's copy: one encoder, two vocabularies, two softmaxes told apart by id.

    Ids below the size of the teacher's vocabulary are its own pieces, those above the student's.
    """

    def __init__(self, spec: EncoderSpec, student: EncoderSpec, *, bridge: nn.Module) -> None:
        super().__init__()
        self.encoder = TextEncoder(spec, pretrained=False)
        self.predictor = MaskedLanguageHead(spec)
        self.bridge = bridge
        self.student_bias = nn.Parameter(torch.zeros(student.vocabulary_size))
        self._num_own = spec.vocabulary_size

    def forward(self, view: MaskedTexts, table_SD: Tensor) -> Predictions:
        """Loss at each masked position, by the softmax of the vocabulary that wrote the word.

        Args:
            view: The teacher's view of some texts.
            table_SD: Token table of the student that reads the same texts.
        """
        tokens_BT, mask_BT, place_K, target_K = view
        table_SH = self.bridge(table_SD)
        embedded_BTH = self._embed(tokens_BT, table_SH)
        states_BTH = self.encoder.backbone(
            inputs_embeds=embedded_BTH, attention_mask=mask_BT
        ).last_hidden_state
        hidden_KH = self.predictor.norm(
            gelu(self.predictor.dense(states_BTH.flatten(0, 1)[place_K]))
        )
        losses_K = hidden_KH.new_zeros(len(target_K), dtype=torch.float32)
        hits_K = torch.zeros_like(target_K, dtype=torch.bool)
        is_students_K = target_K >= self._num_own
        for chosen_K, table, bias, shift in (
            (~is_students_K, self.encoder.token_table, self.predictor.bias, 0),
            (is_students_K, table_SH, self.student_bias, self._num_own),
        ):
            scores = linear(hidden_KH[chosen_K], table, bias).float()
            target = target_K[chosen_K] - shift
            losses_K[chosen_K] = cross_entropy(scores, target, reduction="none")
            hits_K[chosen_K] = scores.detach().argmax(-1) == target
        return Predictions(losses_K, hits_K)

    def _embed(self, tokens_BT: Tensor, table_SH: Tensor) -> Tensor:
        is_students_BT = tokens_BT >= self._num_own
        own_BTH = embedding(tokens_BT.masked_fill(is_students_BT, 0), self.encoder.token_table)
        students = (tokens_BT - self._num_own).masked_fill(~is_students_BT, 0)
        return torch.where(is_students_BT[..., None], embedding(students, table_SH), own_BTH)


class DualModel(nn.Module):
    """Student and teacher in one training step; only the student's encoders are kept (S4.7).

    Args:
        student: Whose encoders are trained.
        teacher: None trains the student alone (``NoKD``, papers.md S4.9).
        recipe: Bridge and shared projections.
    """

    def __init__(
        self, student: ModelSpec, teacher: TeacherSpec | None, *, recipe: DualVocabulary
    ) -> None:
        super().__init__()
        spec, num_encoders = student_encoders(student)
        self.encoders = nn.ModuleList(
            TextEncoder(spec, pretrained=False) for _ in range(num_encoders)
        )
        self.predictor = MaskedLanguageHead(spec)
        self.teacher: DualTeacher | None = None
        self.projections: SharedProjections | None = None
        if teacher is None:
            return
        bridge = (
            AffineBridge(spec, teacher.encoder, detach=recipe.detach_bridge)
            if recipe.bridge == "affine"
            else SeparateTable(spec, teacher.encoder)
        )
        self.teacher = DualTeacher(teacher.encoder, spec, bridge=bridge)
        self._layer_map = recipe.layers(spec.num_layers, teacher.encoder.num_layers)
        if recipe.direction is not None:
            self.projections = SharedProjections(
                sizes_of(self.pairs(0)),
                direction=recipe.direction,
                reduction=recipe.reduction,
                share=recipe.share,
                detach_teacher=recipe.detach_teacher,
            )

    def forward(self, parts: Sequence[Views]) -> DualOutput:
        """Losses of both models at their masked positions, and L_p.

        Args:
            parts: Views of some texts; part n is for encoder n modulo their number.
        """
        student, teacher = [], []
        for number, (own, other) in enumerate(parts):
            encoder = self._encoder(number % len(self.encoders))
            student.append(self._predict(encoder, own))
            if self.teacher is not None and other is not None:
                teacher.append(self.teacher(other, encoder.token_table))
        projection = torch.zeros((), device=student[0].losses.device)
        if self.projections is not None:
            projection = torch.stack(
                [self.projections(self.pairs(number)) for number in range(len(self.encoders))]
            ).sum()
        return DualOutput(_joined(student), _joined(teacher) if teacher else None, projection)

    def load_teacher(self, weights: Path) -> None:
        """Start the teacher's encoder from a file, which is only read.

        Raises:
            BundleError: the file holds no ``encoder.*`` of this shape.
        """
        assert self.teacher is not None
        load_weights(nn.ModuleDict({"encoder": self.teacher.encoder}), weights)

    def pairs(self, number: int) -> list[PairedVariable]:
        """Variables of one of the student's encoders beside the teacher's (papers.md S4.7)."""
        assert self.teacher is not None
        own = nn.ModuleDict({"encoder": self._encoder(number), "predictor": self.predictor})
        other = nn.ModuleDict(
            {"encoder": self.teacher.encoder, "predictor": self.teacher.predictor}
        )
        pairs = pair_variables(other, own, layer_map=self._layer_map)
        if isinstance(self.teacher.bridge, SeparateTable):
            table_SD = self._encoder(number).token_table
            pairs.append(PairedVariable("token_table", "nh", self.teacher.bridge.weight, table_SD))
        return pairs

    def _predict(self, encoder: TextEncoder, view: MaskedTexts) -> Predictions:
        tokens_BT, mask_BT, place_K, target_K = view
        states_KD = encoder(tokens_BT, mask_BT).flatten(0, 1)[place_K]
        scores_KS = self.predictor(states_KD, encoder.token_table).float()
        losses_K = cross_entropy(scores_KS, target_K, reduction="none")
        return Predictions(losses_K, scores_KS.detach().argmax(-1) == target_K)

    def _encoder(self, number: int) -> TextEncoder:
        encoder = self.encoders[number]
        assert isinstance(encoder, TextEncoder)
        return encoder


def student_encoders(student: ModelSpec) -> tuple[EncoderSpec, int]:
    """The encoder of a student and how many of it there are.

    Raises:
        ValueError: the model has no encoder of the student's kind.
    """
    match student:
        case TwinSpec():
            return student.encoder, 1 if student.tie_arms else 2
        case SingleSpec():
            return student.encoder, 1
        case _:
            raise ValueError(
                f"dual training needs a student with an encoder (twin or single), got kind "
                f"{student.kind!r}"
            )


def _joined(parts: Sequence[Predictions]) -> Predictions:
    losses, hits = zip(*parts, strict=True)
    return Predictions(torch.cat(losses), torch.cat(hits))

"""Masked-language distillation: a language model learns another's distribution over tokens.

L = w_hard CE at masked tokens + w_soft t^2 KL at all tokens + matches (papers.md S3.5, A3.1-A3.3,
C11). Shape suffixes: B rows of a step, T tokens, P positions where the teacher is asked, K masked
positions, H hidden width, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from driftline.platform.batching import Rows, by_length
from driftline.platform.devices import to_device
from driftline.platform.distillation.anatomy import shape_of
from driftline.platform.distillation.capture import Capture
from driftline.platform.distillation.matching import Features, Matching
from driftline.platform.distillation.token_models import (
    AskedTexts,
    TokenModel,
    check_language_teacher,
)
from driftline.platform.errors import SettingsError
from driftline.platform.examples import TokenRows
from driftline.platform.masked_language import EVALUATION_STEP, DrawnTexts, MlmTask, roles_of
from driftline.platform.models.spec import ModelSpec
from driftline.platform.objective import soft_loss, wide
from driftline.platform.settings import ObjectiveSettings
from driftline.platform.tasks import INFERENCE_TOKENS, StopOn, Workers, unscheduled

MARKER: Final = 1  # position of the role marker, after [CLS]
OF_TOKENS: Final[Mapping[str, tuple[int, ...]]] = {
    "hidden": (1,),
    "attention": (2, 3),
    "scores": (2, 3),
}
"""Dimensions of a feature that go over the tokens."""


@dataclass(frozen=True)
class _Asked:
    """One part of a step, for the student and for the teacher."""

    student: AskedTexts
    teacher: AskedTexts
    masked: Tensor
    """Which of the asked places are masked. ``[K]``"""
    target: Tensor
    """What stood there. ``[K]``"""
    counted: bool
    drop_marker: bool


class TokenDistilTask(MlmTask):
    """Learns the teacher's distribution over tokens beside the tokens themselves.

    Both read the same masked tokens; a role marker that the teacher does not know is left out of
    what it reads and of what is compared. Each part of the loss is a mean over the whole step:
    ``hard`` over masked positions, ``soft`` over all that are not padding (or the masked ones,
    ``objective.tokens``), matches as they say. An update costs P x V scores of both models:
    30,000 pieces and 4,000 tokens are 0.5 GB each.

    Args:
        spec: The student.
        model: What is trained; its ``projections`` are added to it here, where a match needs any.
        teacher: The frozen language model and what it is.
        objective: Weights, temperature, soft loss, matches.
        train: Texts to learn from.
        validation: Texts for early stopping.
        workers: This process among others.
        seed: Of masks, roles and projections.
        stop_on: What early stopping watches.
        device: Where the model is.
        max_rows: Newest texts only.

    Raises:
        SettingsError: the two do not share a tokeniser, or a match is impossible.
    """

    num_batches: int = 1
    """Of the whole training, for weights with a schedule."""

    def __init__(
        self,
        spec: ModelSpec,
        model: TokenModel,
        teacher: tuple[ModelSpec, TokenModel],
        *,
        objective: ObjectiveSettings,
        train: TokenRows,
        validation: TokenRows | None,
        workers: Workers,
        seed: int,
        device: torch.device,
        stop_on: StopOn = "loss",
        max_rows: int | None = None,
    ) -> None:
        super().__init__(spec, train, validation, workers=workers, seed=seed, max_rows=max_rows)
        self.stop_on = stop_on
        self.objective = objective
        self._judged = unscheduled(objective)
        teacher_spec, self.teacher = teacher
        check_language_teacher(spec, teacher_spec)
        self._drop_marker = self.roles[0] is not None and roles_of(teacher_spec)[1][0] is None
        shapes = [shape_of(each.encoders[0], tokens="same") for each in (model, self.teacher)]
        try:
            self.matching = Matching(objective.matches, *shapes)
            for each, keys in (
                (model, self.matching.student_keys),
                (self.teacher, self.matching.teacher_keys),
            ):
                Capture(each.encoders[0], keys)
                each.keys = keys
        except ValueError as error:
            raise SettingsError(f"{error}") from error
        self.teacher.to(device).eval().requires_grad_(False)
        if len(self.matching.projections):
            model.projections = self.matching.projections.to(device)

    def loss(self, model: nn.Module, rows: Rows, *, step: int, device: torch.device) -> Tensor:
        """See ``Task``."""
        progress = min(1.0, (step - 1) / self.num_batches)
        sums, amounts = self._sums(model, self.train, rows, step=step, device=device)
        hard, soft = self.objective.weights_at(progress)
        weights = {"hard": hard, "soft": soft, **self.matching.weights(progress)}
        terms = [weights[name] * sums[name] / max(1.0, amounts[name]) for name in sums]
        return torch.stack(terms).sum() * self.workers.world_size

    def evaluate(self, model: nn.Module, *, device: torch.device) -> dict[str, float]:
        """The objective by the bases of its weights, and its parts; the same masks every time."""
        if self.validation is None or not len(self.evaluated):
            return {}
        names = ("hard", "soft", *self.matching.names)
        totals = np.zeros((len(names), 2))
        lengths = self.validation.tokens.lengths[self.evaluated]
        for number, places in enumerate(by_length(lengths, max_tokens=INFERENCE_TOKENS, width=3)):
            rows = self.evaluated[places]
            step = EVALUATION_STEP + number
            sums, amounts = self._sums(model, self.validation, rows, step=step, device=device)
            for place, name in enumerate(names):
                totals[place, 0] += float(sums[name])
                totals[place, 1] += amounts[name] / self.workers.world_size
        totals = self.workers.all_sum(totals, device)
        means = {name: totals[n, 0] / max(1.0, totals[n, 1]) for n, name in enumerate(names)}
        hard, soft = self._judged.weights_at(0.0)
        weights = {"hard": hard, "soft": soft, **self.matching.base_weights}
        return {
            "loss": float(sum(weights[name] * means[name] for name in names)),
            "hard_loss": float(means["hard"]),
            "soft_loss": float(means["soft"]),
            **{f"match_{name}": float(means[name]) for name in self.matching.names},
        }

    def _sums(
        self,
        model: nn.Module,
        source: TokenRows,
        rows: Rows,
        *,
        step: int,
        device: torch.device,
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Sums of this worker's losses, and what those of the whole step are to be divided by."""
        drawn, num_masked, lengths = self.draw(source, rows, step=step)
        asked = [self._ask(part) for part in drawn]
        students = model(to_device([part.student for part in asked], device))
        with torch.no_grad():
            teachers = self.teacher(to_device([part.teacher for part in asked], device))
        num_asked, amounts = self._amounts(num_masked, lengths)
        zero = torch.zeros((), device=device)
        sums = dict.fromkeys(("hard", "soft", *self.matching.names), zero)
        for part, (scores_PV, own), (known_PV, other) in zip(
            asked, students, teachers, strict=True
        ):
            for name, loss in self._part_sums(part, scores_PV, known_PV, own, other).items():
                sums[name] = sums[name] + loss
        return sums, {"hard": float(num_masked), "soft": float(num_asked), **amounts}

    def _part_sums(
        self, part: _Asked, scores_PV: Tensor, known_PV: Tensor, own: Features, other: Features
    ) -> dict[str, Tensor]:
        device = scores_PV.device
        if not part.counted:
            nothing = scores_PV.sum() * 0
            return {"hard": nothing, "soft": nothing, **self.matching.nothing(own)}
        scores_PV = wide(scores_PV)
        masked_KV = scores_PV[part.masked.to(device)]
        sums = {
            "hard": cross_entropy(masked_KV, part.target.to(device), reduction="sum"),
            "soft": soft_loss(scores_PV, wide(known_PV), self.objective).sum(),
        }
        if len(self.matching):
            mask_BT = part.teacher[1].to(device)
            own = self._aligned(own) if part.drop_marker else own
            means = self.matching.losses(own, other, mask_BT)
            lengths_B = mask_BT.sum(dim=1).double()
            amounts = self.matching.row_weights(lengths_B)
            sums |= {name: mean * amounts[name].sum() for name, mean in means.items()}
        return sums

    def _amounts(
        self, num_masked: int, lengths: Sequence[np.ndarray]
    ) -> tuple[int, dict[str, float]]:
        """Positions asked for in the whole step, and what each match's mean is over."""
        lengths_B = torch.from_numpy(np.concatenate(lengths)).double() - float(self._drop_marker)
        weights = self.matching.row_weights(lengths_B)
        asked = num_masked if self.objective.tokens == "masked" else int(lengths_B.sum())
        return asked, {name: float(weight_B.sum()) for name, weight_B in weights.items()}

    def _ask(self, part: DrawnTexts) -> _Asked:
        """The places to be asked, in what either reads."""
        tokens_BT, mask_BT, place_K, target_K = part.texts
        wanted_BT = mask_BT.clone()
        if self._drop_marker:
            wanted_BT[:, MARKER] = False
        place_P = wanted_BT.flatten().nonzero().flatten()
        if self.objective.tokens == "masked":
            place_P = place_K
        teacher: AskedTexts = (tokens_BT, mask_BT, place_P)
        if self._drop_marker:
            row_P, column_P = place_P // tokens_BT.shape[1], place_P % tokens_BT.shape[1]
            column_P = column_P - (column_P > MARKER).long()
            tokens, mask = (_without(x, MARKER, dims=(1,)) for x in (tokens_BT, mask_BT))
            teacher = (tokens, mask, row_P * tokens.shape[1] + column_P)
        return _Asked(
            student=(tokens_BT, mask_BT, place_P),
            teacher=teacher,
            masked=torch.searchsorted(place_P, place_K),
            target=target_K,
            counted=part.counted,
            drop_marker=self._drop_marker,
        )

    def _aligned(self, features: Features) -> Features:
        """The student's features without the marker that the teacher did not read."""
        return {
            key: _without(tensor, MARKER, dims=OF_TOKENS.get(key.kind, ()))
            for key, tensor in features.items()
        }


def _without(tensor: Tensor, place: int, *, dims: Sequence[int]) -> Tensor:
    """A tensor without one index of some dimensions."""
    for dim in dims:
        kept = [slice(0, place), slice(place + 1, None)]
        parts: list[Any] = [tensor.movedim(dim, 0)[part] for part in kept]
        tensor = torch.cat(parts).movedim(0, dim)
    return tensor

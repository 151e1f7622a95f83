"""Masked-language training of a model's encoders (papers.md S0.7, S0.9, A0.18).

Shape suffixes: B rows of a step, K masked positions, T tokens.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from driftline.platform.batching import Rows, by_length
from driftline.platform.devices import to_device
from driftline.platform.examples import TokenRows
from driftline.platform.inputs import frame_texts
from driftline.platform.models.encoder import MaskedLanguageModel, MaskedTexts, TextEncoder
from driftline.platform.models.spec import EncoderSpec, ModelSpec, SingleSpec, TeacherSpec, TwinSpec
from driftline.platform.models.student import AD, PAGE, TwinStudent
from driftline.platform.models.teacher import ClickTower
from driftline.platform.tasks import INFERENCE_TOKENS, StopOn, Workers, pick_rows

MASK_SHARE: Final = 0.15
MASK_TOKEN_SHARE, RANDOM_TOKEN_SHARE = 0.8, 0.1
MAX_EVALUATION_TEXTS: Final = 25_000
EVALUATION_STEP: Final = 2**40  # random stream of evaluations, apart from that of training steps


@dataclass(frozen=True)
class DrawnTexts:
    """One part of a step: this worker's share of the texts of one role."""

    texts: MaskedTexts
    counted: bool
    """False for a text that only stands in for none, so that every weight has a gradient."""


class MlmTask:
    """Masked language: 15 % of the tokens, of which 80/10/10 masked, random, kept (S0.9).

    Masks are drawn anew in every step, from the seed; special tokens are never masked. A twin
    student reads each text as page or as ad, by chance.
    """

    stop_on: StopOn = "loss"
    block_rows = 1

    def __init__(
        self,
        spec: ModelSpec,
        train: TokenRows,
        validation: TokenRows | None,
        *,
        workers: Workers,
        seed: int,
        max_rows: int | None = None,
    ) -> None:
        self.encoder, self.roles = roles_of(spec)
        self.train = train
        self.validation = validation
        self.workers = workers
        self.seed = seed
        self.num_rows = min(len(train), max_rows or len(train))
        self.first_row = len(train) - self.num_rows
        self.lengths: NDArray[np.int64] | None = train.tokens.lengths
        self.evaluated = pick_rows(
            len(validation) if validation else 0, limit=MAX_EVALUATION_TEXTS, seed=seed
        )
        special = np.array(self.encoder.specials.ids)
        self._plain = np.setdiff1d(np.arange(self.encoder.vocabulary_size), special)
        self._special = special

    def loss(self, model: nn.Module, rows: Rows, *, step: int, device: torch.device) -> Tensor:
        """See ``Task``."""
        drawn, num_masked, _ = self.draw(self.train, rows, step=step)
        losses_K: Tensor = model(to_device([part.texts for part in drawn], device))
        return losses_K.sum() * (self.workers.world_size / max(1, num_masked))

    def evaluate(self, model: nn.Module, *, device: torch.device) -> dict[str, float]:
        """Mean loss at masked positions; every evaluation masks the same ones."""
        if self.validation is None or not len(self.evaluated):
            return {}
        total = np.zeros(2)
        lengths = self.validation.tokens.lengths[self.evaluated]
        batches = by_length(lengths, max_tokens=INFERENCE_TOKENS, width=3)
        for number, places in enumerate(batches):
            rows = self.evaluated[places]
            drawn, *_ = self.draw(self.validation, rows, step=EVALUATION_STEP + number)
            losses_K = model(to_device([part.texts for part in drawn], device))
            total += (float(losses_K.sum()), len(losses_K))
        total = self.workers.all_sum(total, device)
        return {"loss": float(total[0] / max(1.0, total[1]))}

    def draw(
        self, source: TokenRows, rows: Rows, *, step: int
    ) -> tuple[list[DrawnTexts], int, list[NDArray[np.int64]]]:
        """Roles and masks of a step, from the seed.

        Returns:
            This worker's share of each role's texts; number of masked positions in the whole step
            and, for each role, tokens of each text: the same in every worker.
        """
        random = np.random.default_rng((self.seed, step))
        role_B = random.integers(len(self.roles), size=len(rows))
        parts, num_masked, lengths = [], 0, []
        for number, role in enumerate(self.roles):
            chosen = rows[role_B == number]
            tokens_BT, mask_BT = frame_texts(
                self.encoder, source.tokens, chosen if len(chosen) else np.array([-1]), role=role
            )
            masked_BT, picked_BT = self._mask(tokens_BT.numpy(), random)
            num_masked += int(picked_BT.sum())
            lengths.append(mask_BT.sum(dim=1).numpy()[: len(chosen)])
            own, counted = slice(self.workers.rank, None, self.workers.world_size), len(chosen) > 0
            if len(picked_BT) <= self.workers.rank:  # fewer texts than workers: one, unmasked
                own, picked_BT, counted = slice(0, 1), np.zeros_like(picked_BT), False
            place_K = torch.from_numpy(np.flatnonzero(picked_BT[own]))
            target_K = tokens_BT[own].flatten()[place_K]
            masked = torch.from_numpy(masked_BT[own])
            parts.append(DrawnTexts((masked, mask_BT[own], place_K, target_K), counted))
        return parts, num_masked, lengths

    def _mask(
        self, tokens_BT: NDArray[np.int64], random: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        picked_BT = random.random(tokens_BT.shape) < MASK_SHARE
        picked_BT &= ~np.isin(tokens_BT, self._special)
        way_BT = random.random(tokens_BT.shape)
        drawn_BT = self._plain[random.integers(len(self._plain), size=tokens_BT.shape)]
        masked_BT = np.where(picked_BT & (way_BT < MASK_TOKEN_SHARE), self._mask_id, tokens_BT)
        randomly_BT = picked_BT & (way_BT >= 1 - RANDOM_TOKEN_SHARE)
        return np.where(randomly_BT, drawn_BT, masked_BT), picked_BT

    @property
    def _mask_id(self) -> int:
        return self.encoder.specials.mask


def masked_language_model(model: nn.Module) -> MaskedLanguageModel:
    """The encoders of a model under a new prediction head.

    Raises:
        ValueError: the model has no encoder.
    """
    return MaskedLanguageModel(encoders_of(model))


def encoders_of(model: nn.Module) -> list[TextEncoder]:
    """Encoders that masked-language training trains.

    Raises:
        ValueError: the model has none.
    """
    if isinstance(model, ClickTower):
        return [model.encoder]
    if isinstance(model, TwinStudent):
        return [b for b in model.arms.backbones if isinstance(b, TextEncoder)]
    raise ValueError(f"masked-language training needs an encoder; {type(model).__name__} has none")


def roles_of(spec: ModelSpec) -> tuple[EncoderSpec, tuple[int | None, ...]]:
    """Encoder and the roles it reads texts in: part n of a step is for encoder n modulo them.

    Raises:
        ValueError: the model has no encoder.
    """
    match spec:
        case TeacherSpec() | SingleSpec():
            return spec.encoder, (None,)
        case TwinSpec():
            return spec.encoder, (PAGE, AD) if spec.tie_arms else (None, None)
        case _:
            raise ValueError(f"masked-language training needs an encoder, got kind {spec.kind!r}")

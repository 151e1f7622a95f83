"""What one step learns and what an evaluation measures.

Shape suffixes: B rows of a step, N evaluated rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from driftline.platform.batching import Rows, by_length
from driftline.platform.distillation.row_matching import RowMatching
from driftline.platform.distillation.schedules import Weight
from driftline.platform.inputs import ClickInputs
from driftline.platform.metrics import roc_auc
from driftline.platform.objective import click_loss, soft_loss
from driftline.platform.settings import ObjectiveSettings

StopOn = Literal["loss", "soft_loss", "auc"]

MAX_EVALUATION_ROWS: Final = 100_000
INFERENCE_TOKENS: Final = 16_384
INFERENCE_ROWS: Final = 8_192


@dataclass(frozen=True)
class Workers:
    """This process among those that train together."""

    rank: int = 0
    world_size: int = 1

    def share(self, rows: Rows) -> Rows:
        """This worker's rows of a step."""
        return rows[self.rank :: self.world_size]

    def all_sum(self, values: NDArray[np.float64], device: torch.device) -> NDArray[np.float64]:
        """Sum over the workers, the same in each."""
        if self.world_size == 1:
            return values
        tensor = torch.from_numpy(values.copy()).to(device)
        dist.all_reduce(tensor)
        return tensor.cpu().numpy()


class Task(Protocol):
    """One thing to learn. Rows are those of the whole step, the same in every worker."""

    first_row: int
    num_rows: int
    lengths: NDArray[np.int64] | None
    block_rows: int
    stop_on: StopOn

    def loss(self, model: nn.Module, rows: Rows, *, step: int, device: torch.device) -> Tensor:
        """This worker's part of the mean loss, times the number of workers. Scalar."""

    def evaluate(self, model: nn.Module, *, device: torch.device) -> dict[str, float]:
        """Measures on the validation rows, the same in every worker; empty without any."""


class ClickTask:
    """Clicks, soft labels or both, and matches with the teacher (papers.md S0.16-S0.21, section 6).

    Soft labels stand beside the examples; where they do not, a live teacher gives them. Schedules
    shape the training; evaluations weigh all parts by their bases, so that they can be compared.
    """

    num_batches: int = 1
    """Of the whole training, for weights with a schedule."""

    def __init__(
        self,
        train: ClickInputs,
        validation: ClickInputs | None,
        *,
        objective: ObjectiveSettings | None,
        stop_on: StopOn,
        workers: Workers,
        seed: int,
        max_rows: int | None = None,
        matching: RowMatching | None = None,
    ) -> None:
        self.train = train
        self.validation = validation
        self.objective = objective
        self.matching = matching
        self._judged = objective and unscheduled(objective)
        self.workers = workers
        self.num_rows = min(train.num_rows, max_rows or train.num_rows)
        self.first_row = train.num_rows - self.num_rows
        self.lengths = train.lengths
        self.block_rows = train.block_rows
        self.evaluated = pick_rows(
            validation.num_rows if validation else 0, limit=MAX_EVALUATION_ROWS, seed=seed
        )
        self.stop_on = self._usable(stop_on)

    def loss(self, model: nn.Module, rows: Rows, *, step: int, device: torch.device) -> Tensor:
        """See ``Task``."""
        own = self.workers.share(rows)
        progress = min(1.0, (step - 1) / self.num_batches)
        share = self.workers.world_size / len(rows)
        if self.matching is None:
            logits_B2 = self.train.logits(model, own, device=device)
            losses_B = self._row_losses(self.train, own, logits_B2, progress=progress)
            return losses_B.sum() * share
        found = self.matching.run(model, self.train, own, device=device)
        losses_B = self._row_losses(
            self.train, own, found.logits, found.teacher_logits, progress=progress
        )
        total = losses_B.sum() * share
        weights = self.matching.matching.weights(progress)
        shares = self.matching.shares(self.train, own, rows)
        for name, loss in found.matches.items():
            total = total + weights[name] * shares[name] * self.workers.world_size * loss
        return total

    def evaluate(self, model: nn.Module, *, device: torch.device) -> dict[str, float]:
        """Objective, its parts and AUC on true clicks.

        ``loss`` is the objective; ``hard_loss`` and ``soft_loss`` (with t^2) are means over the
        rows that have the label, ``match_NAME`` over those that have the teacher's tensors.
        """
        if self.validation is None or not len(self.evaluated):
            return {}
        own = np.arange(len(self.evaluated))[self.workers.rank :: self.workers.world_size]
        logits_N2 = np.zeros((len(self.evaluated), 2))
        teacher_N2 = np.full((len(self.evaluated), 2), np.nan)
        matches: dict[str, float] = {}
        if self.matching is None:
            logits_N2[own] = predict(model, self.validation, self.evaluated[own], device=device)
        else:
            matches = self._compare(model, own, logits_N2, teacher_N2, device)
        logits_N2 = self.workers.all_sum(logits_N2, device)
        if self.validation.teacher_logits is not None:
            teacher_N2 = self.validation.teacher_logits[self.evaluated].astype(np.float64)
        elif self.workers.world_size > 1 and self._live:
            teacher_N2 = self.workers.all_sum(np.nan_to_num(teacher_N2), device)
        logits, teacher = torch.from_numpy(logits_N2), torch.from_numpy(teacher_N2)
        return self._measure(self.validation, logits, teacher, matches)

    def _compare(
        self,
        model: nn.Module,
        own: Rows,
        logits_N2: NDArray[np.float64],
        teacher_N2: NDArray[np.float64],
        device: torch.device,
    ) -> dict[str, float]:
        """Fill in the logits of this worker's rows; mean of each match over all rows."""
        assert self.validation is not None
        assert self.matching is not None
        names = self.matching.matching.names
        sums = np.zeros((len(names), 2))
        for places in inference_batches(self.validation, self.evaluated[own]):
            rows = self.evaluated[own[places]]
            found = self.matching.run(model, self.validation, rows, device=device)
            logits_N2[own[places]] = found.logits.float().cpu().numpy()
            if found.teacher_logits is not None:
                teacher_N2[own[places]] = found.teacher_logits.float().cpu().numpy()
            amounts = self.matching.amounts(self.validation, rows)
            for number, name in enumerate(names):
                sums[number] += amounts[name] * float(found.matches[name]), amounts[name]
        sums = self.workers.all_sum(sums, device)
        return {
            name: float(total / amount)
            for name, (total, amount) in zip(names, sums, strict=True)
            if amount
        }

    def _row_losses(
        self,
        inputs: ClickInputs,
        rows: Rows,
        logits_B2: Tensor,
        live_B2: Tensor | None = None,
        *,
        progress: float,
    ) -> Tensor:
        device = logits_B2.device
        stored = inputs.teacher_logits
        teacher = live_B2 if stored is None else torch.from_numpy(stored[rows]).to(device)
        clicked = torch.from_numpy(inputs.clicked[rows]).to(device)
        return click_loss(logits_B2, clicked, teacher, self.objective, progress=progress)

    def _measure(
        self,
        inputs: ClickInputs,
        logits_N2: Tensor,
        teacher_N2: Tensor,
        matches: dict[str, float],
    ) -> dict[str, float]:
        rows = self.evaluated
        clicked_N = torch.from_numpy(inputs.clicked[rows])
        known = ~torch.isnan(teacher_N2).any(dim=1)
        teacher = teacher_N2 if known.any() else None
        losses_N = click_loss(logits_N2, clicked_N, teacher, self._judged)
        measures = {"loss": float(losses_N.mean())}
        if self.matching is not None:
            weights = self.matching.matching.base_weights
            measures["loss"] += sum(weights[name] * value for name, value in matches.items())
        measures |= {f"match_{name}": value for name, value in matches.items()}
        clicks = ~torch.isnan(clicked_N)
        if self.objective is not None and clicks.any():
            hard_N = click_loss(logits_N2[clicks], clicked_N[clicks], None, None)
            measures["hard_loss"] = float(hard_N.mean())
        if teacher is not None:
            objective = self._judged or ObjectiveSettings()
            losses = soft_loss(logits_N2[known].float(), teacher_N2[known].float(), objective)
            measures["soft_loss"] = float(losses.mean())
        judged = _hard_labels(inputs.clicked[rows])
        margin_N = (logits_N2[:, 1] - logits_N2[:, 0]).numpy()
        if not np.isfinite(margin_N).all():  # the training says so: see ``Loop``
            return measures | dict.fromkeys(("loss", "soft_loss", "auc"), float("nan"))
        measures["auc"] = roc_auc(inputs.clicked[rows][judged], margin_N[judged])
        return measures

    def _usable(self, wanted: StopOn) -> StopOn:
        """The objective itself, where the validation rows cannot give the wanted measure."""
        if self.validation is None:
            return wanted
        clicked = self.validation.clicked[self.evaluated]
        teacher = self.validation.teacher_logits
        if wanted == "auc" and len(np.unique(clicked[_hard_labels(clicked)])) < 2:
            return "loss"
        unlabelled = teacher is None or bool(np.isnan(teacher[self.evaluated]).all())
        if wanted == "soft_loss" and unlabelled and not self._live:
            return "loss"
        return wanted

    @property
    def _live(self) -> bool:
        return self.matching is not None and self.matching.teacher is not None


def unscheduled(objective: ObjectiveSettings) -> ObjectiveSettings:
    """The same objective with the base of every weight."""
    weights = {
        name: Weight(base=weight.base)
        for name in ("hard_weight", "soft_weight")
        if (weight := getattr(objective, name)) is not None
    }
    return objective.model_copy(update=weights)


def predict(
    model: nn.Module, inputs: ClickInputs, rows: Rows, *, device: torch.device
) -> NDArray[np.float64]:
    """Logits in the order of ``rows``; the model is run as it stands (mode, autocast). ``[N, 2]``.

    Serialised rows are batched by length, pairs by number.
    """
    logits_N2 = np.empty((len(rows), 2))
    for places in inference_batches(inputs, rows):
        batch = inputs.logits(model, rows[places], device=device)
        logits_N2[places] = batch.float().cpu().numpy()
    return logits_N2


def inference_batches(inputs: ClickInputs, rows: Rows) -> Iterator[Rows]:
    """Places in ``rows``, cut into batches of bounded size."""
    if inputs.lengths is not None:
        yield from by_length(inputs.lengths[rows], max_tokens=INFERENCE_TOKENS, width=3)
        return
    for start in range(0, len(rows), INFERENCE_ROWS):
        yield np.arange(start, min(start + INFERENCE_ROWS, len(rows)))


def pick_rows(num_rows: int, *, limit: int, seed: int) -> Rows:
    """All rows, or ``limit`` of them by chance, in order."""
    if num_rows <= limit:
        return np.arange(num_rows)
    return np.sort(np.random.default_rng((seed, 1)).choice(num_rows, limit, replace=False))


def _hard_labels(clicked_N: NDArray[np.float32]) -> NDArray[np.bool_]:
    return (clicked_N == 0) | (clicked_N == 1)

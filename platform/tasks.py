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
    """Clicks, soft labels or both (papers.md S0.16-S0.21)."""

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
    ) -> None:
        self.train = train
        self.validation = validation
        self.objective = objective
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
        logits_B2 = self.train.logits(model, own, device=device)
        losses_B = self._row_losses(self.train, own, logits_B2)
        return losses_B.sum() * (self.workers.world_size / len(rows))

    def evaluate(self, model: nn.Module, *, device: torch.device) -> dict[str, float]:
        """Objective, soft loss and AUC on true clicks."""
        if self.validation is None or not len(self.evaluated):
            return {}
        own = np.arange(len(self.evaluated))[self.workers.rank :: self.workers.world_size]
        logits_N2 = np.zeros((len(self.evaluated), 2))
        logits_N2[own] = predict(model, self.validation, self.evaluated[own], device=device)
        logits_N2 = self.workers.all_sum(logits_N2, device)
        return self._measure(self.validation, torch.from_numpy(logits_N2))

    def _row_losses(self, inputs: ClickInputs, rows: Rows, logits_B2: Tensor) -> Tensor:
        device = logits_B2.device
        teacher = inputs.teacher_logits
        return click_loss(
            logits_B2,
            torch.from_numpy(inputs.clicked[rows]).to(device),
            None if teacher is None else torch.from_numpy(teacher[rows]).to(device),
            self.objective,
        )

    def _measure(self, inputs: ClickInputs, logits_N2: Tensor) -> dict[str, float]:
        rows = self.evaluated
        measures = {"loss": float(self._row_losses(inputs, rows, logits_N2).mean())}
        if inputs.teacher_logits is not None:
            teacher_N2 = torch.from_numpy(inputs.teacher_logits[rows])
            known = ~torch.isnan(teacher_N2).any(dim=1)
            if known.any():
                objective = self.objective or ObjectiveSettings()
                losses = soft_loss(logits_N2[known].float(), teacher_N2[known], objective)
                measures["soft_loss"] = float(losses.mean())
        judged = _hard_labels(inputs.clicked[rows])
        margin_N = (logits_N2[:, 1] - logits_N2[:, 0]).numpy()
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
        if wanted == "soft_loss" and (teacher is None or np.isnan(teacher[self.evaluated]).all()):
            return "loss"
        return wanted


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

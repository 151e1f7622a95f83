"""The training loop: one for all stages, resumable to the bit, on one worker or many.

Everything random in a step derives from (seed, step), so a killed stage continues from its last
checkpoint as if nothing had happened. The loop knows nothing of Ray; it is given ``report``.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Final

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from driftline.platform.batching import BatchPlan, Rows
from driftline.platform.checkpoints import CheckpointFolder
from driftline.platform.devices import autocast
from driftline.platform.errors import ResourceError, TrainingError
from driftline.platform.settings import StageSettings
from driftline.platform.tasks import Task, Workers

logger = logging.getLogger(__name__)

Report = Callable[[Mapping[str, float]], None]
Progress = Callable[[int, int], None]

CHECKPOINT_SECONDS: Final = 60.0
SMALLER_IS_BETTER: Final = ("loss", "soft_loss")


@dataclass
class Progression:
    """What is known so far; stands in every checkpoint."""

    step: int = 0
    num_rows: int = 0
    seconds: float = 0.0
    core_seconds: float = 0.0
    best: float | None = None
    best_step: int = 0
    stale_evaluations: int = 0
    """Evaluations since the best one."""
    train_loss: float = 0.0
    """Sum of the step losses since the last evaluation."""
    train_steps: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Loop:
    """One stage's training. ``run`` leaves the best weights in the model.

    The model is trained as it is given: parameters that need no gradient stay.
    """

    model: nn.Module
    task: Task
    stage: StageSettings
    seed: int
    folder: CheckpointFolder
    workers: Workers
    report: Report | None = None
    progress: Progress | None = None

    def run(self) -> Progression:
        """Train until the last step, or until patience ends.

        Raises:
            TrainingError: the loss is no longer a number.
            ResourceError: the workers do not see the same checkpoints.
        """
        device = next(self.model.parameters()).device
        plan = self._plan()
        optimizer = make_optimizer(self.model, self.stage)
        now = self._restore(optimizer, device)
        forward = self._distribute()
        every = max(1, round(plan.steps_per_epoch / self.stage.evaluations_per_epoch))
        clock = _Clock(now)
        self._train_mode()
        while now.step < plan.num_steps and now.stale_evaluations < self.stage.patience:
            rows = plan.rows(now.step)
            now.step += 1
            if len(rows) >= self.workers.world_size:  # a last batch may be too small to share
                set_learning_rate(optimizer, self.stage, now.step, plan.num_steps)
                _seed_step(self.seed, now.step, self.workers.rank)
                now.train_loss += self._step(forward, optimizer, rows, now.step, device)
                now.train_steps += 1
                now.num_rows += len(rows)
            if now.step % every == 0 or now.step == plan.num_steps:
                is_best = self._evaluate(now, plan, device)
                clock.update(now)
                self._save(now, optimizer, is_best=is_best)
                clock.saved()
            elif clock.seconds_since_saved > CHECKPOINT_SECONDS:
                clock.update(now)
                self._save(now, optimizer, is_best=False)
                clock.saved()
            if self.progress is not None:
                self.progress(now.step, plan.num_steps)
        self._take_best()
        clock.update(now)
        return now

    def _plan(self) -> BatchPlan:
        return BatchPlan(
            num_rows=self.task.num_rows,
            batch_size=self.stage.batch_size,
            num_epochs=self.stage.num_epochs,
            seed=self.seed,
            first_row=self.task.first_row,
            lengths=self.task.lengths,
            block_rows=self.task.block_rows,
        )

    def _restore(self, optimizer: torch.optim.Optimizer, device: torch.device) -> Progression:
        latest = self.folder.latest()
        step = latest.step if latest is not None else 0
        total = self.workers.all_sum(np.array([float(step)]), device)[0]
        if total != step * self.workers.world_size:
            raise ResourceError(
                f"worker {self.workers.rank} sees a checkpoint of step {step} in "
                f"{self.folder.root}, others see another; put the workspace on storage that all "
                "nodes share"
            )
        if latest is None:
            return Progression()
        latest.restore(self.model, optimizer)
        logger.info("continuing %s from step %d", self.folder.root, latest.step)
        return Progression(**latest.state["progression"])

    def _distribute(self) -> nn.Module:
        if self.workers.world_size == 1:
            return self.model
        return DistributedDataParallel(self.model, gradient_as_bucket_view=True)

    def _train_mode(self) -> None:
        """Frozen parts keep quiet: no dropout where nothing is learned."""
        self.model.train()
        for part in self.model.children():
            if not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()

    def _step(
        self,
        forward: nn.Module,
        optimizer: torch.optim.Optimizer,
        rows: Rows,
        step: int,
        device: torch.device,
    ) -> float:
        with autocast(device, self.stage.autocast):
            loss = self.task.loss(forward, rows, step=step, device=device)
        loss.backward()  # type: ignore[no-untyped-call]
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(trained, self.stage.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss became {value} at step {step} of {self.folder.root.name}; look for "
                "non-finite inputs, or lower the learning rate "
                f"(now {self.stage.learning_rate:g})"
            )
        return value

    def _evaluate(self, now: Progression, plan: BatchPlan, device: torch.device) -> bool:
        """Measure, remember, report; True when this is the best so far."""
        self.model.eval()
        with torch.inference_mode(), autocast(device, self.stage.autocast):
            measures = self.task.evaluate(self.model, device=device)
        self._train_mode()
        train_loss = self.workers.all_sum(np.array([now.train_loss]), device)[0]
        row = {
            "step": float(now.step),
            "epoch": now.step / plan.steps_per_epoch,
            "train_loss": float(train_loss) / (self.workers.world_size * max(1, now.train_steps)),
            **measures,
        }
        now.history.append(row)
        now.train_loss, now.train_steps = 0.0, 0
        is_best = _improves(measures, now.best, self.task.stop_on)
        if is_best:
            now.best = measures.get(self.task.stop_on)
            now.best_step = now.step
        now.stale_evaluations = 0 if is_best else now.stale_evaluations + 1
        if self.report is not None:
            self.report(row)
        return is_best

    def _save(self, now: Progression, optimizer: torch.optim.Optimizer, *, is_best: bool) -> None:
        if self.workers.rank == 0:
            self.folder.save(
                step=now.step,
                model=self.model,
                optimizer=optimizer,
                state={"progression": asdict(now)},
                is_best=is_best,
            )

    def _take_best(self) -> None:
        """Rank 0 holds the result; the others are done."""
        if self.workers.rank == 0 and (best := self.folder.best_weights()) is not None:
            self.model.load_state_dict(best)
        self.model.eval()


def make_optimizer(model: nn.Module, stage: StageSettings) -> torch.optim.AdamW:
    """Fused AdamW; biases, norms and other vectors do not decay (papers.md S0.9)."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": stage.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=stage.learning_rate, fused=True)


def learning_rate(stage: StageSettings, step: int, num_steps: int) -> float:
    """Linear warm-up, then linear decay to 0 just after the last step. Steps count from 1."""
    warmup = max(1, round(stage.warmup_share * num_steps))
    rising = step / warmup
    falling = (num_steps + 1 - step) / (num_steps + 1 - warmup)
    return stage.learning_rate * min(rising, falling)


def set_learning_rate(
    optimizer: torch.optim.Optimizer, stage: StageSettings, step: int, num_steps: int
) -> None:
    """Put the rate of a step into the optimiser."""
    rate = learning_rate(stage, step, num_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate


class _Clock:
    """Wall time and processor time of this process, added to what a killed run had used."""

    def __init__(self, now: Progression) -> None:
        self._seconds = now.seconds - time.perf_counter()
        self._core_seconds = now.core_seconds - time.process_time()
        self.saved()

    def update(self, now: Progression) -> None:
        now.seconds = self._seconds + time.perf_counter()
        now.core_seconds = self._core_seconds + time.process_time()

    def saved(self) -> None:
        self._saved = time.perf_counter()

    @property
    def seconds_since_saved(self) -> float:
        return time.perf_counter() - self._saved


def _improves(measures: Mapping[str, float], best: float | None, stop_on: str) -> bool:
    """Without validation rows the newest weights are the best."""
    if not measures or best is None:
        return True
    value = measures[stop_on]
    return value < best if stop_on in SMALLER_IS_BETTER else value > best


def _seed_step(seed: int, step: int, rank: int) -> None:
    """Seed the generators directly: ``torch.manual_seed`` costs 2 ms without an accelerator."""
    value = int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0])
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_available():
        torch.cuda.manual_seed(value)

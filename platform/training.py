"""The training loop: one for all stages, resumable to the bit, on one worker or many.

Everything random in a batch derives from (seed, batch), so a killed stage continues from its last
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
from torch import Tensor, nn

from driftline.platform.batching import BatchPlan
from driftline.platform.checkpoints import CheckpointFolder, optimizer_tensors, whole_state
from driftline.platform.devices import autocast
from driftline.platform.errors import ResourceError, SettingsError, TrainingError
from driftline.platform.models.encoder import checkpoint_activations, take_num_tokens
from driftline.platform.optimizers import make_optimizer, set_learning_rate
from driftline.platform.settings import StageSettings
from driftline.platform.sharding import distribute, gathered, is_sharded, summed
from driftline.platform.tasks import Task, Workers

logger = logging.getLogger(__name__)

Report = Callable[[Mapping[str, float]], None]
Progress = Callable[[int, int], None]

CHECKPOINT_SECONDS: Final = 60.0
LOSS_STEPS: Final = 20  # losses are read from the device together, at the latest after so many
SMALLER_IS_BETTER: Final = ("loss", "soft_loss")


@dataclass
class Progression:
    """What is known so far; stands in every checkpoint."""

    step: int = 0
    """Updates done."""
    num_rows: int = 0
    num_tokens: int = 0
    """Tokens this worker's encoders were trained on, padding included."""
    seconds: float = 0.0
    train_seconds: float = 0.0
    """Without evaluations and checkpoints: what throughput is measured by."""
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
    rates: Mapping[str, float] = field(default_factory=dict)
    """Learning rates of parts of the model by prefix; see ``make_optimizer``."""
    report: Report | None = None
    progress: Progress | None = None

    def run(self) -> Progression:
        """Train until the last step, or until patience ends.

        Raises:
            TrainingError: the loss, or what comes of the weights, is no longer a number.
            ResourceError: the workers do not see the same checkpoints.
            SettingsError: activation checkpointing is asked for, and the model has no encoder; or
                sharding is, and the model was not put in its place by ``sharding.place``.
        """
        self._check_placed()
        device = next(self.model.parameters()).device
        plan = self._plan()
        if self.stage.activation_checkpointing:
            checkpoint_activations(self.model)
        optimizer = make_optimizer(self.model, self.stage, rates=self.rates)
        now = self._restore(optimizer, device)
        forward = distribute(self.model)
        every = self._evaluation_interval(plan)
        clock = _Clock(now)
        meter = _Meter(self, device)
        self._train_mode()
        meter.start()
        while now.step < plan.num_steps and now.stale_evaluations < self.stage.patience:
            self._step(forward, optimizer, plan, now, meter)
            if now.step % every == 0 or now.step == plan.num_steps:
                meter.settle(now)
                is_best = self._evaluate(now, plan, device)
                clock.update(now)
                self._save(now, optimizer, is_best=is_best)
                clock.saved()
                meter.start()
            elif clock.seconds_since_saved > CHECKPOINT_SECONDS:
                meter.settle(now)
                clock.update(now)
                self._save(now, optimizer, is_best=False)
                clock.saved()
                meter.start()
            elif meter.is_full:
                meter.settle(now)
            if self.progress is not None:
                self.progress(now.step, plan.num_steps)
        self._take_best(device)
        clock.update(now)
        return now

    def _check_placed(self) -> None:
        wanted = self.stage.sharding == "fsdp" and self.workers.world_size > 1
        if wanted and not is_sharded(self.model):
            raise SettingsError(
                f"{self.folder.root.name}: sharding 'fsdp' is not offered for this stage; "
                "set it to 'off'"
            )

    @property
    def num_batches(self) -> int:
        """Batches of all updates."""
        plan = self._plan()
        return plan.batches(plan.num_steps - 1).stop

    def _plan(self) -> BatchPlan:
        return BatchPlan(
            num_rows=self.task.num_rows,
            batch_size=self.stage.batch_size,
            num_epochs=self.stage.num_epochs,
            seed=self.seed,
            first_row=self.task.first_row,
            lengths=self.task.lengths,
            block_rows=self.task.block_rows,
            accumulation=self.stage.accumulation,
            fixed_steps=self.stage.num_steps,
        )

    def _evaluation_interval(self, plan: BatchPlan) -> int:
        """Updates between two evaluations."""
        stage = self.stage
        if stage.num_steps is not None:
            num_evaluations = stage.num_epochs * stage.evaluations_per_epoch
            return max(1, round(plan.num_steps / num_evaluations))
        steps_per_epoch = plan.batches_per_epoch / stage.accumulation
        return max(1, round(steps_per_epoch / stage.evaluations_per_epoch))

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
        plan: BatchPlan,
        now: Progression,
        meter: "_Meter",
    ) -> None:
        """One update from the batches of a step, weighted by their rows as in one large batch."""
        batches = [(number, plan.rows(number)) for number in plan.batches(now.step)]
        # a last batch may be too small to share
        batches = [(n, rows) for n, rows in batches if len(rows) >= self.workers.world_size]
        now.step += 1
        if not batches:
            return
        set_learning_rate(optimizer, self.stage, now.step, plan.num_steps)
        num_rows = sum(len(rows) for _, rows in batches)
        losses = []
        for place, (number, rows) in enumerate(batches, start=1):
            _seed_step(self.seed, number + 1, self.workers.rank)
            with summed(forward, across_workers=place == len(batches)):
                with autocast(meter.device, self.stage.autocast):
                    loss = self.task.loss(forward, rows, step=number + 1, device=meter.device)
                    loss = loss * (len(rows) / num_rows)
                loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(trained, self.stage.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        now.num_rows += num_rows
        meter.add(now.step, losses)

    def _evaluate(self, now: Progression, plan: BatchPlan, device: torch.device) -> bool:
        """Measure, remember, report; True when this is the best so far."""
        self.model.eval()
        with gathered(self.model), autocast(device, self.stage.autocast):
            measures = self.task.evaluate(self.model, device=device)
        self._check_numbers(measures, now)
        self._train_mode()
        train_loss = self.workers.all_sum(np.array([now.train_loss]), device)[0]
        row = {
            "step": float(now.step),
            "epoch": plan.batches(now.step - 1).stop / plan.batches_per_epoch,
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

    def _check_numbers(self, measures: Mapping[str, float], now: Progression) -> None:
        """An update can spoil the weights after a loss that was still a number: the last one too.

        Raises:
            TrainingError: what the stage stops on, or without validation rows a weight, is no
                number.
        """
        if measures:
            sound = math.isfinite(measures[self.task.stop_on])
        else:
            sound = is_sharded(self.model) or all(
                bool(torch.isfinite(weight).all()) for weight in self.model.parameters()
            )
        if not sound:
            what = self.task.stop_on if measures else "a weight"
            raise TrainingError(
                f"{what} is no number after step {now.step} of {self.folder.root.name}; look for "
                f"non-finite inputs, or lower the learning rate (now {self.stage.learning_rate:g})"
            )

    def _save(self, now: Progression, optimizer: torch.optim.Optimizer, *, is_best: bool) -> None:
        """Rank 0 writes the whole model, also where each worker holds a part."""
        is_writer = self.workers.rank == 0
        if not is_writer and not is_sharded(self.model):
            return
        weights = whole_state(self.model, keep=is_writer)
        moments = optimizer_tensors(optimizer, keep=is_writer)
        if is_writer:
            self.folder.save(
                step=now.step,
                weights=weights,
                moments=moments,
                state={"progression": asdict(now)},
                is_best=is_best,
            )

    def _take_best(self, device: torch.device) -> None:
        """Rank 0 holds the result, or all workers together; the others are done."""
        if is_sharded(self.model):
            self.workers.all_sum(np.zeros(1), device)  # rank 0 has written
            self.folder.take_best(self.model)
        elif self.workers.rank == 0:
            self.folder.take_best(self.model)
        self.model.eval()


class _Meter:
    """What training has cost and lost since it was last asked.

    Losses stay on the device until then: to read each would make every step wait (papers.md B20).
    """

    def __init__(self, loop: Loop, device: torch.device) -> None:
        self.device = device
        self._loop = loop
        self._losses: list[tuple[int, Tensor]] = []
        self.start()

    def start(self) -> None:
        """Training begins, or goes on after an evaluation or a checkpoint."""
        self._since = time.perf_counter()

    def add(self, step: int, losses: list[Tensor]) -> None:
        """Losses of the batches of a step, weighted."""
        self._losses.append((step, losses[0] if len(losses) == 1 else torch.stack(losses).sum()))

    @property
    def is_full(self) -> bool:
        """The same in every worker."""
        return len(self._losses) >= LOSS_STEPS

    def settle(self, now: Progression) -> None:
        """Bring the progression up to date.

        Raises:
            TrainingError: a loss is no number, in whichever worker.
        """
        if self._losses:
            values = torch.stack([loss for _, loss in self._losses]).tolist()
            self._check(values)
            for value in values:
                now.train_loss += value
            now.train_steps += len(values)
        self._losses.clear()
        now.num_tokens += take_num_tokens(self._loop.model)
        now.train_seconds += time.perf_counter() - self._since
        self.start()

    def _check(self, values: list[float]) -> None:
        lost = np.array([float(not math.isfinite(value)) for value in values])
        lost = self._loop.workers.all_sum(lost, self.device)
        if lost.any():
            first = int(np.flatnonzero(lost)[0])
            mine = values[first]
            found = "non-finite in another worker" if math.isfinite(mine) else mine
            raise TrainingError(
                f"the loss became {found} at step {self._losses[first][0]} of "
                f"{self._loop.folder.root.name}; look for non-finite inputs, or lower the learning "
                f"rate (now {self._loop.stage.learning_rate:g})"
            )


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

"""One student for several outcomes, such as click and purchase (papers.md C14, section 3.2).

Arms and fusion layers are shared, each task has an output layer of its own. A batch holds rows of
one task; which one is drawn with a probability proportional to (number of rows)^tau. The draws
follow from the seed and the number of the batch, so that every worker makes the same ones and a
killed stage goes on as if nothing had happened.

Shape suffixes: B rows, H inputs of the output layer, K tasks.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import linear

from driftline.platform.artefacts import hash_file
from driftline.platform.batching import BatchPlan, Rows
from driftline.platform.models.layers import LogitLayer
from driftline.platform.settings import ObjectiveSettings
from driftline.platform.tasks import ClickTask, StopOn, Task
from driftline.platform.training import Loop

DRAWS_AT_ONCE: Final = 4_096
OTHERS: Final = "others"
FIRST_TASK: Final = "click"


@dataclass(frozen=True)
class TaskExamples:
    """One more outcome that a stage learns beside the click."""

    name: str
    examples: Path
    """Of the same form as the stage's own, with this outcome in the place of the click."""
    validation: Path | None = None
    objective: ObjectiveSettings | None = None
    """None learns from the outcome alone."""

    def identity(self) -> list[Any]:
        """What decides the result, contents of the files included."""
        files = [path and hash_file(path) for path in (self.examples, self.validation)]
        return [self.name, *files, self.to_json()["objective"]]

    def to_json(self) -> dict[str, Any]:
        """Plain values with absolute paths; inverse of ``from_json``."""
        return {
            "name": self.name,
            "examples": str(self.examples.absolute()),
            "validation": self.validation and str(self.validation.absolute()),
            "objective": self.objective and self.objective.model_dump(mode="json"),
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "TaskExamples":
        """Read what ``to_json`` gave."""
        validation, objective = raw["validation"], raw["objective"]
        return cls(
            name=raw["name"],
            examples=Path(raw["examples"]),
            validation=validation and Path(validation),
            objective=objective and ObjectiveSettings.model_validate(objective),
        )


def check_tasks(
    tasks: Sequence[TaskExamples], objective: ObjectiveSettings | None, *, tau: float
) -> None:
    """Refuse what cannot be learned together.

    Args:
        tasks: Those beside the click.
        objective: Of the click.
        tau: Power of the number of rows; see ``task_shares``.

    Raises:
        ValueError: names that are not fit or not distinct, matches, or a negative ``tau``.
    """
    names = [FIRST_TASK, *(task.name for task in tasks)]
    if len(set(names)) < len(names) or not all(name.isidentifier() for name in names):
        raise ValueError(f"names of tasks must be distinct words, got {names}")
    if any(one is not None and one.matches for one in (objective, *(t.objective for t in tasks))):
        raise ValueError(
            "matches are not offered where a student learns several tasks; leave "
            "objective.matches out"
        )
    task_shares([1, *(1 for _ in tasks)], tau=tau)


class TaskLogits(LogitLayer):
    """The output layers of all tasks; gives the logits of the active one.

    The first task's weights have the names of a plain output layer, so that they are exchanged
    with students of one task. Every update is one of the tasks' common loss, estimated from a
    batch of one of them: outputs of the others have a gradient of 0, not none.
    """

    def __init__(self, first: LogitLayer, others: Sequence[str]) -> None:
        super().__init__(first.in_features)
        self.load_state_dict(first.state_dict())
        self.others = nn.ModuleDict({name: LogitLayer(first.in_features) for name in others})
        self.active = 0

    def forward(self, inputs_BH: Tensor) -> Tensor:
        """Logits of the active task. ``[B, 2]``."""
        others = [layer for layer in self.others.values() if isinstance(layer, LogitLayer)]
        weights_K2H = torch.stack([self.weight, *(layer.weight for layer in others)])
        biases_K2 = torch.stack([self.bias, *(layer.bias for layer in others)])
        with torch.autocast(inputs_BH.device.type, enabled=False):
            return linear(inputs_BH.float(), weights_K2H[self.active], biases_K2[self.active])


def add_tasks(model: nn.Module, others: Sequence[str]) -> None:
    """Give a model one more output layer for each further task, in place.

    Raises:
        ValueError: the model has not exactly one output layer.
    """
    found = [name for name, part in model.named_modules() if type(part) is LogitLayer]
    if len(found) != 1:
        raise ValueError(
            f"several tasks need a model with one output layer, {type(model).__name__} has "
            f"{len(found)}"
        )
    first = model.get_submodule(found[0])
    assert isinstance(first, LogitLayer)
    model.set_submodule(found[0], TaskLogits(first, others))


def weights_of_task(weights: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The student of one task from the weights of all: what a model without ``add_tasks`` loads.

    Args:
        weights: State of a model of several tasks.
        name: The task; ``click`` is the first.

    Raises:
        ValueError: there is no such task.
    """
    marks = [key.split(".") for key in weights]
    others = {parts[parts.index(OTHERS) + 1] for parts in marks if OTHERS in parts}
    if name != FIRST_TASK and name not in others:
        raise ValueError(f"no task {name!r}, only {[FIRST_TASK, *sorted(others)]}")
    plain = {key: value for key, value in weights.items() if f".{OTHERS}." not in key}
    own = f"{OTHERS}.{name}."
    return plain | {key.replace(own, ""): value for key, value in weights.items() if own in key}


@contextmanager
def active(model: nn.Module, number: int) -> Iterator[None]:
    """Let a model answer for one of its tasks inside the block; then for the first again."""
    outputs = [part for part in model.modules() if isinstance(part, TaskLogits)]
    assert outputs, "add_tasks comes first"
    for part in outputs:
        part.active = number
    try:
        yield
    finally:
        for part in outputs:
            part.active = 0


def task_shares(sizes: Sequence[int], *, tau: float) -> NDArray[np.float64]:
    """How often each task is drawn: size^tau, normalised. ``[K]``.

    1 draws as if all rows were in one pot, 0 draws all tasks alike (papers.md section 3.2).

    Raises:
        ValueError: tau is negative.
    """
    if not tau >= 0:
        raise ValueError(f"tau must be 0 or more, got {tau}: small tasks would be drawn most")
    weights = np.asarray(sizes, np.float64) ** tau
    shares: NDArray[np.float64] = weights / weights.sum()
    return shares


def _nothing() -> NDArray[np.int64]:
    return np.empty(0, np.int64)


@dataclass
class MultiTaskPlan(BatchPlan):
    """Batches of one task each. Rows count through all tasks; see ``MultiTask``."""

    plans: tuple[BatchPlan, ...] = ()
    """Of each task; their epochs have no end."""
    shares: tuple[float, ...] = ()
    offsets: tuple[int, ...] = ()
    """Number of each task's first row."""
    _drawn: NDArray[np.int64] = field(default_factory=_nothing, init=False)
    _earlier: NDArray[np.int64] = field(default_factory=_nothing, init=False)
    """How many batches before each one are of its task."""

    def task_of(self, batch: int) -> int:
        """The task of a batch, counted from 0."""
        self._draw(batch)
        return int(self._drawn[batch])

    def rows(self, batch: int) -> Rows:
        """Rows of a batch, counted from 0. ``[B]``."""
        task = self.task_of(batch)
        return self.offsets[task] + self.plans[task].rows(int(self._earlier[batch]))

    def _draw(self, batch: int) -> None:
        """Draw the tasks of all batches up to this one, a block at a time."""
        while len(self._drawn) <= batch:
            block = len(self._drawn) // DRAWS_AT_ONCE
            chances = np.random.default_rng((self.seed, 2, block)).random(DRAWS_AT_ONCE)
            limits = np.cumsum(self.shares[:-1])
            found = np.searchsorted(limits, chances, side="right")
            earlier = np.empty(DRAWS_AT_ONCE, np.int64)
            for task in range(len(self.shares)):
                mine = found == task
                before = int((self._drawn == task).sum())
                earlier[mine] = before + np.arange(mine.sum())
            self._drawn = np.concatenate([self._drawn, found])
            self._earlier = np.concatenate([self._earlier, earlier])


class MultiTask:
    """Several tasks as one: each with its own examples, soft labels and objective.

    Evaluations give ``NAME.MEASURE`` for each task and, without a name, the mean of ``loss`` and
    of the measure to stop on, weighed as often as the tasks are drawn.
    """

    def __init__(self, tasks: Mapping[str, Task], *, tau: float) -> None:
        self.names = tuple(tasks)
        self.tasks = tuple(tasks.values())
        sizes = [task.num_rows for task in self.tasks]
        self.shares: list[float] = task_shares(sizes, tau=tau).tolist()
        ends = np.cumsum([task.first_row + task.num_rows for task in self.tasks])
        self.offsets = np.concatenate([[0], ends[:-1]])
        self.first_row = 0
        self.num_rows = sum(task.num_rows for task in self.tasks)
        self.lengths: NDArray[np.int64] | None = None
        self.block_rows = 1
        wanted = {task.stop_on for task in self.tasks}
        self.stop_on: StopOn = wanted.pop() if len(wanted) == 1 else "loss"
        self._num_batches = 1
        assert all(task.num_rows for task in self.tasks), "a task without rows is never drawn"

    def loss(self, model: nn.Module, rows: Rows, *, step: int, device: torch.device) -> Tensor:
        """See ``Task``; the rows are of one task."""
        number = int(np.searchsorted(self.offsets, rows[0], side="right")) - 1
        with active(model, number):
            return self.tasks[number].loss(
                model, rows - self.offsets[number], step=step, device=device
            )

    def evaluate(self, model: nn.Module, *, device: torch.device) -> dict[str, float]:
        """See ``Task``."""
        found: dict[str, float] = {}
        means: dict[str, list[tuple[float, float]]] = {"loss": [], self.stop_on: []}
        for number, (name, task) in enumerate(zip(self.names, self.tasks, strict=True)):
            with active(model, number):
                measures = task.evaluate(model, device=device)
            found |= {f"{name}.{measure}": value for measure, value in measures.items()}
            for measure, values in means.items():
                if measure in measures:
                    values.append((measures[measure], self.shares[number]))
        overall = {
            measure: sum(value * share for value, share in values) / sum(s for _, s in values)
            for measure, values in means.items()
            if values
        }
        return overall | found

    @property
    def num_batches(self) -> int:
        """Of the whole training, for weights with a schedule."""
        return self._num_batches

    @num_batches.setter
    def num_batches(self, number: int) -> None:
        self._num_batches = number
        for task in self.tasks:
            if isinstance(task, ClickTask):
                task.num_batches = number


class MultiTaskLoop(Loop):
    """The loop over batches of one task each."""

    def _plan(self) -> BatchPlan:
        assert isinstance(self.task, MultiTask)
        tasks = self.task
        own = [int(s) for s in np.random.SeedSequence(self.seed).generate_state(len(tasks.tasks))]
        return MultiTaskPlan(
            num_rows=tasks.num_rows,
            batch_size=self.stage.batch_size,
            num_epochs=self.stage.num_epochs,
            seed=self.seed,
            accumulation=self.stage.accumulation,
            fixed_steps=self.stage.num_steps,
            plans=tuple(
                BatchPlan(
                    num_rows=task.num_rows,
                    batch_size=self.stage.batch_size,
                    num_epochs=1,
                    seed=seed,
                    first_row=task.first_row,
                    lengths=task.lengths,
                    block_rows=task.block_rows,
                )
                for task, seed in zip(tasks.tasks, own, strict=True)
            ),
            shares=tuple(tasks.shares),
            offsets=tuple(tasks.offsets.tolist()),
        )

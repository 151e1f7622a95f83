"""A training stage as a value: what is trained, on what, towards what, from where."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch

from driftline.platform.artefacts import hash_file, hash_value
from driftline.platform.examples import hash_examples
from driftline.platform.inputs import ClickInputs, open_inputs
from driftline.platform.kinds import foreign_code
from driftline.platform.models.spec import ModelSpec, parse_spec
from driftline.platform.multi_task import TaskExamples, check_tasks
from driftline.platform.settings import ObjectiveSettings, StageSettings
from driftline.platform.stage_teacher import FrozenTeacher, fingerprint
from driftline.platform.tasks import StopOn
from driftline.platform.teacher_features import TeacherFeatures

FORMAT: Final = 1  # raise when the same job would give other weights
PATHS: Final = ("examples", "output", "checkpoints", "validation", "texts", "vectors", "features")


@dataclass(frozen=True)
class StageJob:
    """One stage: what is trained, on what, towards what, from where, into which file."""

    name: str
    model: ModelSpec
    task: Literal["mlm", "mlm_distil", "clicks"]
    examples: Path
    output: Path
    """Weights, safetensors; beside it ``OUTPUT.json`` with the result. An ``mlm`` or ``mlm_distil``
    stage writes the encoder's weights only. Projections of matches are never written."""
    checkpoints: Path
    """Folder of its own; removed when the stage is done."""
    stage: StageSettings
    seed: int
    validation: Path | None = None
    """Example file for early stopping; without one the last weights count as the best."""
    texts: Path | None = None
    vectors: Path | None = None
    objective: ObjectiveSettings | None = None
    """None learns from clicks alone."""
    initial: tuple[Path, ...] = ()
    """Weights to start from, later files win; each may hold a part of the model."""
    stop_on: StopOn = "loss"
    trainable: Literal["all", "head"] = "all"
    teacher: FrozenTeacher | None = None
    """For matches, and for ``mlm_distil``, whose teacher is a language model with its head. With
    weights it runs beside a student that reads the same tokens; without it says what the
    ``features`` are of."""
    features: Path | None = None
    """Folder of the teacher's stored tensors (``TeacherFeatures``), to which the examples' column
    ``teacher_rows`` points."""
    label_teacher: str | None = None
    """Hash of the teacher that gave the soft labels. The features must be of the same; without a
    hash, the logits stored beside the features must equal the soft labels."""
    keep_head: bool = False
    """A language stage writes its prediction head too (``predictor.*``), so that it can teach."""
    tasks: tuple[TaskExamples, ...] = ()
    """Further outcomes, learned by the same arms and fusion layers; the job's own examples are
    those of the first task, ``click``."""
    tau: float = 1.0
    """A batch is of a task with a probability proportional to (number of its rows)^tau."""

    def __post_init__(self) -> None:
        if self.task == "mlm" and (self.objective, self.stop_on, self.trainable) != (
            None,
            "loss",
            "all",
        ):
            raise ValueError(
                f"stage {self.name}: an mlm stage has no objective, stops on 'loss' and trains "
                f"'all', got {self.objective}, {self.stop_on!r}, {self.trainable!r}"
            )
        if self.tasks:
            self._check_tasks()
        if self.task == "mlm_distil":
            self._check_language_distillation()
        elif self.task == "clicks":
            self._check_clicks()
        if self.features is not None and not self._matches:
            raise ValueError(
                f"stage {self.name}: features are what matches compare with, but the objective has "
                "no match; leave out the features"
            )

    def _check_tasks(self) -> None:
        if self.task != "clicks" or self.teacher is not None:
            raise ValueError(
                f"stage {self.name}: several tasks need task 'clicks' and stored soft labels, got "
                f"{self.task!r}{'' if self.teacher is None else ' and a live teacher'}"
            )
        try:
            check_tasks(self.tasks, self.objective, tau=self.tau)
        except ValueError as error:
            raise ValueError(f"stage {self.name}: {error}") from error

    def _check_language_distillation(self) -> None:
        if self.objective is None or self.teacher is None or not self.teacher.weights:
            raise ValueError(
                f"stage {self.name}: an mlm_distil stage needs an objective (preset: thesis) and a "
                "teacher with weights, the output of an mlm stage with keep_head"
            )
        if self.trainable != "all" or self.stop_on == "auc" or self.features is not None:
            raise ValueError(
                f"stage {self.name}: an mlm_distil stage trains 'all', stops on 'loss' or "
                f"'soft_loss' and runs its teacher live, got trainable {self.trainable!r}, stop_on "
                f"{self.stop_on!r}, features {self.features}"
            )
        self.objective.check_task("tokens")

    def _check_clicks(self) -> None:
        if self.keep_head:
            raise ValueError(
                f"stage {self.name}: keep_head is of masked-language stages, not of clicks"
            )
        if self.objective is not None:
            self.objective.check_task("clicks")
        if self._matches and (self.teacher is None or not (self.teacher.weights or self.features)):
            raise ValueError(
                f"stage {self.name}: matches need a teacher: its shape and either features (a "
                "folder of its stored tensors) or weights, to run it beside the student"
            )
        if self.teacher is not None and (
            self.objective is None or not self.objective.needs_teacher
        ):
            raise ValueError(
                f"stage {self.name}: a teacher is given, but nothing is learned from it; give an "
                "objective with soft labels or matches, or leave it out"
            )

    @property
    def _matches(self) -> bool:
        return self.objective is not None and bool(self.objective.matches)

    def identity(self) -> str:
        """Hash of everything that decides the result, contents of the files included.

        Raises:
            ContractError: the examples or the teacher's features cannot be read.
        """
        examples = hash_file if self.features is None else hash_examples
        files = [
            *((examples, path) for path in (self.examples, self.validation)),
            *((hash_file, path) for path in (self.texts, self.vectors, *self.initial)),
        ]
        code = foreign_code([self.objective, self.stage, [task.objective for task in self.tasks]])
        return hash_value(
            ({"code": code} if code else {})
            | {
                "format": FORMAT,
                "torch": torch.__version__,
                "model": self.model.model_dump(mode="json"),
                "task": self.task,
                "files": [path and hash_of(path) for hash_of, path in files],
                "objective": self.objective and self.objective.model_dump(mode="json"),
                "stage": self.stage.model_dump(mode="json"),
                "stop_on": self.stop_on,
                "seed": self.seed,
                "trainable": self.trainable,
                "teacher": self.teacher and self.teacher.identity(),
                "features": self._fingerprint(),
                "keep_head": self.keep_head,
                "tasks": [task.identity() for task in self.tasks],
                "tau": self.tau if self.tasks else None,
            }
        )

    def _fingerprint(self) -> list[str] | None:
        """Of the stored tensors that the rows point to."""
        if self.features is None:
            return None
        store = TeacherFeatures.open(self.features)
        found = []
        for path in (self.examples, self.validation):
            rows = None if path is None else self.open(path).teacher_rows
            if rows is not None:
                found.append(fingerprint(store, rows))
        return found

    def open(self, examples: Path) -> ClickInputs:
        """Map an example file for the stage's model; see ``open_inputs``."""
        return open_inputs(self.model, examples, texts=self.texts, vectors=self.vectors)

    def to_json(self) -> dict[str, Any]:
        """Plain values with absolute paths, for a worker elsewhere; inverse of ``from_json``."""
        raw = asdict(self) | {
            "model": self.model.model_dump(mode="json"),
            "stage": self.stage.model_dump(mode="json"),
            "objective": self.objective and self.objective.model_dump(mode="json"),
            "initial": [str(path.absolute()) for path in self.initial],
            "teacher": self.teacher and self.teacher.to_json(),
            "tasks": [task.to_json() for task in self.tasks],
        }
        for name in PATHS:
            raw[name] = raw[name] and str(raw[name].absolute())
        return raw

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "StageJob":
        """Read what ``to_json`` gave."""
        objective = raw["objective"]
        values = dict(raw) | {
            "model": parse_spec(raw["model"]),
            "stage": StageSettings.model_validate(raw["stage"]),
            "objective": objective and ObjectiveSettings.model_validate(objective),
            "initial": tuple(Path(path) for path in raw["initial"]),
            "teacher": raw["teacher"] and FrozenTeacher.from_json(raw["teacher"]),
            "tasks": tuple(TaskExamples.from_json(task) for task in raw["tasks"]),
            **{name: raw[name] and Path(raw[name]) for name in PATHS},
        }
        return cls(**values)


@dataclass(frozen=True)
class StageResult:
    """What came of a stage."""

    metric: str
    """What the stage was stopped on."""
    best: float | None
    """Its best value on the validation rows; None without any."""
    best_step: int
    num_steps: int
    num_rows: int
    """Rows seen, each as often as it was seen."""
    seconds: float
    core_seconds: float
    """Processor time of all workers and their threads."""
    history: tuple[dict[str, float], ...]
    """One entry an evaluation: step, epoch, train_loss and the validation measures."""
    num_tokens: int = 0
    """Tokens that the encoders of all workers were trained on, padding included."""
    train_seconds: float = 0.0
    """Of one worker, without evaluations and checkpoints."""

    @property
    def rows_per_second(self) -> float:
        """Throughput of training, all workers together."""
        return self.num_rows / self.train_seconds if self.train_seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Throughput of training, all workers together; 0 for a model without an encoder."""
        return self.num_tokens / self.train_seconds if self.train_seconds else 0.0

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "StageResult":
        """Read what stands beside the weights."""
        return cls(**{**raw, "history": tuple(raw["history"])})

"""A training stage as a value, and how to run one in this process.

The same job gives the same weights, whether it runs at once, is killed and called again, or has
been done before (then nothing runs).
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor, nn

from driftline.platform.artefacts import hash_file, hash_value, read_json, write_json
from driftline.platform.checkpoints import CheckpointFolder, load_weights, save_weights, whole_state
from driftline.platform.devices import choose_device
from driftline.platform.distillation.row_matching import RowMatching
from driftline.platform.distillation.token_distillation import TokenDistilTask
from driftline.platform.distillation.token_models import TokenModel, language_teacher, load_head
from driftline.platform.errors import ContractError, EmptyWindowError, SettingsError
from driftline.platform.examples import open_tokens
from driftline.platform.inputs import ClickInputs, open_inputs
from driftline.platform.masked_language import MlmTask, encoders_of, masked_language_model
from driftline.platform.models.build import build_model
from driftline.platform.models.spec import ModelSpec, parse_spec
from driftline.platform.settings import ObjectiveSettings, StageSettings
from driftline.platform.sharding import place
from driftline.platform.stage_teacher import FrozenTeacher, match_rows
from driftline.platform.tasks import ClickTask, StopOn, Task, Workers
from driftline.platform.teacher_features import TeacherFeatures
from driftline.platform.training import Loop, Progress, Progression, Report

logger = logging.getLogger(__name__)

FORMAT: Final = 1  # raise when the same job would give other weights
LANGUAGE_TASKS: Final = ("mlm", "mlm_distil")
MLM_PARTS: Final = ("encoder.", "arms.")
HEAD: Final = "predictor."
PROJECTIONS: Final = "projections."
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
        if self.task == "mlm_distil":
            self._check_language_distillation()
        elif self.task == "clicks":
            self._check_clicks()
        if self.features is not None and not self._matches:
            raise ValueError(
                f"stage {self.name}: features are what matches compare with, but the objective has "
                "no match; leave out the features"
            )

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
        files = (self.examples, self.validation, self.texts, self.vectors, *self.initial)
        return hash_value(
            {
                "format": FORMAT,
                "torch": torch.__version__,
                "model": self.model.model_dump(mode="json"),
                "task": self.task,
                "files": [hash_file(path) if path is not None else None for path in files],
                "objective": self.objective and self.objective.model_dump(mode="json"),
                "stage": self.stage.model_dump(mode="json"),
                "stop_on": self.stop_on,
                "seed": self.seed,
                "trainable": self.trainable,
                "teacher": self.teacher and self.teacher.identity(),
                "features": self._fingerprint(),
                "keep_head": self.keep_head,
            }
        )

    def _fingerprint(self) -> list[str] | None:
        """Of the stored tensors that the rows point to."""
        if self.features is None:
            return None
        store = TeacherFeatures.open(self.features)
        found = []
        for path in (self.examples, self.validation):
            rows = None if path is None else _open(self, path).teacher_rows
            if rows is not None:
                found.append(store.fingerprint(rows))
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain values with absolute paths, for a worker elsewhere; inverse of ``from_json``."""
        raw = asdict(self) | {
            "model": self.model.model_dump(mode="json"),
            "stage": self.stage.model_dump(mode="json"),
            "objective": self.objective and self.objective.model_dump(mode="json"),
            "initial": [str(path.absolute()) for path in self.initial],
            "teacher": self.teacher and self.teacher.to_json(),
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


def run_stage(
    job: StageJob,
    *,
    report: Report | None = None,
    rank: int = 0,
    world_size: int = 1,
    progress: Progress | None = None,
) -> StageResult:
    """Train in this process, as one of ``world_size`` workers.

    Resumes from the job's checkpoints. A job that has been done gives its result at once.

    Raises:
        EmptyWindowError: the example file holds no row.
        ContractError: an input file does not fit the model.
        BundleError: initial weights do not fit the model.
        SettingsError: a match is impossible between the student and its teacher, or the two do not
            share the tokeniser that the stage needs.
        TrainingError: the loss is no longer a number.
    """
    identity = job.identity()
    done = _finished(job, identity)
    if done is not None:
        return done
    workers = Workers(rank, world_size)
    device = choose_device()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(job.seed)
        model = build_model(job.model)
        load_weights(model, *job.initial)
        trained = _trained(job, model)
        task = _make_task(job, trained, workers, device)
        _freeze(model, job)
        loop = Loop(
            model=place(trained, job.stage, device=device),
            task=task,
            rates=_projection_rates(task),
            stage=job.stage,
            seed=job.seed,
            folder=CheckpointFolder(job.checkpoints, identity),
            workers=workers,
            report=report,
            progress=progress if rank == 0 else None,
        )
        if isinstance(task, ClickTask | TokenDistilTask):
            task.num_batches = loop.num_batches
        now = loop.run()
    spent = workers.all_sum(np.array([now.core_seconds, float(now.num_tokens)]), device)
    now.num_tokens = int(spent[1])
    result = _to_result(job, loop.task, now, core_seconds=float(spent[0]))
    weights = whole_state(model, keep=rank == 0)
    if job.keep_head:
        head = whole_state(trained.get_submodule("predictor"), keep=rank == 0)
        weights |= {f"{HEAD}{name}": value for name, value in head.items()}
    if rank == 0:
        _write(job, weights, result, identity)
    workers.all_sum(np.zeros(1), device)  # nobody returns before the result is on disk
    return result


def _trained(job: StageJob, model: nn.Module) -> nn.Module:
    """The model, or its encoders under a prediction head (a former one, where weights hold it)."""
    if job.task not in LANGUAGE_TASKS:
        return model
    distils = job.task == "mlm_distil"
    trained = TokenModel(encoders_of(model)) if distils else masked_language_model(model)
    load_head(trained, job.initial)
    return trained


def _make_task(job: StageJob, model: nn.Module, workers: Workers, device: torch.device) -> Task:
    """What is learned; puts the projections of matches into the model."""
    if job.task in LANGUAGE_TASKS:
        return _language_task(job, model, workers, device)
    train = _open(job, job.examples)
    validation = _open(job, job.validation) if job.validation is not None else None
    _refuse_empty(job, train.num_rows)
    _check_labels(job, train)
    return ClickTask(
        train,
        validation,
        objective=job.objective,
        stop_on=job.stop_on,
        workers=workers,
        seed=job.seed,
        max_rows=job.stage.max_rows,
        matching=_row_matching(job, model, train, validation, device),
    )


def _language_task(
    job: StageJob, model: nn.Module, workers: Workers, device: torch.device
) -> MlmTask:
    train = open_tokens(job.examples)
    validation = open_tokens(job.validation) if job.validation is not None else None
    _refuse_empty(job, len(train))
    if job.task == "mlm":
        return MlmTask(
            job.model,
            train,
            validation,
            workers=workers,
            seed=job.seed,
            max_rows=job.stage.max_rows,
        )
    assert isinstance(model, TokenModel)
    assert job.objective is not None
    assert job.teacher is not None
    with torch.random.fork_rng(devices=[]):
        teacher = language_teacher(job.teacher.model, job.teacher.weights)
    task = TokenDistilTask(
        job.model,
        model,
        (job.teacher.model, teacher),
        objective=job.objective,
        train=train,
        validation=validation,
        workers=workers,
        seed=job.seed,
        device=device,
        stop_on=job.stop_on,
        max_rows=job.stage.max_rows,
    )
    if len(task.matching.projections):
        _refuse_sharding(job)
    return task


def _row_matching(
    job: StageJob,
    model: nn.Module,
    train: ClickInputs,
    validation: ClickInputs | None,
    device: torch.device,
) -> RowMatching | None:
    if job.teacher is None:
        return None
    assert job.objective is not None
    try:
        found = match_rows(
            model.to(device),
            job.model,
            job.objective,
            teacher=job.teacher,
            features=job.features,
            label_teacher=job.label_teacher,
            inputs=(train,) if validation is None else (train, validation),
            device=device,
        )
    except SettingsError as error:
        raise SettingsError(f"stage {job.name}: {error}") from error
    if len(found.matching.projections):
        _refuse_sharding(job)
        model.projections = found.matching.projections
    return found


def _refuse_sharding(job: StageJob) -> None:
    if job.stage.sharding == "fsdp":
        raise SettingsError(
            f"stage {job.name}: projections of matches cannot be sharded; set sharding to 'off', or "
            "match layers of equal width"
        )


def _projection_rates(task: Task) -> dict[str, float]:
    """Learning rates of projections that have their own, by the prefix of their parameters."""
    matching = None
    if isinstance(task, TokenDistilTask):
        matching = task.matching
    elif isinstance(task, ClickTask) and task.matching is not None:
        matching = task.matching.matching
    rates = matching.rates if matching is not None else {}
    return {f"{PROJECTIONS}{name}.": rate for name, rate in rates.items()}


def _refuse_empty(job: StageJob, num_rows: int) -> None:
    if num_rows == 0:
        raise EmptyWindowError(f"stage {job.name}: {job.examples} holds no row to learn from")


def _check_labels(job: StageJob, train: ClickInputs) -> None:
    """Soft labels that count must be there; from a live teacher they come with each batch."""
    is_live = job.teacher is not None and bool(job.teacher.weights) and job.features is None
    if job.objective is None or not job.objective.needs_soft_labels or is_live:
        return
    if train.teacher_logits is None or np.isnan(train.teacher_logits).all():
        raise ContractError(
            f"stage {job.name}: the objective weighs soft labels, but {job.examples} has none "
            "(column teacher_logits); label its rows with the teacher first, or set alpha to 0"
        )


def _open(job: StageJob, examples: Path) -> ClickInputs:
    return open_inputs(job.model, examples, texts=job.texts, vectors=job.vectors)


def _freeze(model: nn.Module, job: StageJob) -> None:
    if job.trainable == "head":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(("head.", PROJECTIONS)))


def _to_result(job: StageJob, task: Task, now: Progression, *, core_seconds: float) -> StageResult:
    result = StageResult(
        metric=task.stop_on,
        best=now.best,
        best_step=now.best_step,
        num_steps=now.step,
        num_rows=now.num_rows,
        seconds=now.seconds,
        core_seconds=core_seconds,
        history=tuple(now.history),
        num_tokens=now.num_tokens,
        train_seconds=now.train_seconds,
    )
    logger.info(
        "stage %s: %d steps, %d rows, %.1f s, %.0f rows/s, %.0f tokens/s, best %s %s at step %d",
        job.name,
        result.num_steps,
        result.num_rows,
        result.seconds,
        result.rows_per_second,
        result.tokens_per_second,
        result.metric,
        "-" if result.best is None else f"{result.best:.5f}",
        result.best_step,
    )
    return result


def _result_path(job: StageJob) -> Path:
    return job.output.with_name(f"{job.output.name}.json")


def _finished(job: StageJob, identity: str) -> StageResult | None:
    if not (job.output.exists() and _result_path(job).exists()):
        return None
    raw = read_json(_result_path(job))
    if raw["job"] != identity or raw["weights"] != hash_file(job.output):
        return None
    logger.info("stage %s: done before, nothing to do", job.name)
    return StageResult.from_json(raw["result"])


def _write(
    job: StageJob, weights: Mapping[str, Tensor], result: StageResult, identity: str
) -> None:
    if job.task in LANGUAGE_TASKS:
        kept = (*MLM_PARTS, HEAD) if job.keep_head else MLM_PARTS
        weights = {name: value for name, value in weights.items() if name.startswith(kept)}
    weights = {n: value for n, value in weights.items() if not n.startswith(PROJECTIONS)}
    save_weights(job.output, weights)
    record = {"job": identity, "weights": hash_file(job.output), "result": asdict(result)}
    write_json(_result_path(job), record)
    CheckpointFolder(job.checkpoints, identity).clear()

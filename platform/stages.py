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
from driftline.platform.errors import EmptyWindowError
from driftline.platform.examples import open_tokens
from driftline.platform.inputs import ClickInputs, open_inputs
from driftline.platform.masked_language import MlmTask, masked_language_model
from driftline.platform.models.build import build_model
from driftline.platform.models.spec import ModelSpec, parse_spec
from driftline.platform.settings import ObjectiveSettings, StageSettings
from driftline.platform.sharding import place
from driftline.platform.tasks import ClickTask, StopOn, Task, Workers
from driftline.platform.training import Loop, Progress, Progression, Report

logger = logging.getLogger(__name__)

FORMAT: Final = 1  # raise when the same job would give other weights
MLM_PARTS: Final = ("encoder.", "arms.")
PATHS: Final = ("examples", "output", "checkpoints", "validation", "texts", "vectors")


@dataclass(frozen=True)
class StageJob:
    """One stage: what is trained, on what, towards what, from where, into which file."""

    name: str
    model: ModelSpec
    task: Literal["mlm", "clicks"]
    examples: Path
    output: Path
    """Weights, safetensors; beside it ``OUTPUT.json`` with the result. An ``mlm`` stage writes
    the encoder's weights only."""
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

    def identity(self) -> str:
        """Hash of everything that decides the result, contents of the files included."""
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
            }
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values with absolute paths, for a worker elsewhere; inverse of ``from_json``."""
        raw = asdict(self) | {
            "model": self.model.model_dump(mode="json"),
            "stage": self.stage.model_dump(mode="json"),
            "objective": self.objective and self.objective.model_dump(mode="json"),
            "initial": [str(path.absolute()) for path in self.initial],
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
        trained = masked_language_model(model) if job.task == "mlm" else model
        _freeze(model, job)
        loop = Loop(
            model=place(trained, job.stage, device=device),
            task=_make_task(job, workers),
            stage=job.stage,
            seed=job.seed,
            folder=CheckpointFolder(job.checkpoints, identity),
            workers=workers,
            report=report,
            progress=progress if rank == 0 else None,
        )
        now = loop.run()
    spent = workers.all_sum(np.array([now.core_seconds, float(now.num_tokens)]), device)
    now.num_tokens = int(spent[1])
    result = _to_result(job, loop.task, now, core_seconds=float(spent[0]))
    weights = whole_state(model, keep=rank == 0)
    if rank == 0:
        _write(job, weights, result, identity)
    workers.all_sum(np.zeros(1), device)  # nobody returns before the result is on disk
    return result


def _make_task(job: StageJob, workers: Workers) -> Task:
    if job.task == "mlm":
        validation = open_tokens(job.validation) if job.validation is not None else None
        task: Task = MlmTask(
            job.model,
            open_tokens(job.examples),
            validation,
            workers=workers,
            seed=job.seed,
            max_rows=job.stage.max_rows,
        )
    else:
        task = ClickTask(
            _open(job, job.examples),
            _open(job, job.validation) if job.validation is not None else None,
            objective=job.objective,
            stop_on=job.stop_on,
            workers=workers,
            seed=job.seed,
            max_rows=job.stage.max_rows,
        )
    if task.num_rows == 0:
        raise EmptyWindowError(f"stage {job.name}: {job.examples} holds no row to learn from")
    return task


def _open(job: StageJob, examples: Path) -> ClickInputs:
    return open_inputs(job.model, examples, texts=job.texts, vectors=job.vectors)


def _freeze(model: nn.Module, job: StageJob) -> None:
    if job.trainable == "head":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("head."))


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
    if job.task == "mlm":
        weights = {name: value for name, value in weights.items() if name.startswith(MLM_PARTS)}
    save_weights(job.output, weights)
    record = {"job": identity, "weights": hash_file(job.output), "result": asdict(result)}
    write_json(_result_path(job), record)
    CheckpointFolder(job.checkpoints, identity).clear()

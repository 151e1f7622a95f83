"""How to run one training stage in this process.

The same job gives the same weights, whether it runs at once, is killed and called again, or has
been done before (then nothing runs).
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from driftline.platform.artefacts import hash_file, read_json, write_json
from driftline.platform.checkpoints import CheckpointFolder, load_weights, save_weights, whole_state
from driftline.platform.devices import choose_device
from driftline.platform.distillation.token_distillation import TokenDistilTask
from driftline.platform.models.build import build_model
from driftline.platform.multi_task import MultiTask, MultiTaskLoop, add_tasks
from driftline.platform.sharding import place
from driftline.platform.stage_job import StageJob, StageResult
from driftline.platform.stage_tasks import (
    LANGUAGE_TASKS,
    PROJECTIONS,
    freeze,
    make_task,
    projection_rates,
    trained_model,
)
from driftline.platform.tasks import ClickTask, Task, Workers
from driftline.platform.training import Loop, Progress, Progression, Report

__all__ = ["StageJob", "StageResult", "run_stage"]

logger = logging.getLogger(__name__)

MLM_PARTS: Final = ("encoder.", "arms.")
HEAD: Final = "predictor."


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
        if job.tasks:
            add_tasks(model, [task.name for task in job.tasks])
        load_weights(model, *job.initial)
        trained = trained_model(job, model)
        task = make_task(job, trained, workers, device)
        freeze(model, job)
        loop = (MultiTaskLoop if job.tasks else Loop)(
            model=place(trained, job.stage, device=device),
            task=task,
            rates=projection_rates(task),
            stage=job.stage,
            seed=job.seed,
            folder=CheckpointFolder(job.checkpoints, identity),
            workers=workers,
            report=report,
            progress=progress if rank == 0 else None,
        )
        if isinstance(task, ClickTask | TokenDistilTask | MultiTask):
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

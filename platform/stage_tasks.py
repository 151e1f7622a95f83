"""From a stage's job to what its loop trains and learns; whatever does not fit is refused here."""

from dataclasses import replace
from typing import Final

import numpy as np
import torch
from torch import nn

from driftline.platform.distillation.row_matching import RowMatching
from driftline.platform.distillation.token_distillation import TokenDistilTask
from driftline.platform.distillation.token_models import TokenModel, language_teacher, load_head
from driftline.platform.errors import ContractError, EmptyWindowError, SettingsError
from driftline.platform.examples import open_tokens
from driftline.platform.inputs import ClickInputs
from driftline.platform.masked_language import MlmTask, encoders_of, masked_language_model
from driftline.platform.multi_task import FIRST_TASK, MultiTask
from driftline.platform.stage_job import StageJob
from driftline.platform.stage_teacher import match_rows
from driftline.platform.tasks import ClickTask, Task, Workers

LANGUAGE_TASKS: Final = ("mlm", "mlm_distil")
PROJECTIONS: Final = "projections."


def trained_model(job: StageJob, model: nn.Module) -> nn.Module:
    """The model, or its encoders under a prediction head (a former one, where weights hold it)."""
    if job.task not in LANGUAGE_TASKS:
        return model
    distils = job.task == "mlm_distil"
    trained = TokenModel(encoders_of(model)) if distils else masked_language_model(model)
    load_head(trained, job.initial)
    return trained


def make_task(job: StageJob, model: nn.Module, workers: Workers, device: torch.device) -> Task:
    """What is learned; puts the projections of matches into the model."""
    if job.task in LANGUAGE_TASKS:
        return _language_task(job, model, workers, device)
    first = _click_task(job, model, workers, device)
    if not job.tasks:
        return first
    others = {
        task.name: replace(
            job,
            name=f"{job.name}.{task.name}",
            examples=task.examples,
            validation=task.validation,
            objective=task.objective,
            tasks=(),
        )
        for task in job.tasks
    }
    tasks = {name: _click_task(one, model, workers, device) for name, one in others.items()}
    return MultiTask({FIRST_TASK: first, **tasks}, tau=job.tau)


def _click_task(
    job: StageJob, model: nn.Module, workers: Workers, device: torch.device
) -> ClickTask:
    train = job.open(job.examples)
    validation = job.open(job.validation) if job.validation is not None else None
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
            f"stage {job.name}: projections of matches cannot be sharded; set sharding to 'off', "
            "or match layers of equal width"
        )


def projection_rates(task: Task) -> dict[str, float]:
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


def freeze(model: nn.Module, job: StageJob) -> None:
    """Leave only what the job trains with a gradient."""
    if job.trainable == "head":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(("head.", PROJECTIONS)))

"""The stage of dual training: keyed by its content, resumable, through the one loop (S4.8).

L = L_p + eps (CE of the student + CE of the teacher), each cross-entropy a mean over that model's
own masked positions (papers.md A4.4). The best weights are those with the smallest loss of the
*student* on held-out texts; the teacher is a means.
"""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from driftline.platform.artefacts import hash_file, hash_value, read_json, write_json
from driftline.platform.batching import Rows, by_length
from driftline.platform.checkpoints import CheckpointFolder, save_weights
from driftline.platform.devices import choose_device
from driftline.platform.errors import EmptyWindowError, SettingsError
from driftline.platform.masked_language import EVALUATION_STEP, MAX_EVALUATION_TEXTS
from driftline.platform.models.spec import EncoderSpec, ModelSpec, TeacherSpec, TwinSpec
from driftline.platform.models.student import AD, PAGE
from driftline.platform.stages import StageResult
from driftline.platform.tasks import INFERENCE_TOKENS, StopOn, Workers, pick_rows
from driftline.platform.training import Loop, Progress, Progression, Report
from driftline.platform.vocabulary.dual_model import DualModel, DualOutput, student_encoders
from driftline.platform.vocabulary.export import student_weights
from driftline.platform.vocabulary.shared_projections import student_norm
from driftline.platform.vocabulary.start import DualVocabulary
from driftline.platform.vocabulary.views import ViewMaker, Views, share_of
from driftline.platform.vocabulary.words import WordTexts

logger = logging.getLogger(__name__)

BERT: Final = "bert"
FORMAT: Final = 1  # raise when the same job would give other weights


def check_models(
    student: ModelSpec, teacher: TeacherSpec | None, *, recipe: DualVocabulary
) -> None:
    """Make sure that a student can be trained beside a teacher, before anything is.

    Raises:
        ValueError: the student has no encoder.
        SettingsError: it has the weights of a checkpoint; widths, depths, vocabularies or
            architectures do not fit.
    """
    own, _ = student_encoders(student)
    if own.checkpoint is not None:
        raise SettingsError(
            f"init dual_vocabulary trains a student's encoder from noise, in a vocabulary of its "
            f"own; the checkpoint {own.checkpoint} has weights and a vocabulary; use an encoder of "
            "kind 'config'"
        )
    _check_heads("student", own)
    if teacher is None:
        return
    theirs = teacher.encoder
    if own.vocabulary_size >= theirs.vocabulary_size:
        raise SettingsError(
            f"init dual_vocabulary needs a student with a smaller vocabulary than the teacher's "
            f"{theirs.vocabulary_size} pieces, got {own.vocabulary_size}; set "
            "student.vocabulary_size below that"
        )
    if not recipe.has_teacher:
        return
    _check_heads("teacher", theirs)
    recipe.layers(own.num_layers, theirs.num_layers)
    kind = (theirs.architecture or {}).get("model_type", BERT)
    if recipe.direction is not None and kind != BERT:
        raise SettingsError(
            f"shared projections pair the weights of two BERT encoders, the teacher is a {kind!r}; "
            "use variant 'dual'"
        )


def _check_heads(whose: str, spec: EncoderSpec) -> None:
    if spec.hidden_size % spec.num_heads:
        raise SettingsError(
            f"the {whose}'s hidden_size {spec.hidden_size} must be a multiple of its "
            f"{spec.num_heads} attention heads"
        )


@dataclass(frozen=True)
class DualJob:
    """One dual training: which student, beside which teacher, on which texts."""

    name: str
    student: ModelSpec
    teacher: TeacherSpec | None
    """None exactly for the variant without one."""
    recipe: DualVocabulary
    corpus: Path
    """Texts to learn from, a file of ``WordTexts``."""
    held_out: Path | None
    """Texts to be judged by; without them the last weights count as the best."""
    start: Path | None
    """Weights that hold the teacher's ``encoder.*``; noise when not given. Only read."""
    seed: int

    def __post_init__(self) -> None:
        if (self.teacher is not None) != self.recipe.has_teacher:
            raise ValueError(
                f"stage {self.name}: variant {self.recipe.variant!r} needs "
                f"{'a' if self.recipe.has_teacher else 'no'} teacher"
            )
        check_models(self.student, self.teacher, recipe=self.recipe)

    def identity(self) -> str:
        """Hash of everything that decides the result, contents of the files included."""
        files = (self.corpus, self.held_out, self.start)
        return hash_value(
            {
                "format": FORMAT,
                "torch": torch.__version__,
                "student": student_encoders(self.student)[0].model_dump(mode="json"),
                "num_encoders": student_encoders(self.student)[1],
                "kind": self.student.kind,
                "teacher": self.teacher and self.teacher.model_dump(mode="json"),
                "recipe": self.recipe.model_dump(mode="json"),
                "files": [hash_file(path) if path is not None else None for path in files],
                "seed": self.seed,
            }
        )


class DualTask:
    """Masked words for both models, and L_p; see ``Task``.

    A twin student reads each text as page or as ad, by chance, as in ``MlmTask``.
    """

    stop_on: StopOn = "loss"
    block_rows = 1

    def __init__(self, job: DualJob, *, workers: Workers) -> None:
        self.workers = workers
        self.seed = job.seed
        self.recipe = job.recipe
        self.roles = roles_of(job.student)
        train = WordTexts.open(job.corpus)
        held_out = WordTexts.open(job.held_out) if job.held_out is not None else None
        max_rows = job.recipe.stage.max_rows
        self.num_rows = min(len(train), max_rows or len(train))
        self.first_row = len(train) - self.num_rows
        self.lengths: NDArray[np.int64] | None = train.num_pieces
        self.evaluated = pick_rows(
            len(held_out) if held_out is not None else 0, limit=MAX_EVALUATION_TEXTS, seed=job.seed
        )
        self._train = _maker(job, train)
        self._held_out = _maker(job, held_out) if held_out is not None else None
        self._held_out_lengths = held_out.num_pieces if held_out is not None else None

    def loss(self, model: nn.Module, rows: Rows, *, step: int, device: torch.device) -> Tensor:
        """See ``Task``."""
        parts, num_masked = self._parts(self._train, rows, step=step)
        output: DualOutput = model([part.to(device) for part in parts])
        entropy = output.student.losses.sum() / max(1, num_masked[0])
        if output.teacher is not None:
            entropy = entropy + output.teacher.losses.sum() / max(1, num_masked[1])
        weight = self.recipe.cross_entropy_weight * self.workers.world_size
        return output.projection + weight * entropy

    def evaluate(self, model: nn.Module, *, device: torch.device) -> dict[str, float]:
        """Loss and masked-word accuracy of both models on held-out texts (papers.md S4.11).

        Also L_p and the norm of the student's weights, which falls when L_p down collapses.
        """
        assert isinstance(model, DualModel)
        if self._held_out is None or not len(self.evaluated):
            return {}
        assert self._held_out_lengths is not None
        totals = np.zeros((2, 3))
        lengths = self._held_out_lengths[self.evaluated]
        batches = by_length(lengths, max_tokens=INFERENCE_TOKENS, width=3)
        for number, places in enumerate(batches):
            rows = self.evaluated[places]
            parts, _ = self._parts(self._held_out, rows, step=EVALUATION_STEP + number)
            output = model([part.to(device) for part in parts])
            for total, found in zip(totals, (output.student, output.teacher), strict=True):
                if found is not None:
                    losses, hits = float(found.losses.sum()), float(found.hits.sum())
                    total += (losses, hits, len(found.hits))
        totals = self.workers.all_sum(totals, device)
        measures = _measures(totals[0], "")
        if model.teacher is not None:
            measures |= _measures(totals[1], "teacher_")
        if model.projections is not None:
            measures["projection_loss"] = float(output.projection)
            measures["student_norm"] = float(student_norm(model.pairs(0)))
        return measures

    def _parts(self, maker: ViewMaker, rows: Rows, *, step: int) -> tuple[list[Views], list[int]]:
        """This worker's views for each encoder of the student; masked positions of all workers."""
        role_B = np.random.default_rng((self.seed, step)).integers(len(self.roles), size=len(rows))
        parts, num_masked = [], [0, 0]
        for number, role in enumerate(self.roles):
            chosen = rows[role_B == number]
            chosen = chosen if len(chosen) else np.array([-1])
            views = maker.draw(chosen, role=role, seed=(self.seed, step, number))
            num_masked[0] += len(views.student[2])
            num_masked[1] += len(views.teacher[2]) if views.teacher is not None else 0
            parts.append(self._own(views))
        return parts, num_masked

    def _own(self, views: Views) -> Views:
        rank, world_size = self.workers.rank, self.workers.world_size
        own = share_of(views.student, rank=rank, world_size=world_size)
        if views.teacher is None:
            return Views(own, None)
        return Views(own, share_of(views.teacher, rank=rank, world_size=world_size))


def run_dual(
    job: DualJob,
    *,
    output: Path,
    checkpoints: Path,
    report: Report | None = None,
    rank: int = 0,
    world_size: int = 1,
    progress: Progress | None = None,
) -> StageResult:
    """Train in this process, as one of ``world_size`` workers; writes the student's encoders.

    Resumes from ``checkpoints``; a job that has been done gives its result at once. ``accuracy``
    in the history is that of the student on held-out texts; see ``held_out_measures``.

    Args:
        job: The stage.
        output: Weights, safetensors, ``arms.*`` or ``encoder.*``; beside it ``OUTPUT.json``.
        checkpoints: Folder of its own; removed when the stage is done.
        report: Called with each evaluation.
        rank: This worker.
        world_size: All workers.
        progress: Called with steps done and steps in all.

    Raises:
        EmptyWindowError: there is no text to learn from.
        SettingsError: an encoder is no BERT, as shared projections need it.
        BundleError: ``job.start`` does not fit the teacher.
        TrainingError: the loss is no longer a number.
    """
    identity = job.identity()
    if (done := _finished(output, identity)) is not None:
        logger.info("stage %s: done before, nothing to do", job.name)
        return done
    workers = Workers(rank, world_size)
    task = DualTask(job, workers=workers)
    if task.num_rows == 0:
        raise EmptyWindowError(f"stage {job.name}: {job.corpus} holds no text to learn from")
    device = choose_device()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(job.seed)
        model = DualModel(job.student, job.teacher, recipe=job.recipe)
        if job.start is not None and job.teacher is not None:
            model.load_teacher(job.start)
        loop = Loop(
            model=model.to(device),
            task=task,
            stage=job.recipe.stage,
            seed=job.seed,
            folder=CheckpointFolder(checkpoints, identity),
            workers=workers,
            report=report,
            progress=progress if rank == 0 else None,
        )
        now = loop.run()
    core_seconds = workers.all_sum(np.array([now.core_seconds]), device)
    result = _to_result(now, core_seconds=float(core_seconds[0]))
    if rank == 0:
        save_weights(output, student_weights(model, job.student))
        record = {"job": identity, "weights": hash_file(output), "result": asdict(result)}
        write_json(_result_path(output), record)
        CheckpointFolder(checkpoints, identity).clear()
        logger.info("stage %s: %s", job.name, held_out_measures(result))
    workers.all_sum(np.zeros(1), device)  # nobody returns before the result is on disk
    return result


def held_out_measures(result: StageResult) -> dict[str, float]:
    """Measures of the weights that a dual training kept; ``accuracy`` is the study's (S4.11)."""
    return next((row for row in result.history if row["step"] == result.best_step), {})


def roles_of(student: ModelSpec) -> tuple[int | None, ...]:
    """Roles the student reads texts in; part n of a step belongs to encoder n modulo them."""
    if isinstance(student, TwinSpec):
        return (PAGE, AD) if student.tie_arms else (None, None)
    return (None,)


def _maker(job: DualJob, texts: WordTexts) -> ViewMaker:
    return ViewMaker(
        texts,
        student=student_encoders(job.student)[0],
        teacher=job.teacher.encoder if job.teacher is not None else None,
        student_share=job.recipe.student_share,
    )


def _measures(total: NDArray[np.float64], prefix: str) -> dict[str, float]:
    losses, hits, num_masked = total
    count = max(1.0, num_masked)
    return {f"{prefix}loss": float(losses / count), f"{prefix}accuracy": float(hits / count)}


def _to_result(now: Progression, *, core_seconds: float) -> StageResult:
    return StageResult(
        metric=DualTask.stop_on,
        best=now.best,
        best_step=now.best_step,
        num_steps=now.step,
        num_rows=now.num_rows,
        seconds=now.seconds,
        core_seconds=core_seconds,
        history=tuple(now.history),
    )


def _result_path(output: Path) -> Path:
    return output.with_name(f"{output.name}.json")


def _finished(output: Path, identity: str) -> StageResult | None:
    if not (output.exists() and _result_path(output).exists()):
        return None
    raw: dict[str, Any] = read_json(_result_path(output))
    if raw["job"] != identity or raw["weights"] != hash_file(output):
        return None
    return StageResult.from_json(raw["result"])

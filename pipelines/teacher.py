"""Training a teacher, once, on the stale part of the log."""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from driftline.features.log import ImpressionLog
from driftline.features.texts import known_texts, read_texts
from driftline.pipelines.frozen_teacher import (
    MANIFEST,
    MASKED,
    WEIGHTS,
    Teacher,
    check_frozen,
    teacher_folder,
)
from driftline.pipelines.provenance import code_version
from driftline.pipelines.student_vocabulary import small_tokenizer
from driftline.pipelines.teacher_input import RowSerialiser, TeacherInput, teacher_columns
from driftline.pipelines.training_sets import (
    clicks,
    known_frame,
    newest,
    split_rows,
    with_outcome,
)
from driftline.platform.artefacts import (
    hash_file,
    hash_value,
    whole_directory,
    write_json,
)
from driftline.platform.examples import Ragged, TokenRows, write_tokens
from driftline.platform.models.spec import ModelSpec, TeacherSpec, encoder_spec
from driftline.platform.ray_runtime import fit
from driftline.platform.settings import CheckpointEncoder, DriftlineSettings, StageSettings
from driftline.platform.stages import StageJob, StageResult
from driftline.platform.text import Tokenizer, train_tokenizer
from driftline.platform.windows import HOUR, Window, floor_time, format_time
from driftline.platform.workspace import Workspace, require

logger = logging.getLogger(__name__)

MAX_VALIDATION_ROWS = 4_000


def train_teacher(
    settings: DriftlineSettings,
    *,
    name: str | None = None,
    share: tuple[float, float] = (0, 1),
    label: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Teacher:
    """Tokeniser, MLM, supervised training on OOD rows, frozen (papers.md S0.7).

    A second call with the same settings returns the frozen teacher.

    Args:
        settings: ``teacher`` and ``seed`` say how.
        name: Of a member of the ensemble; the market's first teacher when not given.
        share: Part of the OOD window to learn from; see ``stale_part``.
        label: Outcome to learn; the click when not given.
        progress: Called with steps done and steps in all of a stage.

    Raises:
        FrozenTeacherError: there is a teacher from other settings.
        EmptyWindowError: the part of the window holds no rows, or only one outcome.
    """
    workspace = Workspace.of(settings)
    path = teacher_folder(workspace, name)
    key = teacher_key(settings, share=share, label=label)
    if path.exists():
        teacher = Teacher.open(workspace, name)
        check_frozen(teacher, key)
        logger.info("teacher %s is frozen already", teacher.hash[:12])
        return teacher
    started = time.monotonic()
    window, as_of = stale_part(settings, share)
    frame = with_outcome(known_frame(settings, window, as_of=as_of), label)
    keep_rate = settings.teacher.negative_keep_rate or settings.labels.negative_keep_rate
    max_rows = settings.teacher.supervised.max_rows
    rows = split_rows(settings, frame, max_rows=max_rows, keep_rate=keep_rate)
    validation = newest(rows.validation, MAX_VALIDATION_ROWS)
    reader = _train_reader(settings, rows.train, as_of=as_of)
    if settings.student.vocabulary_size is not None:  # here, so that it fails before hours of work
        small_tokenizer(settings, vocabulary_size=settings.student.vocabulary_size)
    scratch = workspace.scratch / f"teacher-{key}"
    examples, held_out = scratch / "train.arrow", scratch / "validation.arrow"
    write_tokens(examples, TokenRows(Ragged.of(reader.tokens(rows.train)), clicks(rows.train)))
    write_tokens(held_out, TokenRows(Ragged.of(reader.tokens(validation)), clicks(validation)))
    spec = TeacherSpec(
        encoder=encoder_spec(
            settings.teacher.encoder, vocabulary_size=reader.tokenizer.vocabulary_size
        )
    )
    results = []
    initial: tuple[Path, ...] = ()
    masked: Path | None = None
    for job in _stages(settings, spec, examples, held_out, scratch):
        job = replace(job, initial=initial)
        result = fit(
            job, num_workers=settings.ray.teacher_workers, ray=settings.ray, progress=progress
        )
        results.append(result)
        initial = (job.output,)
        masked = job.output if job.task == "mlm" else masked
    with whole_directory(path) as folder:
        (folder / WEIGHTS).write_bytes(initial[0].read_bytes())
        if masked is not None:
            (folder / MASKED).write_bytes(masked.read_bytes())
        manifest = {
            "key": key,
            "weights": hash_file(folder / WEIGHTS),
            "tokenizer": tokenizer_hash(settings),
            "columns": list(reader.serialiser.columns),
            "max_tokens": reader.max_tokens,
            "spec": spec.model_dump(mode="json"),
            "keep_rate": keep_rate,
            **({} if masked is None else {"masked": hash_file(folder / MASKED)}),
            **({} if label is None else {"label": label}),
            "window": [format_time(window.start), format_time(window.end)],
            "num_rows": rows.train.num_rows,
            "seconds": round(time.monotonic() - started, 1),
            "core_seconds": round(sum(r.core_seconds for r in results), 1),
            "stages": [_summary(r) for r in results],
            "code": code_version(),
        }
        write_json(folder / MANIFEST, manifest)
    return Teacher.open(workspace, name)


def stale_part(
    settings: DriftlineSettings, share: tuple[float, float] = (0, 1)
) -> tuple[Window, datetime]:
    """A part of the OOD window, cut at whole hours, and the moment at which it is looked at."""
    ood = ImpressionLog.open(Workspace.of(settings).clean, settings).split.ood
    length = ood.end - ood.start
    start, end = (floor_time(ood.start + part * length, HOUR) for part in share)
    start = max(start, ood.start)
    return Window(start, ood.end if share[1] == 1 else max(start, end)), ood.end


def teacher_input(settings: DriftlineSettings, *, texts: pa.Table | None = None) -> TeacherInput:
    """How rows are written for the teacher of these settings.

    Args:
        settings: ``teacher`` says which columns and how many tokens.
        texts: ``text_id`` and the text features; those of the workspace when not given.
    """
    return TeacherInput(
        serialiser=RowSerialiser(
            teacher_columns(settings), read_texts(settings) if texts is None else texts
        ),
        tokenizer=open_tokenizer(settings),
        max_tokens=settings.teacher.encoder.max_tokens,
    )


def open_tokenizer(settings: DriftlineSettings) -> Tokenizer:
    """The workspace's SentencePiece model, or the tokeniser of the checkpoint in use."""
    encoder = settings.teacher.encoder
    if isinstance(encoder, CheckpointEncoder):
        return Tokenizer(encoder.path)
    return Tokenizer(require(Workspace.of(settings).tokenizer, made_by="teacher CONFIG"))


def _train_reader(settings: DriftlineSettings, train: pa.Table, *, as_of: datetime) -> TeacherInput:
    """Train the tokeniser on the serialised OOD rows and texts, once (papers.md S0.26)."""
    workspace = Workspace.of(settings)
    encoder = settings.teacher.encoder
    if not isinstance(encoder, CheckpointEncoder) and not workspace.tokenizer.exists():
        texts = known_texts(settings, as_of=as_of)
        serialiser = RowSerialiser(teacher_columns(settings), texts)

        def sentences() -> Iterator[str]:
            yield from serialiser.text_strings("page")
            yield from serialiser.text_strings("ad")
            yield from serialiser.tabular_strings(train)

        train_tokenizer(
            sentences(), workspace.tokenizer, settings=settings.tokenizer, seed=settings.seed
        )
    return teacher_input(settings)


def tokenizer_hash(settings: DriftlineSettings) -> str:
    """Hash of the workspace's tokeniser; a checkpoint's own is part of its weights' folder."""
    if isinstance(settings.teacher.encoder, CheckpointEncoder):
        return "own"
    return hash_file(Workspace.of(settings).tokenizer)


def _stages(
    settings: DriftlineSettings, spec: ModelSpec, examples: Path, validation: Path, scratch: Path
) -> list[StageJob]:
    """MLM if asked for, then supervised; each stops on its own target (papers.md S0.21)."""

    def job(name: str, stage: StageSettings) -> StageJob:
        return StageJob(
            name=f"teacher.{name}",
            model=spec,
            task="clicks",
            examples=examples,
            validation=validation,
            output=scratch / f"{name}.safetensors",
            checkpoints=scratch / f"{name}.checkpoints",
            stage=stage,
            seed=settings.seed,
            stop_on="auc",
        )

    stages = [job("supervised", settings.teacher.supervised)]
    if settings.teacher.mlm is not None:
        mlm = replace(job("mlm", settings.teacher.mlm), task="mlm", stop_on="loss")
        stages.insert(0, replace(mlm, keep_head=True))  # so that it can teach its language
    return stages


def teacher_key(
    settings: DriftlineSettings,
    *,
    share: tuple[float, float] = (0, 1),
    label: str | None = None,
) -> str:
    """Hash of all settings that shape a teacher; more teachers beside it do not."""
    shaping = {"name", "seed", "features", "counters", "labels", "split", "tokenizer", "teacher"}
    beside = {"teacher": {"ensemble", "features"}}
    value = settings.model_dump(mode="json", include=shaping, exclude=beside)
    own = [*share, label]
    return hash_value(value if own == [0, 1, None] else [value, *own])[:12]


def _summary(result: StageResult) -> dict[str, Any]:
    return {
        "metric": result.metric,
        "best": result.best,
        "num_steps": result.num_steps,
        "seconds": round(result.seconds, 1),
    }

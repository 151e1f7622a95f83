"""The teacher: trained once on the stale part of the log, then frozen for good."""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa

from driftline.features.log import ImpressionLog
from driftline.features.texts import known_texts, read_texts
from driftline.pipelines.provenance import code_version
from driftline.pipelines.teacher_input import RowSerialiser, TeacherInput, teacher_columns
from driftline.pipelines.training_sets import clicks, known_frame, newest, split_rows
from driftline.platform.artefacts import (
    hash_file,
    hash_value,
    read_json,
    whole_directory,
    write_json,
)
from driftline.platform.errors import FrozenTeacherError
from driftline.platform.examples import Ragged, TokenRows, write_tokens
from driftline.platform.models.spec import ModelSpec, TeacherSpec, encoder_spec
from driftline.platform.ray_runtime import fit
from driftline.platform.settings import CheckpointEncoder, DriftlineSettings, StageSettings
from driftline.platform.stages import StageJob, StageResult
from driftline.platform.text import Tokenizer, train_tokenizer
from driftline.platform.windows import format_time
from driftline.platform.workspace import Workspace, require

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
MANIFEST = "manifest.json"
MAX_VALIDATION_ROWS = 4_000


@dataclass(frozen=True)
class Teacher:
    """The frozen teacher on disk."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, workspace: Workspace) -> "Teacher":
        """Open it and check that nobody touched the weights.

        Raises:
            MissingArtefactError: there is none yet.
            FrozenTeacherError: the weights do not have the hash they were frozen with.
        """
        path = require(workspace.teacher, made_by="teacher CONFIG")
        manifest = read_json(path / MANIFEST)
        if (found := _hash_once(path / WEIGHTS)) != manifest["weights"]:
            raise FrozenTeacherError(
                f"teacher {path}: weights have hash {found[:12]}, frozen as "
                f"{manifest['weights'][:12]}; restore the file or start a new workspace"
            )
        return cls(path, manifest)

    @property
    def hash(self) -> str:
        """Hash of weights, input columns and tokeniser: the key of its soft labels."""
        parts = (self.manifest["weights"], self.manifest["columns"], self.manifest["tokenizer"])
        return hash_value(parts)

    @property
    def weights(self) -> Path:
        """The frozen weights."""
        return self.path / WEIGHTS

    @property
    def keep_rate(self) -> float:
        """Share of non-clicks it was trained on; its logits stand on that prior."""
        return float(self.manifest["keep_rate"])


def train_teacher(
    settings: DriftlineSettings, *, progress: Callable[[int, int], None] | None = None
) -> Teacher:
    """Tokeniser, MLM, supervised training on OOD rows, frozen (papers.md S0.7).

    A second call with the same settings returns the frozen teacher.

    Raises:
        FrozenTeacherError: there is a teacher from other settings.
    """
    workspace = Workspace.of(settings)
    key = _teacher_key(settings)
    if workspace.teacher.exists():
        teacher = Teacher.open(workspace)
        if teacher.manifest["key"] != key:
            raise FrozenTeacherError(
                f"teacher {workspace.teacher} is frozen and was trained with other settings "
                f"(key {teacher.manifest['key']}, these give {key}); undo the change of "
                "teacher/tokenizer/features/labels/split settings, or use a new workspace"
            )
        logger.info("teacher %s is frozen already", teacher.hash[:12])
        return teacher
    started = time.monotonic()
    split = ImpressionLog.open(workspace.clean, settings).split
    frame = known_frame(settings, split.ood, as_of=split.ood.end)
    keep_rate = settings.teacher.negative_keep_rate or settings.labels.negative_keep_rate
    max_rows = settings.teacher.supervised.max_rows
    rows = split_rows(settings, frame, max_rows=max_rows, keep_rate=keep_rate)
    validation = newest(rows.validation, MAX_VALIDATION_ROWS)
    reader = _train_reader(settings, rows.train, as_of=split.ood.end)
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
    for job in _stages(settings, spec, examples, held_out, scratch):
        job = replace(job, initial=initial)
        result = fit(
            job, num_workers=settings.ray.teacher_workers, ray=settings.ray, progress=progress
        )
        results.append(result)
        initial = (job.output,)
    with whole_directory(workspace.teacher) as folder:
        (folder / WEIGHTS).write_bytes(initial[0].read_bytes())
        manifest = {
            "key": key,
            "weights": hash_file(folder / WEIGHTS),
            "tokenizer": tokenizer_hash(settings),
            "columns": list(reader.serialiser.columns),
            "max_tokens": reader.max_tokens,
            "spec": spec.model_dump(mode="json"),
            "keep_rate": keep_rate,
            "window": [format_time(split.ood.start), format_time(split.ood.end)],
            "num_rows": rows.train.num_rows,
            "seconds": round(time.monotonic() - started, 1),
            "core_seconds": round(sum(r.core_seconds for r in results), 1),
            "stages": [_summary(r) for r in results],
            "code": code_version(),
        }
        write_json(folder / MANIFEST, manifest)
    return Teacher.open(workspace)


def teacher_input(settings: DriftlineSettings) -> TeacherInput:
    """How rows are written for the teacher of this workspace."""
    return TeacherInput(
        serialiser=_serialiser(settings),
        tokenizer=open_tokenizer(settings),
        max_tokens=settings.teacher.encoder.max_tokens,
    )


def _serialiser(settings: DriftlineSettings) -> RowSerialiser:
    return RowSerialiser(teacher_columns(settings), read_texts(settings))


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
    tokenizer = Workspace.of(settings).tokenizer
    return hash_file(tokenizer) if tokenizer.exists() else "own"


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
        stages.insert(0, replace(job("mlm", settings.teacher.mlm), task="mlm", stop_on="loss"))
    return stages


def _teacher_key(settings: DriftlineSettings) -> str:
    shaping = {"name", "seed", "features", "counters", "labels", "split", "tokenizer", "teacher"}
    return hash_value(settings.model_dump(mode="json", include=shaping))[:12]


def _summary(result: StageResult) -> dict[str, Any]:
    return {
        "metric": result.metric,
        "best": result.best,
        "num_steps": result.num_steps,
        "seconds": round(result.seconds, 1),
    }


def _hash_once(path: Path) -> str:
    """Hash a file again only when it changed: hourly steps open the teacher often."""
    status = path.stat()
    return _hash_of(path, status.st_mtime_ns, status.st_size)


@cache
def _hash_of(path: Path, mtime_ns: int, size: int) -> str:
    return hash_file(path)

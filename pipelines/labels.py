"""Soft labels of a market: what its frozen teachers say about rows, each input paid once.

Whatever reads them later (arms, head, any strategy that is tried) finds them on disk, below
``labels/TEACHER``; see ``TeacherMemory``. Several teachers speak as one: the mean of their logits.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from driftline.pipelines.frozen_teacher import Teacher
from driftline.pipelines.prepare import prepare_features
from driftline.pipelines.teacher import teacher_input, tokenizer_hash
from driftline.pipelines.teacher_input import RowSerialiser, TeacherInput
from driftline.pipelines.teachers import as_member, find_member
from driftline.pipelines.training_sets import known_frame, split_rows
from driftline.platform.artefacts import hash_value
from driftline.platform.distillation.keys import FeatureKey
from driftline.platform.errors import FrozenTeacherError
from driftline.platform.models.spec import TeacherSpec
from driftline.platform.sampling import soft_labelled
from driftline.platform.settings import DriftlineSettings
from driftline.platform.teacher_features import TeacherFeatures
from driftline.platform.teacher_memory import ROWS_PER_PASS, Inputs, Labelled, TeacherMemory
from driftline.platform.workspace import Workspace

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]

MICROS_PER_HOUR: Final = 3_600_000_000


@dataclass(frozen=True)
class TeacherLabels:
    """Labels of one teacher: how it reads a row, and what it said."""

    teacher: Teacher
    reader: TeacherInput
    memory: TeacherMemory

    @classmethod
    def open(
        cls,
        settings: DriftlineSettings,
        *,
        name: str | None = None,
        texts: pa.Table | None = None,
        keys: Sequence[FeatureKey] = (),
    ) -> "TeacherLabels":
        """Those of the teacher of these settings, which lies under ``name``; see ``SoftLabels``."""
        workspace = Workspace.of(settings)
        teacher = Teacher.open(workspace, name)
        reader = teacher_input(settings, texts=texts)
        fields = ("columns", "max_tokens", "tokenizer")
        known = (teacher.manifest[field] for field in fields)
        now = ([*reader.serialiser.columns], reader.max_tokens, tokenizer_hash(settings))
        for field, before, found in zip(fields, known, now, strict=True):
            if before != found:
                raise FrozenTeacherError(
                    f"teacher {teacher.path}: {field} was {before} in its training and is {found} "
                    "now; undo the change, or use a new workspace"
                )
        memory = TeacherMemory(
            folder=workspace.labels / teacher.hash[:12],
            teacher=teacher.hash,
            spec=TeacherSpec.model_validate(teacher.manifest["spec"]),
            weights=teacher.weights,
            keys=tuple(dict.fromkeys(keys)),
            limits=settings.teacher.features,
        )
        return cls(teacher, reader, memory)

    def with_texts(self, texts: pa.Table) -> "TeacherLabels":
        """The same for rows that point to other texts."""
        serialiser = RowSerialiser(self.reader.serialiser.columns, texts)
        return replace(self, reader=replace(self.reader, serialiser=serialiser))

    def with_keys(self, keys: Sequence[FeatureKey]) -> "TeacherLabels":
        """The same, also keeping inner tensors; its passes are counted from 0."""
        memory = replace(self.memory, keys=tuple(dict.fromkeys(keys)), num_passes=0)
        return replace(self, memory=memory)

    def label(self, frame: pa.Table, *, progress: Progress | None = None) -> Labelled:
        """See ``SoftLabels.label``."""
        logits = np.empty((frame.num_rows, 2), np.float32)
        rows = np.empty(frame.num_rows, np.int64)
        self.memory.check_room(inputs for _, inputs in self._parts(frame))
        for part, inputs in self._parts(frame):
            answer = self.memory.answer(inputs)
            logits[part] = answer.logits
            if answer.teacher_rows is not None:
                rows[part] = answer.teacher_rows
            if progress is not None:
                progress(int(part.stop), frame.num_rows)
        return Labelled(logits, rows if self.memory.keys else None)

    def _parts(self, frame: pa.Table) -> Iterator[tuple[slice, Inputs]]:
        """The frame in parts of whole hours, about ``ROWS_PER_PASS`` rows each."""
        hours = frame["event_time"].cast(pa.int64()).to_numpy() // MICROS_PER_HOUR
        ends = [*(np.flatnonzero(np.diff(hours)) + 1).tolist(), frame.num_rows]
        start = 0
        for end, following in zip(ends, [*ends[1:], None], strict=True):
            if start < end and (following is None or following - start > ROWS_PER_PASS):
                tokens = self.reader.tokens(frame.slice(start, end - start))
                yield slice(start, end), Inputs(hours[start:end], tokens)
                start = end


@dataclass(frozen=True)
class SoftLabels:
    """Reads and extends the labels of one teacher, or of all together. Open it with ``open``."""

    members: tuple[TeacherLabels, ...]

    @classmethod
    def open(
        cls,
        settings: DriftlineSettings,
        *,
        teacher: str | None = None,
        texts: pa.Table | None = None,
        keys: Sequence[FeatureKey] = (),
    ) -> "SoftLabels":
        """The labels of the workspace's frozen teachers.

        Args:
            settings: ``teacher.ensemble`` names the teachers beside the first.
            teacher: The name of one of them, to hear that one alone. The mean of all when not
                given, but for those of another label; only the first where there is no ensemble.
            texts: Texts that rows point to, ``text_id`` and the text features; those of the
                workspace when not given. See also ``with_texts``.
            keys: Inner tensors that the first teacher keeps of each pass, for matches. Name those
                of all strategies at once: tensors that are asked for later need another pass.

        Raises:
            MissingArtefactError: one of the teachers is not trained yet.
            FrozenTeacherError: rows would be written for one in another way than in its training.
            SettingsError: there is no teacher of this name.
        """
        if teacher is not None:
            own = as_member(settings, find_member(settings, teacher))
            return cls((TeacherLabels.open(own, name=teacher, texts=texts, keys=keys),))
        others = (
            TeacherLabels.open(as_member(settings, member), name=member.name, texts=texts)
            for member in settings.teacher.ensemble
            if member.label is None
        )
        return cls((TeacherLabels.open(settings, texts=texts, keys=keys), *others))

    @property
    def teacher(self) -> Teacher:
        """The first teacher; all logits stand on its prior, all features are its own."""
        return self.members[0].teacher

    @property
    def reader(self) -> TeacherInput:
        """How rows are written for the first teacher."""
        return self.members[0].reader

    @property
    def hash(self) -> str:
        """Of all teachers that are heard; that of the teacher where there is one."""
        hashes = [member.teacher.hash for member in self.members]
        return hashes[0] if len(hashes) == 1 else hash_value(hashes)

    @property
    def features(self) -> TeacherFeatures | None:
        """The first teacher's inner tensors; None where none was asked for."""
        return self.members[0].memory.features

    @property
    def num_passes(self) -> int:
        """Inputs that went through a teacher in this process, each teacher counted."""
        return sum(member.memory.num_passes for member in self.members)

    def with_texts(self, texts: pa.Table) -> "SoftLabels":
        """The same labels for rows that point to other texts, such as generated ones."""
        return SoftLabels(tuple(member.with_texts(texts) for member in self.members))

    def with_keys(self, keys: Sequence[FeatureKey]) -> "SoftLabels":
        """The same labels; the first teacher also keeps inner tensors. Passes count from 0."""
        first, *others = self.members
        return SoftLabels((first.with_keys(keys), *(other.with_keys(()) for other in others)))

    def label(self, frame: pa.Table, *, progress: Progress | None = None) -> Labelled:
        """Logits of every row, in order, and where its features are.

        Only inputs never seen go through a teacher. Several teachers: the mean of their logits,
        each moved to the first one's prior (papers.md S2.12, S0.25).

        Args:
            frame: Rows, in order of time.
            progress: Called with rows done and rows in all, for each teacher.

        Raises:
            ResourceError: the features would take more room than allowed; nothing was asked then.
        """
        first = self.members[0].label(frame, progress=progress)
        if len(self.members) == 1:
            return first
        others = [
            shift_prior(
                member.label(frame, progress=progress).logits,
                from_keep_rate=member.teacher.keep_rate,
                to_keep_rate=self.teacher.keep_rate,
            )
            for member in self.members[1:]
        ]
        stacked = np.stack([first.logits, *others])
        mean = stacked.mean(axis=0, dtype=np.float64)
        return replace(first, logits=np.asarray(mean, np.float32))

    def logits(self, frame: pa.Table, *, progress: Progress | None = None) -> NDArray[np.float32]:
        """The logits alone. ``[B, 2]``."""
        return self.label(frame, progress=progress).logits


def label_log(settings: DriftlineSettings, *, progress: Progress | None = None) -> dict[str, int]:
    """Label every training row of the log that the teachers are asked about."""
    span = prepare_features(settings)
    frame = known_frame(settings, span, as_of=span.end + settings.labels.maturity)
    rows = split_rows(settings, frame).train
    share = settings.labels.soft_label_share
    rows = rows.filter(pa.array(soft_labelled(rows, share=share, seed=settings.seed)))
    store = SoftLabels.open(settings)
    store.logits(rows, progress=progress)
    return {"num_rows": rows.num_rows, "num_passes": store.num_passes}


def shift_prior(
    logits: NDArray[np.float32], *, from_keep_rate: float, to_keep_rate: float
) -> NDArray[np.float32]:
    """Teacher logits as they would be on the student's thinned prior (papers.md S0.25)."""
    shifted = logits.copy()
    shifted[:, 1] += np.float32(np.log(from_keep_rate) - np.log(to_keep_rate))
    return shifted

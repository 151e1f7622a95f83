"""The soft-label store: the teacher's logits, paid once for each (teacher, input), kept as Parquet.

``labels/TEACHER/HOUR.parquet`` has one row for each labelled input of that hour: ``input_hash`` and
the two logits before any temperature. Whatever reads them later (arms, head, any strategy that is
tried) finds them here; a crash loses at most the hours under way.
"""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from torch import nn

from driftline.pipelines.prepare import prepare_features
from driftline.pipelines.teacher import Teacher, teacher_input, tokenizer_hash
from driftline.pipelines.teacher_input import TeacherInput
from driftline.pipelines.training_sets import known_frame, split_rows
from driftline.platform.artefacts import whole_file
from driftline.platform.errors import FrozenTeacherError
from driftline.platform.examples import Ragged, TokenRows
from driftline.platform.inference import load_model, predict_logits
from driftline.platform.inputs import TowerInputs
from driftline.platform.models.spec import TeacherSpec
from driftline.platform.sampling import soft_labelled
from driftline.platform.settings import DriftlineSettings
from driftline.platform.windows import format_time
from driftline.platform.workspace import Workspace

logger = logging.getLogger(__name__)

LABELS_SCHEMA: Final = pa.schema(
    [
        pa.field("input_hash", pa.int64(), nullable=False),
        pa.field("no_click", pa.float32(), nullable=False),
        pa.field("click", pa.float32(), nullable=False),
    ]
)

ROWS_PER_PASS: Final = 8_192
MICROS_PER_HOUR: Final = 3_600_000_000


@dataclass
class SoftLabels:
    """Reads and extends the store of one teacher."""

    folder: Path
    teacher: Teacher
    reader: TeacherInput
    num_passes: int = 0
    """Rows that went through the teacher in this process."""

    @classmethod
    def open(cls, settings: DriftlineSettings) -> "SoftLabels":
        """The store of the workspace's frozen teacher.

        Raises:
            FrozenTeacherError: rows would be written for it in another way than in its training.
        """
        workspace = Workspace.of(settings)
        teacher = Teacher.open(workspace)
        reader = teacher_input(settings)
        names = ("columns", "max_tokens", "tokenizer")
        known = (teacher.manifest[name] for name in names)
        now = ([*reader.serialiser.columns], reader.max_tokens, tokenizer_hash(settings))
        for name, before, found in zip(names, known, now, strict=True):
            if before != found:
                raise FrozenTeacherError(
                    f"teacher {teacher.path}: {name} was {before} in its training and is {found} "
                    "now; undo the change, or use a new workspace"
                )
        return cls(workspace.labels / teacher.hash[:12], teacher, reader)

    def logits(
        self, frame: pa.Table, *, progress: Callable[[int, int], None] | None = None
    ) -> NDArray[np.float32]:
        """Logits of every row, in order; only inputs never seen go through the teacher. ``[B, 2]``.

        Hours of the frame are completed one group at a time, so a killed call resumes.
        """
        found = np.empty((frame.num_rows, 2), np.float32)
        hours = frame["event_time"].cast(pa.int64()).to_numpy() // MICROS_PER_HOUR
        starts = np.flatnonzero(np.r_[True, hours[1:] != hours[:-1]][: len(hours)])
        bounds = [*starts.tolist(), frame.num_rows]
        done = 0
        while done < len(starts):
            last = done + 1
            while last < len(starts) and bounds[last + 1] - bounds[done] <= ROWS_PER_PASS:
                last += 1
            rows = slice(bounds[done], bounds[last])
            part = frame.slice(rows.start, rows.stop - rows.start)
            found[rows] = self._complete(part, hours[rows])
            done = last
            if progress is not None:
                progress(int(rows.stop), frame.num_rows)
        return found

    def _complete(self, frame: pa.Table, hours: NDArray[np.int64]) -> NDArray[np.float32]:
        tokens = self.reader.tokens(frame)
        hashes = np.array([_hash_tokens(t) for t in tokens], np.int64)
        stored = {hour: self._read(hour) for hour in np.unique(hours).tolist()}
        known_hashes = np.concatenate([hash_ for hash_, _ in stored.values()])
        known_logits = np.concatenate([logits for _, logits in stored.values()])
        missing = np.flatnonzero(~np.isin(hashes, known_hashes))
        if len(missing):
            _, first = np.unique(hashes[missing], return_index=True)
            fresh = missing[np.sort(first)]
            logits = self._pass([tokens[row] for row in fresh])
            for hour in np.unique(hours[fresh]).tolist():
                mine = hours[fresh] == hour
                old_hashes, old_logits = stored[hour]
                self._write(
                    hour,
                    np.concatenate([old_hashes, hashes[fresh][mine]]),
                    np.concatenate([old_logits, logits[mine]]),
                )
            known_hashes = np.concatenate([known_hashes, hashes[fresh]])
            known_logits = np.concatenate([known_logits, logits])
        order = np.argsort(known_hashes, kind="stable")
        at = order[np.searchsorted(known_hashes, hashes, sorter=order)]
        result: NDArray[np.float32] = known_logits[at]
        return result

    def _pass(self, tokens: list[NDArray[np.int32]]) -> NDArray[np.float32]:
        self.num_passes += len(tokens)
        unknown = np.full(len(tokens), np.nan, np.float32)
        rows = TowerInputs(self._spec, TokenRows(Ragged.of(tokens), unknown))
        return predict_logits(self._model, rows)

    @cached_property
    def _spec(self) -> TeacherSpec:
        return TeacherSpec.model_validate(self.teacher.manifest["spec"])

    @cached_property
    def _model(self) -> nn.Module:
        return load_model(self._spec, self.teacher.weights)

    def _path(self, hour: int) -> Path:
        moment = datetime.fromtimestamp(int(hour) * 3600, UTC)
        return self.folder / f"{format_time(moment)[:13]}.parquet"

    def _read(self, hour: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        path = self._path(hour)
        if not path.exists():
            return np.empty(0, np.int64), np.empty((0, 2), np.float32)
        table = pq.read_table(path)
        logits = np.column_stack([table["no_click"].to_numpy(), table["click"].to_numpy()])
        return table["input_hash"].to_numpy(), logits

    def _write(self, hour: int, hashes: NDArray[np.int64], logits: NDArray[np.float32]) -> None:
        columns = [pa.array(hashes), pa.array(logits[:, 0]), pa.array(logits[:, 1])]
        with whole_file(self._path(hour)) as scratch:
            pq.write_table(pa.Table.from_arrays(columns, schema=LABELS_SCHEMA), scratch)


def label_log(
    settings: DriftlineSettings, *, progress: Callable[[int, int], None] | None = None
) -> dict[str, int]:
    """Label every training row of the log that the teacher is asked about."""
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


def _hash_tokens(tokens: NDArray[np.int32]) -> int:
    digest = hashlib.blake2b(tokens.tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)

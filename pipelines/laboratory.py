"""Everything a strategy is run on, prepared once: rows, texts, scales, soft labels, trained stages.

Whatever a laboratory makes has a name made from what decides it. A stage's weights lie at
``nodes/IDENTITY.safetensors``, so two strategies that begin alike share their beginning, also when
they run in different processes: whoever comes second waits, then finds the file.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
from filelock import FileLock
from numpy.typing import NDArray

from driftline.features.log import ImpressionLog
from driftline.features.texts import known_texts
from driftline.pipelines.labels import SoftLabels, shift_prior
from driftline.pipelines.prepare import prepare_features
from driftline.pipelines.provenance import NOT_MODEL_SETTINGS
from driftline.pipelines.student import student_tokenizer, write_student_texts
from driftline.pipelines.teacher import Teacher
from driftline.pipelines.training_sets import TrainingRows, known_frame, newest, split_rows
from driftline.platform.artefacts import hash_value, read_json, write_json
from driftline.platform.columns import head_columns
from driftline.platform.errors import SettingsError
from driftline.platform.sampling import part_mask, request_keys, soft_labelled, unit_hash
from driftline.platform.settings import DistilSettings, DriftlineSettings, StageSettings
from driftline.platform.stages import StageJob, StageResult, run_stage
from driftline.platform.tabular import TabularEncoder
from driftline.platform.teacher_memory import Labelled
from driftline.platform.text import Tokenizer
from driftline.platform.training import Report
from driftline.platform.transfer.sets import Natural, TransferRows, TransferSource
from driftline.platform.windows import Window, floor_time, format_time
from driftline.platform.workspace import Workspace

logger = logging.getLogger(__name__)

FORMAT: Final = 1  # raise when the same settings would give other files
MAX_VALIDATION_ROWS: Final = 5_000
MAX_TEST_ROWS: Final = 50_000
IDENTITY_LENGTH: Final = 32

Logits = NDArray[np.float32]
Source = Literal["ood", "id"]
Runner = Callable[[StageJob, Report | None], StageResult]


@dataclass
class TextSet:
    """Texts that rows point to; read when first asked for."""

    key: str
    """Decides the content."""
    read: Callable[[], pa.Table]

    @cached_property
    def table(self) -> pa.Table:
        """``text_id`` (ascending) and a column for each text feature."""
        return self.read()


@dataclass
class Rows:
    """Rows of one example file; made when first asked for, since most files are there already."""

    key: str
    """Decides the content."""
    texts: TextSet
    read: Callable[[], tuple[pa.Table, Logits | None]]
    """The frame, whose ``clicked`` may be a share, or NaN where nobody knows; and the teacher's
    logits on the student's prior, NaN in rows it was not asked about. ``[N, 2]``."""

    @cached_property
    def content(self) -> tuple[pa.Table, Logits | None]:
        """Frame and logits."""
        return self.read()


@dataclass(frozen=True)
class Node:
    """One thing that a strategy needed: a trained stage, or a pass of the teacher."""

    name: str
    identity: str
    seconds: float
    core_seconds: float
    made_now: bool
    """False when it was found: another strategy, seed or run had made it."""
    teacher_passes: int = 0
    """Rows that went through the teacher for it."""
    result: StageResult | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, without the history."""
        return {
            "name": self.name,
            "identity": self.identity,
            "seconds": round(self.seconds, 3),
            "core_seconds": round(self.core_seconds, 3),
            "made_now": self.made_now,
            "teacher_passes": self.teacher_passes,
            "metric": self.result and self.result.metric,
            "best": self.result and self.result.best,
            "num_steps": self.result and self.result.num_steps,
        }


def run_here(job: StageJob, report: Report | None) -> StageResult:
    """Train in this process, as a search does inside a trial."""
    return run_stage(job, report=report)


@dataclass
class Laboratory:
    """One market at one moment. Open it with ``open``; rows are read when first asked for.

    OOD rows come from the stale window, parted by request: train, validation, and the gate's part
    as test, which nobody trains on. ID rows come from the newest hours before ``as_of``. The *next
    slices* come after it: no student may know them.

    Everything that rows decide follows ``settings.seed``; ``seed`` is that of starts, orders and
    transfer sets. So all seeds share one pass of the teacher.
    """

    settings: DriftlineSettings
    as_of: datetime
    folder: Path
    seed: int
    slice_hours: float = 0
    run: Runner = run_here
    progress: Callable[[int, int], None] | None = None
    """Called with rows labelled and rows in all, while the teacher is asked."""
    nodes: list[Node] = field(default_factory=list)
    """Everything asked for so far, in order."""

    @classmethod
    def open(
        cls,
        settings: DriftlineSettings,
        *,
        as_of: datetime,
        folder: Path,
        seed: int,
        slice_hours: float = 0,
        num_slices: int = 1,
        run: Runner = run_here,
    ) -> "Laboratory":
        """Prepare the features, up to the end of the test slices if any are wanted.

        Args:
            settings: Of the market; ``student.arms_refresh`` gives the window of recent rows.
            as_of: What is known; students learn from nothing later.
            folder: Where files and nodes are kept; laboratories may share one.
            seed: Of starts, orders and transfer sets.
            slice_hours: Length of a test slice after ``as_of``; 0 for none.
            num_slices: How many such slices the log must hold.
            run: How a stage is run.

        Raises:
            SettingsError: a test slice lies outside the log.
            MissingArtefactError: the log was not checked yet.
        """
        span = ImpressionLog.open(Workspace.of(settings).clean, settings).span
        end = as_of + timedelta(hours=slice_hours * num_slices)
        if slice_hours and not (span.start < as_of and end <= span.end):
            raise SettingsError(
                f"{num_slices} slices of {slice_hours:g} h after {format_time(as_of)} must lie "
                f"inside the log {span}; take an earlier as_of or a smaller slice_hours"
            )
        prepare_features(settings, as_of=end)
        return cls(settings, as_of, folder.absolute(), seed, slice_hours=slice_hours, run=run)

    # --- rows -----------------------------------------------------------------------------

    @cached_property
    def ood_window(self) -> Window:
        """The stale part of the log, as far as it is known."""
        split = ImpressionLog.open(Workspace.of(self.settings).clean, self.settings).split
        return Window(split.ood.start, min(split.ood.end, self.as_of))

    @cached_property
    def id_window(self) -> Window:
        """The newest ``window_hours`` before ``as_of``."""
        length = timedelta(hours=self.settings.student.arms_refresh.window_hours)
        return Window(self.ood_window.start, self.as_of).last(length)

    @cached_property
    def ood_frame(self) -> pa.Table:
        """All known rows of the stale window."""
        return known_frame(self.settings, self.ood_window, as_of=self.as_of)

    @cached_property
    def id_frame(self) -> pa.Table:
        """All known rows of the recent window."""
        return known_frame(self.settings, self.id_window, as_of=self.as_of)

    @cached_property
    def ood(self) -> TrainingRows:
        """Stale rows: training thinned, validation natural."""
        return _bounded(split_rows(self.settings, self.ood_frame))

    @cached_property
    def id(self) -> TrainingRows:
        """Recent rows: training thinned, validation natural."""
        return _bounded(split_rows(self.settings, self.id_frame))

    def training_rows(self, source: Source) -> TrainingRows:
        """Rows to learn from, by name."""
        return self.ood if source == "ood" else self.id

    @cached_property
    def ood_test(self) -> pa.Table:
        """Stale rows on the natural click rate that neither teacher nor student has seen."""
        frame = self.ood_frame
        return _sampled(frame.filter(part_mask(frame, "gate", split=self.settings.split)))

    def next_window(self, number: int = 0) -> Window:
        """The window of a test slice: 0 begins at ``as_of``, 1 where 0 ends."""
        length = timedelta(hours=self.slice_hours)
        start = self.as_of + number * length
        return Window(start, start + length)

    def next_slice(self, number: int = 0) -> pa.Table:
        """Rows after ``as_of`` on the natural click rate, each outcome known (papers.md S0.24)."""
        window = self.next_window(number)
        known_at = window.end + self.settings.labels.maturity
        return _sampled(known_frame(self.settings, window, as_of=known_at))

    @cached_property
    def tabular(self) -> TabularEncoder:
        """Categories and scales as the recent rows have them; the same for every strategy."""
        finetune = self.settings.student.arms_refresh.finetune or StageSettings()
        return TabularEncoder.fit(
            newest(self.id.train, finetune.max_rows),
            head_columns(self.settings),
            num_bins=self.settings.student.head.num_bins,
        )

    # --- texts ----------------------------------------------------------------------------

    @property
    def has_text(self) -> bool:
        """Without text there are no arms, only a head."""
        return bool(self.settings.select(kind="text"))

    @cached_property
    def texts(self) -> TextSet:
        """All texts known at ``as_of``."""
        return TextSet(self.key("texts"), lambda: known_texts(self.settings, as_of=self.as_of))

    @cached_property
    def test_texts(self) -> TextSet:
        """Texts up to the end of both test slices; a product is read as it is when it is shown."""
        end = self.next_window(1).end
        key = self.key("texts", format_time(end))
        return TextSet(key, lambda: known_texts(self.settings, as_of=end))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The student's."""
        return student_tokenizer(self.settings)

    def text_file(self, texts: TextSet) -> Path:
        """Texts as tokens, for the arms."""
        return self.make(
            "texts.arrow",
            lambda path: void(write_student_texts(self.settings, texts.table, path)),
            key=texts.key,
        )

    # --- teacher --------------------------------------------------------------------------

    @cached_property
    def teacher(self) -> Teacher:
        """The frozen one; the first of several."""
        return self.store.teacher

    @cached_property
    def store(self) -> SoftLabels:
        """Soft labels of all teachers; set it to listen to one of them alone.

        Raises:
            MissingArtefactError: there is no teacher yet.
        """
        return SoftLabels.open(self.settings)

    def soft_labels(self, frame: pa.Table, *, texts: pa.Table | None = None) -> Logits:
        """The teacher's logits on the student's prior, of every row. ``[N, 2]``.

        Args:
            frame: Rows, in order of time.
            texts: Texts of made-up rows; those of the log when not given.
        """
        return self.labelled(frame, texts=texts).logits

    def labelled(self, frame: pa.Table, *, texts: pa.Table | None = None) -> Labelled:
        """The same, and where the rows' inner features are."""
        store = self.store if texts is None else self.store.with_texts(texts)
        with self.labelling():
            found = store.label(frame, progress=self.progress)
        logits = shift_prior(
            found.logits,
            from_keep_rate=store.teacher.keep_rate,
            to_keep_rate=self.settings.labels.negative_keep_rate,
        )
        return replace(found, logits=logits)

    def asked(self, frame: pa.Table) -> pa.Table:
        """The rows that the teacher may be asked about."""
        share = self.settings.labels.soft_label_share
        return frame.filter(pa.array(soft_labelled(frame, share=share, seed=self.settings.seed)))

    @contextmanager
    def labelling(self) -> Iterator[None]:
        """One process at a time asks the teacher, so that no row is paid twice."""
        with self._lock("teacher"):
            yield

    # --- rows of the stages ---------------------------------------------------------------

    def distil_rows(self, distil: DistilSettings) -> tuple[Rows, Rows]:
        """Training and validation rows of a distillation, labelled (papers.md S0.18).

        The transfer set is made of the rows the teacher may be asked about, newest ``max_rows``;
        validation rows stay natural. Rows that were made up have no click. The story of the set is
        written to ``transfer/``.
        """
        rows = self.training_rows
        natural = distil.transfer == Natural()
        drawn = None if natural else (distil.transfer.model_dump(mode="json"), self.seed)
        key = self.key("distil", distil.on, distil.max_rows, drawn, self.store.hash)

        def asked() -> pa.Table:
            return newest(self.asked(rows(distil.on).train), distil.max_rows)

        @cache
        def made() -> TransferRows:
            source = TransferSource(asked(), self.texts.table, self.tokenizer)
            found = distil.transfer.build(source, seed=self.seed)
            write_json(self.folder / "transfer" / f"{key[:IDENTITY_LENGTH]}.json", found.provenance)
            return found

        texts = self.texts
        if not natural:
            texts = TextSet(f"{key}.texts", lambda: _merged(self.texts.table, made().texts))

        def train() -> tuple[pa.Table, Logits]:
            if natural:
                return asked(), self.soft_labels(asked())
            frame = made().frame
            if not made().has_clicks:
                known = np.where(made().made_up, np.nan, frame["clicked"].to_numpy())
                frame = with_clicks(frame, known.astype(np.float32))
            return frame, self.soft_labels(frame, texts=texts.table)

        def validation() -> tuple[pa.Table, Logits]:
            frame = self.asked(rows(distil.on).validation)
            return frame, self.soft_labels(frame)

        return Rows(key, texts, train), Rows(f"{key}.validation", texts, validation)

    def click_rows(self, source: Source, *, max_rows: int | None) -> tuple[Rows, Rows]:
        """Training and validation rows of a stage that learns from clicks."""
        rows = self.training_rows
        return (
            Rows(
                self.key("clicks", source, max_rows),
                self.texts,
                lambda: (newest(rows(source).train, max_rows), None),
            ),
            Rows(
                self.key("clicks", source, "validation"),
                self.texts,
                lambda: (rows(source).validation, None),
            ),
        )

    # --- nodes and files ------------------------------------------------------------------

    def train(self, job: StageJob, *, report: Report | None = None) -> Path:
        """The weights of a stage, trained unless somebody has trained it; see ``StageJob``.

        ``job.output`` and ``job.checkpoints`` are replaced by the node's own places.
        """

        def run(output: Path, checkpoints: Path) -> StageResult:
            return self.run(replace(job, output=output, checkpoints=checkpoints), report)

        return self.train_node(job.name, run, identity=job.identity())

    def train_node(
        self, name: str, run: Callable[[Path, Path], StageResult], *, identity: str
    ) -> Path:
        """The same for anything that trains: ``run(output, checkpoints)`` does, or finds it done.

        Args:
            name: Of the stage, for people.
            run: Resumes from the folder; returns at once when the output is there.
            identity: Hash of everything that decides the weights.
        """
        identity = identity[:IDENTITY_LENGTH]
        output = self.folder / "nodes" / f"{identity}.safetensors"
        with self._lock(f"nodes/{identity}"):
            is_new = not output.exists()
            result = run(output, output.with_suffix(".checkpoints"))
        self.nodes.append(
            Node(name, identity, result.seconds, result.core_seconds, is_new, result=result)
        )
        return output

    def make(self, name: str, write: Callable[[Path], None], *, key: object) -> Path:
        """A file that ``write`` writes, unless it was written before under the same key.

        What it cost stands beside it, teacher passes included.
        """
        identity = hash_value([FORMAT, name, key])[:IDENTITY_LENGTH]
        path = self.folder / "files" / f"{identity}-{name}"
        record = path.with_name(f"{path.name}.json")
        with self._lock(f"files/{identity}"):
            is_new = not (path.exists() and record.exists())
            if is_new:
                path.parent.mkdir(parents=True, exist_ok=True)
                started, cpu = time.monotonic(), time.process_time()
                before = self._num_passes()
                write(path)
                cost = {
                    "seconds": time.monotonic() - started,
                    "core_seconds": time.process_time() - cpu,
                    "teacher_passes": self._num_passes() - before,
                }
                write_json(record, cost)
        self.nodes.append(Node(name, identity, made_now=is_new, **read_json(record)))
        return path

    def _num_passes(self) -> int:
        return self.store.num_passes if "store" in self.__dict__ else 0

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        path = self.folder / "locks" / f"{name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path):
            yield

    def key(self, *parts: object) -> str:
        """A name for what these parts decide, with the rows and settings of this laboratory."""
        return hash_value([self._base, *parts])

    @cached_property
    def _base(self) -> str:
        """Everything that decides rows, texts and scales; strategies and addresses do not."""
        left_out: dict[str, Any] = dict.fromkeys(NOT_MODEL_SETTINGS, True)
        shaping = self.settings.model_dump(
            mode="json", exclude=left_out | {"student": {"arms_refresh", "head_refresh"}}
        )
        arms = self.settings.student.arms_refresh
        finetune = arms.finetune or StageSettings()
        decided = (arms.window_hours, finetune.max_rows, format_time(self.as_of))
        return hash_value([FORMAT, shaping, decided])


def default_moment(settings: DriftlineSettings, *, slice_hours: float, num_slices: int) -> datetime:
    """The last full hour after which the log still holds so many test slices.

    Raises:
        SettingsError: that moment lies in the part of the log that the teacher learned from.
    """
    log = ImpressionLog.open(Workspace.of(settings).clean, settings)
    length = timedelta(hours=slice_hours * num_slices)
    moment = floor_time(log.span.end - length, timedelta(hours=1))
    if moment < log.split.ood.end:
        raise SettingsError(
            f"{num_slices} slices of {slice_hours:g} h need a recent part of at least "
            f"{length}, the log has {log.split.id}; take a smaller slice_hours or split.ood_share"
        )
    return moment


def with_clicks(frame: pa.Table, clicked: NDArray[np.float32]) -> pa.Table:
    """The same rows with other labels: shares, or NaN for not known."""
    at = frame.column_names.index("clicked")
    return frame.set_column(at, "clicked", pa.array(clicked, pa.float32()))


def void(_: object) -> None:
    """Turn a function that gives something into one that gives nothing."""


def _bounded(rows: TrainingRows) -> TrainingRows:
    return replace(rows, validation=newest(rows.validation, MAX_VALIDATION_ROWS))


def _sampled(frame: pa.Table) -> pa.Table:
    """At most about ``MAX_TEST_ROWS``: requests drawn by hash, whole."""
    if frame.num_rows <= MAX_TEST_ROWS:
        return frame
    position = unit_hash(request_keys(frame), salt="driftline-test")
    return frame.filter(pa.array(position < MAX_TEST_ROWS / frame.num_rows))


def _merged(first: pa.Table, second: pa.Table) -> pa.Table:
    """Texts of both, by ascending id; what stands in both is the same text."""
    known = first["text_id"].to_numpy()
    new = second.filter(pa.array(~np.isin(second["text_id"].to_numpy(), known)))
    both = pa.concat_tables([first, new.select(first.column_names).cast(first.schema)])
    return both.take(pa.array(np.argsort(both["text_id"].to_numpy(), kind="stable")))

"""Everything a strategy is run on, prepared once: rows, texts, scales, soft labels, trained stages.

Whatever a laboratory makes has a name made from what decides it; see ``laboratory_nodes``.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from driftline.features.log import ImpressionLog
from driftline.pipelines.frozen_teacher import Teacher
from driftline.pipelines.labels import SoftLabels, shift_prior
from driftline.pipelines.laboratory_nodes import (
    IDENTITY_LENGTH,
    Node,
    NodeFolder,
    Runner,
    run_here,
)
from driftline.pipelines.laboratory_rows import (
    Logits,
    Rows,
    Source,
    TextSet,
    merged_texts,
    with_clicks,
)
from driftline.pipelines.market_moment import MarketMoment
from driftline.pipelines.prepare import prepare_features
from driftline.pipelines.student import write_student_texts
from driftline.pipelines.training_sets import newest
from driftline.platform.artefacts import write_json
from driftline.platform.distillation.keys import FeatureKey
from driftline.platform.errors import SettingsError
from driftline.platform.kinds import foreign_code
from driftline.platform.sampling import soft_labelled
from driftline.platform.settings import DistilSettings, DriftlineSettings
from driftline.platform.stages import StageJob, StageResult
from driftline.platform.teacher_memory import Labelled
from driftline.platform.training import Report
from driftline.platform.transfer.sets import Natural, TransferRows, TransferSource
from driftline.platform.windows import format_time
from driftline.platform.workspace import Workspace


@dataclass
class Laboratory(MarketMoment):
    """One market at one moment, with its teacher and a place for what is trained. See ``open``.

    ``seed`` is that of starts, orders and transfer sets; rows follow ``settings.seed``. So all
    seeds share one pass of the teacher.
    """

    folder: Path
    seed: int
    run: Runner = run_here
    progress: Callable[[int, int], None] | None = None
    """Called with rows labelled and rows in all, while the teacher is asked."""
    keys: tuple[FeatureKey, ...] = ()
    """Inner tensors that the teacher's passes keep for matches; see ``keep``."""
    _passes_before: int = field(default=0, init=False, repr=False)

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
        return cls(settings, as_of, slice_hours, folder=folder.absolute(), seed=seed, run=run)

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

    def keep(self, keys: Iterable[FeatureKey]) -> None:
        """Name inner tensors that strategies need, before the rows of any of them are labelled.

        Tensors that are named only after rows were labelled cost these rows a second pass.
        """
        wanted = tuple(sorted({*self.keys, *keys}, key=str))
        if wanted != self.keys:
            self.keys = wanted
            former: SoftLabels | None = self.__dict__.pop("feature_store", None)
            self._passes_before += former.num_passes if former is not None else 0

    @cached_property
    def feature_store(self) -> SoftLabels:
        """The same soft labels, whose passes also keep the tensors that were named."""
        return self.store.with_keys(self.keys)

    @property
    def features(self) -> Path:
        """Folder of these tensors; see ``TeacherFeatures``.

        Raises:
            ValueError: the teacher has no such tensor.
        """
        found = self.feature_store.features
        assert found is not None, "no tensor was named"
        return found.folder

    def soft_labels(self, frame: pa.Table) -> Logits:
        """The teacher's logits of rows, on the student's prior. ``[N, 2]``."""
        return self.labelled(frame).logits

    def labelled(
        self, frame: pa.Table, *, texts: pa.Table | None = None, features: bool = False
    ) -> Labelled:
        """The same, and where the inner tensors of each row are.

        Args:
            frame: Rows, in order of time.
            texts: Texts of made-up rows; those of the log when not given.
            features: Also keep the tensors named by ``keep``.
        """
        store = self.feature_store if features else self.store
        if texts is not None:
            store = store.with_texts(texts)
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
        with self.made.lock("teacher"):
            yield

    # --- rows of the stages ---------------------------------------------------------------

    def distil_rows(self, distil: DistilSettings, *, features: bool = False) -> tuple[Rows, Rows]:
        """Training and validation rows of a distillation, labelled (papers.md S0.18).

        The transfer set is made of the rows the teacher may be asked about, newest ``max_rows``;
        validation rows stay natural. Rows that were made up have no click. The story of the set is
        written to ``transfer/``.

        Args:
            distil: Which rows, and what is made of them.
            features: The rows also point to the tensors named by ``keep``.
        """
        rows = self.training_rows
        natural = distil.transfer == Natural()
        drawn = None if natural else [distil.transfer.model_dump(mode="json"), self.seed]
        if drawn is not None and (code := foreign_code(distil.transfer)):
            drawn.append(code)
        key = self.key("distil", distil.on, distil.max_rows, drawn, self.store.hash)
        kept = f".{self.features.name}" if features else ""

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
            texts = TextSet(f"{key}.texts", lambda: merged_texts(self.texts.table, made().texts))

        def read() -> pa.Table:
            if natural:
                return asked()
            frame = made().frame
            if not made().has_clicks:
                known = np.where(made().made_up, np.nan, frame["clicked"].to_numpy())
                frame = with_clicks(frame, known.astype(np.float32))
            return frame

        def read_validation() -> pa.Table:
            return self.asked(rows(distil.on).validation)

        def label() -> Labelled:
            own = None if natural else texts.table
            return self.labelled(train.frame, texts=own, features=features)

        def label_validation() -> Labelled:
            return self.labelled(validation.frame, features=features)

        train = Rows(f"{key}{kept}", texts, read, label)
        validation = Rows(f"{key}.validation{kept}", texts, read_validation, label_validation)
        return train, validation

    def click_rows(self, source: Source, *, max_rows: int | None) -> tuple[Rows, Rows]:
        """Training and validation rows of a stage that learns from clicks."""
        rows = self.training_rows
        return (
            Rows(
                self.key("clicks", source, max_rows),
                self.texts,
                lambda: newest(rows(source).train, max_rows),
            ),
            Rows(
                self.key("clicks", source, "validation"),
                self.texts,
                lambda: rows(source).validation,
            ),
        )

    def text_file(self, texts: TextSet) -> Path:
        """Texts as tokens, for the arms."""
        return self.make(
            "texts.arrow",
            lambda path: write_student_texts(self.settings, texts.table, path),
            key=texts.key,
        )

    # --- what is made ---------------------------------------------------------------------

    @cached_property
    def made(self) -> NodeFolder:
        """Files and trained stages; their teacher passes are counted."""
        return NodeFolder(self.folder, self.run, self._num_passes)

    @property
    def nodes(self) -> list[Node]:
        """Everything asked for so far, in order."""
        return self.made.nodes

    def train(self, job: StageJob, *, report: Report | None = None) -> Path:
        """See ``NodeFolder.train``."""
        return self.made.train(job, report=report)

    def train_node(
        self, name: str, run: Callable[[Path, Path], StageResult], *, identity: str
    ) -> Path:
        """See ``NodeFolder.train_node``."""
        return self.made.train_node(name, run, identity=identity)

    def make(self, name: str, write: Callable[[Path], object], *, key: object) -> Path:
        """See ``NodeFolder.make``."""
        return self.made.make(name, write, key=key)

    def _num_passes(self) -> int:
        opened = (self.__dict__.get(name) for name in ("store", "feature_store"))
        return self._passes_before + sum(store.num_passes for store in opened if store is not None)

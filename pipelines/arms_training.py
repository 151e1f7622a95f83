"""The stages of an arms refresh, one after the other, each resumable by itself."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from driftline.features.log import ImpressionLog
from driftline.features.texts import known_texts
from driftline.pipelines.labels import SoftLabels
from driftline.pipelines.student import (
    soft_labels,
    student_tokenizer,
    write_student_texts,
)
from driftline.pipelines.training_sets import (
    TrainingRows,
    known_frame,
    newest,
    split_rows,
    write_pair_examples,
)
from driftline.platform.bundle import (
    Calibration,
    VectorCache,
)
from driftline.platform.columns import head_columns
from driftline.platform.contract import TIME
from driftline.platform.inference import encode_texts, load_model
from driftline.platform.initialisers import MlmStart
from driftline.platform.models.spec import (
    EncoderSpec,
    HeadOnlySpec,
    ModelSpec,
    TwinSpec,
    encoder_spec,
    head_spec,
)
from driftline.platform.ray_runtime import fit
from driftline.platform.sampling import soft_labelled
from driftline.platform.scorer import Scorer, load_head
from driftline.platform.settings import DriftlineSettings, ObjectiveSettings, StageSettings
from driftline.platform.stages import StageJob
from driftline.platform.tabular import TabularEncoder
from driftline.platform.windows import Window, format_time
from driftline.platform.workspace import Workspace

MAX_VALIDATION_ROWS = 5_000

Progress = Callable[[int, int], None]


@dataclass
class ArmsTraining:
    """The stages of one arms refresh; each one's weights are kept until the bundle is out."""

    settings: DriftlineSettings
    scratch: Path
    window: Window
    stale: TrainingRows
    recent: TrainingRows
    recent_frame: pa.Table
    tabular: TabularEncoder
    texts: pa.Table
    texts_file: Path
    encoder: EncoderSpec | None
    head_spec: HeadOnlySpec
    store: SoftLabels
    progress: Progress | None
    core_seconds: float = 0.0

    @classmethod
    def prepare(
        cls, settings: DriftlineSettings, *, as_of: datetime, progress: Progress | None
    ) -> "ArmsTraining":
        """Rows, texts and shapes of everything the stages need, as known at ``as_of``."""
        workspace = Workspace.of(settings)
        arms = settings.student.arms_refresh
        split = ImpressionLog.open(workspace.clean, settings).split
        window = Window(split.ood.start, as_of).last(timedelta(hours=arms.window_hours))
        stale_end = min(split.ood.end, as_of)
        recent_frame = known_frame(settings, window, as_of=as_of)
        distil = arms.distil or StageSettings()
        stale_frame = known_frame(settings, Window(split.ood.start, stale_end), as_of=as_of)
        recent = split_rows(
            settings, recent_frame, max_rows=(arms.finetune or StageSettings()).max_rows
        )
        recent = replace(recent, validation=newest(recent.validation, MAX_VALIDATION_ROWS))
        stale = _asked(settings, split_rows(settings, stale_frame), max_rows=distil.max_rows)
        tabular = TabularEncoder.fit(
            recent.train, head_columns(settings), num_bins=settings.student.head.num_bins
        )
        scratch = workspace.scratch / f"arms-{format_time(as_of).replace(':', '')}"
        texts = known_texts(settings, as_of=as_of)
        encoder = None
        if settings.select(kind="text"):
            vocabulary_size = student_tokenizer(settings).vocabulary_size
            encoder = encoder_spec(settings.student.encoder, vocabulary_size=vocabulary_size)
        head = head_spec(
            settings.student.head,
            vector_size=encoder.hidden_size if encoder else 0,
            cardinalities=tabular.cardinalities,
            num_numbers=tabular.num_numbers,
        )
        return cls(
            settings=settings,
            scratch=scratch,
            window=window,
            stale=stale,
            recent=recent,
            recent_frame=recent_frame,
            tabular=tabular,
            texts=texts,
            texts_file=write_student_texts(settings, texts, scratch / "texts.arrow"),
            encoder=encoder,
            head_spec=HeadOnlySpec(head=head),
            store=SoftLabels.open(settings),
            progress=progress,
        )

    @property
    def has_text(self) -> bool:
        """Without text there are no arms, only a head."""
        return self.encoder is not None

    @property
    def num_rows(self) -> int:
        """Rows learned from."""
        return self.stale.train.num_rows + self.recent.train.num_rows

    @property
    def model(self) -> ModelSpec:
        """What the stages train."""
        if self.encoder is None:
            return self.head_spec
        return TwinSpec(
            encoder=self.encoder, tie_arms=self.settings.student.tie_arms, head=self.head_spec.head
        )

    def run(self) -> Path:
        """MLM, distil, fine-tune, self-train; gives the weights of the last stage."""
        arms = self.settings.student.arms_refresh
        weights: tuple[Path, ...] = ()
        if isinstance(arms.init, MlmStart) and self.has_text and self.texts.num_rows:
            weights = (self._stage("mlm", arms.mlm, self.texts_file, None, start=()),)
        if arms.distil is not None:
            labels = [soft_labels(self.settings, part, self.store) for part in _parts(self.stale)]
            files = self._examples("stale", self.stale, labels)
            weights = (
                self._stage(
                    "distil",
                    arms.distil.stage,
                    *files,
                    start=weights,
                    objective=arms.objective,
                    stop_on="soft_loss",
                ),
            )
        distilled = weights
        files = self._examples("recent", self.recent, None)
        finetuned = self._stage("finetune", arms.finetune or StageSettings(), *files, start=weights)
        if not arms.self_training.enabled:
            return finetuned
        return self._self_train(finetuned, distilled, validation=files[1])

    def _self_train(
        self, finetuned: Path, distilled: tuple[Path, ...], *, validation: Path
    ) -> Path:
        """Learn both parts again from the fine-tuned student's own labels (papers.md S0.20)."""
        rounds = self.settings.student.arms_refresh.self_training
        scorer = self.scorer(finetuned, self.encode(finetuned))
        earlier = pc.less(self.stale.train["event_time"], pa.scalar(self.window.start, TIME))
        both = pa.concat_tables([self.stale.train.filter(earlier), self.recent.train])
        own = scorer.logit_pairs(both).astype(np.float32)
        examples = self._write("both", both, own)
        start = distilled if rounds.start == "distilled" and distilled else (finetuned,)
        return self._stage(
            "self_training",
            rounds.stage,
            examples,
            validation,
            start=start,
            objective=rounds.objective,
        )

    def train_head(self, weights: Path, vectors: Path) -> Path:
        """The head alone over the finished vectors, on every recent row, several times."""
        stage = self.settings.student.arms_refresh.head
        rows = split_rows(self.settings, self.recent_frame, max_rows=stage.max_rows)
        rows = replace(rows, validation=self.recent.validation)
        objective = self.settings.student.head_refresh.objective
        taught = objective.needs_teacher
        soft = soft_labels(self.settings, rows.train, self.store) if taught else None
        return self._stage(
            "head",
            stage,
            self._write("head.train", rows.train, soft),
            self._write("head.validation", rows.validation, None),
            start=(weights,),
            objective=objective,
            vectors=vectors,
        )

    def _stage(
        self,
        name: str,
        stage: StageSettings,
        examples: Path,
        validation: Path | None,
        *,
        start: tuple[Path, ...],
        objective: ObjectiveSettings | None = None,
        stop_on: Literal["loss", "soft_loss", "auc"] = "auc",
        vectors: Path | None = None,
    ) -> Path:
        """Run one stage; with ``vectors`` only the head is trained, over them."""
        output = self.scratch / f"{name}.safetensors"
        is_mlm = name == "mlm"
        reads_texts = self.has_text and vectors is None and not is_mlm
        job = StageJob(
            name=f"arms.{name}",
            model=self.model if vectors is None else self.head_spec,
            task="mlm" if is_mlm else "clicks",
            examples=examples,
            validation=validation,
            texts=self.texts_file if reads_texts else None,
            vectors=vectors if self.has_text else None,
            objective=objective,
            stage=stage,
            initial=start,
            output=output,
            checkpoints=self.scratch / f"{name}.checkpoints",
            stop_on="loss" if is_mlm else stop_on,
            seed=self.settings.seed,
            trainable="all",
        )
        num_workers = self.settings.student.arms_refresh.num_workers
        result = fit(job, num_workers=num_workers, ray=self.settings.ray, progress=self.progress)
        self.core_seconds += result.core_seconds
        return output

    def encode(self, weights: Path) -> Path:
        """Vectors of every text in both roles, from these arms."""
        spec = self.model
        if not isinstance(spec, TwinSpec):
            return self._no_vectors()
        destination = weights.with_suffix(".vectors")
        encode_texts(load_model(spec, weights), spec, self.texts_file, destination)
        return destination

    def scorer(self, weights: Path, vectors: Path) -> Scorer:
        """The student with these weights, not calibrated."""
        keep_rate = self.settings.labels.negative_keep_rate
        head = load_head(self.head_spec, weights)
        return Scorer(head, VectorCache.load(vectors), self.tabular, Calibration(keep_rate))

    def _examples(
        self, name: str, rows: TrainingRows, labels: list[NDArray[np.float32]] | None
    ) -> tuple[Path, Path]:
        soft: list[NDArray[np.float32] | None] = [*labels] if labels else [None, None]
        train, validation = (
            self._write(f"{name}.{part}", frame, logits)
            for part, frame, logits in zip(("train", "validation"), _parts(rows), soft, strict=True)
        )
        return train, validation

    def _write(self, name: str, frame: pa.Table, logits: NDArray[np.float32] | None) -> Path:
        return write_pair_examples(
            self.scratch / f"{name}.arrow",
            frame,
            tabular=self.tabular,
            text_ids=self.texts["text_id"].to_numpy(),
            teacher_logits=logits,
        )

    def _no_vectors(self) -> Path:
        path = self.scratch / "none.vectors"
        if not path.exists():
            empty = np.empty((0, 0), np.float32)
            self.scratch.mkdir(parents=True, exist_ok=True)
            VectorCache(np.empty(0, np.int64), empty, empty).save(path)
        return path


def _asked(
    settings: DriftlineSettings, rows: TrainingRows, *, max_rows: int | None
) -> TrainingRows:
    """Rows to distil from: those the teacher is asked about."""
    share = settings.labels.soft_label_share
    asked = soft_labelled(rows.train, share=share, seed=settings.seed)
    return TrainingRows(
        train=newest(rows.train.filter(pa.array(asked)), max_rows),
        validation=newest(rows.validation, MAX_VALIDATION_ROWS),
    )


def _parts(rows: TrainingRows) -> tuple[pa.Table, pa.Table]:
    return rows.train, rows.validation

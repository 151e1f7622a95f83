"""The MLP baseline of a replay: hashed ids, bag of words, categories, numbers (papers.md S0.34)."""

import shutil
import tempfile
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import nn

from driftline.features.texts import known_texts
from driftline.pipelines.student import write_student_texts
from driftline.pipelines.training_sets import (
    replayed_frame,
    split_rows,
    write_pair_examples,
)
from driftline.platform.artefacts import link_or_copy, read_json, write_json
from driftline.platform.bundle import Calibration
from driftline.platform.checkpoints import load_weights
from driftline.platform.columns import head_columns
from driftline.platform.examples import open_texts
from driftline.platform.inputs import open_inputs
from driftline.platform.models.build import build_model
from driftline.platform.models.spec import MlpSpec
from driftline.platform.settings import DriftlineSettings, StageSettings
from driftline.platform.stages import StageJob, run_stage
from driftline.platform.tabular import TabularEncoder
from driftline.platform.tasks import predict
from driftline.platform.windows import Window

WEIGHTS, TEXTS, TABULAR, SPEC = "mlp.safetensors", "texts.arrow", "tabular.json", "spec.json"


@dataclass(frozen=True)
class MlpPeer:
    """A trained baseline; its files lie in ``folder``."""

    folder: Path
    spec: MlpSpec
    tabular: TabularEncoder
    keep_rate: float

    @classmethod
    def fit(cls, settings: DriftlineSettings, window: Window, *, as_of: datetime) -> "MlpPeer":
        """Train from scratch on all that is known, as the head is trained in an arms refresh."""
        frame = replayed_frame(settings, window, as_of=as_of, replay_share=0)
        rows = split_rows(settings, frame)
        tabular = TabularEncoder.fit(
            rows.train, head_columns(settings), num_bins=settings.student.head.num_bins
        )
        spec = MlpSpec(
            cardinalities=tabular.cardinalities,
            num_numbers=tabular.num_numbers,
            num_word_buckets=settings.tokenizer.vocabulary_size + 8,
            hidden_sizes=settings.student.head.hidden_sizes,
            dropout=settings.student.head.dropout,
        )
        new = cls(Path(tempfile.mkdtemp()), spec, tabular, settings.labels.negative_keep_rate)
        write_student_texts(settings, known_texts(settings, as_of=as_of), new.folder / TEXTS)
        stage = settings.student.arms_refresh.head or StageSettings()
        new._train(settings, frame, initial=(), stage=stage)
        return new

    def continued(self, settings: DriftlineSettings, span: Window, *, as_of: datetime) -> "MlpPeer":
        """Train on with the head's own recipe: same window, replay, rate and passes."""
        refresh = settings.student.head_refresh
        window = Window(span.start, as_of).last(timedelta(hours=refresh.window_hours))
        frame = replayed_frame(settings, window, as_of=as_of, replay_share=refresh.replay_share)
        tabular = self.tabular.refitted(split_rows(settings, frame).train)
        new = replace(self, folder=Path(tempfile.mkdtemp()), tabular=tabular)
        write_student_texts(settings, known_texts(settings, as_of=as_of), new.folder / TEXTS)
        start = (self.folder / WEIGHTS,)
        new._train(settings, frame, initial=start, stage=refresh.finetune)
        return new

    def score(self, frame: pa.Table) -> NDArray[np.float64]:
        """Click probability of each row, on the natural click rate. ``[B]``."""
        with tempfile.TemporaryDirectory() as scratch:
            inputs = open_inputs(
                self.spec,
                self._examples(Path(scratch) / "rows.arrow", frame),
                texts=self.folder / TEXTS,
            )
            rows = np.arange(frame.num_rows)
            with torch.inference_mode():
                logits = predict(self._model, inputs, rows, device=torch.device("cpu"))
        return Calibration(self.keep_rate).probabilities(logits[:, 1] - logits[:, 0])

    def save(self, folder: Path) -> None:
        """Keep it, so that a killed replay continues with the same weights."""
        for name in (WEIGHTS, TEXTS):
            link_or_copy(self.folder / name, folder / name)
        (folder / TABULAR).write_text(self.tabular.to_json())
        write_json(
            folder / SPEC, {"spec": self.spec.model_dump(mode="json"), "keep_rate": self.keep_rate}
        )
        shutil.rmtree(self.folder)

    @classmethod
    def load(cls, folder: Path) -> "MlpPeer":
        """Read what ``save`` wrote."""
        raw = read_json(folder / SPEC)
        tabular = TabularEncoder.from_json((folder / TABULAR).read_text())
        return cls(folder, MlpSpec.model_validate(raw["spec"]), tabular, float(raw["keep_rate"]))

    @cached_property
    def _model(self) -> nn.Module:
        model = build_model(self.spec)
        load_weights(model, self.folder / WEIGHTS)
        return model.eval()

    def _train(
        self,
        settings: DriftlineSettings,
        frame: pa.Table,
        *,
        initial: tuple[Path, ...],
        stage: StageSettings,
    ) -> None:
        rows = split_rows(settings, frame)
        job = StageJob(
            name="peer.mlp",
            model=self.spec,
            task="clicks",
            examples=self._examples(self.folder / "train.arrow", rows.train),
            validation=self._examples(self.folder / "validation.arrow", rows.validation),
            texts=self.folder / TEXTS,
            stage=stage,
            initial=initial,
            output=self.folder / WEIGHTS,
            checkpoints=self.folder / "checkpoints",
            stop_on="auc",
            seed=settings.seed,
        )
        run_stage(job)

    def _examples(self, destination: Path, frame: pa.Table) -> Path:
        return write_pair_examples(
            destination,
            frame,
            tabular=self.tabular,
            text_ids=open_texts(self.folder / TEXTS).text_id,
            product_buckets=self.spec.num_product_buckets,
        )

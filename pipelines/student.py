"""What both refreshes share: texts and vectors, soft labels, calibration, and the bundle."""

from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from driftline.features.log import ImpressionLog
from driftline.features.views import feature_view_versions
from driftline.pipelines.labels import SoftLabels, shift_prior
from driftline.pipelines.provenance import code_version, settings_hash
from driftline.pipelines.student_vocabulary import small_tokenizer
from driftline.pipelines.teacher import open_tokenizer
from driftline.pipelines.training_sets import newest
from driftline.platform.artefacts import hash_file
from driftline.platform.bundle import Calibration
from driftline.platform.columns import head_columns
from driftline.platform.examples import Ragged, Texts, write_texts
from driftline.platform.metrics import fit_platt
from driftline.platform.sampling import part_mask, soft_labelled
from driftline.platform.scorer import Scorer
from driftline.platform.settings import CheckpointEncoder, DriftlineSettings
from driftline.platform.text import Tokenizer, serialise_table
from driftline.platform.windows import Window, format_time
from driftline.platform.workspace import Workspace

MAX_CALIBRATION_ROWS = 50_000


def student_tokenizer(settings: DriftlineSettings) -> Tokenizer:
    """The teacher's tokeniser (papers.md S0.26), the student's own small one, or a checkpoint's."""
    encoder = settings.student.encoder
    if isinstance(encoder, CheckpointEncoder):
        return Tokenizer(encoder.path)
    if settings.student.vocabulary_size is not None:
        return small_tokenizer(settings, vocabulary_size=settings.student.vocabulary_size)
    return open_tokenizer(settings)


def write_student_texts(settings: DriftlineSettings, texts: pa.Table, destination: Path) -> Path:
    """Tokenise texts for the arms: one ``name: value`` sequence a product (papers.md A0.18)."""
    fields = texts.select([feature.name for feature in settings.select(kind="text")])
    strings = serialise_table(fields).to_pylist() if fields.num_columns else []
    max_tokens = settings.student.encoder.max_tokens
    tokens = student_tokenizer(settings).encode(strings, max_tokens=max_tokens) if strings else []
    text_id = texts["text_id"].to_numpy().astype(np.int64)
    write_texts(destination, Texts(text_id, Ragged.of(tokens)))
    return destination


def soft_labels(
    settings: DriftlineSettings, frame: pa.Table, store: SoftLabels
) -> NDArray[np.float32]:
    """The frozen teacher's logits, moved to the student's prior; NaN where it is not asked.

    ``[B, 2]``.
    """
    asked = soft_labelled(frame, share=settings.labels.soft_label_share, seed=settings.seed)
    logits = np.full((frame.num_rows, 2), np.nan, np.float32)
    logits[asked] = shift_prior(
        store.logits(frame.filter(pa.array(asked))),
        from_keep_rate=store.teacher.keep_rate,
        to_keep_rate=settings.labels.negative_keep_rate,
    )
    return logits


def calibrated(settings: DriftlineSettings, scorer: Scorer, validation: pa.Table) -> Calibration:
    """Slope and intercept from the newest validation rows, on top of the exact prior shift."""
    rows = newest(validation, MAX_CALIBRATION_ROWS)
    keep_rate = settings.labels.negative_keep_rate
    labels = rows["clicked"].to_numpy().astype(bool)
    if labels.sum() == 0 or labels.all():
        return Calibration(keep_rate)
    platt = fit_platt(labels, scorer.logits(rows) + np.log(keep_rate), prior_strength=20.0)
    return Calibration(keep_rate, platt.slope, platt.intercept)


def newest_validation(
    settings: DriftlineSettings, frame: pa.Table, *, min_clicks: int = 400
) -> pa.Table:
    """The newest validation rows of a frame that hold enough clicks to calibrate by."""
    rows = frame.filter(part_mask(frame, "validation", split=settings.split))
    clicks_from_end = np.cumsum(rows["clicked"].to_numpy()[::-1].astype(np.int64))
    needed = int(np.searchsorted(clicks_from_end, min_clicks)) + 1
    return newest(rows, needed)


def bundle_contract(settings: DriftlineSettings) -> dict[str, Any]:
    """What a server must know to check a request and to read features."""
    key_type = ImpressionLog.open(Workspace.of(settings).clean, settings).key_type
    return {
        "key_type": str(key_type),
        "columns": [asdict(column) for column in head_columns(settings)],
        "context": {feature.name: feature.kind for feature in settings.select(entity="impression")},
        "text_features": [feature.name for feature in settings.select(kind="text")],
        "tiers": settings.tiers.model_dump(mode="json"),
        "label_maturity_minutes": settings.labels.maturity_minutes,
    }


def lineage(
    settings: DriftlineSettings,
    *,
    kind: str,
    as_of: datetime,
    window: Window,
    num_rows: int,
    teacher: str,
    arms: str,
    parent: str | None,
) -> dict[str, Any]:
    """Where a bundle comes from. No wall-clock time: the same inputs give the same fingerprint."""
    return {
        "name": settings.name,
        "kind": kind,
        "as_of": format_time(as_of),
        "window": [format_time(window.start), format_time(window.end)],
        "num_rows": num_rows,
        "teacher": teacher,
        "arms": arms,
        "parent": parent,
        "feature_views": feature_view_versions(settings),
        "settings": settings_hash(settings),
        "code": code_version(),
    }


def arms_id(weights: Path) -> str:
    """Name of a pair of arms: the hash of the weights they were born with."""
    return hash_file(weights)[:12]

"""The hourly refresh: the fusion MLP alone, on cached vectors and fresh features.

Reads like this: take the champion, bring features and vectors up to date, ask the frozen teacher
about the new rows, continue training, calibrate, bundle, judge, publish.
"""

import logging
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pyarrow as pa

from driftline.features.log import ImpressionLog
from driftline.features.texts import known_texts
from driftline.pipelines.catalogue_vectors import new_vectors
from driftline.pipelines.head_training import HeadStart, train_head
from driftline.pipelines.prepare import prepare_features
from driftline.pipelines.provenance import settings_hash
from driftline.pipelines.publish import Challenger, champion_before, publish
from driftline.pipelines.records import RefreshRecord, read_record
from driftline.pipelines.student import (
    bundle_contract,
    calibrated,
    lineage,
    newest_validation,
)
from driftline.pipelines.training_sets import replayed_frame
from driftline.platform.bundle import (
    ARMS,
    HEAD,
    TOKENIZER,
    VECTORS,
    Bundle,
    BundleParts,
    write_bundle,
)
from driftline.platform.errors import MissingArtefactError
from driftline.platform.models.spec import HeadOnlySpec
from driftline.platform.settings import DriftlineSettings
from driftline.platform.vector_deltas import known_vectors
from driftline.platform.windows import Window, format_time
from driftline.platform.workspace import Workspace

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


def refresh_head(
    settings: DriftlineSettings, *, as_of: datetime, progress: Progress | None = None
) -> RefreshRecord:
    """Refresh the head with everything known at ``as_of``; a second call changes nothing.

    Source: papers.md S0.4, A0.17 (which parameters move), S0.16 (frozen-teacher labels), S0.20.

    Raises:
        MissingArtefactError: no champion yet; arms come first.
        EmptyWindowError: no matured impression to learn from.
    """
    workspace = Workspace.of(settings)
    done = read_record(workspace, "head", as_of, settings_hash=settings_hash(settings))
    if done is not None:
        logger.info("head refresh of %s was done before: %s", done.as_of, done.decision)
        return done
    started, cpu_started = time.monotonic(), time.process_time()
    champion = champion_before(settings, as_of, kind="head")
    if champion is None:
        raise MissingArtefactError(
            f"no champion before {format_time(as_of)}; run `driftline refresh arms CONFIG` first"
        )
    prepare_features(settings, as_of=as_of)
    scratch = workspace.scratch / f"head-{format_time(as_of).replace(':', '')}"
    vectors = _current_vectors(settings, champion, scratch, as_of=as_of)
    rows, window = _training_rows(settings, as_of)
    refresh = settings.student.head_refresh
    start = HeadStart(
        weights=champion.path / HEAD if refresh.warm_start else _arms_head(settings, champion),
        spec=HeadOnlySpec.model_validate(champion.student["head"]),
        tabular=champion.tabular,
        vectors=vectors,
    )
    trained = train_head(settings, start, rows, scratch=scratch, progress=progress)
    calibration = calibrated(settings, trained.scorer, newest_validation(settings, rows))
    bundle = write_bundle(
        workspace.bundles,
        BundleParts(
            head=trained.weights,
            arms=_existing(champion.path / ARMS),
            vectors=vectors,
            projected=trained.scorer.projected,
            tokenizer=_existing(champion.path / TOKENIZER),
            tabular=trained.scorer.tabular,
            calibration=calibration,
            student=champion.student,
            contract=bundle_contract(settings),
            lineage=lineage(
                settings,
                kind="head",
                as_of=as_of,
                window=window,
                num_rows=trained.num_rows,
                teacher=str(champion.lineage["teacher"]),
                arms=str(champion.lineage["arms"]),
                parent=champion.fingerprint,
            ),
        ),
    )
    return publish(
        settings,
        Challenger(
            bundle=bundle,
            num_rows=trained.num_rows,
            seconds=time.monotonic() - started,
            core_seconds=time.process_time() - cpu_started + trained.core_seconds,
        ),
        champion=champion,
        as_of=as_of,
        scratch=scratch,
    )


def _current_vectors(
    settings: DriftlineSettings, champion: Bundle, scratch: Path, *, as_of: datetime
) -> Path:
    """The champion's vectors, its deltas', and those of new or edited texts from the same arms."""
    known = known_vectors(champion)
    texts = known_texts(settings, as_of=as_of)
    fresh = new_vectors(champion, known, texts)
    if fresh is None and known is champion.vectors:
        return champion.path / VECTORS
    scratch.mkdir(parents=True, exist_ok=True)
    destination = scratch / VECTORS
    (known if fresh is None else known.merged(fresh)).save(destination)
    return destination


def _training_rows(settings: DriftlineSettings, as_of: datetime) -> tuple[pa.Table, Window]:
    """The newest window, and older rows to replay so that the head does not forget."""
    refresh = settings.student.head_refresh
    log = ImpressionLog.open(Workspace.of(settings).clean, settings)
    window = Window(log.span.start, as_of).last(timedelta(hours=refresh.window_hours))
    frame = replayed_frame(settings, window, as_of=as_of, replay_share=refresh.replay_share)
    return frame, window


def _arms_head(settings: DriftlineSettings, champion: Bundle) -> Path:
    """The head that the champion's arms were born with."""
    return Workspace.of(settings).arms / str(champion.lineage["arms"]) / HEAD


def _existing(path: Path) -> Path | None:
    return path if path.exists() else None

"""The monthly refresh: new arms, new vectors, and with them a new head, in one bundle.

MLM on the catalogue's texts, distillation on the stale rows, fine-tuning on the recent ones,
self-training on both; then every text is encoded, the head calibrated, the whole judged and
published (papers.md S0.17-S0.20, S0.33).
"""

import logging
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from driftline.pipelines.arms_training import ArmsTraining
from driftline.pipelines.prepare import prepare_features
from driftline.pipelines.provenance import settings_hash
from driftline.pipelines.publish import Challenger, champion_before, publish
from driftline.pipelines.records import RefreshRecord, read_record
from driftline.pipelines.student import (
    arms_id,
    bundle_contract,
    calibrated,
    lineage,
    newest_validation,
    student_tokenizer,
)
from driftline.platform.artefacts import link_or_copy, whole_directory
from driftline.platform.bundle import (
    ARMS,
    HEAD,
    TABULAR,
    TOKENIZER,
    VECTORS,
    BundleParts,
    write_bundle,
)
from driftline.platform.checkpoints import extract_weights
from driftline.platform.scorer import student_json
from driftline.platform.settings import DriftlineSettings
from driftline.platform.workspace import Workspace

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


def refresh_arms(
    settings: DriftlineSettings, *, as_of: datetime, progress: Progress | None = None
) -> RefreshRecord:
    """Refresh arms and head with everything known at ``as_of``; a second call changes nothing.

    Without text features there are no arms; the same stages then train the head alone.

    Raises:
        MissingArtefactError: no frozen teacher yet.
        EmptyWindowError: no matured impression to learn from.
    """
    workspace = Workspace.of(settings)
    done = read_record(workspace, "arms", as_of, settings_hash=settings_hash(settings))
    if done is not None:
        logger.info("arms refresh of %s was done before: %s", done.as_of, done.decision)
        return done
    started, cpu_started = time.monotonic(), time.process_time()
    prepare_features(settings, as_of=as_of)
    training = ArmsTraining.prepare(settings, as_of=as_of, progress=progress)
    weights = training.run()
    vectors = training.encode(weights)
    head = training.train_head(weights, vectors)
    scorer = training.scorer(head, vectors)
    recent = training.recent_frame
    calibration = calibrated(settings, scorer, newest_validation(settings, recent))
    arms = _keep(training, weights, head, vectors)
    champion = champion_before(settings, as_of, kind="arms")
    tokenizer = training.scratch / TOKENIZER
    if training.has_text:
        student_tokenizer(settings).save(tokenizer)
    bundle = write_bundle(
        workspace.bundles,
        BundleParts(
            head=arms / HEAD,
            arms=arms / ARMS if training.has_text else None,
            vectors=arms / VECTORS,
            tokenizer=tokenizer if training.has_text else None,
            tabular=training.tabular,
            calibration=calibration,
            student=student_json(
                training.head_spec,
                training.encoder.model_dump(mode="json") if training.encoder else None,
                tie_arms=settings.student.tie_arms,
            ),
            contract=bundle_contract(settings),
            lineage=lineage(
                settings,
                kind="arms",
                as_of=as_of,
                window=training.window,
                num_rows=training.num_rows,
                teacher=training.store.teacher.hash[:12],
                arms=arms.name,
                parent=champion.fingerprint if champion else None,
            ),
        ),
    )
    return publish(
        settings,
        Challenger(
            bundle=bundle,
            num_rows=training.num_rows,
            seconds=time.monotonic() - started,
            core_seconds=time.process_time() - cpu_started + training.core_seconds,
        ),
        champion=champion,
        as_of=as_of,
        scratch=training.scratch,
    )


def _keep(training: ArmsTraining, weights: Path, head: Path, vectors: Path) -> Path:
    """Keep arms, vectors and the head they were born with, under the arms' own name."""
    destination = Workspace.of(training.settings).arms / arms_id(weights)
    with whole_directory(destination) as folder:
        if training.has_text:
            extract_weights(weights, folder / ARMS, prefix="arms.")
        link_or_copy(head, folder / HEAD)
        link_or_copy(vectors, folder / VECTORS)
        (folder / TABULAR).write_text(training.tabular.to_json())
    return destination

"""The monthly refresh: new arms, new vectors, and with them a new head, in one bundle.

The strategy of ``student.arms_refresh`` gives a student (papers.md S0.17-S0.20, S0.33); every text
is encoded, the head catches up with the last hours and is calibrated, the whole judged and
published.
"""

import logging
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from driftline.pipelines.arms_training import FreshArms, arms_laboratory, train_arms
from driftline.pipelines.laboratory import Laboratory
from driftline.pipelines.provenance import settings_hash
from driftline.pipelines.publish import Challenger, champion_before, publish
from driftline.pipelines.records import RefreshRecord, read_record
from driftline.pipelines.student import (
    arms_id,
    bundle_contract,
    calibrated,
    lineage,
    newest_validation,
)
from driftline.pipelines.student_forms import TwinForm
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
from driftline.platform.models.spec import HeadOnlySpec
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
    laboratory = arms_laboratory(settings, as_of=as_of, progress=progress)
    trained = train_arms(laboratory, progress=progress)
    calibration = calibrated(
        settings, trained.scorer, newest_validation(settings, laboratory.id_frame)
    )
    arms = _keep(laboratory, trained)
    champion = champion_before(settings, as_of, kind="arms")
    tokenizer = laboratory.folder / TOKENIZER
    if laboratory.has_text:
        laboratory.tokenizer.save(tokenizer)
    form = trained.student.form
    assert isinstance(form, TwinForm)
    bundle = write_bundle(
        workspace.bundles,
        BundleParts(
            head=trained.published_head,
            arms=arms / ARMS if laboratory.has_text else None,
            vectors=arms / VECTORS,
            projected=trained.scorer.projected,
            tokenizer=tokenizer if laboratory.has_text else None,
            tabular=trained.scorer.tabular,
            calibration=calibration,
            student=student_json(
                HeadOnlySpec(head=form.head),
                form.encoder.model_dump(mode="json") if form.encoder else None,
                tie_arms=settings.student.tie_arms,
            ),
            contract=bundle_contract(settings),
            lineage=lineage(
                settings,
                kind="arms",
                as_of=as_of,
                window=laboratory.id_window,
                num_rows=trained.num_rows,
                teacher=laboratory.teacher.hash[:12],
                arms=arms.name,
                parent=champion.fingerprint if champion else None,
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
        scratch=laboratory.folder,
    )


def _keep(laboratory: Laboratory, trained: FreshArms) -> Path:
    """Keep arms, vectors and the head they were born with, under the arms' own name."""
    weights = trained.student.weights
    destination = Workspace.of(laboratory.settings).arms / arms_id(weights)
    with whole_directory(destination) as folder:
        if laboratory.has_text:
            extract_weights(weights, folder / ARMS, prefix="arms.")
        link_or_copy(trained.head, folder / HEAD)
        link_or_copy(trained.vectors, folder / VECTORS)
        (folder / TABULAR).write_text(trained.tabular.to_json())
    return destination

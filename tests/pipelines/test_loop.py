"""Teacher, labels, arms, head, gate: each step does its work once, and only once."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from driftline.features.frame_files import read_frames
from driftline.pipelines.frozen_teacher import Teacher
from driftline.pipelines.labels import SoftLabels, shift_prior
from driftline.pipelines.provenance import settings_hash
from driftline.pipelines.publish import champion_before
from driftline.pipelines.records import read_record, read_records
from driftline.pipelines.refresh_arms import refresh_arms
from driftline.pipelines.refresh_head import refresh_head
from driftline.pipelines.replay import log_split
from driftline.pipelines.teacher import train_teacher
from driftline.platform.artefacts import hash_file
from driftline.platform.bundle import ARMS, HEAD, VECTORS, Bundle
from driftline.platform.errors import DriftlineError, FrozenTeacherError, MissingArtefactError
from driftline.platform.registry import Registry, read_champion
from driftline.platform.scorer import Scorer
from driftline.platform.settings import DriftlineSettings
from driftline.platform.windows import HOUR, Window
from driftline.platform.workspace import Workspace
from driftline.serving.rollout.delivery import Delivery

Copy = Callable[[str], DriftlineSettings]


def champion(settings: DriftlineSettings) -> Bundle:
    pointer = read_champion(Workspace.of(settings).bundles)
    assert pointer is not None
    return Bundle.open(pointer.path)


def test_the_first_arms_refresh_gives_a_champion_that_answers(market: DriftlineSettings) -> None:
    bundle = champion(market)
    start = log_split(market).id.start
    frame = read_frames(market, Window(start, start + HOUR))
    scores = Scorer.of(bundle).score(frame)
    assert frame.num_rows > 0
    assert np.isfinite(scores).all()
    assert ((scores > 0) & (scores < 1)).all()
    assert bundle.lineage["kind"] == "arms"
    assert {"teacher", "arms", "window", "feature_views", "code"} <= set(bundle.lineage)


def test_a_head_refresh_changes_the_head_and_nothing_else(market: DriftlineSettings) -> None:
    before = champion(market)
    record = refresh_head(market, as_of=log_split(market).id.start + HOUR)
    after = Bundle.open(Workspace.of(market).bundles / record.bundle)
    assert hash_file(after.path / HEAD) != hash_file(before.path / HEAD)
    assert hash_file(after.path / ARMS) == hash_file(before.path / ARMS)
    assert record.parent == before.fingerprint
    assert set(before.vectors.text_id) <= set(after.vectors.text_id)
    old = after.vectors.rows(before.vectors.text_id)
    np.testing.assert_array_equal(after.vectors.ad[old], before.vectors.ad)


def test_new_products_are_encoded_with_the_current_arms(market: DriftlineSettings) -> None:
    """Every text published until the refresh has a vector in the refreshed bundle."""
    moment = log_split(market).id.end - HOUR
    record = refresh_head(market, as_of=moment)
    bundle = Bundle.open(Workspace.of(market).bundles / record.bundle)
    frame = read_frames(market, Window(moment - HOUR, moment))
    wanted = frame["ad__text_id"].drop_null().to_numpy()
    assert (bundle.vectors.rows(wanted) >= 0).all()
    assert len(bundle.vectors.text_id) > len(champion_before_all(market).vectors.text_id)


def champion_before_all(settings: DriftlineSettings) -> Bundle:
    first = read_records(Workspace.of(settings))[0]
    return Bundle.open(Workspace.of(settings).bundles / first.bundle)


def test_a_second_refresh_of_the_same_hour_changes_nothing(market: DriftlineSettings) -> None:
    moment = log_split(market).id.start + HOUR
    first = refresh_head(market, as_of=moment)
    versions = Registry(market, Workspace.of(market)).versions()
    assert refresh_head(market, as_of=moment) == first
    assert Registry(market, Workspace.of(market)).versions() == versions


def test_the_same_refresh_in_two_workspaces_gives_the_same_bundle(copy_market: Copy) -> None:
    moments = []
    for name in ("one", "two"):
        settings = copy_market(name)
        moments.append(refresh_head(settings, as_of=log_split(settings).id.start + HOUR).bundle)
    assert moments[0] == moments[1]


def test_a_refresh_whose_record_was_lost_is_repeated_with_the_same_result(
    market: DriftlineSettings,
) -> None:
    moment = log_split(market).id.start + HOUR
    first = refresh_head(market, as_of=moment)
    for path in (Workspace.of(market).reports / "refreshes").glob("*-head.json"):
        path.unlink()
    again = refresh_head(market, as_of=moment)
    assert (again.bundle, again.parent, again.champion) == (
        first.bundle,
        first.parent,
        first.champion,
    )


@pytest.mark.slow
def test_a_killed_refresh_completes_with_the_same_bundle(copy_market: Copy) -> None:
    calm, killed = copy_market("calm"), copy_market("killed")
    moment = log_split(calm).id.start + HOUR
    expected = refresh_head(calm, as_of=moment).bundle
    settings_file = Path(killed.workspace) / "settings.yaml"
    settings_file.write_text(yaml.safe_dump(killed.model_dump(mode="json")))
    code = (
        "import sys; from pathlib import Path\n"
        "from driftline.platform.settings import load_settings\n"
        "from driftline.platform.windows import parse_time\n"
        "from driftline.pipelines.refresh_head import refresh_head\n"
        "print('ready', flush=True)\n"
        "refresh_head(load_settings(Path(sys.argv[1])), as_of=parse_time(sys.argv[2]))\n"
    )
    command = [sys.executable, "-c", code, str(settings_file), moment.isoformat()]
    for delay_seconds in (0.3, 1.0):
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay_seconds)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    assert refresh_head(killed, as_of=moment).bundle == expected


def test_a_head_refresh_needs_a_champion(market: DriftlineSettings) -> None:
    workspace = Workspace.of(market)
    workspace.registry.unlink()
    with pytest.raises(MissingArtefactError, match="refresh arms"):
        refresh_head(market, as_of=log_split(market).id.start + HOUR)


def test_the_past_is_not_refreshed_over_a_champion_that_knows_more(
    market: DriftlineSettings,
) -> None:
    with pytest.raises(DriftlineError, match="later than"):
        refresh_head(market, as_of=log_split(market).id.start - HOUR)


def test_an_arms_refresh_rotates_arms_vectors_and_head_together(market: DriftlineSettings) -> None:
    before = champion(market)
    record = refresh_arms(market, as_of=log_split(market).id.start + 6 * HOUR)
    after = Bundle.open(Workspace.of(market).bundles / record.bundle)
    for part in (ARMS, HEAD, VECTORS):
        assert hash_file(after.path / part) != hash_file(before.path / part)
    assert record.parent == before.fingerprint


def test_rolling_back_makes_the_older_version_champion(market: DriftlineSettings) -> None:
    first = champion(market)
    moment = log_split(market).id.start + HOUR
    assert refresh_head(market, as_of=moment).decision == "promoted"
    delivery = Delivery(market, by="test", via="test")
    assert delivery.roll_back().fingerprint == first.fingerprint
    assert champion(market).fingerprint == first.fingerprint
    with pytest.raises(MissingArtefactError, match="no version 99"):
        delivery.roll_back("99")


def test_the_teacher_is_trained_once_and_then_refuses_change(market: DriftlineSettings) -> None:
    frozen = train_teacher(market)
    weights = hash_file(frozen.weights)
    assert train_teacher(market).hash == frozen.hash
    other = market.model_copy(
        update={"labels": market.labels.model_copy(update={"negative_keep_rate": 0.1})}
    )
    with pytest.raises(FrozenTeacherError, match="other settings"):
        train_teacher(other)
    assert hash_file(frozen.weights) == weights


def test_altered_teacher_weights_are_refused(market: DriftlineSettings) -> None:
    weights = Teacher.open(Workspace.of(market)).weights
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(FrozenTeacherError, match="weights have hash"):
        Teacher.open(Workspace.of(market))


def test_each_input_goes_through_the_teacher_once(market: DriftlineSettings) -> None:
    shutil.rmtree(Workspace.of(market).labels)
    split = log_split(market)
    frame = read_frames(market, Window(split.id.start, split.id.start + 2 * HOUR))
    store = SoftLabels.open(market)
    first = store.logits(frame)
    distinct = len({tuple(t.tolist()) for t in store.reader.tokens(frame)})
    assert store.num_passes == distinct
    again = SoftLabels.open(market)
    half = frame.slice(frame.num_rows // 2)
    np.testing.assert_array_equal(again.logits(half), first[frame.num_rows // 2 :])
    assert again.num_passes == 0


def test_soft_labels_move_with_the_prior() -> None:
    """The odds of a click scale by the ratio of the keep rates."""
    logits = np.array([[0.3, -1.0], [0.0, 2.0]], np.float32)
    moved = shift_prior(logits, from_keep_rate=0.5, to_keep_rate=0.1)
    odds = np.exp(logits[:, 1] - logits[:, 0])
    moved_odds = np.exp(moved[:, 1] - moved[:, 0])
    np.testing.assert_allclose(moved_odds, odds * 5, rtol=1e-5)


def test_a_record_reads_back(market: DriftlineSettings) -> None:
    moment = log_split(market).id.start
    record = read_record(Workspace.of(market), "arms", moment, settings_hash=settings_hash(market))
    assert record is not None
    assert record.champion == champion(market).fingerprint
    assert champion_before(market, moment, kind="arms") is None

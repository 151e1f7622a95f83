"""What teachers say is paid once, survives a kill to the bit, and is a mean if several speak."""

import json
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from numpy.typing import NDArray
from tests.pipelines.conftest import NOW, small_settings

from driftline.features.frame_files import read_frames
from driftline.features.quality import check_log
from driftline.features.simulate import simulate
from driftline.features.texts import read_texts
from driftline.pipelines.frozen_teacher import Teacher
from driftline.pipelines.labels import SoftLabels, TeacherLabels
from driftline.pipelines.prepare import prepare_features
from driftline.pipelines.replay import log_split
from driftline.pipelines.teacher import teacher_key
from driftline.pipelines.teachers import train_teachers
from driftline.platform.artefacts import hash_files
from driftline.platform.distillation.keys import FeatureKey
from driftline.platform.errors import (
    EmptyWindowError,
    FrozenTeacherError,
    MissingArtefactError,
    ResourceError,
    SettingsError,
)
from driftline.platform.examples import Ragged
from driftline.platform.inference import load_model
from driftline.platform.inputs import frame_texts
from driftline.platform.models.spec import TeacherSpec
from driftline.platform.settings import DriftlineSettings
from driftline.platform.windows import HOUR, Window
from driftline.platform.workspace import Workspace

HIDDEN, CLS = FeatureKey("hidden", 0), FeatureKey("cls", 1)
WIDE: dict[str, Any] = {"kind": "config", "num_layers": 2, "hidden_size": 24, "max_tokens": 24}
MEMBERS: list[dict[str, Any]] = [
    {"name": "other-seed", "seed": 11},
    {"name": "newer-half", "window": [0.5, 1], "negative_keep_rate": 0.8, "mlm": None},
    {"name": "wide", "encoder": WIDE, "columns": ["ad__category"]},
]


def ensemble_settings(workspace: Path, members: list[dict[str, Any]]) -> DriftlineSettings:
    source = {
        "kind": "simulate",
        "start": "2026-01-01T00:00:00Z",
        "num_days": 1,
        "impressions_per_day": 2_000,
        "num_products": 40,
        "new_products_per_day": 10,
        "num_categories": 4,
        "ads_per_page": 5,
    }
    return small_settings(
        workspace, source=source, split={"ood_share": 0.5}, teacher={"ensemble": members}
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> DriftlineSettings:
    """A market of one day with four teachers, none of which was asked about anything."""
    settings = ensemble_settings(tmp_path_factory.mktemp("labels") / "market", MEMBERS)
    workspace = Workspace.of(settings)
    simulate(settings, workspace.log)
    check_log(workspace.log, workspace.clean, settings=settings, now=NOW)
    prepare_features(settings)
    train_teachers(settings)
    return settings


@pytest.fixture
def market(trained: DriftlineSettings) -> DriftlineSettings:
    """The market, and no labels."""
    shutil.rmtree(Workspace.of(trained).labels, ignore_errors=True)
    return trained


def alone(settings: DriftlineSettings, **teacher: Any) -> DriftlineSettings:
    """The same market with the first teacher only."""
    changed = settings.teacher.model_copy(update={"ensemble": (), **teacher})
    return settings.model_copy(update={"teacher": changed})


def rows(settings: DriftlineSettings, num_hours: int) -> pa.Table:
    start = log_split(settings).id.start
    return read_frames(settings, Window(start, start + num_hours * HOUR))


def num_distinct(store: SoftLabels, frame: pa.Table) -> int:
    return len({tuple(tokens.tolist()) for tokens in store.reader.tokens(frame)})


def said_live(labels: TeacherLabels, frame: pa.Table) -> NDArray[np.float32]:
    """Logits of each row alone, straight from the model."""
    spec = TeacherSpec.model_validate(labels.teacher.manifest["spec"])
    model = load_model(spec, labels.teacher.weights)
    logits = []
    for tokens in labels.reader.tokens(frame):
        with torch.inference_mode():
            framed = frame_texts(spec.encoder, Ragged.of([tokens]), np.array([0]), role=None)
            logits.append(model(*framed)[0].numpy())
    return np.stack(logits)


# --- once an input --------------------------------------------------------------------------


def test_an_input_that_comes_back_in_another_hour_is_not_paid_again(
    market: DriftlineSettings,
) -> None:
    frame = rows(market, 2)
    later = pc.add(frame["event_time"], pa.scalar(5 * HOUR))
    at = frame.column_names.index("event_time")
    again = frame.set_column(at, frame.schema.field(at), later)
    store = SoftLabels.open(alone(market))
    first = store.logits(frame)
    distinct = num_distinct(store, frame)
    assert store.num_passes == distinct
    np.testing.assert_array_equal(
        store.logits(pa.concat_tables([frame, again]))[-len(first) :], first
    )
    other = SoftLabels.open(alone(market))
    np.testing.assert_array_equal(other.logits(again), first)
    assert (store.num_passes, other.num_passes) == (distinct, 0)


def test_many_strategies_cost_one_pass_of_the_teacher(market: DriftlineSettings) -> None:
    """Each strategy opens the store for itself and asks about its own part of the rows."""
    market, frame = alone(market), rows(market, 3)
    wanted = [(), (CLS,), (HIDDEN,), (CLS, HIDDEN), ()]
    union = SoftLabels.open(market, keys=(HIDDEN, CLS))
    union.label(frame)
    assert union.num_passes == num_distinct(union, frame)
    for number, keys in enumerate(wanted):
        strategy = SoftLabels.open(market, keys=keys)
        strategy.label(frame.slice(20 * number))
        assert strategy.num_passes == 0


def test_labels_are_what_the_teacher_says_of_each_row(market: DriftlineSettings) -> None:
    frame = rows(market, 1).slice(0, 60)
    store = SoftLabels.open(alone(market))
    np.testing.assert_allclose(store.logits(frame), said_live(store.members[0], frame), atol=1e-5)


def test_the_order_of_rows_within_an_hour_does_not_change_a_bit(
    market: DriftlineSettings,
) -> None:
    market, frame = alone(market), rows(market, 1)
    order = np.random.default_rng(0).permutation(frame.num_rows)
    first = SoftLabels.open(market).logits(frame)
    shutil.rmtree(Workspace.of(market).labels)
    np.testing.assert_array_equal(SoftLabels.open(market).logits(frame.take(order)), first[order])


# --- features --------------------------------------------------------------------------------


def test_features_come_from_the_same_pass_and_follow_the_rows(market: DriftlineSettings) -> None:
    market, frame = alone(market), rows(market, 2)
    store = SoftLabels.open(market, keys=(CLS, HIDDEN))
    labelled = store.label(frame)
    assert store.num_passes == num_distinct(store, frame)
    assert store.features is not None
    assert labelled.teacher_rows is not None
    np.testing.assert_array_equal(store.features.logits(labelled.teacher_rows), labelled.logits)
    vectors = store.features.read(CLS, labelled.teacher_rows)
    model = load_model(store.members[0].memory.spec, store.teacher.weights)
    with torch.inference_mode():
        said = model.classifier(vectors)  # type: ignore[operator]
    np.testing.assert_allclose(said.numpy(), labelled.logits, atol=0.01)  # float16


def test_tensors_asked_for_later_need_a_pass_but_keep_the_labels(
    market: DriftlineSettings,
) -> None:
    market, frame = alone(market), rows(market, 1)
    plain = SoftLabels.open(market).label(frame)
    assert plain.teacher_rows is None
    store = SoftLabels.open(market, keys=(CLS,))
    np.testing.assert_array_equal(store.label(frame).logits, plain.logits)
    assert store.num_passes == num_distinct(store, frame)


def test_features_that_would_not_fit_are_refused_before_the_pass(
    market: DriftlineSettings,
) -> None:
    limits = market.teacher.features.model_copy(update={"max_gigabytes": 1e-5})
    store = SoftLabels.open(alone(market, features=limits), keys=(HIDDEN,))
    with pytest.raises(
        ResourceError, match=r"GB with [0-9]+ more inputs.*limit is 1e-05 GB; raise"
    ):
        store.label(rows(market, 3))
    assert store.num_passes == 0
    assert not list(Workspace.of(market).labels.rglob("*.parquet"))


def test_a_tensor_the_teacher_has_not_is_refused_before_the_pass(
    market: DriftlineSettings,
) -> None:
    store = SoftLabels.open(alone(market), keys=(FeatureKey("hidden", 9),))
    with pytest.raises(ValueError, match=r"has no hidden\.9; it has 1 layers"):
        store.label(rows(market, 1))
    assert store.num_passes == 0


# --- kills -----------------------------------------------------------------------------------

KILLED = """
import json, os, shutil, signal, sys
from driftline.features.frame_files import read_frames
from driftline.pipelines.labels import SoftLabels
from driftline.platform import label_store, teacher_memory
from driftline.platform.artefacts import hash_files
from driftline.platform.distillation.keys import FeatureKey
from driftline.platform.settings import parse_settings
from driftline.platform.windows import Window, parse_time
from driftline.platform.workspace import Workspace

raw, start, end = json.loads(sys.argv[1])
settings = parse_settings(raw, origin="test")
labels = Workspace.of(settings).labels
teacher_memory.ROWS_PER_PASS = 60

def label(keyed, before, after):
    add, calls = label_store.LabelStore.add, [0]
    def counted(self, *arguments):
        calls[0] += 1
        if calls[0] == before:
            os.kill(os.getpid(), signal.SIGKILL)
        add(self, *arguments)
        if calls[0] == after:
            os.kill(os.getpid(), signal.SIGKILL)
    label_store.LabelStore.add = counted
    keys = (FeatureKey("cls", 1), FeatureKey("hidden", 0)) if keyed else ()
    frame = read_frames(settings, Window(parse_time(start), parse_time(end)))
    SoftLabels.open(settings, keys=keys).label(frame)
    os._exit(0)

def run(*arguments):
    child = os.fork()
    if child == 0:
        label(*arguments)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

found = []
for keyed, kills in ((False, [(0, 2), (1, 0)]), (True, [(2, 0), (0, 3)])):
    codes = [run(keyed, 0, 0)]
    whole = hash_files(labels)
    shutil.rmtree(labels)
    codes += [run(keyed, *kill) for kill in kills]
    part = hash_files(labels)
    codes.append(run(keyed, 0, 0))
    found.append([codes, whole, part, hash_files(labels)])
    shutil.rmtree(labels)
print(json.dumps(found))
"""


def test_killed_and_called_again_gives_the_same_bits(market: DriftlineSettings) -> None:
    """Kills fall before and after a file of labels, also between features and their labels."""
    market = alone(market)
    start = log_split(market).id.start
    raw = market.model_dump(mode="json")
    arguments = json.dumps([raw, start.isoformat(), (start + 4 * HOUR).isoformat()])
    command = [sys.executable, "-c", KILLED, arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    plain, keyed = json.loads(done.stdout)
    for codes, whole, part, again in (plain, keyed):
        assert codes == [0, -signal.SIGKILL, -signal.SIGKILL, 0]
        assert {name for name in whole if name.endswith("parquet")} > {
            name for name in part if name.endswith("parquet")
        }
        assert again == whole
    assert any(name.endswith("hidden.0.npy") for name in keyed[1])


# --- several teachers -------------------------------------------------------------------------


def test_several_teachers_speak_as_the_mean_of_their_logits_on_one_prior(
    market: DriftlineSettings,
) -> None:
    frame = rows(market, 1).slice(0, 50)
    store = SoftLabels.open(market)
    found = store.logits(frame)
    assert len(store.members) == 4
    rates = [member.teacher.keep_rate for member in store.members]
    assert rates == [0.5, 0.5, 0.8, 0.5]
    for row in range(frame.num_rows):
        total = np.zeros(2)
        for member, rate in zip(store.members, rates, strict=True):
            no_click, click = said_live(member, frame.slice(row, 1))[0]
            total += [no_click, click + np.log(rate / 0.5)]
        np.testing.assert_allclose(found[row], total / 4, atol=1e-5)
    assert SoftLabels.open(market).logits(frame).tolist() == found.tolist()


def test_every_teacher_is_asked_once_and_can_be_heard_alone(market: DriftlineSettings) -> None:
    frame = rows(market, 1)
    store = SoftLabels.open(market)
    store.logits(frame)
    distinct = [
        len({tuple(t.tolist()) for t in member.reader.tokens(frame)}) for member in store.members
    ]
    assert store.num_passes == sum(distinct)
    for member in ("wide", "newer-half"):
        one = SoftLabels.open(market, teacher=member)
        assert one.teacher.path.name == member
        np.testing.assert_allclose(one.logits(frame), said_live(one.members[0], frame), atol=1e-5)
        assert one.num_passes == 0
    with pytest.raises(SettingsError, match="no member 'third', only"):
        SoftLabels.open(market, teacher="third")


def test_members_differ_as_their_settings_do(market: DriftlineSettings) -> None:
    workspace = Workspace.of(market)
    first = Teacher.open(workspace)
    seed, half, wide = (Teacher.open(workspace, member["name"]) for member in MEMBERS)
    assert len({first.hash, seed.hash, half.hash, wide.hash}) == 4
    assert seed.manifest["window"] == first.manifest["window"]
    start, end = first.manifest["window"]
    middle, last = half.manifest["window"]
    assert start < middle < last == end
    assert (len(first.manifest["stages"]), len(half.manifest["stages"])) == (2, 1)  # no MLM
    assert wide.manifest["columns"] == ["ad__category"]
    assert wide.manifest["spec"]["encoder"]["hidden_size"] == 24
    assert all(
        a["tokenizer"] == b["tokenizer"]
        for a, b in pairwise((first.manifest, seed.manifest, wide.manifest))
    )


def test_without_an_ensemble_there_is_one_teacher_as_ever(market: DriftlineSettings) -> None:
    """Neither its key nor its files know of teachers beside it."""
    assert teacher_key(market) == teacher_key(alone(market))
    assert teacher_key(market) == Teacher.open(Workspace.of(market)).manifest["key"]
    store = SoftLabels.open(alone(market))
    assert store.hash == store.teacher.hash
    store.logits(rows(market, 1))
    folders = [path.name for path in Workspace.of(market).labels.iterdir()]
    assert folders == [store.teacher.hash[:12]]


def test_trained_teachers_stay_as_they_are(market: DriftlineSettings) -> None:
    before = hash_files(Workspace.of(market).teachers)
    train_teachers(market)
    assert hash_files(Workspace.of(market).teachers) == before


def changed_member(settings: DriftlineSettings, **changes: Any) -> DriftlineSettings:
    members = [MEMBERS[0], MEMBERS[1] | changes, MEMBERS[2]]
    return ensemble_settings(settings.workspace, members)


def test_a_member_whose_settings_changed_is_refused(market: DriftlineSettings) -> None:
    others: list[dict[str, Any]] = [{"seed": 5}, {"window": [0.25, 1]}, {"mlm": "same"}]
    for changes in others:
        with pytest.raises(FrozenTeacherError, match="newer-half is frozen and was trained with"):
            train_teachers(changed_member(market, **changes))
    for reading in ({"columns": ["ad__category"]}, {"encoder": WIDE}):
        with pytest.raises(FrozenTeacherError, match=r"newer-half: (columns|max_tokens) was"):
            SoftLabels.open(changed_member(market, **reading))


def test_a_window_without_rows_is_refused_before_any_training(
    market: DriftlineSettings,
) -> None:
    empty = changed_member(market, name="empty", window=[0.01, 0.02])
    with pytest.raises(EmptyWindowError, match=r"'empty': window \[0.01, 0.02\].*holds 0 rows"):
        train_teachers(empty)
    unknown = changed_member(market, name="unknown", columns=["ad__colour"])
    with pytest.raises(SettingsError, match="ad__colour"):
        train_teachers(unknown)
    assert sorted(path.name for path in Workspace.of(market).teachers.iterdir()) == sorted(
        member["name"] for member in MEMBERS
    )
    with pytest.raises(MissingArtefactError, match=r"driftline teacher CONFIG"):
        SoftLabels.open(empty)


def test_names_of_teachers_must_differ(market: DriftlineSettings) -> None:
    with pytest.raises(SettingsError, match="names of teachers must differ, wide stands twice"):
        changed_member(market, name="wide")
    with pytest.raises(SettingsError, match=r"ensemble\.1\.window.*|window must start before"):
        changed_member(market, window=[0.5, 0.5])


def test_altered_weights_of_a_member_are_refused(market: DriftlineSettings) -> None:
    weights = Teacher.open(Workspace.of(market), "wide").weights
    content = weights.read_bytes()
    try:
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(FrozenTeacherError, match="weights have hash"):
            SoftLabels.open(market)
    finally:
        weights.write_bytes(content)


# --- other texts ------------------------------------------------------------------------------


def test_rows_may_point_to_texts_that_are_not_of_the_log(market: DriftlineSettings) -> None:
    frame = rows(market, 1).slice(0, 40)
    texts = read_texts(market)
    upper = texts.set_column(
        texts.column_names.index("title"), "title", pc.utf8_reverse(texts["title"])
    )
    store = SoftLabels.open(market)
    plain = store.logits(frame)
    other = store.with_texts(upper)
    found = other.logits(frame)
    assert not np.allclose(found, plain)
    assert SoftLabels.open(market, texts=upper).logits(frame).tolist() == found.tolist()
    live = [said_live(member, frame) for member in other.members]
    shift = np.array([0.0, np.log(0.8 / 0.5)])
    mean = (live[0] + live[1] + live[2] + shift + live[3]) / 4
    np.testing.assert_allclose(found, mean, atol=1e-5)
    assert store.num_passes == other.num_passes

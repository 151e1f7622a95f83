"""From a log with purchases to one student of clicks and purchases, by the real steps."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tests.pipelines.conftest import NOW, REST, TEXT, small_settings

from driftline.features.quality import check_log
from driftline.features.simulate import simulate
from driftline.pipelines.frozen_teacher import Teacher
from driftline.pipelines.labels import SoftLabels
from driftline.pipelines.prepare import prepare_features
from driftline.pipelines.replay import log_split
from driftline.pipelines.student import student_tokenizer
from driftline.pipelines.tasks import train_tasks
from driftline.pipelines.teacher import open_tokenizer
from driftline.pipelines.teachers import train_teachers
from driftline.pipelines.training_sets import known_frame
from driftline.platform.errors import FrozenTeacherError, SettingsError
from driftline.platform.examples import open_pairs, open_texts
from driftline.platform.inference import load_model, predict_logits
from driftline.platform.inputs import open_inputs
from driftline.platform.metrics import roc_auc
from driftline.platform.sampling import part_mask
from driftline.platform.settings import DriftlineSettings
from driftline.platform.workspace import Workspace

STAGE = {"num_epochs": 4, "batch_size": 64, "learning_rate": 0.005}
BUYERS = {"name": "buyers", "label": "purchased", "supervised": STAGE, "negative_keep_rate": 1.0}
OUTCOME = {"label": "purchased", "teacher": "buyers"}


def selling_settings(
    workspace: Path,
    *,
    outcome: dict[str, Any] = OUTCOME,
    buyers: dict[str, Any] = BUYERS,
    **student: Any,
) -> DriftlineSettings:
    plain = small_settings(workspace).model_dump(mode="json")
    label = {"name": "purchased", "kind": "label", "entity": "impression"}
    return small_settings(
        workspace,
        source=plain["source"] | {"purchase_rate": 0.4, "click_rate": 0.3, "num_days": 1},
        features=[*TEXT, *REST, label],
        teacher={"ensemble": [buyers]},
        student=plain["student"]
        | {"tasks": {"outcomes": [outcome], "tau": 0.5, "stage": STAGE}, "vocabulary_size": 320}
        | student,
    )


@pytest.fixture(scope="module")
def selling(tmp_path_factory: pytest.TempPathFactory) -> DriftlineSettings:
    settings = selling_settings(tmp_path_factory.mktemp("selling") / "market")
    workspace = Workspace.of(settings)
    simulate(settings, workspace.log)
    check_log(workspace.log, workspace.clean, settings=settings, now=NOW)
    prepare_features(settings)
    train_teachers(settings)
    return settings


def test_one_student_learns_each_outcome_from_its_own_teacher(selling: DriftlineSettings) -> None:
    """The student cuts texts otherwise than the teachers (papers.md C16)."""
    teacher, student = open_tokenizer(selling), student_tokenizer(selling)
    assert student.vocabulary_size < teacher.vocabulary_size
    report = train_tasks(selling)
    assert report.num_rows["purchased"] < report.num_rows["click"]
    roots = {name: count**0.5 for name, count in report.num_rows.items()}
    assert report.shares == pytest.approx({n: r / sum(roots.values()) for n, r in roots.items()})
    assert {f"{name}.{m}" for name in roots for m in ("auc", "soft_loss")} <= set(report.measures)
    folder = Workspace.of(selling).scratch / "tasks"
    texts = open_texts(folder / "texts.arrow").tokens
    assert texts.values.max() < student.vocabulary_size
    for name, path in report.weights.items():
        own = folder / f"{name}.validation.arrow"
        inputs = open_inputs(report.model, own, texts=folder / "texts.arrow")
        logits = predict_logits(load_model(report.model, path), inputs)
        margin = (logits[:, 1] - logits[:, 0]).astype(np.float64)
        auc = roc_auc(open_pairs(own).clicked, margin)
        assert auc == pytest.approx(report.measures[f"{name}.auc"], abs=1e-6)


def test_each_outcome_has_the_soft_labels_of_its_own_teacher(selling: DriftlineSettings) -> None:
    """Every purchase row is a click row too, with another label and another teacher's opinion."""
    train_tasks(selling)
    ood = log_split(selling).ood
    frame = known_frame(selling, ood, as_of=ood.end)
    for name, teacher, keep_rate in (("click", None, 0.5), ("purchased", "buyers", 1.0)):
        column = "clicked" if teacher is None else name
        known = [value is not None for value in frame[column].to_pylist()]
        rows = frame.filter(pa.array(known))
        rows = rows.filter(part_mask(rows, "validation", split=selling.split))
        store = SoftLabels.open(selling, teacher=teacher)
        said = store.logits(rows)
        said[:, 1] += np.log(keep_rate) - np.log(selling.labels.negative_keep_rate)
        pairs = open_pairs(Workspace.of(selling).scratch / "tasks" / f"{name}.validation.arrow")
        assert pairs.clicked.tolist() == [float(value) for value in rows[column].to_pylist()]
        assert pairs.teacher_logits is not None
        np.testing.assert_allclose(pairs.teacher_logits, said, rtol=1e-6)
        assert said.std(axis=0).min() > 0


def test_done_before_with_the_same_rows_nothing_is_trained(selling: DriftlineSettings) -> None:
    first = train_tasks(selling)
    times = {name: path.stat().st_mtime_ns for name, path in first.weights.items()}
    seen: list[int] = []
    again = train_tasks(selling, progress=lambda done, _: seen.append(done))
    assert again == first
    assert not seen
    assert set(times) == {"click", "purchased"}


def test_a_teacher_of_another_outcome_is_heard_alone(selling: DriftlineSettings) -> None:
    assert [member.teacher.path.name for member in SoftLabels.open(selling).members] == ["teacher"]
    buyers = SoftLabels.open(selling, teacher="buyers")
    assert buyers.teacher.manifest["label"] == "purchased"
    assert "label" not in Teacher.open(Workspace.of(selling)).manifest
    assert buyers.hash != SoftLabels.open(selling).hash
    clicks = dict(BUYERS)
    del clicks["label"]
    with pytest.raises(FrozenTeacherError, match="buyers is frozen and was trained with other"):
        train_teachers(selling_settings(selling.workspace, buyers=clicks))


def test_outcomes_that_cannot_be_learned_are_refused(selling: DriftlineSettings) -> None:
    root = selling.workspace
    with pytest.raises(SettingsError, match=r"student.tasks is not given; name the outcomes"):
        train_tasks(selling_settings(root, tasks=None))
    with pytest.raises(SettingsError, match=r"'dwell' is no feature of kind label, got \['purch"):
        train_tasks(selling_settings(root, outcome={"label": "dwell"}))
    with pytest.raises(SettingsError, match=r"no member 'sellers', only \['buyers'\]"):
        train_tasks(selling_settings(root, outcome=OUTCOME | {"teacher": "sellers"}))
    clicks = dict(BUYERS)
    del clicks["label"]
    with pytest.raises(SettingsError, match=r"'buyers' learned clicks, not 'purchased'"):
        train_tasks(selling_settings(root, buyers=clicks))
    with pytest.raises(SettingsError, match="has an objective but no teacher"):
        selling_settings(root, outcome={"label": "purchased", "objective": {"alpha": 1.0}})
    with pytest.raises(
        SettingsError, match=r"outcomes must differ .* got \['click', 'purchased', 'p"
    ):
        selling_settings(root, tasks={"outcomes": [OUTCOME, OUTCOME]})
    with pytest.raises(SettingsError, match=r"tasks.tau: Input should be greater"):
        selling_settings(root, tasks={"outcomes": [OUTCOME], "tau": -1})
    with pytest.raises(SettingsError, match=r"'dwellers': 'dwell' is no feature of kind label"):
        train_teachers(
            selling_settings(root, buyers=BUYERS | {"name": "dwellers", "label": "dwell"})
        )

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.pipelines.conftest import NOW, small_settings
from torch import nn

from driftline.features.quality import check_log
from driftline.features.simulate import simulate
from driftline.pipelines.frozen_teacher import MASKED, Teacher
from driftline.pipelines.laboratory import Laboratory
from driftline.pipelines.prepare import prepare_features
from driftline.pipelines.replay import log_split
from driftline.pipelines.strategy import check_strategy, train_strategy
from driftline.pipelines.student import student_tokenizer
from driftline.pipelines.student_vocabulary import small_tokenizer, vocabulary_report
from driftline.pipelines.teacher import open_tokenizer, train_teacher
from driftline.platform.artefacts import hash_file, write_json
from driftline.platform.checkpoints import load_weights
from driftline.platform.errors import FrozenTeacherError, SettingsError
from driftline.platform.models.encoder import TextEncoder
from driftline.platform.models.spec import TeacherSpec
from driftline.platform.settings import DriftlineSettings, StageSettings
from driftline.platform.vocabulary.start import DualVocabulary
from driftline.platform.workspace import Workspace

TOKEN_TABLE = "embeddings.word_embeddings.weight"


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> DriftlineSettings:
    """A market with a teacher, for a student with 330 pieces of its own."""
    settings = small_settings(tmp_path_factory.mktemp("vocabulary") / "market")
    student = settings.student.model_copy(update={"vocabulary_size": 330})
    settings = settings.model_copy(update={"student": student})
    workspace = Workspace.of(settings)
    simulate(settings, workspace.log)
    check_log(workspace.log, workspace.clean, settings=settings, now=NOW)
    prepare_features(settings)
    train_teacher(settings)
    return settings


def test_the_students_tokenizer_is_learned_with_the_teachers_and_only_once(
    taught: DriftlineSettings,
) -> None:
    path = Workspace.of(taught).student_tokenizer(330)
    before = path.stat().st_mtime_ns
    tokenizer = student_tokenizer(taught)
    assert tokenizer.path == path
    assert tokenizer.vocabulary_size <= 330 < open_tokenizer(taught).vocabulary_size
    assert path.stat().st_mtime_ns == before
    found = hash_file(path)
    path.unlink()
    assert student_tokenizer(taught).hash == found  # from the same corpus, whenever it is asked for
    shared = taught.model_copy(
        update={"student": taught.student.model_copy(update={"vocabulary_size": None})}
    )
    assert student_tokenizer(shared).path == open_tokenizer(taught).path


def test_a_vocabulary_too_small_for_the_corpus_is_refused(taught: DriftlineSettings) -> None:
    with pytest.raises(SettingsError, match=r"student\.vocabulary_size 260 does not fit"):
        small_tokenizer(taught, vocabulary_size=260)


def test_the_report_is_of_the_markets_texts(taught: DriftlineSettings) -> None:
    report = vocabulary_report(
        taught, teacher=open_tokenizer(taught), student=student_tokenizer(taught)
    )
    assert report.num_texts >= 60
    assert report.student.fertility > report.teacher.fertility > 1
    assert report.overlap > 0.9


def test_the_teacher_keeps_its_weights_from_before_the_clicks(taught: DriftlineSettings) -> None:
    teacher = Teacher.open(Workspace.of(taught))
    masked = teacher.path / MASKED
    names = set(load_file(masked))
    assert {name.split(".")[0] for name in names} == {"encoder", "predictor"}
    assert {name for name in names if name.startswith("encoder.")} < set(load_file(teacher.weights))
    spec = TeacherSpec.model_validate(teacher.manifest["spec"])
    holder = nn.ModuleDict({"encoder": TextEncoder(spec.encoder, pretrained=False)})
    load_weights(holder, masked)
    frozen = load_file(teacher.weights)
    own = holder.state_dict()
    assert any(not torch.equal(own[name], frozen[name]) for name in own)


@pytest.fixture
def own_teacher(taught: DriftlineSettings, tmp_path: Path) -> DriftlineSettings:
    """A copy of the market whose teacher may be harmed."""
    shutil.copytree(Workspace.of(taught).root, tmp_path / "market")
    return taught.model_copy(update={"workspace": tmp_path / "market"})


@pytest.mark.parametrize("harm", ["changed", "lost"])
def test_a_language_that_is_not_the_teachers_own_is_refused(
    own_teacher: DriftlineSettings, harm: str
) -> None:
    teacher = Teacher.open(Workspace.of(own_teacher))
    assert teacher.masked == teacher.path / MASKED
    if harm == "lost":
        (teacher.path / MASKED).unlink()
    else:
        shutil.copy(teacher.weights, teacher.path / MASKED)
    again = Teacher.open(Workspace.of(own_teacher))
    assert again.hash == teacher.hash
    with pytest.raises(FrozenTeacherError, match=r"masked.safetensors .*, frozen as"):
        _ = again.masked


def test_a_teacher_without_language_is_refused_before_anything_is_made(
    own_teacher: DriftlineSettings, tmp_path: Path
) -> None:
    teacher = Teacher.open(Workspace.of(own_teacher))
    (teacher.path / MASKED).unlink()
    manifest = {name: value for name, value in teacher.manifest.items() if name != "masked"}
    write_json(teacher.path / "manifest.json", manifest)
    moment = log_split(own_teacher).id.start
    laboratory = Laboratory.open(own_teacher, as_of=moment, folder=tmp_path / "lab", seed=1)
    arms = own_teacher.student.arms_refresh
    with pytest.raises(SettingsError, match="teacher_start 'mlm' needs"):
        check_strategy(laboratory, arms.model_copy(update={"init": DualVocabulary()}))
    assert laboratory.nodes == []
    frozen = DualVocabulary(teacher_start="frozen")
    check_strategy(laboratory, arms.model_copy(update={"init": frozen}))


def test_a_strategy_starts_from_dual_training_and_finds_it_again(
    taught: DriftlineSettings, tmp_path: Path
) -> None:
    frozen = hash_file(Teacher.open(Workspace.of(taught)).weights)
    stage = StageSettings(num_steps=4, batch_size=16)
    arms = taught.student.arms_refresh
    strategy = arms.model_copy(update={"init": DualVocabulary(stage=stage)})
    moment = log_split(taught).id.start
    students, nodes = [], []
    for _ in range(2):
        laboratory = Laboratory.open(taught, as_of=moment, folder=tmp_path, seed=1)
        students.append(train_strategy(laboratory, strategy))
        nodes.append([node for node in laboratory.nodes if node.name == "dual_vocabulary"])
    assert nodes[0][0].identity == nodes[1][0].identity
    assert students[0].weights == students[1].weights
    table = load_file(students[0].weights)["arms.backbones.0.backbone." + TOKEN_TABLE]
    assert table.shape[0] == student_tokenizer(taught).vocabulary_size
    assert hash_file(Teacher.open(Workspace.of(taught)).weights) == frozen

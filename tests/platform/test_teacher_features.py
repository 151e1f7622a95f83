"""The store of the teacher's inner tensors: the same as a live pass, bounded, safe to kill."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from driftline.platform.distillation.keys import FeatureKey
from driftline.platform.errors import ArtefactError, ContractError, ResourceError
from driftline.platform.models.build import build_model
from driftline.platform.models.spec import EncoderSpec, TeacherSpec
from driftline.platform.models.teacher import ClickTower
from driftline.platform.teacher_features import FeatureShape, TeacherFeatures
from driftline.platform.teacher_pass import TeacherPass

HIDDEN, CLS = FeatureKey("hidden", 1), FeatureKey("cls", 2)
ATTENTION, SCORES = FeatureKey("attention", 2), FeatureKey("scores", 1)
MODULE = FeatureKey("module", "classifier.1")
KEYS = (HIDDEN, CLS, ATTENTION, SCORES, MODULE)
SPEC = TeacherSpec(
    encoder=EncoderSpec(
        hidden_size=16, num_layers=2, num_heads=2, vocabulary_size=50, max_tokens=12
    )
)
FLOAT16_STEP = 2**-10  # relative distance of neighbouring float16 values


def make_tokens(num: int, *, seed: int = 0) -> list[NDArray[np.int32]]:
    """Sequences of 0 to 14 tokens; those above 10 are cut by the teacher."""
    random = np.random.default_rng(seed)
    return [random.integers(7, 50, size).astype(np.int32) for size in random.integers(0, 15, num)]


@pytest.fixture(scope="module")
def teacher() -> ClickTower:
    torch.manual_seed(0)
    model = build_model(SPEC)
    assert isinstance(model, ClickTower)
    return model.eval()


@pytest.fixture(scope="module")
def passing(teacher: ClickTower) -> TeacherPass:
    return TeacherPass(teacher, SPEC, KEYS)


def write(store: TeacherFeatures, passing: TeacherPass, first: int, last: int) -> None:
    """Inputs ``first`` to ``last - 1``, known by their numbers, as one segment."""
    tokens = make_tokens(60)[first:last]
    with store.segment(np.arange(first, last), passing.lengths(tokens)) as segment:
        for batch in passing.run(tokens):
            segment.write(batch.places, batch.logits, batch.features)


@pytest.fixture(scope="module")
def store(passing: TeacherPass, tmp_path_factory: pytest.TempPathFactory) -> TeacherFeatures:
    folder = tmp_path_factory.mktemp("store")
    made = TeacherFeatures.create(folder, teacher="t" * 64, shapes=passing.shapes, dtype="float16")
    write(made, passing, 0, 40)
    write(made, passing, 40, 60)
    return TeacherFeatures.open(folder)


def live(teacher: ClickTower, number: int) -> dict[FeatureKey, torch.Tensor]:
    """One input alone through the teacher, slowly; ``transformers`` gives its states itself."""
    specials = SPEC.encoder.specials
    row = make_tokens(60)[number][:10].tolist()
    ids = torch.tensor([[specials.cls, *row, specials.sep]])
    backbone: Any = teacher.encoder.backbone
    before = backbone.config._attn_implementation
    backbone.set_attn_implementation("eager")
    with torch.inference_mode():
        found = backbone(ids, output_hidden_states=True, output_attentions=True)
        norm, linear = teacher.classifier[0], teacher.classifier[1]
        last = found.hidden_states[2][:, 0]
        own = backbone.encoder.layer[0].attention.self
        query, key = (
            part(found.hidden_states[0]).reshape(1, len(ids[0]), 2, 8).transpose(1, 2)
            for part in (own.query, own.key)
        )
        values = {
            HIDDEN: found.hidden_states[1][0],
            CLS: last[0],
            ATTENTION: found.attentions[1][0],
            SCORES: (query @ key.transpose(2, 3) / 8**0.5)[0],
            MODULE: linear(norm(last))[0],
        }
    backbone.set_attn_implementation(before)
    return values


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_a_row_read_is_the_live_forward_pass_and_zeros(
    key: FeatureKey, store: TeacherFeatures, teacher: ClickTower
) -> None:
    rows = np.array([3, 59, -1, 41, 3])
    read = store.read(key, rows, num_tokens=12)
    assert read.dtype == torch.float32
    for place, row in enumerate(rows.tolist()):
        wanted = torch.zeros(read.shape[1:])
        if row >= 0:
            alone = live(teacher, row)[key]
            wanted[tuple(map(slice, alone.shape))] = alone
        torch.testing.assert_close(read[place], wanted, rtol=FLOAT16_STEP, atol=1e-4)


def test_lengths_and_logits_are_those_of_the_pass(
    store: TeacherFeatures, teacher: ClickTower
) -> None:
    rows = np.array([0, 45, -1])
    framed = [min(len(make_tokens(60)[row]) + 2, 12) for row in (0, 45)]
    assert store.lengths(rows).tolist() == [*framed, 0]
    specials = SPEC.encoder.specials
    ids = torch.tensor([[specials.cls, *make_tokens(60)[45][:10].tolist(), specials.sep]])
    with torch.inference_mode():
        alone = teacher(ids, torch.ones_like(ids, dtype=torch.bool))
    np.testing.assert_allclose(store.logits(rows)[1], alone[0].numpy(), atol=1e-5)
    assert np.isnan(store.logits(rows)[2]).all()


def test_rows_are_found_by_input_and_survive_more_segments(
    passing: TeacherPass, tmp_path: Path
) -> None:
    store = TeacherFeatures.create(tmp_path / "s", teacher="t", shapes=passing.shapes)
    assert store.rows_of(np.array([1, 2])).tolist() == [-1, -1]
    write(store, passing, 20, 30)
    before = store.rows_of(np.array([29, 20, 99]))
    first, fingerprint = store.read(HIDDEN, before), store.fingerprint(before)
    other = TeacherFeatures.open(tmp_path / "s")
    write(store, passing, 5, 20)
    assert store.rows_of(np.array([29, 20, 99])).tolist() == before.tolist() == [9, 0, -1]
    torch.testing.assert_close(store.read(HIDDEN, before), first, rtol=0, atol=0)
    assert store.fingerprint(before) == fingerprint != store.fingerprint(before[::-1])
    assert len(other) == 10
    other.refresh()
    assert other.rows_of(np.array([5])).tolist() == [10]


def test_fewer_positions_than_the_teacher_saw_cut_the_row(store: TeacherFeatures) -> None:
    rows = np.argsort(store.lengths(np.arange(60)))[-2:]
    whole, cut = store.read(HIDDEN, rows), store.read(HIDDEN, rows, num_tokens=4)
    torch.testing.assert_close(cut, whole[:, :4], rtol=0, atol=0)


def test_only_the_rows_asked_for_come_into_memory(tmp_path: Path) -> None:
    """The store is 64 MB, of which one row in a thousand is read."""
    width, num = 1_600, 20_000
    store = TeacherFeatures.create(
        tmp_path / "s", teacher="t", shapes={CLS: FeatureShape((width,))}
    )
    with store.segment(np.arange(num), np.full(num, 5)) as segment:
        for start in range(0, num, 1_000):
            places = np.arange(start, start + 1_000)
            values = np.repeat(places[:, None] // 1_000, width, axis=1).astype(np.float32)
            segment.write(places, np.zeros((1_000, 2), np.float32), {CLS: values})
    code = (
        "import resource, sys, numpy as np, pathlib\n"
        "from driftline.platform.distillation.keys import FeatureKey\n"
        "from driftline.platform.teacher_features import TeacherFeatures\n"
        "store = TeacherFeatures.open(pathlib.Path(sys.argv[1]))\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "read = store.read(FeatureKey('cls', 2), np.arange(0, 20_000, 1_000))\n"
        "assert read[:, 0].tolist() == list(range(20))\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print((after - before) / (1024**2 if sys.platform == 'darwin' else 1024))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "s")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout) < 16  # MB; the whole file is 64


KILLED = """
import os, pathlib, signal, sys
import numpy as np
from driftline.platform.distillation.keys import FeatureKey
from driftline.platform.teacher_features import FeatureShape, TeacherFeatures

key = FeatureKey("cls", 2)
store = TeacherFeatures.create(pathlib.Path(sys.argv[1]), teacher="t", shapes={key: FeatureShape((4,))})
for number in range(int(sys.argv[2])):
    hashes = np.arange(10) + 10 * number
    if (store.rows_of(hashes) >= 0).all():
        continue
    with store.segment(hashes, np.full(10, 3)) as segment:
        segment.write(np.arange(5), np.zeros((5, 2), np.float32), {key: np.full((5, 4), number, np.float32)})
        if number == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        segment.write(np.arange(5, 10), np.zeros((5, 2), np.float32), {key: np.full((5, 4), number, np.float32)})
"""  # noqa: E501


def test_a_killed_pass_loses_only_the_segment_under_way(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "s"), "4"]
    killed = subprocess.run([*command, "2"], check=False, env=os.environ)
    assert killed.returncode == -signal.SIGKILL
    store = TeacherFeatures.open(tmp_path / "s")
    assert store.rows_of(np.arange(40)).tolist() == [*range(20), *[-1] * 20]
    kept = (tmp_path / "s" / "000001" / "cls.2.npy").stat().st_mtime_ns
    subprocess.run([*command, "-1"], check=True, env=os.environ)
    store.refresh()
    rows = store.rows_of(np.arange(40))
    assert store.read(CLS, rows)[:, 0].tolist() == np.repeat(np.arange(4.0), 10).tolist()
    assert (tmp_path / "s" / "000001" / "cls.2.npy").stat().st_mtime_ns == kept
    assert not list((tmp_path / "s").glob(".*partial"))


def test_the_size_is_known_before_the_pass_and_refused(
    passing: TeacherPass, tmp_path: Path
) -> None:
    store = TeacherFeatures.create(tmp_path / "s", teacher="t", shapes=passing.shapes)
    lengths = passing.lengths(make_tokens(60))
    values = sum(
        int(np.prod(shape.of(length)))
        for shape in passing.shapes.values()
        for length in lengths.tolist()
    )
    limit = 2 * values / 1e9
    store.check_room(lengths, max_gigabytes=limit)
    with pytest.raises(ResourceError, match=r"GB.*limit.*max_gigabytes.*float16"):
        store.check_room(lengths, max_gigabytes=0.99 * limit)
    write(store, passing, 0, 60)
    files = (tmp_path / "s").glob("*/*.npy")
    assert store.num_bytes == sum(np.load(file).nbytes for file in files) == 2 * values
    with pytest.raises(ResourceError):
        store.check_room(lengths[:1], max_gigabytes=limit)


def test_a_store_of_another_teacher_or_type_is_refused(
    passing: TeacherPass, store: TeacherFeatures, tmp_path: Path
) -> None:
    with pytest.raises(ContractError, match="are of teacher tttttttttttt, the labels are of other"):
        TeacherFeatures.open(store.folder, teacher="other")
    with pytest.raises(ContractError, match="hold float16, the settings ask for float32"):
        TeacherFeatures.open(store.folder, dtype="float32")
    with pytest.raises(ContractError, match=r"hold hidden\.1.*this pass would write cls\.2"):
        TeacherFeatures.create(
            store.folder, teacher="t" * 64, shapes={CLS: passing.shapes[CLS]}, dtype="float16"
        )
    with pytest.raises(ContractError, match="no teacher features in"):
        TeacherFeatures.open(tmp_path / "none")
    with pytest.raises(ContractError, match=r"do not hold hidden\.2, only hidden\.1"):
        store.read(FeatureKey("hidden", 2), np.array([0]))
    with pytest.raises(IndexError, match=r"must lie in \[-1, 60\), got 2\.\.60"):
        store.read(HIDDEN, np.array([2, 60]))


def test_a_segment_takes_only_new_inputs_and_all_of_them(
    passing: TeacherPass, tmp_path: Path
) -> None:
    store = TeacherFeatures.create(tmp_path / "s", teacher="t", shapes=passing.shapes)
    write(store, passing, 0, 3)
    with pytest.raises(ValueError, match="must be new"):
        write(store, passing, 2, 5)
    with (
        pytest.raises(ValueError, match="not every input"),
        store.segment(np.array([7]), np.array([4])),
    ):
        pass
    assert len(store) == 3


def test_values_too_large_for_float16_ask_for_float32(tmp_path: Path) -> None:
    shapes, logits = {CLS: FeatureShape((2,))}, np.zeros((1, 2), np.float32)
    large = {CLS: np.full((1, 2), 1e5, np.float32)}
    small = TeacherFeatures.create(tmp_path / "16", teacher="t", shapes=shapes)
    with (
        pytest.raises(ValueError, match=r"cls\.2 holds values that float16 cannot \(100000"),
        small.segment(np.array([1]), np.array([3])) as segment,
    ):
        segment.write(np.array([0]), logits, large)
    wide = TeacherFeatures.create(tmp_path / "32", teacher="t", shapes=shapes, dtype="float32")
    with wide.segment(np.array([1]), np.array([3])) as segment:
        segment.write(np.array([0]), logits, large)
    assert wide.read(CLS, np.array([0])).tolist() == [[1e5, 1e5]]


def test_a_tensor_that_grows_otherwise_than_the_tokens_cannot_be_stored(
    teacher: ClickTower,
) -> None:
    with pytest.raises(ValueError, match=r"has no hidden\.7"):
        TeacherPass(teacher, SPEC, (FeatureKey("hidden", 7),)).shapes  # noqa: B018
    assert TeacherPass(teacher, SPEC, (HIDDEN,)).shapes == {HIDDEN: FeatureShape(("T", 16))}


def test_more_files_than_may_be_open_are_read_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("driftline.platform.teacher_features.MAX_OPEN_FILES", 2)
    store = TeacherFeatures.create(tmp_path / "s", teacher="t", shapes={CLS: FeatureShape((1,))})
    for number in range(5):
        with store.segment(np.array([number]), np.array([3])) as segment:
            value = {CLS: np.full((1, 1), number, np.float32)}
            segment.write(np.array([0]), np.zeros((1, 2), np.float32), value)
    rows = np.array([4, 0, 3, 1, 2, 0])
    assert store.read(CLS, rows)[:, 0].tolist() == rows.tolist()
    shutil.rmtree(tmp_path / "s")


@pytest.mark.parametrize("name", ["index.parquet", "hidden.1.npy", "cls.2.npy"])
@pytest.mark.parametrize("is_missing", [True, False])
def test_a_damaged_store_is_refused_when_it_is_opened(
    store: TeacherFeatures, tmp_path: Path, name: str, is_missing: bool
) -> None:
    copy = tmp_path / "store"
    shutil.copytree(store.folder, copy)
    file = copy / "000001" / name
    whole = file.read_bytes()
    file.unlink()
    if not is_missing:
        file.write_bytes(whole[:-2])
    with pytest.raises(ArtefactError, match=r"(?s)000001 are damaged .*; remove .*store and the"):
        TeacherFeatures.open(copy)


def test_a_manifest_that_is_none_is_refused(store: TeacherFeatures, tmp_path: Path) -> None:
    shutil.copytree(store.folder, tmp_path / "store")
    for content, error in (("{", ArtefactError), ("{}", ContractError)):
        (tmp_path / "store" / "manifest.json").write_text(content)
        with pytest.raises(error, match=r"remove"):
            TeacherFeatures.open(tmp_path / "store")

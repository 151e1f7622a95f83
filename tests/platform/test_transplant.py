"""Initialisers that cut one encoder out of another, on a tiny market with real stages."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

from driftline.platform.artefacts import hash_value
from driftline.platform.checkpoints import load_weights, save_weights
from driftline.platform.errors import BundleError, SettingsError
from driftline.platform.initialisers import (
    CheckpointStart,
    EmbeddingsStart,
    Initialiser,
    LayersStart,
    TruncationStart,
)
from driftline.platform.models.build import build_model
from driftline.platform.models.spec import EncoderSpec, ModelSpec, SingleSpec, TeacherSpec
from driftline.platform.settings import StageSettings
from driftline.platform.stages import StageJob, StageResult, run_stage
from driftline.platform.text import Tokenizer
from driftline.platform.transplant import open_donors, transplant

TABLE = "embeddings.word_embeddings.weight"


@dataclass
class SmallNursery:
    """Trains on the tiny market in this process; keeps what it made by content."""

    market: Any
    folder: Path
    spec: ModelSpec
    teacher: tuple[TeacherSpec, Path]
    masked_teacher: Path | None = None
    seed: int = 5
    made: list[str] = field(default_factory=list)
    """Names of what was made, in order; what was there before is not made again."""

    def pretrain(self, spec: ModelSpec | None = None, *, keep_head: bool = False) -> Path:
        model = spec or self.spec
        identity = hash_value(model.model_dump(mode="json"))[:8]
        stage = StageSettings(batch_size=20, learning_rate=1e-2, num_epochs=1)
        job: StageJob = self.market.job("mlm", self.folder / identity, model=model, stage=stage)
        if not job.output.exists():
            self.made.append(f"mlm of {model.encoder.num_layers} layers")  # type: ignore[union-attr]
        run_stage(job)
        return job.output

    def imitate(self, *_: Any, **__: Any) -> Path:
        raise AssertionError("no initialiser of these asks for it")

    def supervise(self) -> Path:
        raise AssertionError("no initialiser of these asks for it")

    def make(self, name: str, write: Callable[[Path], None], *, key: object) -> Path:
        path = self.folder / f"{hash_value([name, key])[:8]}-{name}"
        if not path.exists():
            self.made.append(name)
            write(path)
        return path

    def train(self, name: str, run: Callable[[Path, Path], StageResult], *, key: object) -> Path:
        raise AssertionError("no initialiser of these asks for it")

    @property
    def texts(self) -> Sequence[str]:
        raise AssertionError("no initialiser of these asks for it")

    @property
    def tokenizers(self) -> tuple[Tokenizer, Tokenizer]:
        raise AssertionError("no initialiser of these asks for it")


def deeper(spec: Any, num_layers: int, **changes: Any) -> Any:
    encoder = spec.encoder.model_copy(update={"num_layers": num_layers, **changes})
    return spec.model_copy(update={"encoder": encoder})


@pytest.fixture
def nursery(tiny_market: Any, tmp_path: Path) -> SmallNursery:
    teacher = deeper(tiny_market.teacher, 5)
    torch.manual_seed(3)
    save_weights(tmp_path / "teacher.safetensors", build_model(teacher).state_dict())
    return SmallNursery(
        tiny_market, tmp_path, tiny_market.twin, (teacher, tmp_path / "teacher.safetensors")
    )


def layer(tensors: dict[str, Tensor], prefix: str, number: int) -> dict[str, Tensor]:
    start = f"{prefix}encoder.layer.{number}."
    return {n.removeprefix(start): v for n, v in tensors.items() if n.startswith(start)}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert found
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("tied", [True, False])
def test_truncation_takes_the_embeddings_and_the_bottom_layers_of_each_arm(
    nursery: SmallNursery, tied: bool
) -> None:
    nursery.spec = nursery.spec.model_copy(update={"tie_arms": tied})
    (path,) = TruncationStart(num_layers=4).weights(nursery)
    found = load_file(path)
    donor = load_file(nursery.pretrain(deeper(nursery.spec, 4)))
    for arm in range(1 if tied else 2):
        prefix = f"arms.backbones.{arm}.backbone."
        for number in range(2):
            assert_equal(layer(found, prefix, number), layer(donor, prefix, number))
        assert_equal(
            {n: v for n, v in found.items() if n.startswith(f"{prefix}embeddings.")},
            {n: v for n, v in donor.items() if n.startswith(f"{prefix}embeddings.")},
        )
        assert not layer(found, prefix, 2)
    model = build_model(nursery.spec)
    load_weights(model, path)
    for name, value in model.state_dict().items():
        if name.startswith("arms."):
            assert torch.equal(value, found[name])


def test_the_embeddings_start_keeps_the_token_table_of_a_one_layer_model_and_nothing_else(
    nursery: SmallNursery,
) -> None:
    (path,) = EmbeddingsStart().weights(nursery)
    found, donor = load_file(path), load_file(nursery.pretrain(deeper(nursery.spec, 1)))
    assert list(found) == [f"arms.backbones.0.backbone.{TABLE}"]
    assert_equal(found, {name: donor[name] for name in found})
    assert nursery.made == ["mlm of 1 layers", "token-embeddings.safetensors"]


def test_picked_layers_come_from_the_teacher_counted_from_one(nursery: SmallNursery) -> None:
    (path,) = LayersStart(layers=(2, 5), source="teacher").weights(nursery)
    found, donor = load_file(path), load_file(nursery.teacher[1])
    ours, theirs = "arms.backbones.0.backbone.", "encoder.backbone."
    assert_equal(layer(found, ours, 0), layer(donor, theirs, 1))
    assert_equal(layer(found, ours, 1), layer(donor, theirs, 4))
    assert torch.equal(found[ours + TABLE], donor[theirs + TABLE])
    assert nursery.made == ["picked-layers.safetensors"]  # the teacher is trained already


def test_the_bottom_layers_picked_one_by_one_are_the_truncation(nursery: SmallNursery) -> None:
    (picked,) = LayersStart(layers=(1, 2), num_layers=4).weights(nursery)
    (truncated,) = TruncationStart(num_layers=4).weights(nursery)
    assert_equal(load_file(picked), load_file(truncated))
    assert nursery.made.count("mlm of 4 layers") == 1


def test_layers_can_be_taken_from_the_teacher_before_it_saw_clicks(nursery: SmallNursery) -> None:
    start = LayersStart(layers=(1, 3), source="masked_teacher")
    with pytest.raises(SettingsError, match=r"'masked_teacher' needs teacher\.mlm"):
        start.weights(nursery)
    nursery.masked_teacher = nursery.pretrain(nursery.teacher[0])
    found = load_file(*start.weights(nursery))
    donor = load_file(nursery.masked_teacher)
    assert_equal(
        layer(found, "arms.backbones.0.backbone.", 1), layer(donor, "encoder.backbone.", 2)
    )


def test_a_started_student_trains_on_and_what_was_cut_once_is_not_cut_again(
    nursery: SmallNursery, tmp_path: Path
) -> None:
    start = LayersStart(layers=(1, 3), source="teacher")
    first, second = start.weights(nursery), start.weights(nursery)
    assert first == second
    assert nursery.made == ["picked-layers.safetensors"]
    job = nursery.market.job("twin", tmp_path / "started", initial=first)
    cold = nursery.market.job("twin", tmp_path / "cold")
    assert run_stage(job).history != run_stage(cold).history


# --- checkpoints --------------------------------------------------------------------------


def bert_folder(folder: Path, *, vocabulary_size: int = 90, num_layers: int = 4) -> BertForMaskedLM:
    config = BertConfig(
        vocab_size=vocabulary_size,
        hidden_size=16,
        num_hidden_layers=num_layers,
        num_attention_heads=1,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    torch.manual_seed(7)
    model = BertForMaskedLM(config)
    model.save_pretrained(folder)
    return model


def test_layers_of_a_transformers_folder_become_a_students(
    nursery: SmallNursery, tmp_path: Path
) -> None:
    bert = bert_folder(tmp_path / "bert")
    start = CheckpointStart(path=tmp_path / "bert", layers=(2, 4))
    found = load_file(*start.weights(nursery))
    donor = {n.removeprefix("bert."): v for n, v in bert.state_dict().items()}
    prefix = "arms.backbones.0.backbone."
    assert_equal(layer(found, prefix, 0), layer(donor, "", 1))
    assert_equal(layer(found, prefix, 1), layer(donor, "", 3))
    positions = "embeddings.position_embeddings.weight"
    assert found[prefix + positions].shape == (512, 16)  # grown: texts here have 12 tokens
    assert torch.equal(found[prefix + positions][:32], donor[positions])
    again = load_file(*replace_path(start, tmp_path / "bert/model.safetensors").weights(nursery))
    assert_equal(again, found)


def replace_path(start: CheckpointStart, path: Path) -> CheckpointStart:
    return start.model_copy(update={"path": path})


def test_a_folder_cut_into_several_files_is_read_whole(
    nursery: SmallNursery, tmp_path: Path
) -> None:
    bert = bert_folder(tmp_path / "one")
    bert.save_pretrained(tmp_path / "many", max_shard_size="8KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    one, many = (
        load_file(*CheckpointStart(path=tmp_path / name, layers=(1, 4)).weights(nursery))
        for name in ("one", "many")
    )
    assert_equal(many, one)


def test_a_twin_takes_the_encoder_of_a_single_tower_and_the_other_way_round(
    nursery: SmallNursery, tmp_path: Path
) -> None:
    tower = SingleSpec(encoder=nursery.market.twin.encoder)
    weights = build_model(tower).state_dict()
    save_weights(tmp_path / "tower.safetensors", weights)
    twin_path = CheckpointStart(path=tmp_path / "tower.safetensors").weights(nursery)[0]
    nursery.spec = tower
    back = load_file(*CheckpointStart(path=twin_path).weights(nursery))
    assert_equal(back, {n: v for n, v in weights.items() if n.startswith("encoder.")})


def test_untied_arms_share_one_donor_or_take_one_each(nursery: SmallNursery) -> None:
    untied = nursery.market.twin.model_copy(update={"tie_arms": False})
    pair = nursery.folder / "pair.safetensors"
    save_weights(pair, build_model(untied).state_dict())
    two = load_file(nursery.folder / "pair.safetensors")
    transplant(nursery.folder / "two.safetensors", untied, open_donors(pair))
    assert_equal(
        load_file(nursery.folder / "two.safetensors"),
        {name: value for name, value in two.items() if name.startswith("arms.")},
    )
    transplant(nursery.folder / "one.safetensors", untied, open_donors(pair)[:1])
    one = load_file(nursery.folder / "one.safetensors")
    assert torch.equal(one[f"arms.backbones.1.backbone.{TABLE}"], two[donor_table(0)])
    with pytest.raises(SettingsError, match=r"holds 2 encoders, the student has 1; give one"):
        transplant(nursery.folder / "no.safetensors", nursery.market.twin, open_donors(pair))
    assert not (nursery.folder / "no.safetensors").exists()


def donor_table(arm: int) -> str:
    return f"arms.backbones.{arm}.backbone.{TABLE}"


# --- refusals -----------------------------------------------------------------------------


def test_a_start_that_cannot_fit_is_refused_before_anything_is_trained(
    nursery: SmallNursery, tmp_path: Path
) -> None:
    bert_folder(tmp_path / "bert")
    bert_folder(tmp_path / "other", vocabulary_size=77)
    wide = EncoderSpec(hidden_size=32, num_layers=4, num_heads=1, vocabulary_size=90, max_tokens=12)
    save_weights(tmp_path / "wide.safetensors", build_model(SingleSpec(encoder=wide)).state_dict())
    save_file({"head.weight": torch.zeros(2)}, tmp_path / "head.safetensors")
    (tmp_path / "text.safetensors").write_text("no")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled/config.json").write_text("{}")
    teacher = replace(nursery, teacher=(deeper(nursery.teacher[0], 5, hidden_size=32), tmp_path))
    spoken = replace(nursery, teacher=(deeper(nursery.teacher[0], 5, vocabulary_size=91), tmp_path))
    cut = replace(nursery, teacher=(deeper(nursery.teacher[0], 5, num_heads=2), tmp_path))
    mlp = replace(nursery, spec=nursery.market.mlp)
    for start, on, message in (
        (TruncationStart(num_layers=1), nursery, "num_layers must be at least 2"),
        (LayersStart(layers=(1, 2, 3)), nursery, r"each of the student's 2 layers, got 3"),
        (
            LayersStart(layers=(1, 6), source="teacher"),
            nursery,
            r"layers must lie in 1\.\.5, the layers of the teacher, got 6",
        ),
        (
            LayersStart(layers=(1, 2), source="teacher"),
            teacher,
            "the teacher has hidden_size 32, the student 16",
        ),
        (
            LayersStart(layers=(1, 2), source="teacher"),
            spoken,
            "the teacher has a vocabulary of 91 tokens, the student of 90",
        ),
        (
            LayersStart(layers=(1, 2), source="teacher"),
            cut,
            "the teacher has 2 attention heads, the student 1",
        ),
        (CheckpointStart(path=tmp_path / "none"), nursery, "must be a weights file, or a folder"),
        (CheckpointStart(path=tmp_path / "pickled"), nursery, "lacks model.safetensors; a pickled"),
        (CheckpointStart(path=tmp_path / "head.safetensors"), nursery, "holds no encoder"),
        (CheckpointStart(path=tmp_path / "bert"), nursery, "has 4 layers, the student 2; say"),
        (CheckpointStart(path=tmp_path / "bert", layers=(1, 5)), nursery, r"1\.\.4.*, got 5"),
        (
            CheckpointStart(path=tmp_path / "wide.safetensors", layers=(1, 2)),
            nursery,
            "has hidden_size 32, the student 16",
        ),
        (
            CheckpointStart(path=tmp_path / "other", layers=(1, 2)),
            nursery,
            "a vocabulary of 77 tokens, the student of 90",
        ),
        (EmbeddingsStart(), mlp, "needs a student with an encoder, kind 'mlp' has none"),
    ):
        with pytest.raises(SettingsError, match=message):
            start.check(on.spec, on.teacher[0])
        with pytest.raises(SettingsError, match=message):
            start.weights(on)
    with pytest.raises(BundleError, match=r"text\.safetensors cannot be read as safetensors"):
        CheckpointStart(path=tmp_path / "text.safetensors").check(nursery.spec)
    assert not nursery.made


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"kind": "layers", "layers": [1, 13]}, r"layers must lie in 1\.\.12.*got 13"),
        ({"kind": "layers", "layers": [0, 1]}, "greater than 0"),
        ({"kind": "layers", "layers": []}, "at least 1 item"),
        (
            {"kind": "layers", "layers": [1], "source": "teacher", "num_layers": 12},
            "num_layers is for source 'deeper'",
        ),
        ({"kind": "truncated"}, "kind must be one of .*truncation"),
        ({"kind": "truncation", "depth": 3}, "Extra inputs are not permitted"),
    ],
)
def test_settings_that_name_no_possible_start_are_refused(raw: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TypeAdapter(Initialiser).validate_python(raw)


def test_every_start_comes_back_from_its_json(tmp_path: Path) -> None:
    adapter: TypeAdapter[Initialiser] = TypeAdapter(Initialiser)
    for start in (
        EmbeddingsStart(),
        TruncationStart(num_layers=6),
        LayersStart(layers=(1, 3, 5, 8, 10, 12)),
        CheckpointStart(path=tmp_path, layers=(2, 1)),
    ):
        assert adapter.validate_python(start.model_dump(mode="json")) == start

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from driftline.platform.errors import EmptyWindowError, SettingsError
from driftline.platform.examples import PairRows, Ragged, Texts, write_pairs, write_texts
from driftline.platform.models.build import build_model
from driftline.platform.models.spec import MlpSpec, SingleSpec, TwinSpec
from driftline.platform.settings import DistilSettings, StageSettings
from driftline.platform.stages import StageJob, run_stage
from driftline.platform.strategy_settings import ArmsRefreshSettings
from driftline.platform.tasks import Workers
from driftline.platform.vocabulary.dual_model import DualModel
from driftline.platform.vocabulary.dual_training import (
    DualJob,
    DualTask,
    held_out_measures,
    run_dual,
)
from driftline.platform.vocabulary.export import student_weights
from driftline.platform.vocabulary.start import DualVocabulary
from driftline.platform.vocabulary.views import Views
from driftline.platform.vocabulary.words import WordTexts

CPU = torch.device("cpu")
VARIANTS = ("none", "dual", "dual_down", "dual_up")


def built(job: DualJob) -> DualModel:
    torch.manual_seed(2)
    model = DualModel(job.student, job.teacher, recipe=job.recipe)
    if job.start is not None:
        model.load_teacher(job.start)
    return model.eval()


def batch(job: DualJob) -> list[Views]:
    parts, _ = DualTask(job, workers=Workers())._parts(
        DualTask(job, workers=Workers())._train, np.arange(20), step=1
    )
    return parts


def run(job: DualJob, folder: Path, **more: Any) -> Any:
    return run_dual(
        job, output=folder / "student.safetensors", checkpoints=folder / "checkpoints", **more
    )


# --- the model ----------------------------------------------------------------------------


def slow_teacher_losses(model: DualModel, view: Any, table_SD: Tensor) -> list[float]:
    """One position at a time: embed by id range, then a softmax of that id's own vocabulary."""
    teacher = model.teacher
    assert teacher is not None
    size = teacher.encoder.spec.vocabulary_size
    bridge: Any = teacher.bridge
    mapped_SH = table_SD @ bridge.map.weight.T + bridge.map.bias
    own_VH = teacher.encoder.token_table
    tokens_BT, mask_BT, place_K, target_K = view
    rows = [
        torch.stack([own_VH[i] if i < size else mapped_SH[i - size] for i in row])
        for row in tokens_BT.tolist()
    ]
    states = teacher.encoder.backbone(inputs_embeds=torch.stack(rows), attention_mask=mask_BT)
    flat = states.last_hidden_state.flatten(0, 1)
    losses = []
    for place, target in zip(place_K.tolist(), target_K.tolist(), strict=True):
        hidden = teacher.predictor.norm(
            torch.nn.functional.gelu(teacher.predictor.dense(flat[place]))
        )
        if target < size:
            scores = [float(hidden @ own_VH[i] + teacher.predictor.bias[i]) for i in range(size)]
        else:
            target -= size
            scores = [
                float(hidden @ row + teacher.student_bias[i]) for i, row in enumerate(mapped_SH)
            ]
        losses.append(math.log(sum(math.exp(score) for score in scores)) - scores[target])
    return losses


@torch.no_grad()
def test_the_teachers_losses_equal_one_softmax_a_position(market: Any) -> None:
    job = market.job("dual")
    model = built(job)
    torch.nn.init.normal_(model.teacher.student_bias)  # type: ignore[union-attr]
    parts = batch(job)
    found = model(parts)
    expected = [
        loss
        for part in parts
        for loss in slow_teacher_losses(model, part.teacher, model._encoder(0).token_table)
    ]
    assert any(
        part.teacher[3].max() >= 480 > part.teacher[3].min() for part in parts if part.teacher
    )
    assert found.teacher is not None
    torch.testing.assert_close(found.teacher.losses, torch.tensor(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_what_the_teacher_learns_reaches_the_students_table(market: Any, share: float) -> None:
    for detach in (False, True):
        recipe = {"student_share": share, "detach_bridge": detach}
        job = market.job("dual_up" if detach else "dual", recipe=recipe)
        model = built(job)
        output = model(batch(job))
        output.teacher.losses.sum().backward()
        table = model._encoder(0).token_table
        bridge: Any = model.teacher.bridge  # type: ignore[union-attr]
        if detach:
            assert table.grad is None
        else:  # also as the rows of a softmax that was not asked: then exactly nothing
            assert table.grad is not None
            assert bool(table.grad.abs().sum() > 0) == (share > 0)
        assert bool(bridge.map.weight.grad.abs().sum() > 0) == (share > 0)
        backbone: Any = model._encoder(0).backbone
        assert backbone.encoder.layer[0].attention.self.query.weight.grad is None


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_every_weight_has_a_gradient_in_every_step(market: Any, variant: str, share: float) -> None:
    """Else several workers could not train together."""
    job = market.job(variant, recipe={"student_share": share})
    model = built(job)
    task = DualTask(job, workers=Workers())
    task.loss(model, np.arange(8), step=1, device=CPU).backward()  # type: ignore[no-untyped-call]
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_the_loss_is_the_projections_and_the_weighted_entropies(market: Any) -> None:
    job = market.job("dual_up", recipe={"cross_entropy_weight": 3.0})
    model, task = built(job), DualTask(market.job("dual_up"), workers=Workers())
    weighted = DualTask(job, workers=Workers())
    rows = np.arange(20)
    with torch.no_grad():
        output = model(batch(job))
        plain = task.loss(model, rows, step=1, device=CPU)
        found = weighted.loss(model, rows, step=1, device=CPU)
        entropy = output.student.losses.mean() + output.teacher.losses.mean()
        torch.testing.assert_close(plain, output.projection + entropy)
        torch.testing.assert_close(found, output.projection + 3 * entropy)


def test_workers_together_learn_what_one_learns(market: Any) -> None:
    job = market.job("dual_down")
    model = built(job)
    with torch.no_grad():
        whole = DualTask(job, workers=Workers()).loss(model, np.arange(9), step=1, device=CPU)
        parts = [
            DualTask(job, workers=Workers(rank, 3)).loss(model, np.arange(9), step=1, device=CPU)
            for rank in range(3)
        ]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


def test_every_variant_is_judged_by_the_same_masked_words(market: Any) -> None:
    found = []
    for variant in VARIANTS:
        job = market.job(variant)
        model = built(job)
        model.load_state_dict(built(market.job("none")).state_dict(), strict=False)
        with torch.inference_mode():
            measures = DualTask(job, workers=Workers()).evaluate(model, device=CPU)
        found.append((measures["loss"], measures["accuracy"]))
    assert len(set(found)) == 1


# --- the stage ----------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_students_learn_and_the_frozen_teacher_stays_as_it_was(
    market: Any, tmp_path: Path, variant: str
) -> None:
    before = market.frozen.read_bytes()
    stage = StageSettings(
        optimizer="lamb", learning_rate=2e-2, batch_size=24, num_epochs=8, patience=99
    )
    result = run(market.job(variant, recipe={"stage": stage}), tmp_path)
    assert market.frozen.read_bytes() == before
    assert result.history[-1]["loss"] < result.history[0]["loss"] - 0.1
    measures = held_out_measures(result)
    assert measures["loss"] == result.best == min(row["loss"] for row in result.history)
    assert 0 < measures["accuracy"] <= 1
    assert ("teacher_accuracy" in measures) == (variant != "none")
    assert ("student_norm" in measures) == (variant in ("dual_down", "dual_up"))


def test_a_teacher_changes_what_the_student_learns(market: Any, tmp_path: Path) -> None:
    students = set()
    for variant in VARIANTS:
        run(market.job(variant), tmp_path / variant)
        students.add((tmp_path / variant / "student.safetensors").read_bytes())
    assert len(students) == 4


@pytest.mark.parametrize("variant", ["none", "dual_up"])
def test_a_killed_stage_goes_on_to_the_same_weights(
    market: Any, tmp_path: Path, variant: str
) -> None:
    job = market.job(variant)
    whole = run(job, tmp_path / "whole")
    seen: list[int] = []

    def kill(done: int, _total: int) -> None:
        seen.append(done)
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(job, tmp_path / "cut", progress=kill)
    resumed = run(job, tmp_path / "cut", progress=lambda done, _: seen.append(done))
    assert 1 < seen[4] <= 5  # from the checkpoint, not from the start
    files = [tmp_path / name / "student.safetensors" for name in ("whole", "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert resumed.history == whole.history
    assert not (tmp_path / "cut" / "checkpoints").exists()
    again = run(job, tmp_path / "cut", progress=lambda done, _: seen.append(-1))
    assert again == resumed
    assert -1 not in seen


def test_whatever_decides_the_result_is_in_the_identity(market: Any, tmp_path: Path) -> None:
    job = market.job("dual_up")
    texts = WordTexts.open(job.corpus)
    fewer = WordTexts(Ragged.of([np.array([1, 2], np.int32)]), texts.teacher, texts.student)
    fewer.save(tmp_path / "fewer.safetensors")
    other = job.teacher.encoder.model_copy(update={"num_layers": 4})
    changes: list[dict[str, Any]] = [
        {},
        {"seed": 6},
        {"corpus": tmp_path / "fewer.safetensors"},
        {"held_out": None},
        {"start": None},
        {"teacher": job.teacher.model_copy(update={"encoder": other})},
        {"recipe": job.recipe.model_copy(update={"student_share": 0.4})},
        {"recipe": job.recipe.model_copy(update={"reduction": "sum"})},
        {"student": job.student.model_copy(update={"tie_arms": False})},
    ]
    identities = [replace(job, **change).identity() for change in changes]
    assert len(set(identities)) == len(changes)
    assert replace(job, name="other").identity() == identities[0]


def test_without_a_text_there_is_nothing_to_learn(market: Any, tmp_path: Path) -> None:
    texts = WordTexts.open(market.job("none").corpus)
    WordTexts(Ragged.of([]), texts.teacher, texts.student).save(tmp_path / "none.safetensors")
    with pytest.raises(EmptyWindowError, match="holds no text to learn from"):
        run(market.job("none", corpus=tmp_path / "none.safetensors"), tmp_path)


# --- export -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tied", "untied", "single"])
def test_the_exported_student_carries_nothing_of_its_training(market: Any, kind: str) -> None:
    encoder = market.student.encoder
    student: TwinSpec | SingleSpec = market.student
    if kind == "untied":
        student = market.student.model_copy(update={"tie_arms": False})
    if kind == "single":
        student = SingleSpec(encoder=encoder)
    job = market.job("dual_up", student=student)
    weights = student_weights(built(job), student)
    click_model = build_model(student)
    expected = {
        name: tensor.shape
        for name, tensor in click_model.state_dict().items()
        if name.startswith(("arms.", "encoder."))
    }
    assert expected
    assert {name: tensor.shape for name, tensor in weights.items()} == expected
    task = DualTask(job, workers=Workers())
    assert torch.isfinite(task.loss(built(job), np.arange(6), step=1, device=CPU))


def test_the_exported_student_trains_on_with_clicks(market: Any, tmp_path: Path) -> None:
    run(market.job("dual_up"), tmp_path)
    random = np.random.default_rng(0)
    texts = market.student_tokenizer.encode(["title: red lamp", "title: umbrella"], max_tokens=20)
    write_texts(tmp_path / "texts.arrow", Texts(np.arange(2), Ragged.of(texts)))
    places = random.integers(0, 2, 64).astype(np.int32)
    numbers, categories = np.zeros((64, 3), np.float32), np.zeros((64, 2), np.int32)
    rows = PairRows(places, places, categories, numbers, (places == 1).astype(np.float32))
    write_pairs(tmp_path / "rows.arrow", rows)
    job = StageJob(
        name="finetune",
        model=market.student,
        task="clicks",
        examples=tmp_path / "rows.arrow",
        texts=tmp_path / "texts.arrow",
        output=tmp_path / "finetuned.safetensors",
        checkpoints=tmp_path / "finetune",
        stage=StageSettings(batch_size=32, learning_rate=1e-6, weight_decay=0),
        seed=1,
        initial=(tmp_path / "student.safetensors",),
    )
    run_stage(job)
    before, after = (
        load_file(tmp_path / f"{name}.safetensors") for name in ("student", "finetuned")
    )
    assert set(before) < set(after)
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-4)


# --- the initialiser ----------------------------------------------------------------------


def test_a_strategy_names_it_by_its_kind() -> None:
    raw = {"kind": "dual_vocabulary", "variant": "dual_down", "student_share": 0.3}
    arms = ArmsRefreshSettings.model_validate({"init": raw})
    assert arms.init == DualVocabulary(variant="dual_down", student_share=0.3)
    written = json.loads(arms.model_dump_json())
    assert ArmsRefreshSettings.model_validate(written) == arms
    assert arms.distil == DistilSettings(num_epochs=2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_gives_weights_to_start_from(nursery: Any, variant: str) -> None:
    quick = StageSettings(num_steps=3, batch_size=16)
    recipe = DualVocabulary(variant=variant, teacher_start="frozen", stage=quick)
    (path,) = recipe.weights(nursery)
    weights = load_file(path)
    model = build_model(nursery.spec)
    assert set(weights) == {name for name in model.state_dict() if name.startswith("arms.")}


def test_a_teacher_without_masked_language_weights_is_said_so(nursery: Any) -> None:
    with pytest.raises(SettingsError, match="teacher_start 'mlm' needs the teacher's masked-lang"):
        DualVocabulary().weights(nursery)
    nursery.masked_teacher = nursery.teacher[1]
    quick = StageSettings(num_steps=1, batch_size=8)
    assert DualVocabulary(stage=quick).weights(nursery)


def test_a_student_that_shares_the_teachers_vocabulary_is_refused(nursery: Any) -> None:
    encoder = nursery.spec.encoder.model_copy(
        update={"vocabulary_size": nursery.teacher[0].encoder.vocabulary_size}
    )
    nursery.spec = nursery.spec.model_copy(update={"encoder": encoder})
    with pytest.raises(SettingsError, match=r"got \d+; set student.vocabulary_size below"):
        DualVocabulary(variant="none").weights(nursery)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"student_share": 1.5}, "less than or equal to 1"),
        ({"student_share": -0.1}, "greater than or equal to 0"),
        ({"variant": "dual", "bridge": "separate"}, "without a shared weight"),
        ({"variant": "dual", "detach_bridge": True}, "keeps the teacher from changing the student"),
        ({"bridge": "separate", "detach_bridge": True}, "a separate table is no bridge"),
        ({"variant": "dual_sideways"}, "Input should be 'none', 'dual', 'dual_down' or 'dual_up'"),
        ({"cross_entropy_weight": 0}, "greater than 0"),
        ({"teacher_shar": 1}, "Extra inputs are not permitted"),
    ],
)
def test_recipes_that_cannot_be_are_refused(recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DualVocabulary.model_validate(recipe)


def test_jobs_that_cannot_be_are_refused_before_anything_is_trained(market: Any) -> None:
    encoder = market.student.encoder

    def student(**changes: Any) -> dict[str, Any]:
        changed = encoder.model_copy(update=changes)
        return {"student": market.student.model_copy(update={"encoder": changed})}

    foreign = market.teacher.encoder.model_copy(
        update={"architecture": {"model_type": "distilbert"}}
    )
    other_teacher = {"teacher": market.teacher.model_copy(update={"encoder": foreign})}
    for changes, message in (
        (student(vocabulary_size=480), "vocabulary than the teacher's 4.. pieces, got 480"),
        (student(checkpoint=Path("bert")), "the checkpoint bert has weights and a vocabulary"),
        (student(num_heads=3), "student's hidden_size 16 must be a multiple of its 3 attention"),
        ({"recipe": {"layer_map": (0, 3)}}, r"layers of the teacher's 0 to 2.*got \[0, 3\]"),
        ({"recipe": {"layer_map": (0,)}}, "must name 2 layers"),
        (other_teacher, "of two BERT encoders, the teacher is a 'distilbert'; use variant 'dual'"),
        ({"teacher": None}, "variant 'dual_up' needs a teacher"),
        ({"student": MlpSpec()}, "needs a student with an encoder"),
    ):
        with pytest.raises(ValueError, match=message):
            market.job("dual_up", **changes)

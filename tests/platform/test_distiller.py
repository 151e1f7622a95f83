import copy
import re
import textwrap
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax
from transformers import (
    BatchEncoding,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
)

from driftline.platform.distillation.anatomy import shape_of
from driftline.platform.distillation.capture import Capture
from driftline.platform.distillation.distiller import (
    Distiller,
    Losses,
    Outputs,
    TeacherTensors,
    hugging_face,
)
from driftline.platform.distillation.keys import FeatureKey
from driftline.platform.settings import ObjectiveSettings

VOCABULARY = 60
SOFT_ONLY = {"hard_weight": 0, "soft_weight": 1}


def bert(layers: int, width: int, *, labels: int = 2, seed: int = 0, kind: Any = None) -> Any:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * width,
        num_labels=labels,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return (kind or BertForSequenceClassification)(config)


def batches(num: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(num):
        lengths = torch.randint(3, 8, (6, 1), generator=generator)
        found.append(
            {
                "input_ids": torch.randint(5, VOCABULARY, (6, 7), generator=generator),
                "attention_mask": (torch.arange(7)[None] < lengths).long(),
                "labels": torch.randint(0, 2, (6,), generator=generator),
            }
        )
    return found


def learn(distiller: Distiller, data: list[Any], *, lr: float = 1e-3) -> list[float]:
    optimizer = torch.optim.AdamW(distiller.parameter_groups(), lr=lr)
    found = []
    for step, batch in enumerate(data):
        losses = distiller(batch, progress=step / len(data))
        losses.total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        found.append(losses.total.item())
    return found


def objective(**values: Any) -> ObjectiveSettings:
    return ObjectiveSettings.model_validate(values)


# --- equal to a plain loop ----------------------------------------------------------------


def test_losses_of_many_steps_equal_a_plain_loop_with_masks_projections_and_schedules() -> None:
    teacher, student = bert(4, 16, seed=1), bert(2, 8, seed=2)
    plain = copy.deepcopy(student)
    distiller = Distiller(
        student,
        objective(
            hard_weight=0.3,
            soft_weight={"base": 2, "schedule": "linear_decay"},
            temperature=3,
            matches=[
                {"kind": "hidden_mse", "weight": 0.7, "projection": "linear"},
                {"kind": "attention_kl", "weight": {"base": 1, "schedule": "linear_growth"}},
            ],
        ),
        teacher=teacher,
    )
    projections = copy.deepcopy(list(distiller.projections.values()))
    found = learn(distiller, batches())

    trained = [*plain.parameters(), *(p for each in projections for p in each.parameters())]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    attention = [FeatureKey("attention", layer) for layer in (1, 2, 3, 4)]
    expected = []
    for step, batch in enumerate(batches()):
        progress = step / 4
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad(), Capture(teacher, attention) as seen_teacher:
            known = teacher(**inputs, output_hidden_states=True)
        with Capture(plain, attention[:2]) as seen:
            own = plain(**inputs, output_hidden_states=True)
        target, own_log = softmax(known.logits / 3, -1), log_softmax(own.logits / 3, -1)
        loss = 0.3 * cross_entropy(own.logits, batch["labels"])
        loss += 2 * (1 - progress) * 9 * kl_div(own_log, target, reduction="batchmean")
        mask = batch["attention_mask"].float()
        for projection, (s, t) in zip(projections, ((0, 0), (1, 2), (2, 4)), strict=True):
            square = (projection(own.hidden_states[s]) - known.hidden_states[t]) ** 2
            loss += 0.7 * (square * mask[..., None]).sum() / (mask.sum() * 16)
        for s, t in ((1, 2), (2, 4)):
            p = seen_teacher.features[FeatureKey("attention", t)].clamp(min=1e-12)
            q = seen.features[FeatureKey("attention", s)].clamp(min=1e-12)
            keys = mask[:, None, None, :]
            rows = (p * (p.log() - q.log()) * keys).sum(-1).mean(1)
            loss += progress * (rows * mask).sum() / mask.sum()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert found == pytest.approx(expected, abs=1e-6, rel=1e-6)


def test_two_teachers_teach_the_mean_of_their_logits() -> None:
    teachers = [bert(2, 16, seed=1), bert(3, 8, seed=2)]
    student = bert(1, 8, seed=3)
    plain = copy.deepcopy(student)
    found = learn(Distiller(student, objective(preset="turc"), teacher=teachers), batches())
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    expected = []
    for batch in batches():
        with torch.no_grad():
            first, second = (hugging_face(teacher.eval(), batch).logits for teacher in teachers)
            mean = (first + second) / 2
        own = hugging_face(plain, batch).logits
        loss = -(softmax(mean, -1) * log_softmax(own, -1)).sum(-1).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert found == pytest.approx(expected, abs=1e-6)


def test_stored_tensors_teach_what_a_live_teacher_does() -> None:
    teacher, student = bert(4, 16, seed=1).eval(), bert(2, 16, seed=2)
    settings = objective(**SOFT_ONLY, matches=["nst", "pkd"])
    live = Distiller(copy.deepcopy(student), settings, teacher=teacher)
    data = batches()
    expected = learn(live, data)
    stored = Distiller(student, settings, teacher_shape=shape_of(teacher))
    optimizer = torch.optim.AdamW(stored.parameter_groups(), lr=1e-3)
    for batch, value in zip(data, expected, strict=True):
        known = live.ask_teacher(batch)
        losses = stored(batch, stored=TeacherTensors(known.logits, known.features))
        losses.total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        assert losses.total.item() == pytest.approx(value, abs=1e-6)


def test_logits_of_tokens_are_distilled_where_there_is_no_padding() -> None:
    teacher, student = bert(2, 16, kind=BertForMaskedLM), bert(1, 16, kind=BertForMaskedLM, seed=4)
    batch = batches(1)[0]
    labels = torch.full((6, 7), -100)
    labels[:, 1] = batch["input_ids"][:, 1]
    batch["labels"] = labels
    with torch.no_grad():
        known, own = (hugging_face(each.eval(), batch).logits for each in (teacher, student))
    real = batch["attention_mask"].bool()
    for where, chosen in (("all", real), ("masked", labels >= 0)):
        losses = Distiller(student, objective(preset="thesis", tokens=where), teacher=teacher)(
            batch
        )
        parts = losses.floats()
        hard = cross_entropy(own[labels >= 0], labels[labels >= 0])
        logs = log_softmax(own[chosen] / 2, -1)
        soft = 4 * kl_div(logs, softmax(known[chosen] / 2, -1), reduction="batchmean")
        assert parts["hard"] == pytest.approx(hard.item(), rel=1e-5)
        assert parts["soft"] == pytest.approx(soft.item(), rel=1e-5)
        total = (parts["hard"] + parts["soft"] + parts["cos"]) / 3
        assert parts["total"] == pytest.approx(total, rel=1e-5)


def test_rows_without_a_label_learn_from_the_teacher_alone() -> None:
    teacher, student = bert(2, 8, seed=1), bert(1, 8, seed=2)
    batch = batches(1)[0]
    batch["labels"] = torch.full((6,), -100)
    found = Distiller(student, objective(alpha=0.2), teacher=teacher)(batch).total
    expected = Distiller(student, objective(alpha=1), teacher=teacher)(batch).total
    assert torch.allclose(found, expected)


def test_the_example_in_the_docstring_runs() -> None:
    code = re.search(r"stay yours::\n\n(.*?)\n\n    Rows", Distiller.__doc__ or "", re.S)
    assert code is not None
    text = textwrap.dedent(code.group(1))
    assert len([line for line in text.splitlines() if line.strip()]) < 25
    values: dict[str, Any] = {}
    exec(text, values)
    assert values["losses"].floats().keys() == {
        "total",
        "hard",
        "soft",
        "hidden_mse",
        "attention_ce",
    }


def test_the_distiller_needs_neither_ray_nor_feast() -> None:
    import subprocess
    import sys

    code = (
        "import sys, driftline.platform.distillation.distiller\n"
        "print([name for name in ('ray', 'feast', 'mlflow', 'duckdb') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# --- what TextBrewer does wrong (papers.md 3.3) -------------------------------------------


def test_a_batch_may_be_any_mapping_or_tuple() -> None:  # B4
    student, teacher = bert(1, 8), bert(1, 8, seed=1)
    distiller = Distiller(student, objective(preset="turc"), teacher=teacher)
    batch = batches(1)[0]
    expected = distiller(batch).total
    assert torch.equal(distiller(BatchEncoding(batch)).total, expected)
    as_tuple = (batch["input_ids"], batch["attention_mask"])
    assert torch.equal(distiller(as_tuple).total, expected)


def test_modules_of_any_model_are_matched_through_hooks() -> None:  # B3
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))
    student = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    match = {"kind": "module", "student": "1", "teacher": "1", "projection": "linear"}
    example = torch.randn(5, 3)
    distiller = Distiller(
        student, objective(alpha=1, matches=[match]), teacher=teacher, example=example
    )
    projection = distiller.projections["module-0"]
    expected = ((projection(student[:2](example)) - teacher[:2](example)) ** 2).mean()
    assert distiller(example).parts["module"] == pytest.approx(expected.item(), rel=1e-6)
    with pytest.raises(ValueError, match="match module: the student has no module '1'"):
        Distiller(student, objective(alpha=1, matches=[match]), teacher=teacher)


def test_a_second_training_adds_no_projections_again() -> None:  # B7
    matches = [{"kind": "hidden_mse", "projection": {"kind": "linear", "learning_rate": 0.1}}]
    distiller = Distiller(
        bert(1, 8), objective(alpha=1, matches=matches), teacher=bert(2, 16, seed=1)
    )
    first = learn(distiller, batches(1))
    before = [list(map(id, group["params"])) for group in distiller.parameter_groups()]
    second = learn(distiller, batches(1))
    assert [list(map(id, group["params"])) for group in distiller.parameter_groups()] == before
    assert second[0] < first[0]
    assert [group.get("lr") for group in distiller.parameter_groups()] == [None, 0.1, 0.1]


def test_one_mask_serves_all_layers_and_logits() -> None:  # B8
    teacher, student = bert(2, 16, kind=BertForMaskedLM), bert(2, 16, kind=BertForMaskedLM, seed=4)
    settings = objective(**SOFT_ONLY, matches=["hidden_mse", "nst", "cos"])
    losses = Distiller(student, settings, teacher=teacher)(batches(1)[0] | {"labels": None})
    assert losses.total.isfinite()


def test_padding_changes_nothing() -> None:  # B2, B15
    teacher, student = bert(2, 16).eval(), bert(2, 8, seed=4).eval()
    matches: list[Any] = ["nst", "attention_ce", "attention_mse", "attention_kl"]
    matches += [{"kind": kind, "projection": "linear"} for kind in ("hidden_mse", "fsp", "cos")]
    distiller = Distiller(student, objective(matches=matches), teacher=teacher)
    batch = batches(1)[0]
    expected = distiller(batch).floats()
    wider = {
        "input_ids": torch.cat([batch["input_ids"], torch.full((6, 5), 9)], dim=1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.zeros(6, 5).long()], dim=1),
        "labels": batch["labels"],
    }
    assert distiller(wider).floats() == pytest.approx(expected, rel=1e-4)


def test_a_head_of_one_logit_is_taught_by_the_binary_loss_and_no_other() -> None:  # B13
    student, teacher = bert(1, 8, labels=1), bert(1, 8, labels=1, seed=1)
    with pytest.raises(ValueError, match=r"softmax over 1 class .* soft: \{kind: binary\}"):
        Distiller(student, objective(alpha=1), teacher=teacher)
    distiller = Distiller(student, objective(alpha=0.5, soft="binary"), teacher=teacher)
    distiller(batches(1)[0]).total.backward()  # type: ignore[no-untyped-call]
    assert student.classifier.weight.grad.abs().sum() > 0


def test_the_teachers_logits_are_not_edited() -> None:  # B19
    teacher, student = bert(1, 8), bert(1, 8, seed=1)
    distiller = Distiller(student, objective(alpha=1, probability_shift=True), teacher=teacher)
    stored = distiller.ask_teacher(batches(1)[0])
    assert stored.logits is not None
    before = stored.logits.clone()
    distiller(batches(1)[0], stored=stored)
    assert torch.equal(stored.logits, before)


def test_losses_stay_on_the_device_until_numbers_are_asked_for(  # B20
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    distiller = Distiller(bert(1, 8), objective(matches=["cos"]), teacher=bert(2, 8, seed=1))
    batch = batches(1)[0]
    reads: list[str] = []
    for name in ("item", "tolist", "__float__", "__bool__"):
        inner = getattr(Tensor, name)

        def read(self: Tensor, *, inner: Any = inner, name: str = name) -> Any:
            if self.is_floating_point():
                reads.append(name)
            return inner(self)

        monkeypatch.setattr(Tensor, name, read)
    losses: Losses = distiller(batch)
    losses.total.backward()  # type: ignore[no-untyped-call]
    assert reads == []
    assert set(losses.floats()) == {"total", "hard", "soft", "cos"}
    assert reads == ["tolist"]


def test_the_teacher_stays_bit_identical_and_has_no_gradient() -> None:  # T.7
    teacher = bert(2, 16, seed=1).train()
    before = copy.deepcopy(teacher.state_dict())
    matches = [{"kind": "hidden_mse", "projection": "linear"}]
    learn(Distiller(bert(1, 8), objective(matches=matches), teacher=teacher), batches())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not teacher.training


def test_schedules_multiply_the_base_from_the_first_step_on() -> None:  # B11
    match = {"kind": "cos", "weight": {"base": 5, "schedule": "linear_growth"}}
    distiller = Distiller(bert(1, 8), objective(alpha=1, matches=[match]), teacher=bert(1, 8))
    batch = batches(1)[0]
    for progress, weight in ((0.0, 0.0), (0.5, 2.5), (1.0, 5.0)):
        losses = distiller(batch, progress=progress).floats()
        expected = losses["soft"] + weight * losses["cos"]
        assert losses["total"] == pytest.approx(expected, abs=1e-6)


# --- refused before the first step --------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"matches": ["hidden_mse"]}, "hidden state is 8 wide .* 16 in the teacher"),
        (
            {"matches": [{"kind": "nst", "layers": {"kind": "explicit", "pairs": [[5, 5]]}}]},
            "the student has places 0 to 1",
        ),
        ({"matches": [{"kind": "module", "student": "no", "teacher": "bert"}]}, "no module 'no'"),
    ],
)
def test_impossible_matches_are_refused_at_construction(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Distiller(bert(1, 8), objective(**values), teacher=bert(4, 16))


def test_other_tokens_leave_matches_of_rows_only() -> None:
    student, teacher = bert(1, 16), bert(2, 16, seed=1)
    with pytest.raises(ValueError, match=r"compares token by token.*; match whole rows instead"):
        Distiller(student, objective(matches=["cos"]), teacher=teacher, same_tokens=False)
    distiller = Distiller(student, objective(matches=["pkd"]), teacher=teacher, same_tokens=False)
    one, other = batches(2)
    losses = distiller(one, teacher_batch={name: other[name][:, :5] for name in list(other)[:2]})
    assert losses.total.isfinite()


def test_what_the_models_cannot_give_is_refused_with_an_example_batch() -> None:
    batch = batches(1)[0]
    unlabelled = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match=r"the batch has none: put labels .* or set alpha to 1"):
        Distiller(bert(1, 8), objective(), teacher=bert(1, 8), example=unlabelled)
    with pytest.raises(ValueError, match=r"same classes, got \[2, 3\] outputs"):
        Distiller(bert(1, 8), objective(), teacher=bert(1, 8, labels=3))
    with pytest.raises(ValueError, match="matches compare with a teacher: give teacher="):
        Distiller(bert(1, 8), objective(matches=["cos"]))
    with pytest.raises(ValueError, match="there is no teacher: give teacher= to the distiller"):
        Distiller(bert(1, 8), objective())(batch)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.full((4,), 7), "classes below 2, or negative where not known, got 7"),
        (torch.ones(4, 2).long(), r"one for each of the logits \[4, 2\], so of shape \[4\]"),
        (torch.full((4,), 2.0), r"shares of yes between 0 and 1, .* got 2; .*labels.long\(\)"),
        (torch.full((4,), -100.0), "shares of yes between 0 and 1, .* got -100"),
    ],
)
def test_labels_that_mean_nothing_are_refused_with_an_example_batch(
    labels: torch.Tensor, message: str
) -> None:
    batch = {"input_ids": torch.randint(5, 20, (4, 6)), "labels": labels}
    with pytest.raises(ValueError, match=message):
        Distiller(bert(1, 8), objective(), teacher=bert(1, 8), example=batch)


def test_classes_in_floating_point_are_refused_where_there_are_more_than_two() -> None:
    batch = {"input_ids": torch.randint(5, 20, (4, 6)), "labels": torch.rand(4)}
    models = bert(1, 8, labels=3), bert(1, 8, labels=3, seed=1)
    with pytest.raises(ValueError, match=r"got them for logits \[4, 3\]; give classes as integers"):
        Distiller(models[0], objective(), teacher=models[1], example=batch)


def test_a_model_cannot_be_its_own_teacher() -> None:
    model = bert(1, 8)
    with pytest.raises(ValueError, match=r"one and the same module; give a copy .*deepcopy"):
        Distiller(model, objective(), teacher=model)


def test_an_adapter_of_ones_own_runs_any_model() -> None:
    student, teacher = nn.Linear(3, 2), nn.Linear(4, 2)

    def left(model: nn.Module, batch: Any) -> Outputs:
        return Outputs(model(batch[0]), labels=batch[2])

    def right(model: nn.Module, batch: Any) -> Outputs:
        return Outputs(model(batch[1]))

    batch = (torch.randn(5, 3), torch.randn(5, 4), torch.rand(5))
    distiller = Distiller(
        student, objective(), teacher=teacher, adapter=left, teacher_adapter=right, example=batch
    )
    log_p = log_softmax(student(batch[0]), -1)
    hard = -(batch[2] * log_p[:, 1] + (1 - batch[2]) * log_p[:, 0]).mean()
    assert distiller(batch).floats()["hard"] == pytest.approx(hard.item(), rel=1e-5)

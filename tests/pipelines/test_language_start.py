"""A student learns its teacher's language before any click, as a start of any strategy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from driftline.pipelines.frozen_teacher import MASKED, Teacher
from driftline.pipelines.laboratory import Laboratory
from driftline.pipelines.replay import log_split
from driftline.pipelines.strategy import TrainedStudent, check_strategy, train_strategy
from driftline.platform.artefacts import hash_file, write_json
from driftline.platform.checkpoints import save_weights
from driftline.platform.distillation.language_start import MlmDistilStart
from driftline.platform.errors import SettingsError
from driftline.platform.settings import ArmsRefreshSettings, DriftlineSettings
from driftline.platform.text import train_tokenizer
from driftline.platform.windows import HOUR
from driftline.platform.workspace import Workspace

Open = Callable[..., Laboratory]
STAGE = {"num_epochs": 2, "batch_size": 32, "learning_rate": 0.003, "max_rows": 300}


@pytest.fixture
def laboratory(market: DriftlineSettings, tmp_path: Path) -> Open:
    """Opens laboratories of one folder on the small market."""

    def open_(**student: Any) -> Laboratory:
        changed = market.student.model_copy(update=student)
        settings = market.model_copy(update={"student": changed})
        moment = log_split(settings).id.start + 6 * HOUR
        return Laboratory.open(settings, as_of=moment, folder=tmp_path / "laboratory", seed=0)

    return open_


def strategy(init: Any, *, finetune: bool = False) -> ArmsRefreshSettings:
    """PD or PD-F of the thesis: language, then soft labels, then clicks."""
    return ArmsRefreshSettings.model_validate(
        {
            "init": init,
            "mlm": STAGE,
            "distil": STAGE,
            "finetune": STAGE if finetune else None,
            "self_training": {"enabled": False},
            "head": None,
        }
    )


def trained(student: TrainedStudent) -> list[str]:
    """Names of the stages that had to be trained."""
    return [node.name for node in student.nodes if node.result and node.made_now]


@pytest.mark.parametrize("form", ["twin", "single"])
def test_a_strategy_begins_with_its_teachers_language_once(
    market: DriftlineSettings, laboratory: Open, form: Any
) -> None:
    teacher = Teacher.open(Workspace.of(market)).path
    before = hash_file(teacher / MASKED)
    student = train_strategy(laboratory(), strategy("mlm_distil"), form=form)
    assert trained(student) == ["mlm_distil", "distil"]
    (node, _) = [node for node in student.nodes if node.result]
    assert node.result is not None
    first, last = node.result.history[0], node.result.history[-1]
    assert last["train_loss"] < first["train_loss"]
    if form == "single":  # the texts of a twin are too few to hold any out
        assert last["loss"] < first["loss"]
        assert {"hard_loss", "soft_loss", "match_cos"} <= last.keys()
    assert hash_file(teacher / MASKED) == before
    longer = train_strategy(laboratory(), strategy("mlm_distil", finetune=True), form=form)
    assert trained(longer) == ["finetune"]
    assert longer.distilled == (student.weights,)


def test_whatever_is_said_of_the_language_decides_the_stage(laboratory: Open) -> None:
    """The recipe is the strategy's ``mlm``; a start of its own is shared with who needs it too."""
    plain = train_strategy(laboratory(), strategy("mlm_distil"))
    same = strategy({"kind": "mlm_distil", "stage": STAGE})
    assert trained(train_strategy(laboratory(), same)) == []
    warmer = {"kind": "mlm_distil", "objective": {"preset": "thesis", "temperature": 4}}
    assert trained(train_strategy(laboratory(), strategy(warmer))) == ["mlm_distil", "distil"]
    assert trained(train_strategy(laboratory(), strategy("mlm"))) == ["mlm", "distil"]
    further = strategy({"kind": "mlm_distil", "start": "mlm"})
    student = train_strategy(laboratory(), further)
    assert trained(student) == ["mlm_distil", "distil"]
    assert hash_file(student.weights) != hash_file(plain.weights)


def test_a_small_vocabulary_is_taught_by_a_deeper_model_of_it(laboratory: Open) -> None:
    lab = laboratory(vocabulary_size=350)
    start = {"kind": "mlm_distil", "teacher": "deeper", "num_layers": 2}
    student = train_strategy(lab, strategy(start))
    assert trained(student) == ["mlm", "mlm_distil", "distil"]
    assert lab.tokenizer.vocabulary_size == 350


# --- refused before anything is trained ---------------------------------------------------


def refusal(lab: Laboratory, init: Any, form: Any = "twin") -> str:
    with pytest.raises(SettingsError) as caught:
        check_strategy(lab, strategy(init), form=form)
    assert lab.nodes == []
    return str(caught.value)


def test_another_vocabulary_is_refused(market: DriftlineSettings, laboratory: Open) -> None:
    told = refusal(laboratory(vocabulary_size=350), "mlm_distil")
    assert "the student has a vocabulary of 350, the teacher 400" in told
    assert "take teacher 'deeper'" in told
    lab = laboratory(vocabulary_size=400)
    train_tokenizer(
        (title[::-1] for title in lab.texts.table["title"].to_pylist() * 5),
        Workspace.of(market).student_tokenizer(400),
        settings=market.tokenizer,
        seed=0,
    )
    assert "another tokeniser than the teacher" in refusal(lab, "mlm_distil")


def test_a_teacher_that_cannot_speak_is_refused(
    market: DriftlineSettings, laboratory: Open
) -> None:
    teacher = Teacher.open(Workspace.of(market))
    masked = teacher.path / MASKED
    before = {name: value for name, value in teacher.manifest.items() if name != "masked"}
    write_json(teacher.path / "manifest.json", before)  # as they were before it stood there
    weights = load_file(masked)
    save_weights(masked, {name: w for name, w in weights.items() if name.startswith("encoder.")})
    assert "kept no prediction head" in refusal(laboratory(), "mlm_distil")
    masked.unlink()
    assert "had no masked-language stage; set teacher.mlm" in refusal(laboratory(), "mlm_distil")
    nested = {"kind": "layers", "layers": [1], "source": "masked_teacher"}
    start = {"kind": "mlm_distil", "teacher": "deeper", "start": nested}
    assert "'masked_teacher' needs teacher.mlm" in refusal(laboratory(), start)


@pytest.mark.parametrize(
    ("init", "form", "message"),
    [
        ("mlm_distil", "mlp", "needs a student with an encoder"),
        ({"objective": {"matches": ["cos"]}}, "twin", "give projection: {kind: linear}"),
        ({"start": {"kind": "layers", "layers": [1, 2, 3]}}, "twin", "one layer of the deeper"),
    ],
)
def test_what_does_not_fit_the_student_is_refused(
    laboratory: Open, market: DriftlineSettings, init: Any, form: Any, message: str
) -> None:
    encoder = market.student.encoder.model_copy(update={"hidden_size": 8, "num_heads": 1})
    raw = init if isinstance(init, str) else {"kind": "mlm_distil", **init}
    assert message in refusal(laboratory(encoder=encoder), raw, form)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"num_layers": 3}, "num_layers is for teacher 'deeper'"),
        ({"objective": {"alpha": 0}}, "learns nothing from the teacher"),
        ({"objective": {"soft": "binary"}}, "objective.soft: binary is of a click"),
    ],
)
def test_settings_that_make_no_sense_are_refused(raw: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MlmDistilStart.model_validate(raw)


def test_a_strategy_with_it_comes_back_from_its_json() -> None:
    layers = {"kind": "layers", "layers": [1], "source": "masked_teacher"}
    whole = strategy({"kind": "mlm_distil", "start": layers, "stage": STAGE})
    assert ArmsRefreshSettings.model_validate_json(whole.model_dump_json()) == whole


def test_it_alone_trains_no_head() -> None:
    with pytest.raises(ValueError, match="trains no head"):
        ArmsRefreshSettings.model_validate(
            {
                "init": "mlm_distil",
                "distil": None,
                "finetune": None,
                "self_training": {"enabled": 0},
            }
        )

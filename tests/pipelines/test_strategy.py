"""A strategy gives one student, trains no stage twice, and is measured on rows nobody learned."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from driftline.features.frame_files import frame_path, read_frames, write_frame
from driftline.pipelines.labels import SoftLabels
from driftline.pipelines.laboratory import Laboratory
from driftline.pipelines.laboratory_rows import Rows
from driftline.pipelines.market_moment import default_moment
from driftline.pipelines.pseudo_labels import pseudo_labelled
from driftline.pipelines.replay import log_split
from driftline.pipelines.strategy import prepare_strategy, train_strategy
from driftline.pipelines.strategy_matches import keep_features
from driftline.pipelines.strategy_measures import TestSets, measure_student, measure_teacher
from driftline.pipelines.strategy_names import (
    APPROACHES,
    NAMED_STRATEGIES,
    approach,
    triple_of,
)
from driftline.platform.artefacts import hash_file
from driftline.platform.errors import SettingsError
from driftline.platform.metrics import roc_auc
from driftline.platform.settings import (
    ArmsRefreshSettings,
    ArmsSelfTrainingSettings,
    DriftlineSettings,
    ObjectiveSettings,
    StageSettings,
    StudentSettings,
)
from driftline.platform.teacher_features import TeacherFeatures
from driftline.platform.windows import HOUR, Window
from driftline.platform.workspace import Workspace

Open = Callable[..., Laboratory]
SLICE_HOURS = 3
STAGE = {"num_epochs": 1, "batch_size": 128, "learning_rate": 0.003, "max_rows": 300}


@pytest.fixture
def base() -> ArmsRefreshSettings:
    """Short stages, no head stage: the paper's strategies."""
    return ArmsRefreshSettings.model_validate(
        {
            "mlm": STAGE,
            "supervised": STAGE,
            "distil": STAGE,
            "finetune": STAGE,
            "self_training": STAGE,
            "head": None,
        }
    )


@pytest.fixture
def laboratory(market: DriftlineSettings, tmp_path: Path) -> Open:
    """Opens laboratories of one folder on the small market."""

    def open_(seed: int = 0, folder: str = "laboratory", **changes: Any) -> Laboratory:
        settings = market.model_copy(update=changes)
        return Laboratory.open(
            settings,
            as_of=default_moment(settings, slice_hours=SLICE_HOURS, num_slices=2),
            folder=tmp_path / folder,
            seed=seed,
            slice_hours=SLICE_HOURS,
            num_slices=2,
        )

    return open_


def test_strategies_that_begin_alike_share_their_beginning(
    laboratory: Open, base: ArmsRefreshSettings
) -> None:
    pd, pd_f = (NAMED_STRATEGIES[name](base) for name in ("PD", "PD-F"))
    first = train_strategy(laboratory(), pd)
    assert [node.name for node in first.nodes if node.result] == ["mlm", "distil"]
    assert all(node.made_now for node in first.nodes)
    second = train_strategy(laboratory(), pd_f)
    trained = [node.name for node in second.nodes if node.result and node.made_now]
    assert trained == ["finetune"]
    assert second.distilled == (first.weights,)
    assert sum(node.teacher_passes for node in second.nodes if node.made_now) == 0


def test_beginnings_are_shared_however_few_rows_the_fine_tuning_may_see(
    market: DriftlineSettings, laboratory: Open, base: ArmsRefreshSettings
) -> None:
    """Cells of a study carry their own strategy, so scales must not follow its ``max_rows``."""
    trained = []
    for name in ("PD", "PD-F"):
        strategy = NAMED_STRATEGIES[name](base)
        student = market.student.model_copy(update={"arms_refresh": strategy})
        lab = laboratory(student=student)
        nodes = train_strategy(lab, strategy).nodes
        trained.append([node.name for node in nodes if node.result and node.made_now])
    assert strategy.finetune is not None
    assert strategy.finetune.max_rows is not None
    assert lab.id.train.num_rows > strategy.finetune.max_rows
    assert trained == [["mlm", "distil"], ["finetune"]]


def test_a_strategy_run_again_or_elsewhere_gives_the_same_weights(
    laboratory: Open, base: ArmsRefreshSettings
) -> None:
    once = train_strategy(laboratory(), base)
    again = train_strategy(laboratory(), base)
    assert again.weights == once.weights
    assert not any(node.made_now for node in again.nodes)
    elsewhere = train_strategy(laboratory(folder="elsewhere"), base)
    assert hash_file(elsewhere.weights) == hash_file(once.weights)
    other_seed = train_strategy(laboratory(seed=1), base)
    assert hash_file(other_seed.weights) != hash_file(once.weights)


def test_all_strategies_and_seeds_cost_one_pass_of_the_teacher(
    market: DriftlineSettings, laboratory: Open, base: ArmsRefreshSettings
) -> None:
    """Every distinct input of the distillation goes through the teacher once, whoever asks."""
    shutil.rmtree(Workspace.of(market).labels)
    passes = 0
    for seed in (0, 1):
        for name in ("KD", "PD"):
            lab = laboratory(seed)
            prepare_strategy(lab, NAMED_STRATEGIES[name](base))
            passes += sum(node.teacher_passes for node in lab.nodes if node.made_now)
    lab = laboratory()
    assert base.distil is not None
    rows = [part.frame for part in lab.distil_rows(base.distil)]
    distinct = {tuple(t.tolist()) for frame in rows for t in lab.store.reader.tokens(frame)}
    assert passes == len(distinct)
    assert lab.store.num_passes == 0


def test_the_measures_are_those_of_rows_after_the_moment(
    laboratory: Open, base: ArmsRefreshSettings
) -> None:
    lab = laboratory()
    student = train_strategy(lab, NAMED_STRATEGIES["PD-F"](base))
    tests = TestSets(lab)
    measures, p = measure_student(student, tests)
    frame = lab.next_slice()
    assert frame["event_time"].to_pylist()[0] >= lab.as_of
    assert measures["id_auc"] == roc_auc(frame["clicked"].to_numpy().astype(float), p)
    wanted = {"ood_auc", "distilled_ood_auc", "id_soft_auc", "log_loss", "normalised_entropy"}
    wanted |= {"calibration_error", "calibration_ratio", "head_auc", "tail_auc", "core_seconds"}
    wanted |= {"num_parameters", "teacher_passes"}
    assert wanted <= set(measures)
    assert p.mean() == pytest.approx(frame["clicked"].to_numpy().mean(), abs=0.2)  # prior undone
    learned = set(lab.ood.train["request_id"].to_pylist())
    assert not learned & set(lab.ood_test["request_id"].to_pylist())


def test_the_teacher_is_a_row_of_the_table(laboratory: Open) -> None:
    measures, p = measure_teacher(TestSets(laboratory()))
    assert 0 <= measures["ood_auc"] <= 1
    assert measures["id_soft_auc"] > 0.5  # it agrees with itself
    assert len(p) == laboratory().next_slice().num_rows


@pytest.mark.parametrize("form", ["twin_text", "single", "mlp"])
def test_every_form_of_student_runs_the_same_strategy(
    laboratory: Open, base: ArmsRefreshSettings, form: Any
) -> None:
    lab = laboratory()
    strategy = NAMED_STRATEGIES["KD" if form == "mlp" else "PD"](base)
    student = train_strategy(lab, strategy, form=form)
    measures, p = measure_student(student, TestSets(lab), soft=False)
    assert np.isfinite(p).all()
    assert np.isfinite(measures["ood_auc"])
    names = [node.name for node in student.nodes if node.result]
    assert names == (["distil"] if form == "mlp" else ["mlm", "distil"])


def test_only_the_text_student_is_blind_to_numbers(
    laboratory: Open, base: ArmsRefreshSettings
) -> None:
    lab = laboratory()
    frame = lab.next_slice()
    at = frame.column_names.index("ad__ctr_24h")
    changed = frame.set_column(at, "ad__ctr_24h", pa.array(np.linspace(0, 1, frame.num_rows)))
    moved = {}
    for form in ("twin", "twin_text"):
        student = train_strategy(lab, NAMED_STRATEGIES["KD"](base), form=form)
        before, after = (
            student.form.logits(Rows(name, lab.test_texts, lambda f=f: f), *student.files)  # type: ignore[misc]
            for name, f in (("as it was", frame), ("changed", changed))
        )
        moved[form] = float(np.abs(before - after).max())
    assert moved["twin"] > 0
    assert moved["twin_text"] == 0


def test_the_numbers_of_table_3_name_the_strategies_one_to_one(base: ArmsRefreshSettings) -> None:
    found = {number: triple_of(approach(number, base)) for number in APPROACHES}
    assert found == APPROACHES
    assert len(set(found.values())) == 10


def test_named_strategies_have_the_stages_of_the_paper(base: ArmsRefreshSettings) -> None:
    stages = {
        name: (s.init.kind == "mlm", s.distil is not None, s.finetune is not None)
        for name, s in ((name, make(base)) for name, make in NAMED_STRATEGIES.items())
    }
    assert stages == {
        "basic": (False, False, True),
        "KD": (False, True, False),
        "PF": (True, False, True),
        "PD": (True, True, False),
        "PD-F": (True, True, True),
    }


# --- matches ------------------------------------------------------------------------------


PKD = {"kind": "pkd", "projection": "linear"}
FIRST = {**PKD, "layers": {"kind": "explicit", "pairs": [[0, 0]]}}
HIDDEN = {"kind": "hidden_mse", "weight": 2}


def matching(base: ArmsRefreshSettings, *matches: Any, **distil: Any) -> ArmsRefreshSettings:
    """KD with these matches beside the soft labels."""
    raw = NAMED_STRATEGIES["KD"](base).model_dump(mode="json")
    raw["objective"]["matches"] = matches
    return ArmsRefreshSettings.model_validate(raw | {"distil": raw["distil"] | distil})


@pytest.mark.parametrize(
    ("form", "matches", "told"),
    [
        ("single", (HIDDEN, {"kind": "pkd"}), {"match_hidden_mse", "match_pkd"}),
        ("twin", (PKD, FIRST), {"match_pkd", "match_pkd_2"}),
    ],
)
def test_a_strategy_matches_inner_features_with_the_stored_ones(
    laboratory: Open,
    base: ArmsRefreshSettings,
    form: Any,
    matches: tuple[Any, ...],
    told: set[str],
) -> None:
    lab, strategy = laboratory(), matching(base, *matches)
    student = train_strategy(lab, strategy, form=form)
    (stage,) = [node.result for node in student.nodes if node.result]
    assert stage is not None
    assert all(np.isfinite(row[name]) for row in stage.history for name in told)
    assert {name for name in stage.history[-1] if name.startswith("match_")} == told
    plain = train_strategy(lab, matching(base), form=form)
    assert hash_file(student.weights) != hash_file(plain.weights)
    again = train_strategy(laboratory(), strategy, form=form)
    assert (again.weights, again.nodes[-1].made_now) == (student.weights, False)


def test_strategies_with_and_without_matches_cost_one_pass_of_the_teacher(
    market: DriftlineSettings, laboratory: Open, base: ArmsRefreshSettings
) -> None:
    """They need other tensors, or none, of other and of the same rows."""
    shutil.rmtree(Workspace.of(market).labels)
    made_up = {"transfer": {"kind": "re_paired"}}
    strategies = [matching(base, PKD), matching(base, FIRST, **made_up), matching(base)]
    passes = 0
    rows: list[Rows] = []
    for strategy in strategies:
        lab = laboratory()
        keep_features(lab, strategies)
        prepare_strategy(lab, strategy)
        passes += sum(node.teacher_passes for node in lab.nodes if node.made_now)
        assert strategy.distil is not None
        rows += lab.distil_rows(strategy.distil)
    readers = (lab.store.with_texts(part.texts.table).reader for part in rows)
    tokens = (reader.tokens(part.frame) for reader, part in zip(readers, rows, strict=True))
    inputs = {tuple(row.tolist()) for part in tokens for row in part}
    (manifest,) = Workspace.of(market).labels.rglob("manifest.json")
    assert passes == len(inputs) == len(TeacherFeatures.open(manifest.parent))


def test_a_stage_is_found_whatever_else_the_teacher_keeps(
    laboratory: Open, base: ArmsRefreshSettings
) -> None:
    alone = train_strategy(laboratory(), matching(base, PKD))
    lab = laboratory()
    keep_features(lab, [matching(base, PKD), matching(base, FIRST)])
    together = train_strategy(lab, matching(base, PKD))
    assert together.weights == alone.weights
    assert not any(node.made_now for node in together.nodes if node.result)


@pytest.mark.parametrize(
    ("form", "match", "message"),
    [
        ("twin", {**PKD, "layers": {"kind": "explicit", "pairs": [[3, 1]]}}, "places 0 to 1"),
        ("twin", {"kind": "pkd"}, "32 wide in the student and 16 in the teacher; give projection"),
        ("twin", HIDDEN, "match hidden_mse compares token by token, .* match whole rows instead"),
        ("mlp", PKD, "the student has no layers"),
        ("single", {"kind": "module", "student": "nose", "teacher": "pooler"}, "nose"),
    ],
)
def test_an_impossible_match_is_refused_before_the_teacher_is_asked(
    market: DriftlineSettings,
    laboratory: Open,
    base: ArmsRefreshSettings,
    form: Any,
    match: dict[str, Any],
    message: str,
) -> None:
    shutil.rmtree(Workspace.of(market).labels)
    lab, bad = laboratory(), matching(base, match)
    with pytest.raises(SettingsError, match=message):
        keep_features(lab, [matching(base), bad], form=form)
    for use in (prepare_strategy, train_strategy):
        with pytest.raises(SettingsError, match=message):
            use(lab, bad, form=form)
    assert (lab.nodes, lab.keys) == ([], ())
    assert not Workspace.of(market).labels.exists()


def test_tokens_are_matched_only_where_both_cut_them_alike(
    market: DriftlineSettings, laboratory: Open, base: ArmsRefreshSettings
) -> None:
    lab, other_words = laboratory(), {"student": small_vocabulary(market)}
    keep_features(lab, [matching(base, HIDDEN)], form="single")
    small = laboratory(**other_words)
    with pytest.raises(SettingsError, match=r"but the student reads .*350 pieces.*tokeniser"):
        keep_features(small, [matching(base, HIDDEN)], form="single")
    keep_features(small, [matching(base, {"kind": "pkd"})], form="single")
    (member,) = lab.store.members
    serialiser = replace(member.reader.serialiser, columns=("ad__category",))
    reader = replace(member.reader, serialiser=serialiser)
    lab.store = SoftLabels((replace(member, reader=reader),))  # as one of an ensemble may read
    with pytest.raises(SettingsError, match=r"ad__ctr_24h' and the teacher .*, of ad__category'"):
        keep_features(lab, [matching(base, HIDDEN)], form="single")


def small_vocabulary(market: DriftlineSettings) -> StudentSettings:
    """The student with fewer pieces than its teacher."""
    return market.student.model_copy(update={"vocabulary_size": 350})


# --- what files are known by --------------------------------------------------------------


def test_rows_for_the_head_are_known_by_the_teacher_that_labelled_them(
    market: DriftlineSettings, laboratory: Open, base: ArmsRefreshSettings
) -> None:
    head = StageSettings.model_validate(STAGE)
    strategy = NAMED_STRATEGIES["basic"](base).model_copy(update={"head": head})

    def made(lab: Laboratory) -> bool:
        nodes = {node.name: node for node in train_strategy(lab, strategy).nodes}
        return nodes["head.arrow"].made_now

    assert made(laboratory())
    assert not made(laboratory())
    other = laboratory()
    (member,) = other.store.members
    manifest = member.teacher.manifest | {"tokenizer": "of another"}
    other.store = SoftLabels((replace(member, teacher=replace(member.teacher, manifest=manifest)),))
    assert made(other)  # another of an ensemble, heard alone
    refresh = market.student.head_refresh.model_copy(
        update={"objective": ObjectiveSettings(alpha=0)}
    )
    alone = market.student.model_copy(update={"head_refresh": refresh})
    assert made(laboratory(student=alone))


def test_a_log_with_other_rows_gives_other_names(
    market: DriftlineSettings, laboratory: Open
) -> None:
    """But not one that only went on after the moment."""

    def names(lab: Laboratory) -> tuple[str, str]:
        return lab.key("rows"), lab.test_texts.key

    def replace_hour(hour: datetime) -> None:
        frame = read_frames(market, Window(hour, hour + HOUR))
        write_frame(frame_path(market, hour), frame.slice(1), key="of other rows")

    lab = laboratory()
    rows, tests = names(lab)
    assert names(laboratory()) == (rows, tests)
    replace_hour(lab.as_of)
    after_rows, after_tests = names(laboratory())
    assert (after_rows == rows, after_tests == tests) == (True, False)
    replace_hour(lab.as_of - HOUR)
    assert names(laboratory())[0] != rows


# --- self-training ------------------------------------------------------------------------


def own_rows() -> tuple[Any, Any, Any]:
    logits = np.array([[0.0, 2.0], [0.0, 0.1], [0.0, -3.0], [0.0, -0.2]])
    frame = pa.table({"clicked": [True, False, False, True]})
    return frame, logits, np.array([False, False, True, True])


def test_soft_labels_stand_beside_the_clicks() -> None:
    frame, logits, recent = own_rows()
    rounds = ArmsSelfTrainingSettings(true_labels="id")
    rows, soft = pseudo_labelled(frame, logits, is_recent=recent, rounds=rounds)
    assert soft is not None
    np.testing.assert_allclose(soft, logits, rtol=1e-6)
    np.testing.assert_array_equal(rows["clicked"].to_numpy(), [np.nan, np.nan, 0, 1])


def test_hard_labels_are_mixed_into_the_clicks() -> None:
    frame, logits, recent = own_rows()
    rounds = ArmsSelfTrainingSettings(labels="hard", true_label_share=0.25)
    rows, soft = pseudo_labelled(frame, logits, is_recent=recent, rounds=rounds)
    assert soft is None
    np.testing.assert_allclose(rows["clicked"].to_numpy(), [1, 0.75, 0, 0.25])


@pytest.mark.parametrize("labels", ["soft", "hard"])
def test_unsure_labels_are_left_out(labels: Any) -> None:
    frame, logits, recent = own_rows()
    rounds = ArmsSelfTrainingSettings(labels=labels, min_confidence=0.8, true_label_share=0)
    rows, _ = pseudo_labelled(frame, logits, is_recent=recent, rounds=rounds)
    assert rows.num_rows == 2  # only the first and the third are sure
    kept = ArmsSelfTrainingSettings(labels=labels, min_confidence=0.8, true_labels="id")
    rows, soft = pseudo_labelled(frame, logits, is_recent=recent, rounds=kept)
    assert rows.num_rows == 3  # the fourth keeps its true click
    assert rows["clicked"].to_pylist()[-1] == 1
    if soft is not None:
        assert np.isnan(soft[-1]).all()


def test_self_training_starts_where_it_is_told_to(
    laboratory: Open, base: ArmsRefreshSettings
) -> None:
    lab = laboratory()
    short = base.model_copy(update={"init": NAMED_STRATEGIES["KD"](base).init})
    for changes in ({"start": "finetuned", "labels": "hard", "on": "id"}, {"on": "ood"}):
        rounds = base.self_training.model_copy(update=changes)
        strategy = short.model_copy(update={"self_training": rounds})
        student = train_strategy(lab, strategy)
        names = [node.name for node in student.nodes if node.result]
        assert names == ["distil", "finetune", "self_training"]


# --- bad input ----------------------------------------------------------------------------


def test_a_strategy_that_trains_no_head_is_refused() -> None:
    with pytest.raises(ValueError, match="trains no head"):
        ArmsRefreshSettings(distil=None, finetune=None, self_training={"enabled": False})
    with pytest.raises(ValueError, match="self_training needs finetune"):
        ArmsRefreshSettings(finetune=None)


ALONE: dict[str, Any] = {"distil": None, "finetune": None, "self_training": {"enabled": False}}
HEADLESS = [
    "random",
    "embeddings",
    "truncation",
    {"kind": "layers", "layers": [1]},
    {"kind": "checkpoint", "path": "weights.safetensors"},
    "dual_vocabulary",
]


@pytest.mark.parametrize("init", HEADLESS)
def test_a_start_of_encoders_alone_is_no_strategy(init: Any) -> None:
    with pytest.raises(ValueError, match="without distil and finetune trains no head"):
        ArmsRefreshSettings.model_validate(ALONE | {"init": init})
    ArmsRefreshSettings.model_validate(ALONE | {"init": "supervised"})
    ArmsRefreshSettings.model_validate(ALONE | {"init": init, "distil": STAGE})


def test_a_set_without_clicks_needs_soft_labels(
    laboratory: Open, base: ArmsRefreshSettings
) -> None:
    strategy = ArmsRefreshSettings.model_validate(
        base.model_dump(mode="json")
        | {"objective": {"alpha": 0}, "distil": {**STAGE, "transfer": {"kind": "re_paired"}}}
    )
    with pytest.raises(ValueError, match="without clicks"):
        prepare_strategy(laboratory(), strategy)


def test_a_slice_outside_the_log_is_refused(market: DriftlineSettings, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="recent part of the log has 12 h"):
        default_moment(market, slice_hours=24, num_slices=2)
    moment = default_moment(market, slice_hours=SLICE_HOURS, num_slices=2)
    with pytest.raises(SettingsError, match="inside the log"):
        Laboratory.open(market, as_of=moment, folder=tmp_path, seed=0, slice_hours=48, num_slices=1)


@pytest.mark.parametrize(
    ("slice_hours", "num_slices", "window_hours", "longest"),
    [(6, 2, 168, 4), (4.5, 2, 168, 4), (6, 2, 2, 5), (7, 1, 168, 6)],
)
def test_recent_rows_to_learn_from_must_be_left_before_the_slices(
    market: DriftlineSettings,
    slice_hours: float,
    num_slices: int,
    window_hours: int,
    longest: int,
) -> None:
    """Of 12 recent hours: slices that take all of them would leave stale rows as recent ones."""
    arms = market.student.arms_refresh.model_copy(update={"window_hours": window_hours})
    student = market.student.model_copy(update={"arms_refresh": arms})
    settings = market.model_copy(update={"student": student})
    with pytest.raises(SettingsError, match=f"set slice_hours to at most {longest}, or take"):
        default_moment(settings, slice_hours=slice_hours, num_slices=num_slices)
    moment = default_moment(settings, slice_hours=longest, num_slices=num_slices)
    recent = moment - log_split(settings).ood.end
    assert recent >= min(window_hours, longest) * HOUR
    assert recent > settings.labels.maturity
    with pytest.raises(SettingsError, match="set slice_hours to at most"):
        default_moment(settings, slice_hours=longest + 1, num_slices=num_slices)


def test_an_unknown_form_is_refused(laboratory: Open, base: ArmsRefreshSettings) -> None:
    with pytest.raises(ValueError, match="form must be one of"):
        train_strategy(laboratory(), base, form="triplet")  # type: ignore[arg-type]

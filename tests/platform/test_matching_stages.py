"""Click stages with matches, and masked-language distillation, as jobs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div, log_softmax, softmax

from driftline.platform.distillation.capture import Capture
from driftline.platform.distillation.keys import FeatureKey
from driftline.platform.distillation.token_distillation import TokenDistilTask
from driftline.platform.distillation.token_models import TokenModel, language_teacher
from driftline.platform.errors import ContractError, SettingsError
from driftline.platform.examples import open_pairs, open_tokens, write_pairs, write_tokens
from driftline.platform.inference import load_model
from driftline.platform.inputs import open_inputs
from driftline.platform.masked_language import MlmTask, encoders_of
from driftline.platform.models.build import build_model
from driftline.platform.models.spec import SingleSpec
from driftline.platform.settings import ObjectiveSettings, StageSettings
from driftline.platform.stage_job import StageJob
from driftline.platform.stage_tasks import make_task, trained_model
from driftline.platform.stage_teacher import FrozenTeacher, teacher_keys
from driftline.platform.stages import run_stage
from driftline.platform.tasks import Workers
from driftline.platform.teacher_features import FeatureShape, TeacherFeatures

CPU = torch.device("cpu")
NARROW = 8
PROJECTED: Any = {"kind": "linear", "learning_rate": 0.01}


class KilledError(Exception):
    """Stands for SIGKILL inside a test."""


def objective(**values: Any) -> ObjectiveSettings:
    return ObjectiveSettings.model_validate(values)


def quiet(spec: Any, **changes: Any) -> Any:
    """The same model without chance in a step, and with other sizes."""
    encoder = spec.encoder.model_copy(update={"dropout": 0.0, **changes})
    spec = spec.model_copy(update={"encoder": encoder})
    if hasattr(spec, "head"):
        still = {"dropout": 0.0, "unknown_share": 0.0, "vector_size": encoder.hidden_size}
        spec = spec.model_copy(update={"head": spec.head.model_copy(update=still)})
    return spec


@pytest.fixture(scope="module")
def teacher(tiny_market: Any, tmp_path_factory: pytest.TempPathFactory) -> FrozenTeacher:
    """A tower of two layers and width 16, after a little training."""
    folder = tmp_path_factory.mktemp("teacher")
    stage = StageSettings(batch_size=20, num_epochs=2)
    job = tiny_market.job("teacher", folder, model=quiet(tiny_market.teacher), stage=stage)
    run_stage(job)
    return FrozenTeacher(job.model, (job.output,))


@pytest.fixture(scope="module")
def student(tiny_market: Any) -> SingleSpec:
    """A tower of one layer and width 8 over the same tokens."""
    narrow = quiet(tiny_market.teacher, hidden_size=NARROW, num_layers=1)
    return SingleSpec(encoder=narrow.encoder)


@pytest.fixture(scope="module")
def store(
    tiny_market: Any, teacher: FrozenTeacher, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path]:
    """The teacher's tensors for the serialised rows, with rows and pairs that point to them."""
    folder = tmp_path_factory.mktemp("store")
    model = load_model(teacher.model, *teacher.weights)
    rows = open_tokens(tiny_market.file("rows.arrow"))
    inputs = open_inputs(teacher.model, tiny_market.file("rows.arrow"))
    keys = [FeatureKey("hidden", layer) for layer in range(3)]
    keys += [FeatureKey("cls", 2), FeatureKey("attention", 2), FeatureKey("module", "classifier.0")]
    tensors: dict[str, tuple[int | str, ...]] = {
        "hidden": ("T", 16), "cls": (16,), "attention": (1, "T", "T"), "module": (16,)
    }  # fmt: skip
    features = TeacherFeatures.create(
        folder / "features",
        teacher="a" * 64,
        shapes={key: FeatureShape(tensors[key.kind]) for key in keys},
        dtype="float32",
    )
    everything = np.arange(len(rows))
    with torch.no_grad(), Capture(model, keys) as seen:
        logits = inputs.logits(model, everything, device=CPU).numpy()
    lengths = inputs.num_tokens(everything)
    assert lengths is not None
    with features.segment(everything, lengths) as writer:
        found = {key: tensor.numpy() for key, tensor in seen.features.items()}
        writer.write(everything, logits, found)
    places = np.where(everything % 7 == 3, -1, everything)  # some rows have no tensors
    labelled = replace(rows, teacher_logits=logits, teacher_rows=places)
    write_tokens(folder / "rows.arrow", labelled)
    pairs = open_pairs(tiny_market.file("train.arrow"))
    at = np.random.default_rng(0).integers(-1, len(rows), len(pairs))
    write_pairs(
        folder / "pairs.arrow",
        replace(pairs, teacher_logits=features.logits(at), teacher_rows=at),
    )
    return folder / "features", folder / "rows.arrow", folder / "pairs.arrow"


@pytest.fixture
def by_row(teacher: FrozenTeacher, store: tuple[Path, Path, Path]) -> dict[str, Any]:
    """What a job is given that learns serialised rows from stored tensors, without the weights."""
    features, rows, _ = store
    return {
        "teacher": FrozenTeacher(teacher.model),
        "features": features,
        "examples": rows,
        "validation": rows,
    }


@pytest.fixture
def by_pair(teacher: FrozenTeacher, store: tuple[Path, Path, Path]) -> dict[str, Any]:
    """The same for pairs."""
    features, _, pairs = store
    return {"teacher": FrozenTeacher(teacher.model), "features": features, "examples": pairs}


def matched(
    tiny_market: Any, folder: Path, spec: Any, settings: ObjectiveSettings, **changes: Any
) -> StageJob:
    job: StageJob = tiny_market.job(
        "teacher",
        folder,
        model=spec,
        objective=settings,
        **{"stage": StageSettings(batch_size=20, num_epochs=2, learning_rate=1e-2), **changes},
    )
    return job


ALL_MATCHES = [
    {"kind": "hidden_mse", "weight": 0.5, "projection": PROJECTED},
    {"kind": "pkd", "layers": {"kind": "explicit", "pairs": [[1, 2]]}, "projection": "linear"},
    {"kind": "attention_kl", "weight": {"base": 2, "schedule": "linear_growth"}},
]


# --- clicks -------------------------------------------------------------------------------


def test_stored_tensors_give_the_weights_of_a_live_teacher(
    tiny_market: Any,
    teacher: FrozenTeacher,
    student: SingleSpec,
    by_row: dict[str, Any],
    tmp_path: Path,
) -> None:
    rows = by_row["examples"]
    write_tokens(tmp_path / "all.arrow", replace(open_tokens(rows), teacher_rows=np.arange(60)))
    files = {"examples": tmp_path / "all.arrow", "validation": tmp_path / "all.arrow"}
    settings = objective(alpha=0.7, matches=ALL_MATCHES)
    live = matched(tiny_market, tmp_path / "live", student, settings, teacher=teacher, **files)
    stored = matched(
        tiny_market,
        tmp_path / "stored",
        student,
        settings,
        **(by_row | files),
    )
    first, second = run_stage(live), run_stage(stored)
    assert first.history[-1].keys() == second.history[-1].keys()
    for name, value in first.history[-1].items():
        assert second.history[-1][name] == pytest.approx(value, rel=1e-4), name
    one, two = load_file(live.output), load_file(stored.output)
    assert one.keys() == two.keys()
    assert not any("projections" in name for name in one)
    for name, value in one.items():
        assert torch.allclose(value, two[name], atol=1e-4), name


def test_a_step_equals_the_plain_sum_of_its_parts_with_rows_that_lack_tensors(
    tiny_market: Any,
    student: SingleSpec,
    store: tuple[Path, Path, Path],
    by_row: dict[str, Any],
    tmp_path: Path,
) -> None:
    features, rows, _ = store
    stage = StageSettings(batch_size=60, num_epochs=1, learning_rate=1e-9, weight_decay=0)
    match = {"kind": "hidden_mse", "weight": 3, "layers": {"kind": "explicit", "pairs": [[1, 2]]}}
    wide = SingleSpec(encoder=student.encoder.model_copy(update={"hidden_size": 16}))
    job = matched(
        tiny_market,
        tmp_path,
        wide,
        objective(alpha=0.4, temperature=2, matches=[match]),
        **by_row,
        stage=stage,
    )
    found = run_stage(job).history[-1]
    model = load_model(wide, job.output)
    inputs = open_inputs(wide, rows)
    tokens: Any
    mask: Any
    tokens, mask = inputs.collate(np.arange(60))
    taught = TeacherFeatures.open(features).read(
        FeatureKey("hidden", 2), np.arange(60), num_tokens=tokens.shape[1]
    )
    with torch.no_grad():
        logits, states = model(tokens, mask), model.encoder(tokens, mask)  # type: ignore[operator]
    labels = torch.tensor(inputs.clicked).long()
    known = torch.tensor(inputs.teacher_logits)
    hard = cross_entropy(logits, labels)
    soft = 4 * kl_div(log_softmax(logits / 2, 1), softmax(known / 2, 1), reduction="batchmean")
    kept = (torch.arange(60) % 7 != 3)[:, None] & mask
    square = ((states - taught) ** 2)[kept].mean()
    assert found["hard_loss"] == pytest.approx(hard.item(), rel=1e-4)
    assert found["soft_loss"] == pytest.approx(soft.item(), rel=1e-3)
    assert found["match_hidden_mse"] == pytest.approx(square.item(), rel=1e-3)
    total = 0.6 * hard + 0.4 * soft + 3 * square
    assert found["loss"] == pytest.approx(total.item(), rel=1e-3)
    assert found["train_loss"] == pytest.approx(total.item(), rel=1e-3)


def test_a_twin_student_is_matched_row_by_row_and_learns_the_match(
    tiny_market: Any,
    teacher: FrozenTeacher,
    by_pair: dict[str, Any],
    tmp_path: Path,
) -> None:
    matches = [
        {"kind": "pkd", "layers": {"kind": "explicit", "pairs": [[2, 2]]}, "projection": PROJECTED},
        {"kind": "module", "student": "arms.ad", "teacher": "classifier.0"},
        {"kind": "module", "student": "head.layers.0", "teacher": "classifier.0",
         "projection": "relu"},
    ]  # fmt: skip
    job = tiny_market.job(
        "twin",
        tmp_path,
        validation=by_pair["examples"],
        objective=objective(alpha=0.5, matches=matches),
        **by_pair,
        stage=StageSettings(batch_size=64, num_epochs=2, learning_rate=3e-3),
    )
    history = run_stage(job).history
    for name in ("match_pkd", "match_module", "match_module_2"):
        assert history[-1][name] < history[0][name]
    assert not any(name.startswith("projections") for name in load_file(job.output))


@pytest.mark.parametrize("kind", ["single", "twin"])
def test_a_killed_stage_with_matches_ends_with_the_same_weights(
    tiny_market: Any,
    student: SingleSpec,
    by_row: dict[str, Any],
    by_pair: dict[str, Any],
    tmp_path: Path,
    kind: str,
) -> None:
    def job(folder: Path) -> StageJob:
        if kind == "twin":
            match = {"kind": "pkd", "layers": {"kind": "explicit", "pairs": [[2, 2]]}}
            made: StageJob = tiny_market.job(
                "twin",
                folder,
                objective=objective(matches=[{**match, "projection": "tanh"}]),
                **by_pair,
            )
            return made
        noisy = SingleSpec(encoder=student.encoder.model_copy(update={"dropout": 0.1}))
        return matched(
            tiny_market,
            folder,
            noisy,
            objective(matches=ALL_MATCHES),
            **by_row,
        )

    whole, cut = job(tmp_path / "whole"), job(tmp_path / "cut")
    expected = run_stage(whole)
    interrupt(cut, after=4 if kind == "single" else 13)
    assert run_stage(cut).history == expected.history
    assert whole.output.read_bytes() == cut.output.read_bytes()


def interrupt(job: StageJob, *, after: int) -> None:
    def kill(done: int, _total: int) -> None:
        if done == after:
            raise KilledError

    with pytest.raises(KilledError):
        run_stage(job, progress=kill)


@pytest.mark.parametrize("num_workers", [2, 3])
@pytest.mark.parametrize("kind", ["clicks", "tokens"])
def test_the_losses_of_workers_add_up_to_that_of_the_whole_step(
    tiny_market: Any,
    language: FrozenTeacher,
    student: SingleSpec,
    by_row: dict[str, Any],
    tmp_path: Path,
    num_workers: int,
    kind: str,
) -> None:
    top: Any = {"layers": {"kind": "explicit", "pairs": [[-1, -1]]}}
    every: dict[str, Any] = dict.fromkeys(("nst", "attention_kl"), top)
    every |= {name: top | {"projection": "linear"} for name in ("fsp", "cos", "pkd", "hidden_mse")}
    settings = objective(
        alpha=0.5, matches=[match | {"kind": name} for name, match in every.items()]
    )
    job = matched(
        tiny_market, tmp_path, student, settings,
        **by_row,
    )  # fmt: skip
    if kind == "tokens":
        spec = quiet(tiny_market.twin, hidden_size=NARROW)
        job = distilled(tiny_market, tmp_path, spec, language, objective=settings)
    step_rows = np.random.default_rng(1).permutation(60)[:23]

    def loss(workers: Workers) -> float:
        torch.manual_seed(8)
        model = trained_model(job, build_model(job.model))
        task = make_task(job, model, workers, CPU)
        return task.loss(model, step_rows, step=1, device=CPU).item()

    parts = [loss(Workers(rank, num_workers)) for rank in range(num_workers)]
    assert sum(parts) / num_workers == pytest.approx(loss(Workers()), rel=1e-5)


def test_the_tensors_to_store_follow_from_the_two_models(
    student: SingleSpec, teacher: FrozenTeacher, tiny_market: Any
) -> None:
    matches = objective(matches=ALL_MATCHES).matches
    found = [str(key) for key in teacher_keys(matches, student, teacher.model)]
    assert found == ["hidden.0", "hidden.2", "cls.2", "attention.2"]
    with pytest.raises(ValueError, match="compares token by token"):
        teacher_keys(matches, tiny_market.twin, teacher.model)


def test_a_job_with_a_teacher_survives_json_and_is_known_by_all_it_depends_on(
    tiny_market: Any,
    teacher: FrozenTeacher,
    student: SingleSpec,
    by_row: dict[str, Any],
    tmp_path: Path,
) -> None:
    job = matched(
        tiny_market,
        tmp_path,
        student,
        objective(matches=ALL_MATCHES),
        **by_row,
    )
    assert StageJob.from_json(job.to_json()).identity() == job.identity()
    live = replace(job, teacher=teacher, features=None)
    other = objective(matches=ALL_MATCHES[:1])
    changed = [live, replace(job, objective=other), replace(job, validation=None)]
    assert len({job.identity(), *(each.identity() for each in changed)}) == 4


# --- refused before training --------------------------------------------------------------


def refusal(job: StageJob, error: type[Exception]) -> str:
    def never(done: int, _: int) -> None:
        raise AssertionError(f"trained {done} steps")

    with pytest.raises(error) as caught:
        run_stage(job, progress=never)
    assert not job.output.exists()
    return str(caught.value)


def test_matches_of_tokens_are_refused_where_the_two_read_different_ones(
    tiny_market: Any, teacher: FrozenTeacher, by_pair: dict[str, Any], tmp_path: Path
) -> None:
    job = tiny_market.job(
        "twin",
        tmp_path,
        objective=objective(matches=["hidden_mse"]),
        **by_pair,
    )
    message = refusal(job, SettingsError)
    assert "the student reads 'two product texts a row'" in message
    assert "match whole rows instead (pkd, or module on pooled vectors)" in message
    live = replace(job, teacher=teacher, features=None)
    assert "a live teacher reads the student's own input" in refusal(live, SettingsError)


def test_a_store_that_does_not_fit_is_refused(
    tiny_market: Any,
    student: SingleSpec,
    by_row: dict[str, Any],
    tmp_path: Path,
) -> None:
    rows = by_row["examples"]
    settings = objective(matches=[ALL_MATCHES[0]])
    job = matched(
        tiny_market, tmp_path, student, settings,
        **by_row,
    )  # fmt: skip
    assert "are of teacher aaaaaaaaaaaa, the labels are of bbbb" in refusal(
        replace(job, label_teacher="b" * 64), ContractError
    )
    found = open_tokens(rows)
    assert found.teacher_logits is not None
    assert found.teacher_rows is not None
    other = tmp_path / "other.arrow"
    write_tokens(other, replace(found, teacher_logits=found.teacher_logits * 3))
    message = refusal(replace(job, examples=other), ContractError)
    assert "the soft labels are of another teacher than the features" in message
    write_tokens(other, replace(found, teacher_rows=np.roll(found.teacher_rows, 1)))
    named = replace(job, examples=other, label_teacher="a" * 64)
    assert "they were not cut alike" in refusal(named, ContractError)
    write_tokens(other, replace(found, teacher_rows=np.full(60, 99)))
    assert "point to row 99 of the teacher features" in refusal(named, ContractError)
    write_tokens(other, replace(found, teacher_rows=None))
    assert "no row of the examples has features" in refusal(named, ContractError)
    lacking = replace(job, objective=objective(matches=["attention_mse"]))
    message = refusal(lacking, ContractError)
    assert "lack scores.2, which the matches need" in message


def test_soft_labels_that_count_must_be_there(tiny_market: Any, tmp_path: Path) -> None:
    job = tiny_market.job("teacher", tmp_path, objective=objective(alpha=0.5))
    assert "label its rows with the teacher first, or set alpha to 0" in refusal(job, ContractError)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("twin", {"objective": objective(matches=["pkd"])}, "matches need a teacher: its shape"),
        ("twin", {"features": Path("x")}, "the objective has no match; leave out the features"),
        ("twin", {"keep_head": True}, "keep_head is of masked-language stages"),
        ("twin", {"objective": objective(tokens="masked")}, "objective.tokens concerns"),
        ("mlm", {"task": "mlm_distil"}, "needs an objective .* and a teacher with weights"),
        ("mlm", {"objective": objective()}, "an mlm stage has no objective"),
    ],
)
def test_jobs_that_cannot_be_are_refused_when_they_are_made(
    tiny_market: Any, tmp_path: Path, kind: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_market.job(kind, tmp_path, **changes)


# --- masked language ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def language(tiny_market: Any, tmp_path_factory: pytest.TempPathFactory) -> FrozenTeacher:
    """A language model of one tower, with its head."""
    folder = tmp_path_factory.mktemp("language")
    job = tiny_market.job(
        "mlm",
        folder,
        model=quiet(tiny_market.teacher),
        keep_head=True,
        stage=StageSettings(batch_size=20, num_epochs=3, learning_rate=1e-2),
    )
    run_stage(job)
    return FrozenTeacher(job.model, (job.output,))


def distilled(
    tiny_market: Any, folder: Path, spec: Any, teacher: FrozenTeacher, **changes: Any
) -> StageJob:
    job: StageJob = tiny_market.job(
        "mlm",
        folder,
        model=spec,
        task="mlm_distil",
        teacher=teacher,
        **{
            "objective": objective(preset="thesis"),
            "stage": StageSettings(batch_size=20, num_epochs=4, learning_rate=1e-2),
            **changes,
        },
    )
    return job


def test_a_language_teacher_keeps_its_head_on_request_only(
    tiny_market: Any, language: FrozenTeacher, tmp_path: Path
) -> None:
    names = load_file(language.weights[0])
    assert {name.split(".")[0] for name in names} == {"encoder", "predictor"}
    load_model(language.model, *language.weights)  # a click stage may start from it
    headless = tiny_market.job("mlm", tmp_path, model=language.model)
    run_stage(headless)
    job = distilled(
        tiny_market,
        tmp_path / "distil",
        language.model,
        FrozenTeacher(language.model, (headless.output,)),
    )
    assert "has no prediction head; train it in an mlm stage with keep_head" in refusal(
        job, SettingsError
    )


@pytest.mark.parametrize("kind", ["tower", "tied", "untied"])
@pytest.mark.parametrize("where", ["all", "masked"])
def test_a_step_of_language_distillation_equals_a_plain_computation(
    tiny_market: Any, language: FrozenTeacher, kind: str, where: Any
) -> None:
    spec = quiet(tiny_market.teacher if kind == "tower" else tiny_market.twin, num_layers=1)
    if kind != "tower":
        spec = spec.model_copy(update={"tie_arms": kind == "tied"})
    torch.manual_seed(4)
    model = TokenModel(encoders_of(build_model(spec))).eval()
    teacher = language_teacher(language.model, language.weights)
    texts = open_tokens(tiny_market.file("texts.arrow"))
    task = TokenDistilTask(
        spec,
        model,
        (language.model, teacher),
        objective=objective(preset="thesis", tokens=where),
        train=texts,
        validation=None,
        workers=Workers(),
        seed=3,
        device=CPU,
    )
    rows = np.arange(40)
    found = task.loss(model, rows, step=5, device=CPU)
    drawn, num_masked, _ = MlmTask(spec, texts, None, workers=Workers(), seed=3).draw(
        texts, rows, step=5
    )
    hard, soft, cos, num_asked, num_real = 0.0, 0.0, 0.0, 0, 0
    for number, part in enumerate(drawn):
        tokens, mask, place, target = part.texts
        encoder: Any = model.encoders[number % len(model.encoders)]
        other: Any = teacher.encoders[0]
        targets = torch.full(tokens.shape, -1).flatten()
        targets[place] = target
        targets = targets.reshape(tokens.shape)
        for row in range(len(tokens)):
            text, wanted = tokens[row][mask[row]], targets[row][mask[row]]
            plain = [n for n in range(len(text)) if not (kind == "tied" and n == 1)]
            whole = torch.ones(1, len(text), dtype=torch.bool)
            own = encoder(text[None], whole)[0][plain]
            known = other(text[plain][None], whole[:, plain])[0]
            wanted = wanted[plain]
            scores = model.predictor(own, encoder.token_table)
            taught = teacher.predictor(known, other.token_table)
            hard += cross_entropy(scores, wanted, ignore_index=-1, reduction="sum").item()
            asked = wanted >= 0 if where == "masked" else wanted >= -1
            soft += kl_div(
                log_softmax(scores[asked] / 2, -1), softmax(taught[asked] / 2, -1), reduction="sum"
            ).item()
            cos += (1 - cosine_similarity(own, known, dim=-1)).sum().item()
            num_asked += int(asked.sum())
            num_real += len(plain)
    expected = (hard / num_masked + 4 * soft / num_asked + cos / num_real) / 3
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_a_narrower_shallower_twin_learns_its_teachers_language(
    tiny_market: Any, language: FrozenTeacher, tmp_path: Path
) -> None:
    narrow = quiet(tiny_market.twin, hidden_size=NARROW, num_layers=1)
    before = language.weights[0].read_bytes()
    job = distilled(tiny_market, tmp_path, narrow, language, stop_on="soft_loss")
    result = run_stage(job)
    for name in ("loss", "hard_loss", "soft_loss", "match_cos"):
        assert result.history[-1][name] < result.history[0][name], name
    assert result.metric == "soft_loss"
    assert all(name.startswith("arms.") for name in load_file(job.output))
    assert language.weights[0].read_bytes() == before


def test_a_killed_language_distillation_ends_with_the_same_weights(
    tiny_market: Any, language: FrozenTeacher, tmp_path: Path
) -> None:
    narrow = tiny_market.twin.model_copy(
        update={"head": tiny_market.twin.head.model_copy(update={"vector_size": NARROW})}
    )
    narrow = narrow.model_copy(
        update={"encoder": narrow.encoder.model_copy(update={"hidden_size": NARROW})}
    )
    whole, cut = (
        distilled(tiny_market, tmp_path / name, narrow, language, keep_head=True)
        for name in ("whole", "cut")
    )
    expected = run_stage(whole)
    interrupt(cut, after=7)
    assert run_stage(cut).history == expected.history
    assert whole.output.read_bytes() == cut.output.read_bytes()


def test_language_distillation_goes_on_from_a_former_head(
    tiny_market: Any, language: FrozenTeacher, tmp_path: Path
) -> None:
    still = StageSettings(batch_size=60, num_epochs=1, learning_rate=1e-12, weight_decay=0)
    same = distilled(
        tiny_market, tmp_path, language.model, language, initial=language.weights, stage=still
    )
    found = run_stage(same).history[-1]
    assert found["soft_loss"] == pytest.approx(0, abs=1e-5)
    assert found["match_cos"] == pytest.approx(0, abs=1e-5)


def test_language_teachers_of_another_tokeniser_are_refused(
    tiny_market: Any, language: FrozenTeacher, tmp_path: Path
) -> None:
    other = quiet(tiny_market.twin, vocabulary_size=95)
    job = distilled(tiny_market, tmp_path, other, language)
    assert "a vocabulary of 95, the teacher 90; train the teacher" in refusal(job, SettingsError)
    narrow = quiet(tiny_market.twin, hidden_size=NARROW)
    bare = objective(matches=["cos"])
    unprojected = distilled(tiny_market, tmp_path, narrow, language, objective=bare)
    assert "give projection: {kind: linear}" in refusal(unprojected, SettingsError)

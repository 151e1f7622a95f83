import json
import math
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file

from driftline.platform.batching import BatchPlan, by_length, frame_tokens, length_groups
from driftline.platform.checkpoints import CheckpointFolder, extract_weights, save_weights
from driftline.platform.errors import (
    BundleError,
    ContractError,
    EmptyWindowError,
    TrainingError,
)
from driftline.platform.examples import (
    PairRows,
    Ragged,
    TokenRows,
    open_pairs,
    open_tokens,
    write_pairs,
    write_tokens,
)
from driftline.platform.inference import encode_texts, load_model, predict_logits
from driftline.platform.inputs import open_inputs
from driftline.platform.masked_language import MlmTask
from driftline.platform.models.build import build_model
from driftline.platform.optimizers import learning_rate
from driftline.platform.settings import ObjectiveSettings, StageSettings
from driftline.platform.stages import StageJob, StageResult, run_stage
from driftline.platform.tasks import Workers
from driftline.platform.training import Loop

CPU = torch.device("cpu")


# --- batches ------------------------------------------------------------------------------


@given(
    num_rows=st.integers(1, 200),
    batch_size=st.integers(1, 40),
    first_row=st.integers(0, 5),
    ragged=st.booleans(),
    block_rows=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_an_epoch_holds_every_row_once(
    num_rows: int, batch_size: int, first_row: int, ragged: bool, block_rows: int, seed: int
) -> None:
    lengths = np.random.default_rng(seed).integers(0, 50, first_row + num_rows) if ragged else None
    plan = BatchPlan(num_rows, batch_size, 2, seed, first_row, lengths, block_rows)
    for epoch in range(2):
        steps = range(epoch * plan.batches_per_epoch, (epoch + 1) * plan.batches_per_epoch)
        rows = np.concatenate([plan.rows(step) for step in steps])
        assert sorted(rows) == list(range(first_row, first_row + num_rows))


def test_any_step_can_be_asked_for_in_any_order() -> None:
    forward, backward = BatchPlan(100, 7, 3, seed=1), BatchPlan(100, 7, 3, seed=1)
    wanted = [forward.rows(step).tolist() for step in range(forward.num_steps)]
    found = [backward.rows(step).tolist() for step in reversed(range(forward.num_steps))]
    assert found[::-1] == wanted
    assert wanted[0] != wanted[forward.batches_per_epoch]


def test_neighbours_share_a_batch_where_that_saves_encoding() -> None:
    def num_texts(block_rows: int) -> float:
        plan = BatchPlan(4000, 100, 1, seed=0, block_rows=block_rows)
        pages = np.arange(4000) // 3  # three ads on a page, next to each other
        return float(np.mean([len(set(pages[plan.rows(step)])) for step in range(40)]))

    assert num_texts(4) < 0.65 * num_texts(1)


def test_rows_of_similar_length_share_a_batch() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 3200)
    spread = {}
    for name, given_lengths in (("bucketed", lengths), ("random", None)):
        plan = BatchPlan(3200, 32, 1, seed=0, lengths=given_lengths)
        spread[name] = np.mean([np.ptp(lengths[plan.rows(step)]) for step in range(100)])
    assert spread["bucketed"] < spread["random"] / 10


def test_rows_of_a_small_set_meet_others_in_every_epoch() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 640)
    plan = BatchPlan(640, 32, 2, seed=0, lengths=lengths)
    pairs = [
        {(a, b) for step in steps for a in plan.rows(step) for b in plan.rows(step) if a < b}
        for steps in (range(20), range(20, 40))
    ]
    assert len(pairs[0] & pairs[1]) < 0.3 * len(pairs[0])


@given(world_size=st.integers(1, 5), num_rows=st.integers(1, 40))
def test_workers_share_a_step_without_overlap(world_size: int, num_rows: int) -> None:
    rows = np.arange(num_rows)
    parts = [Workers(rank, world_size).share(rows) for rank in range(world_size)]
    assert sorted(np.concatenate(parts)) == list(rows)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(lengths=st.lists(st.integers(0, 300), min_size=1, max_size=200))
def test_groups_and_inference_batches_cover_every_text_once(lengths: list[int]) -> None:
    array = np.array(lengths)
    for parts in (length_groups(array), list(by_length(array, max_tokens=500, width=3))):
        assert sorted(np.concatenate(parts)) == list(range(len(lengths)))
    for part in by_length(array, max_tokens=500, width=3):
        assert len(part) == 1 or len(part) * (array[part].max() + 3) <= 500


@given(
    texts=st.lists(st.lists(st.integers(7, 99), max_size=8), min_size=1, max_size=6),
    max_tokens=st.integers(4, 12),
    data=st.data(),
)
def test_token_rectangles_equal_rows_padded_one_by_one(
    texts: list[list[int]], max_tokens: int, data: st.DataObject
) -> None:
    rows = data.draw(st.lists(st.integers(-1, len(texts) - 1), min_size=1, max_size=6))
    ragged = Ragged.of([np.array(text, np.int32) for text in texts])
    tokens, mask = frame_tokens(
        ragged, np.array(rows), prefix=(2, 5), sep=3, pad=0, max_tokens=max_tokens
    )
    expected = [[2, 5, *(texts[row] if row >= 0 else [])[: max_tokens - 3], 3] for row in rows]
    longest = max(map(len, expected))
    assert tokens.tolist() == [row + [0] * (longest - len(row)) for row in expected]
    assert mask.sum(dim=1).tolist() == [len(row) for row in expected]


# --- examples -----------------------------------------------------------------------------


def test_examples_are_read_as_they_were_written_without_a_copy(tiny_market: Any) -> None:
    rows = open_pairs(tiny_market.file("train.arrow"))
    assert rows.numbers.shape == (640, 3)
    assert not rows.numbers.flags.owndata
    assert not rows.clicked.flags.writeable  # the mapped file itself
    tokens = open_tokens(tiny_market.file("rows.arrow"))
    assert len(tokens) == 60
    assert tokens.clicked is not None


def test_examples_without_categories_or_numbers_keep_their_rows(tmp_path: Path) -> None:
    nothing, none_clicked = np.full(4, -1, np.int32), np.zeros(4, np.float32)
    empty = PairRows(
        nothing, nothing, np.empty((4, 0), np.int32), np.empty((4, 0), np.float32), none_clicked
    )
    write_pairs(tmp_path / "empty.arrow", empty)
    found = open_pairs(tmp_path / "empty.arrow")
    assert found.categories.shape == found.numbers.shape == (4, 0)
    assert found.teacher_logits is None


def test_several_record_batches_and_short_lists_are_read_too(tmp_path: Path) -> None:
    path = tmp_path / "tokens.arrow"
    schema = pa.schema([("tokens", pa.list_(pa.int32()))])
    with pa.ipc.new_file(str(path), schema) as writer:
        for rows in ([[1, 2], []], [[3]]):
            writer.write_batch(pa.record_batch([pa.array(rows, schema[0].type)], schema))
    tokens = open_tokens(path).tokens
    assert tokens.lengths.tolist() == [2, 0, 1]
    assert tokens.values[tokens.offsets[2] :].tolist() == [3]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"clicked": pa.array([1.0], pa.float32())}, "column 'page_text' is missing"),
        ({"page_text": pa.array([1], pa.int64())}, "'page_text' must be int32, got int64"),
        ({"page_text": pa.array([None], pa.int32())}, "'page_text' holds 1 nulls"),
    ],
)
def test_examples_that_do_not_fit_are_refused(
    tmp_path: Path, columns: dict[str, pa.Array], message: str
) -> None:
    path = tmp_path / "bad.arrow"
    batch = pa.record_batch(columns)
    with pa.ipc.new_file(str(path), batch.schema) as writer:
        writer.write_batch(batch)
    with pytest.raises(ContractError, match=message):
        open_pairs(path)


def test_a_file_that_is_no_arrow_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.arrow").write_text("no")
    with pytest.raises(ContractError, match=r"bad\.arrow cannot be read as Arrow IPC"):
        open_pairs(tmp_path / "bad.arrow")


def test_examples_that_do_not_fit_the_model_are_refused(tiny_market: Any) -> None:
    head = tiny_market.head.head
    for changes, message in (
        ({"num_numbers": 4}, "2 categories and 4 numbers, as the model was built, got 2 and 3"),
        ({"cardinalities": (4, 3)}, r"category 1 must lie in \[0, 3\), got 0..3"),
        ({"vector_size": 8}, "vectors must have width 8, as the head was built, got 16"),
    ):
        spec = tiny_market.head.model_copy(update={"head": head.model_copy(update=changes)})
        with pytest.raises(ContractError, match=message):
            open_inputs(
                spec,
                tiny_market.file("train.arrow"),
                vectors=tiny_market.file("vectors.safetensors"),
            )


# --- stages -------------------------------------------------------------------------------


def same_weights(first: Path, second: Path) -> bool:
    return first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("kind", ["head", "twin", "mlp"])
def test_models_of_pairs_learn_what_decides_the_clicks(
    tiny_market: Any, tmp_path: Path, kind: str
) -> None:
    stage = StageSettings(batch_size=64, learning_rate=1e-2, num_epochs=8, patience=9)
    result = run_stage(tiny_market.job(kind, tmp_path, stop_on="auc", stage=stage))
    assert result.metric == "auc"
    assert result.best is not None
    assert result.best > 0.75
    assert result.num_rows == 64 * result.num_steps


def test_a_tower_learns_from_its_tokens(tiny_market: Any, tmp_path: Path) -> None:
    stage = StageSettings(batch_size=16, learning_rate=3e-3, num_epochs=30, patience=60)
    result = run_stage(tiny_market.job("teacher", tmp_path, stop_on="auc", stage=stage))
    assert result.best is not None
    assert result.best > 0.9


def test_masked_language_training_lowers_its_loss_and_drops_its_head(
    tiny_market: Any, tmp_path: Path
) -> None:
    stage = StageSettings(batch_size=20, learning_rate=1e-2, num_epochs=15, patience=30)
    result = run_stage(tiny_market.job("mlm", tmp_path, stage=stage))
    assert result.history[-1]["loss"] < result.history[0]["loss"] - 0.3
    names = load_file(tmp_path / "mlm.safetensors")
    assert names
    assert all(name.startswith("arms.") for name in names)


def test_the_same_job_gives_the_same_weights_and_another_seed_others(
    tiny_market: Any, tmp_path: Path
) -> None:
    for name in ("first", "second"):
        torch.manual_seed(hash(name) % 1000)  # what else the process does must not matter
        run_stage(tiny_market.job("head", tmp_path / name))
    run_stage(tiny_market.job("head", tmp_path / "third", seed=6))
    weights = [tmp_path / name / "head.safetensors" for name in ("first", "second", "third")]
    assert same_weights(weights[0], weights[1])
    assert not same_weights(weights[0], weights[2])


def test_training_leaves_the_callers_random_state_alone(tiny_market: Any, tmp_path: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    run_stage(tiny_market.job("head", tmp_path))
    assert torch.equal(torch.rand(3), expected)


def test_a_finished_job_is_not_run_again_until_an_input_changes(
    tiny_market: Any, tmp_path: Path
) -> None:
    steps: list[int] = []
    train = tmp_path / "train.arrow"
    rows = open_pairs(tiny_market.file("train.arrow"))
    write_pairs(train, rows)
    job = tiny_market.job("head", tmp_path, examples=train)
    first = run_stage(job, progress=lambda done, _: steps.append(done))
    assert steps == list(range(1, 21))
    assert not job.checkpoints.exists()
    assert run_stage(job, progress=lambda done, _: steps.append(done)) == first
    assert len(steps) == 20
    write_pairs(train, replace(rows, clicked=1 - rows.clicked))
    run_stage(job, progress=lambda done, _: steps.append(done))
    assert len(steps) == 40


class KilledError(Exception):
    """Stands for SIGKILL inside a test: nothing of ours runs after it."""


@pytest.mark.parametrize(("kind", "after"), [("head", 13), ("twin", 7), ("mlm", 3)])
def test_an_interrupted_job_continues_to_the_same_weights(
    tiny_market: Any, tmp_path: Path, kind: str, after: int
) -> None:
    stage = StageSettings(batch_size=20 if kind == "mlm" else 64, num_epochs=2)
    whole = run_stage(tiny_market.job(kind, tmp_path / "whole", stage=stage))
    job = tiny_market.job(kind, tmp_path / "cut", stage=stage)
    seen: list[int] = []

    def kill(done: int, _total: int) -> None:
        seen.append(done)
        if done == after:
            raise KilledError

    with pytest.raises(KilledError):
        run_stage(job, progress=kill)
    resumed = run_stage(job, progress=lambda done, _: seen.append(done))
    assert 1 < seen[after] <= after + 1  # went on from the checkpoint, not from the start
    output = f"{kind}.safetensors"
    assert same_weights(tmp_path / "whole" / output, tmp_path / "cut" / output)
    assert resumed.history == whole.history
    assert resumed.num_rows == whole.num_rows


@pytest.mark.slow
def test_a_stage_killed_by_the_system_ends_with_the_same_weights(
    tiny_market: Any, tmp_path: Path
) -> None:
    stage = StageSettings(batch_size=32, num_epochs=8, evaluations_per_epoch=4, patience=99)
    run_stage(tiny_market.job("twin", tmp_path / "whole", stage=stage))
    job = tiny_market.job("twin", tmp_path / "cut", stage=stage)
    (tmp_path / "job.json").write_text(json.dumps(job.to_json()))
    code = (
        "import json, sys; from pathlib import Path\n"
        "from driftline.platform.stages import StageJob, run_stage\n"
        "run_stage(StageJob.from_json(json.loads(Path(sys.argv[1]).read_text())))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "job.json")])
    deadline = time.monotonic() + 600
    while not list(job.checkpoints.glob("step-*/state.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not job.output.exists()
    run_stage(job)
    assert same_weights(tmp_path / "whole/twin.safetensors", job.output)


def test_checkpoints_of_another_job_are_not_continued(tiny_market: Any, tmp_path: Path) -> None:
    job = tiny_market.job("head", tmp_path / "cut")

    def kill(done: int, _total: int) -> None:
        if done == 12:
            raise KilledError

    with pytest.raises(KilledError):
        run_stage(job, progress=kill)
    run_stage(replace(job, seed=6))
    run_stage(tiny_market.job("head", tmp_path / "fresh", seed=6))
    assert same_weights(job.output, tmp_path / "fresh/head.safetensors")


def test_the_best_weights_win_and_patience_ends_the_stage(tiny_market: Any, tmp_path: Path) -> None:
    stage = StageSettings(
        batch_size=64, learning_rate=0.1, num_epochs=40, evaluations_per_epoch=1, patience=3
    )
    job = tiny_market.job("head", tmp_path, stage=stage)
    result = run_stage(job)
    losses = [row["loss"] for row in result.history]
    best = int(np.argmin(losses))
    assert result.best == losses[best]
    assert len(losses) == best + 1 + 3 < 40
    assert evaluate(job) == pytest.approx(result.best, abs=1e-6)


def evaluate(job: StageJob) -> float:
    """Cross-entropy of the written weights on the validation rows, the slow way."""
    assert job.validation is not None
    model = load_model(job.model, job.output)
    inputs = open_inputs(job.model, job.validation, texts=job.texts, vectors=job.vectors)
    losses = []
    for logits, clicked in zip(predict_logits(model, inputs), inputs.clicked, strict=True):
        p = math.exp(logits[1]) / (math.exp(logits[0]) + math.exp(logits[1]))
        losses.append(-math.log(p if clicked else 1 - p))
    return sum(losses) / len(losses)


def test_distillation_stops_on_the_soft_loss_and_can_ignore_the_clicks(
    tiny_market: Any, tmp_path: Path
) -> None:
    rows = open_pairs(tiny_market.file("train.arrow"))
    assert rows.teacher_logits is not None
    unlabelled = tmp_path / "unlabelled.arrow"
    teacher = np.nan_to_num(rows.teacher_logits)
    write_pairs(
        unlabelled, replace(rows, clicked=np.full(640, np.nan, np.float32), teacher_logits=teacher)
    )
    stage = StageSettings(batch_size=64, learning_rate=1e-2, num_epochs=4)
    job = tiny_market.job("head", tmp_path, stop_on="soft_loss", objective=ObjectiveSettings())
    result = run_stage(replace(job, examples=unlabelled, stage=stage))
    assert result.metric == "soft_loss"
    assert result.history[-1]["soft_loss"] < result.history[0]["soft_loss"]
    assert result.history[-1]["auc"] > 0.7


def test_validation_rows_of_one_class_are_judged_by_the_objective(
    tiny_market: Any, tmp_path: Path
) -> None:
    rows = open_pairs(tiny_market.file("validation.arrow"))
    write_pairs(tmp_path / "quiet.arrow", replace(rows, clicked=np.zeros(300, np.float32)))
    job = tiny_market.job("head", tmp_path, stop_on="auc", validation=tmp_path / "quiet.arrow")
    assert run_stage(job).metric == "loss"


def test_without_validation_rows_the_last_weights_are_the_result(
    tiny_market: Any, tmp_path: Path
) -> None:
    result = run_stage(tiny_market.job("head", tmp_path, validation=None))
    assert result.best is None
    assert result.best_step == result.num_steps == 20


def test_head_only_training_of_a_twin_leaves_its_arms_as_they_were(
    tiny_market: Any, tmp_path: Path
) -> None:
    first = tiny_market.job("twin", tmp_path / "first")
    run_stage(first)
    second = tiny_market.job(
        "twin", tmp_path / "second", initial=(first.output,), trainable="head", seed=8
    )
    run_stage(second)
    before, after = load_file(first.output), load_file(second.output)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("head.") for name in changed)


def test_initial_weights_may_cover_a_part_or_more_than_the_model(
    tiny_market: Any, tmp_path: Path
) -> None:
    twin = tiny_market.job("twin", tmp_path)
    run_stage(twin)
    extract_weights(twin.output, tmp_path / "arms.safetensors", prefix="arms.")
    frozen = StageSettings(batch_size=64, learning_rate=1e-12)
    head = tiny_market.job("head", tmp_path, initial=(twin.output,), stage=frozen)
    run_stage(head)
    before, after = load_file(twin.output), load_file(head.output)
    for name, value in after.items():
        assert torch.allclose(before[name], value, atol=1e-6), name
    run_stage(tiny_market.job("twin", tmp_path / "x", initial=(tmp_path / "arms.safetensors",)))


def test_initial_weights_of_another_shape_are_refused(tiny_market: Any, tmp_path: Path) -> None:
    save_weights(tmp_path / "w.safetensors", {"head.neutral_page": torch.zeros(3)})
    job = tiny_market.job("head", tmp_path, initial=(tmp_path / "w.safetensors",))
    with pytest.raises(BundleError, match=r"neutral_page has shape \(3,\), the model has \(16,\)"):
        run_stage(job)
    save_weights(tmp_path / "w.safetensors", {"other.thing": torch.zeros(3)})
    with pytest.raises(BundleError, match="holds no weights of"):
        run_stage(job)


def test_a_loss_that_is_no_number_stops_the_stage(tiny_market: Any, tmp_path: Path) -> None:
    rows = open_pairs(tiny_market.file("train.arrow"))
    numbers = rows.numbers.copy()
    numbers[:] = np.inf
    write_pairs(tmp_path / "inf.arrow", replace(rows, numbers=numbers))
    job = tiny_market.job("head", tmp_path, examples=tmp_path / "inf.arrow")
    with pytest.raises(TrainingError, match="the loss became nan at step 1"):
        run_stage(job)
    assert not job.output.exists()


@pytest.mark.parametrize("is_judged", [True, False])
def test_a_last_update_that_spoils_the_weights_stops_the_stage(
    tiny_market: Any, tmp_path: Path, is_judged: bool
) -> None:
    # the loss of a batch is taken before its update, so that of the only step is still a number
    stage = StageSettings(
        batch_size=640, num_steps=1, learning_rate=1e38, warmup_share=0, schedule="constant"
    )
    job = tiny_market.job("head", tmp_path, stage=replace_settings(stage, weight_decay=1e9))
    with pytest.raises(TrainingError, match=r"is no number after step 1 of .* learning rate"):
        run_stage(job if is_judged else replace(job, validation=None))
    assert not job.output.exists()


def replace_settings(stage: StageSettings, **changes: Any) -> StageSettings:
    return StageSettings.model_validate(stage.model_dump() | changes)


def test_a_masked_language_stage_refuses_what_it_would_ignore(
    tiny_market: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="an mlm stage has no objective, stops on 'loss'"):
        tiny_market.job("mlm", tmp_path, objective=ObjectiveSettings())


def test_an_empty_example_file_is_refused(tiny_market: Any, tmp_path: Path) -> None:
    write_tokens(tmp_path / "none.arrow", TokenRows(Ragged.of([])))
    job = tiny_market.job("mlm", tmp_path, examples=tmp_path / "none.arrow")
    with pytest.raises(EmptyWindowError, match="holds no row to learn from"):
        run_stage(job)


def test_only_the_newest_rows_are_used_when_their_number_is_limited(
    tiny_market: Any, tmp_path: Path
) -> None:
    rows = open_pairs(tiny_market.file("train.arrow"))
    present = {name: part for name, part in vars(rows).items() if part is not None}
    newest = replace(rows, **{name: part[-128:] for name, part in present.items()})
    write_pairs(tmp_path / "newest.arrow", newest)
    limited = StageSettings(batch_size=64, max_rows=128)
    run_stage(tiny_market.job("head", tmp_path / "limited", stage=limited))
    cut = tiny_market.job(
        "head", tmp_path / "cut", stage=limited, examples=tmp_path / "newest.arrow"
    )
    result = run_stage(cut)
    assert result.num_rows == 128
    # The same rows in the same order; only their numbers in the file differ.
    first, second = load_file(tmp_path / "limited/head.safetensors"), load_file(cut.output)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_reports_carry_every_evaluation(tiny_market: Any, tmp_path: Path) -> None:
    reported: list[dict[str, float]] = []
    job = tiny_market.job("head", tmp_path)
    result = run_stage(job, report=lambda row: reported.append(dict(row)))
    assert tuple(reported) == result.history
    assert [row["epoch"] for row in reported] == [0.5, 1.0, 1.5, 2.0]
    assert (
        StageResult.from_json(
            json.loads((tmp_path / "head.safetensors.json").read_text())["result"]
        )
        == result
    )


def test_bfloat16_trains_to_about_the_same_loss(tiny_market: Any, tmp_path: Path) -> None:
    best = []
    for autocast in ("off", "bfloat16"):
        stage = StageSettings(batch_size=64, learning_rate=1e-2, num_epochs=4, autocast=autocast)
        best.append(run_stage(tiny_market.job("twin", tmp_path / autocast, stage=stage)).best)
    assert best[1] == pytest.approx(best[0], rel=0.05)  # 8 bits of mantissa


def test_learning_rate_rises_then_falls_to_nearly_nothing() -> None:
    stage = StageSettings(learning_rate=1.0, warmup_share=0.2)
    rates = [learning_rate(stage, step, 10) for step in range(1, 11)]
    assert rates[:2] == [0.5, 1.0]
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert 0 < rates[-1] < 0.2


# --- steps of several batches, stages of a fixed length -------------------------------------


def still(spec: Any) -> Any:
    """The same model without chance in a step."""
    if hasattr(spec, "encoder"):
        spec = spec.model_copy(update={"encoder": spec.encoder.model_copy(update={"dropout": 0.0})})
    if hasattr(spec, "head"):
        head = spec.head.model_copy(update={"dropout": 0.0, "unknown_share": 0.0})
        spec = spec.model_copy(update={"head": head})
    return spec


@given(
    num_rows=st.integers(1, 60),
    batch_size=st.integers(1, 20),
    accumulation=st.integers(1, 7),
    num_epochs=st.sampled_from([0.5, 1, 2.5]),
    fixed_steps=st.sampled_from([None, 1, 9]),
)
def test_steps_share_out_all_batches_and_none_is_lost_at_the_end_of_a_pass(
    num_rows: int, batch_size: int, accumulation: int, num_epochs: float, fixed_steps: int | None
) -> None:
    plan = BatchPlan(
        num_rows,
        batch_size,
        num_epochs,
        seed=1,
        accumulation=accumulation,
        fixed_steps=fixed_steps,
    )
    steps = [list(plan.batches(step)) for step in range(plan.num_steps)]
    assert [batch for step in steps for batch in step] == list(range(plan.num_batches))
    assert all(len(step) == accumulation for step in steps[:-1])
    if fixed_steps is not None:
        assert plan.num_steps == fixed_steps
        assert len(steps[-1]) == accumulation


@pytest.mark.parametrize(("batch_size", "accumulation"), [(16, 4), (64, 1), (128, 3)])
def test_accumulated_batches_train_like_one_large_batch(
    tiny_market: Any, tmp_path: Path, batch_size: int, accumulation: int
) -> None:
    # 640 rows in batches of 128, three a step: a step spans the end of a pass.
    def train(name: str, **changes: Any) -> StageResult:
        stage = StageSettings(learning_rate=1e-2, num_epochs=3, patience=99, **changes)
        job = tiny_market.job("head", tmp_path / name, model=still(tiny_market.head), stage=stage)
        return run_stage(job)

    parts = train("parts", batch_size=batch_size, accumulation=accumulation)
    assert parts.num_rows == 3 * 640
    assert parts.num_steps == math.ceil(3 * 640 / (batch_size * accumulation))
    if 640 % (batch_size * accumulation) == 0:
        train("whole", batch_size=batch_size * accumulation)
        found, expected = (load_file(tmp_path / n / "head.safetensors") for n in ("parts", "whole"))
        for name, value in expected.items():
            assert torch.allclose(found[name], value, atol=1e-4), name  # float32, another order


def test_more_batches_a_step_than_in_a_pass_still_train(tiny_market: Any, tmp_path: Path) -> None:
    stage = StageSettings(batch_size=320, accumulation=40, num_epochs=1, learning_rate=0.1)
    job = tiny_market.job("head", tmp_path, stage=stage)
    torch.manual_seed(job.seed)
    before = build_model(tiny_market.head).state_dict()
    result = run_stage(job)
    assert (result.num_steps, result.num_rows) == (1, 640)
    after = load_file(job.output)
    assert not torch.equal(after["head.layers.0.weight"], before["head.layers.0.weight"])


def test_a_stage_of_a_fixed_length_passes_over_few_rows_more_often(
    tiny_market: Any, tmp_path: Path
) -> None:
    results = {}
    for max_rows in (640, 64):
        stage = StageSettings(batch_size=32, num_steps=30, max_rows=max_rows, patience=99)
        results[max_rows] = run_stage(
            tiny_market.job("head", tmp_path / str(max_rows), stage=stage)
        )
    for max_rows, result in results.items():
        assert (result.num_steps, result.num_rows) == (30, 30 * 32)
        assert [row["step"] for row in result.history] == [15, 30]
        assert result.history[-1]["epoch"] == 30 * 32 / max_rows


@pytest.mark.parametrize("changes", [{"optimizer": "lamb"}, {"accumulation": 3}])
def test_an_interrupted_stage_of_any_recipe_continues_to_the_same_weights(
    tiny_market: Any, tmp_path: Path, changes: dict[str, Any]
) -> None:
    stage = StageSettings(batch_size=32, num_epochs=2, evaluations_per_epoch=4, **changes)
    whole = run_stage(tiny_market.job("twin", tmp_path / "whole", stage=stage))
    job = tiny_market.job("twin", tmp_path / "cut", stage=stage)

    def kill(done: int, _total: int) -> None:
        if done == 7:
            raise KilledError

    with pytest.raises(KilledError):
        run_stage(job, progress=kill)
    resumed = run_stage(job)
    assert same_weights(tmp_path / "whole/twin.safetensors", tmp_path / "cut/twin.safetensors")
    assert resumed.history == whole.history
    assert resumed.num_tokens == whole.num_tokens > 0


def test_gradients_of_all_parts_are_clipped_together(tiny_market: Any, tmp_path: Path) -> None:
    # A huge gradient of the projections must shrink the student's share, not only their own; the
    # first moments after one update are a tenth of what was left after clipping.
    class TwoNumbers:
        first_row, num_rows, block_rows = 0, 1, 1
        lengths: Any = None
        stop_on: Any = "loss"

        def loss(self, model: Any, rows: Any, *, step: int, device: Any) -> Any:
            return 3e5 * model["projections"].weight.sum() + 4.0 * model["head"].weight.sum()

        def evaluate(self, model: Any, *, device: Any) -> dict[str, float]:
            return {}

    norms: list[float] = []
    parts = {name: torch.nn.Linear(1, 1, bias=False) for name in ("projections", "head")}
    model = torch.nn.ModuleDict(parts)
    for part in parts.values():
        weight: Any = part.weight
        weight.register_hook(lambda gradient: norms.append(float(gradient.norm())))
    loop = Loop(
        model=model,
        task=TwoNumbers(),
        stage=StageSettings(optimizer="lamb", clip_norm=1.0, betas=(0.9, 0.999)),
        seed=1,
        folder=CheckpointFolder(tmp_path, "job"),
        workers=Workers(),
        rates={"projections.": 0.5},
    )
    loop.run()
    assert sorted(norms) == [4.0, 3e5]
    saved = load_file(tmp_path / "step-000000001" / "optimizer.safetensors")
    moments = sorted(float(v.abs()) / 0.1 for n, v in saved.items() if n.endswith("exp_avg"))
    assert moments == pytest.approx([4 / 3e5, 1.0], rel=1e-4)


# --- masked language ----------------------------------------------------------------------


def test_masking_follows_bert_and_never_touches_specials(tiny_market: Any) -> None:
    random = np.random.default_rng(0)
    texts = [random.integers(3, 90, 10).astype(np.int32) for _ in range(4000)]
    spec = tiny_market.teacher
    workers = Workers()
    task = MlmTask(spec, TokenRows(Ragged.of(texts)), None, workers=workers, seed=1)
    (part,), num_masked, _ = task.draw(task.train, np.arange(4000), step=0)
    tokens, mask, place, target = part.texts
    now = tokens.flatten()[place]
    plain = sum(int((text > 6).sum()) for text in texts)
    assert num_masked == len(place)
    assert num_masked / plain == pytest.approx(0.15, abs=0.006)  # 3 standard deviations
    kinds = Counter(
        "masked" if n == 4 else "kept" if n == t else "random"
        for n, t in zip(now.tolist(), target.tolist(), strict=True)
    )
    assert kinds["masked"] / num_masked == pytest.approx(0.8, abs=0.02)
    assert kinds["random"] / num_masked == pytest.approx(0.1, abs=0.02)
    assert target.min() > 6
    assert mask.flatten()[place].all()
    (other,), *_ = task.draw(task.train, np.arange(4000), step=1)
    assert not torch.equal(other.texts[2], place)  # dynamic: every step draws anew


# --- inference ----------------------------------------------------------------------------


def test_cached_vectors_and_the_head_alone_score_like_the_whole_student(
    tiny_market: Any, tmp_path: Path
) -> None:
    torch.manual_seed(2)
    save_weights(tmp_path / "twin.safetensors", build_model(tiny_market.twin).state_dict())
    twin = load_model(tiny_market.twin, tmp_path / "twin.safetensors")
    texts = tiny_market.file("texts.arrow")
    seen: list[tuple[int, int]] = []
    num_texts = encode_texts(
        twin,
        tiny_market.twin,
        texts,
        tmp_path / "vectors.safetensors",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert num_texts == 60
    assert seen[-1] == (120, 120)
    cached = load_arrays(tmp_path / "vectors.safetensors")
    assert cached["text_id"].tolist() == list(range(100, 160))
    head = load_model(tiny_market.head, tmp_path / "twin.safetensors")
    train = tiny_market.file("train.arrow")
    whole = predict_logits(twin, open_inputs(tiny_market.twin, train, texts=texts))
    fused = predict_logits(
        head, open_inputs(tiny_market.head, train, vectors=tmp_path / "vectors.safetensors")
    )
    assert np.allclose(whole, fused, atol=1e-5)  # another batch, another order of float32 sums


@settings(max_examples=5)
@given(rows=st.lists(st.integers(0, 59), min_size=1, max_size=20))
def test_bulk_logits_come_in_the_order_asked_for(tiny_market: Any, rows: list[int]) -> None:
    torch.manual_seed(3)
    model = build_model(tiny_market.teacher).eval()
    inputs = open_inputs(tiny_market.teacher, tiny_market.file("rows.arrow"))
    found = predict_logits(model, inputs, rows=np.array(rows))
    with torch.no_grad():
        alone = [inputs.logits(model, np.array([row]), device=CPU)[0].tolist() for row in rows]
    assert np.allclose(found, alone, atol=1e-5)

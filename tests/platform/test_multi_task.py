"""Several outcomes in one student: who is drawn how often, what is shared, what resumes."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from driftline.platform.batching import BatchPlan
from driftline.platform.distillation.hidden_matches import Pkd
from driftline.platform.errors import ContractError, EmptyWindowError
from driftline.platform.examples import open_pairs, write_pairs
from driftline.platform.inference import load_model, predict_logits
from driftline.platform.inputs import open_inputs
from driftline.platform.models.build import build_model
from driftline.platform.models.layers import LogitLayer
from driftline.platform.multi_task import (
    MultiTaskPlan,
    TaskExamples,
    TaskLogits,
    active,
    add_tasks,
    task_shares,
    weights_of_task,
)
from driftline.platform.settings import ObjectiveSettings, StageSettings
from driftline.platform.stages import StageJob, StageResult, run_stage

STAGE = StageSettings(batch_size=40, num_epochs=2, learning_rate=3e-3)


@pytest.fixture(scope="module")
def purchases(tiny_market: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Examples of a second outcome: a third of the rows, and the click turned round."""
    folder = tmp_path_factory.mktemp("purchases")
    for name in ("train", "validation"):
        pairs = open_pairs(tiny_market.file(f"{name}.arrow"))
        kept = np.arange(0, len(pairs), 3)
        assert pairs.teacher_logits is not None
        write_pairs(
            folder / f"{name}.arrow",
            replace(
                pairs,
                page_text=pairs.page_text[kept],
                ad_text=pairs.ad_text[kept],
                categories=pairs.categories[kept],
                numbers=pairs.numbers[kept],
                clicked=1 - pairs.clicked[kept],
                teacher_logits=-pairs.teacher_logits[kept],
                page_id_hash=None,
                ad_id_hash=None,
            ),
        )
    return folder


def multi_job(
    market: Any, purchases: Path, folder: Path, kind: str = "head", **changes: Any
) -> StageJob:
    task = TaskExamples(
        "purchased",
        purchases / "train.arrow",
        purchases / "validation.arrow",
        changes.pop("other_objective", ObjectiveSettings(alpha=0.5)),
    )
    job: StageJob = market.job(kind, folder, **{"stage": STAGE, "tasks": (task,)} | changes)
    return job


# --- draws --------------------------------------------------------------------------------


def make_plan(
    sizes: tuple[int, ...], *, tau: float, seed: int = 0, batch_size: int = 8
) -> MultiTaskPlan:
    plans = tuple(
        BatchPlan(num_rows=size, batch_size=batch_size, num_epochs=1, seed=number)
        for number, size in enumerate(sizes)
    )
    return MultiTaskPlan(
        num_rows=sum(sizes),
        batch_size=batch_size,
        num_epochs=50,
        seed=seed,
        plans=plans,
        shares=tuple(task_shares(sizes, tau=tau).tolist()),
        offsets=tuple(np.cumsum([0, *sizes[:-1]]).tolist()),
    )


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.0])
def test_tasks_are_drawn_as_often_as_their_size_to_the_power_of_tau(tau: float) -> None:
    sizes = (1_000, 100, 400)
    plan = make_plan(sizes, tau=tau)
    count = 20_000
    drawn = Counter(plan.task_of(batch) for batch in range(count))
    total = sum(size**tau for size in sizes)
    for task, size in enumerate(sizes):
        share = size**tau / total
        spread = (share * (1 - share) / count) ** 0.5
        assert abs(drawn[task] / count - share) < 4 * spread


@given(
    sizes=st.lists(st.integers(1, 30), min_size=2, max_size=4),
    tau=st.floats(0, 2),
    seed=st.integers(0, 99),
    batch_size=st.integers(1, 9),
)
@settings(max_examples=30)
def test_a_batch_is_of_one_task_and_each_task_passes_over_its_rows(
    sizes: list[int], tau: float, seed: int, batch_size: int
) -> None:
    plan = make_plan(tuple(sizes), tau=tau, seed=seed, batch_size=batch_size)
    bounds = np.cumsum([0, *sizes])
    seen: dict[int, list[int]] = {task: [] for task in range(len(sizes))}
    for batch in range(60):
        rows = plan.rows(batch)
        task = plan.task_of(batch)
        assert ((bounds[task] <= rows) & (rows < bounds[task + 1])).all()
        seen[task] += (rows - bounds[task]).tolist()
    for task, size in enumerate(sizes):
        passes = [seen[task][start : start + size] for start in range(0, len(seen[task]), size)]
        assert all(sorted(one) == list(range(size)) for one in passes[:-1])


@given(seed=st.integers(0, 99), batches=st.lists(st.integers(0, 9_000), min_size=1, max_size=9))
def test_any_batch_can_be_asked_for_in_any_process(seed: int, batches: list[int]) -> None:
    whole = make_plan((50, 20), tau=0.5, seed=seed)
    for batch in batches:
        other = make_plan((50, 20), tau=0.5, seed=seed)
        np.testing.assert_array_equal(other.rows(batch), whole.rows(batch))


# --- the model ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["twin", "head", "mlp", "teacher"])
def test_a_model_of_several_tasks_answers_as_one_of_each(tiny_market: Any, kind: str) -> None:
    spec = getattr(tiny_market, kind)
    torch.manual_seed(0)
    plain = build_model(spec)
    model = build_model(spec)
    model.load_state_dict(plain.state_dict())
    add_tasks(model, ["purchased", "dwell"])
    inputs = open_inputs(
        spec,
        tiny_market.file("rows.arrow" if kind == "teacher" else "validation.arrow"),
        texts=None if kind in ("head", "teacher") else tiny_market.file("texts.arrow"),
        vectors=tiny_market.file("vectors.safetensors") if kind == "head" else None,
    )
    np.testing.assert_array_equal(
        predict_logits(model.eval(), inputs), predict_logits(plain.eval(), inputs)
    )
    for number, name in enumerate(("click", "purchased", "dwell")):
        with active(model, number):
            together = predict_logits(model, inputs)
        alone = build_model(spec).eval()
        alone.load_state_dict(weights_of_task(model.state_dict(), name))
        np.testing.assert_array_equal(predict_logits(alone, inputs), together)
    with pytest.raises(ValueError, match=r"no task 'sold', only \['click', 'dwell', 'purchased'\]"):
        weights_of_task(model.state_dict(), "sold")


def test_a_batch_of_one_task_has_no_gradient_for_the_output_of_another() -> None:
    outputs = TaskLogits(LogitLayer(4), ["purchased"])
    outputs(torch.ones(3, 4)).sum().backward()
    other = outputs.others["purchased"]
    assert isinstance(other, LogitLayer)
    assert outputs.weight.grad is not None
    assert outputs.weight.grad.abs().sum() > 0
    assert other.weight.grad is not None  # none would make workers wait for each other
    assert other.weight.grad.abs().sum() == 0


# --- training -----------------------------------------------------------------------------


def last(result: StageResult, measure: str) -> float:
    return max(row[measure] for row in result.history)


def test_one_student_learns_opposite_outcomes(
    tiny_market: Any, purchases: Path, tmp_path: Path
) -> None:
    """One output layer could not: what makes a click makes no purchase."""
    stage = STAGE.model_copy(update={"num_epochs": 6})
    job = multi_job(tiny_market, purchases, tmp_path, stop_on="auc", tau=0.5, stage=stage)
    result = run_stage(job)
    assert last(result, "click.auc") > 0.75
    assert last(result, "purchased.auc") > 0.75
    assert {"click.soft_loss", "purchased.soft_loss", "click.loss", "loss"} <= set(
        result.history[0]
    )
    shares = task_shares([640, 214], tau=0.5)
    for row in result.history:
        for measure in ("auc", "loss"):
            mean = np.dot(shares, [row[f"click.{measure}"], row[f"purchased.{measure}"]])
            assert row[measure] == pytest.approx(mean)
    assert result.metric == "auc"
    assert result.best == last(result, "auc")


def test_the_weights_of_each_task_serve_alone(
    tiny_market: Any, purchases: Path, tmp_path: Path
) -> None:
    job = multi_job(tiny_market, purchases, tmp_path)
    run_stage(job)
    both = load_file(job.output)
    answers = []
    for name in ("click", "purchased"):
        path = tmp_path / f"{name}.safetensors"
        save_file(weights_of_task(both, name), path)
        inputs = open_inputs(job.model, tiny_market.file("validation.arrow"), vectors=job.vectors)
        answers.append(predict_logits(load_model(job.model, path), inputs))
    margins = [logits[:, 1] - logits[:, 0] for logits in answers]
    assert np.corrcoef(np.stack(margins))[0, 1] < -0.5


def test_a_stage_of_several_tasks_starts_from_one_of_one(
    tiny_market: Any, purchases: Path, tmp_path: Path
) -> None:
    first = tiny_market.job("head", tmp_path / "one", stage=STAGE)
    run_stage(first)
    job = multi_job(tiny_market, purchases, tmp_path / "two", initial=(first.output,))
    alone = multi_job(tiny_market, purchases, tmp_path / "three")
    early = [run_stage(one).history[0]["click.auc"] for one in (job, alone)]
    assert early[0] > early[1]
    again = multi_job(tiny_market, purchases, tmp_path / "four", initial=(job.output,))
    assert run_stage(again).num_steps > 0


class KilledError(Exception):
    """Stands for SIGKILL inside a test: nothing of ours runs after it."""


@pytest.mark.parametrize(("kind", "after"), [("head", 17), ("twin", 13)])
def test_an_interrupted_stage_continues_to_the_same_weights(
    tiny_market: Any, purchases: Path, tmp_path: Path, kind: str, after: int
) -> None:
    stage = StageSettings(batch_size=64, num_epochs=2, accumulation=1)
    whole_job = multi_job(tiny_market, purchases, tmp_path / "whole", kind, stage=stage)
    whole = run_stage(whole_job)
    job = multi_job(tiny_market, purchases, tmp_path / "cut", kind, stage=stage)
    seen: list[int] = []

    def kill(done: int, _total: int) -> None:
        seen.append(done)
        if done == after:
            raise KilledError

    with pytest.raises(KilledError):
        run_stage(job, progress=kill)
    resumed = run_stage(
        StageJob.from_json(job.to_json()), progress=lambda done, _: seen.append(done)
    )
    assert 1 < seen[after] <= after + 1
    assert resumed.history == whole.history
    assert job.output.read_bytes() == whole_job.output.read_bytes()


TWO_WORKERS = """
import json, sys, torch
from driftline.platform.stages import StageJob, run_stage
torch.set_num_threads(1)
rank = int(sys.argv[2])
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=2
)
job = StageJob.from_json(json.loads(sys.argv[1]))
result = run_stage(job, rank=rank, world_size=2)
torch.distributed.destroy_process_group()
print(json.dumps(result.history))
"""


@pytest.mark.slow
def test_two_workers_learn_what_one_learns(
    tiny_market: Any, purchases: Path, tmp_path: Path
) -> None:
    head = tiny_market.head.head.model_copy(update={"dropout": 0.0, "unknown_share": 0.0})
    changes = {
        "model": tiny_market.head.model_copy(update={"head": head}),
        "stage": StageSettings(batch_size=30, num_epochs=2, learning_rate=1e-3),
        "tau": 0.5,
    }
    alone = multi_job(tiny_market, purchases, tmp_path / "one", **changes)
    expected = run_stage(alone)
    job = multi_job(tiny_market, purchases, tmp_path / "two", **changes)
    arguments = [sys.executable, "-c", TWO_WORKERS, json.dumps(job.to_json())]
    running = [
        subprocess.Popen([*arguments, str(rank), str(tmp_path / "meeting")], stdout=subprocess.PIPE)
        for rank in range(2)
    ]
    answers = [json.loads(process.communicate(timeout=600)[0]) for process in running]
    assert answers[0] == answers[1]
    assert len(answers[0]) == len(expected.history)
    weights = load_file(job.output)
    for name, value in load_file(alone.output).items():
        # float32 sums in another order; AdamW magnifies where gradients are tiny
        assert torch.allclose(weights[name], value, atol=2e-3), name


def test_the_identity_of_a_stage_follows_its_tasks(
    tiny_market: Any, purchases: Path, tmp_path: Path
) -> None:
    plain = tiny_market.job("head", tmp_path, stage=STAGE)
    job = multi_job(tiny_market, purchases, tmp_path)
    copy = tmp_path / "copy.arrow"
    copy.write_bytes((purchases / "train.arrow").read_bytes())
    moved = replace(job, tasks=(replace(job.tasks[0], examples=copy),))
    others = [
        plain,
        replace(plain, tau=0.3),
        job,
        replace(job, tau=0.3),
        replace(job, tasks=(replace(job.tasks[0], objective=None),)),
        replace(job, tasks=(replace(job.tasks[0], validation=None),)),
        replace(job, tasks=(replace(job.tasks[0], name="sold"),)),
    ]
    identities = [one.identity() for one in others]
    assert identities[0] == identities[1]
    assert len(set(identities)) == len(others) - 1
    assert moved.identity() == job.identity()
    assert StageJob.from_json(json.loads(json.dumps(job.to_json()))).identity() == job.identity()


# --- refusals -----------------------------------------------------------------------------


def test_what_cannot_be_learned_together_is_refused_before_training(
    tiny_market: Any, purchases: Path, tmp_path: Path
) -> None:
    task = TaskExamples("purchased", purchases / "train.arrow")

    def job(*tasks: TaskExamples, kind: str = "head", **changes: Any) -> StageJob:
        made: StageJob = tiny_market.job(kind, tmp_path, tasks=tasks, **changes)
        return made

    with pytest.raises(
        ValueError, match=r"distinct words, got \['click', 'purchased', 'purchased'"
    ):
        job(task, task)
    with pytest.raises(ValueError, match=r"distinct words, got \['click', 'click'\]"):
        job(replace(task, name="click"))
    with pytest.raises(ValueError, match="tau must be 0 or more, got -1"):
        job(task, tau=-1.0)
    with pytest.raises(ValueError, match="matches are not offered where a student learns several"):
        job(replace(task, objective=ObjectiveSettings(matches=(Pkd(),))))
    with pytest.raises(ValueError, match=r"need task .clicks.*got .mlm"):
        job(task, kind="mlm")
    pairs = open_pairs(purchases / "train.arrow")
    empty = tmp_path / "empty.arrow"
    none = np.empty(0, np.int32)
    write_pairs(
        empty,
        replace(
            pairs,
            page_text=none,
            ad_text=none,
            categories=pairs.categories[:0],
            numbers=pairs.numbers[:0],
            clicked=pairs.clicked[:0],
            teacher_logits=None,
        ),
    )
    with pytest.raises(EmptyWindowError, match=r"head.purchased: .*empty.arrow holds no row"):
        run_stage(job(replace(task, examples=empty)))
    unlabelled = tmp_path / "unlabelled.arrow"
    write_pairs(unlabelled, replace(pairs, teacher_logits=None))
    with pytest.raises(ContractError, match=r"head.purchased: the objective weighs soft labels"):
        run_stage(job(replace(task, examples=unlabelled, objective=ObjectiveSettings())))

"""What lets a model train that is too large for one worker, at the size of a toy."""

import socket
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from driftline.platform.batching import BatchPlan
from driftline.platform.checkpoints import CheckpointFolder
from driftline.platform.errors import SettingsError
from driftline.platform.examples import open_tokens
from driftline.platform.inputs import open_inputs
from driftline.platform.masked_language import MlmTask, masked_language_model
from driftline.platform.models.build import build_model
from driftline.platform.models.encoder import checkpoint_activations
from driftline.platform.settings import StageSettings
from driftline.platform.sharding import is_sharded, place
from driftline.platform.stages import StageJob, run_stage
from driftline.platform.tasks import ClickTask, Workers
from driftline.platform.training import Loop

CPU = torch.device("cpu")


# --- activation checkpointing ---------------------------------------------------------------


def deep(spec: Any) -> Any:
    encoder = spec.encoder.model_copy(update={"num_layers": 4, "attention_dropout": 0.1})
    return spec.model_copy(update={"encoder": encoder})


def loss_of(kind: str, market: Any, model: nn.Module) -> Tensor:
    """Loss of one step of masked language, of a tower's or of a twin's clicks."""
    if kind == "mlm":
        job = market.job("mlm", market.root, model=deep(market.twin))
        task: Any = MlmTask(job.model, open_tokens(job.examples), None, workers=Workers(), seed=1)
    else:
        job = market.job(kind, market.root)
        inputs = open_inputs(job.model, job.examples, texts=job.texts)
        task = ClickTask(inputs, None, objective=None, stop_on="loss", workers=Workers(), seed=1)
    torch.manual_seed(4)  # of the dropout
    loss: Tensor = task.loss(model, np.arange(40), step=1, device=CPU)
    return loss


def gradients_and_kept(kind: str, market: Any, *, checkpointing: bool) -> tuple[Any, int]:
    """Gradients by name, and how many numbers the forward pass kept for them."""
    spec = deep(market.teacher if kind == "teacher" else market.twin)
    torch.manual_seed(3)
    model: nn.Module = build_model(spec)
    if kind == "mlm":
        model = masked_language_model(model)
    if checkpointing:
        checkpoint_activations(model)
    model.train()
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(kind, market, model)
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, kept


@pytest.mark.parametrize("kind", ["teacher", "twin", "mlm"])
def test_forgotten_activations_give_the_same_gradients_from_less_memory(
    tiny_market: Any, kind: str
) -> None:
    expected, kept = gradients_and_kept(kind, tiny_market, checkpointing=False)
    found, kept_less = gradients_and_kept(kind, tiny_market, checkpointing=True)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name  # dropout is drawn again as it was
    assert kept_less < 0.6 * kept


def test_a_stage_that_forgets_its_activations_ends_with_the_same_weights(
    tiny_market: Any, tmp_path: Path
) -> None:
    for name, forget in (("kept", False), ("forgotten", True)):
        stage = StageSettings(batch_size=160, activation_checkpointing=forget)
        run_stage(tiny_market.job("twin", tmp_path / name, stage=stage))
    kept, forgotten = (
        (tmp_path / name / "twin.safetensors").read_bytes() for name in ("kept", "forgotten")
    )
    assert kept == forgotten


def test_forgetting_activations_of_a_model_without_an_encoder_is_refused(
    tiny_market: Any, tmp_path: Path
) -> None:
    stage = StageSettings(activation_checkpointing=True)
    with pytest.raises(SettingsError, match="activation_checkpointing needs an encoder, HeadOnly"):
        run_stage(tiny_market.job("head", tmp_path, stage=stage))


# --- throughput -----------------------------------------------------------------------------


def test_a_stage_records_the_rows_and_tokens_it_was_trained_on(
    tiny_market: Any, tmp_path: Path
) -> None:
    stage = StageSettings(batch_size=16, num_epochs=2, patience=99)
    job = tiny_market.job("teacher", tmp_path, stage=stage)
    result = run_stage(job)
    inputs = open_inputs(job.model, job.examples)
    plan = BatchPlan(60, 16, 2, seed=job.seed, lengths=inputs.lengths)
    collated: list[Any] = [inputs.collate(plan.rows(n))[0] for n in range(plan.num_batches)]
    assert result.num_tokens == sum(tokens.numel() for tokens in collated)  # not its evaluations
    assert 0 < result.train_seconds < result.seconds
    assert result.rows_per_second == result.num_rows / result.train_seconds
    assert result.tokens_per_second == result.num_tokens / result.train_seconds
    head = run_stage(tiny_market.job("head", tmp_path))
    assert (head.num_tokens, head.tokens_per_second) == (0, 0.0)


# --- sharding -------------------------------------------------------------------------------


def test_sharding_that_a_stage_does_not_offer_is_refused(tiny_market: Any, tmp_path: Path) -> None:
    job = tiny_market.job("head", tmp_path)
    inputs = open_inputs(job.model, job.examples, vectors=job.vectors)
    workers = Workers(0, 2)
    loop = Loop(
        model=build_model(job.model),
        task=ClickTask(inputs, None, objective=None, stop_on="loss", workers=workers, seed=1),
        stage=StageSettings(sharding="fsdp"),
        seed=1,
        folder=CheckpointFolder(tmp_path / "head-checkpoints", "job"),
        workers=workers,
    )
    with pytest.raises(SettingsError, match="sharding 'fsdp' is not offered for this stage"):
        loop.run()


def test_one_worker_holds_its_model_whole(tiny_market: Any) -> None:
    model = place(build_model(tiny_market.twin), StageSettings(sharding="fsdp"), device=CPU)
    assert not is_sharded(model)


def still(spec: Any) -> Any:
    """The same model without chance in a step: workers draw different random numbers."""
    spec = spec.model_copy(update={"encoder": spec.encoder.model_copy(update={"dropout": 0.0})})
    if hasattr(spec, "head"):
        head = spec.head.model_copy(update={"dropout": 0.0, "unknown_share": 0.0})
        spec = spec.model_copy(update={"head": head})
    return spec


RECIPES: dict[str, dict[str, Any]] = {
    "teacher": {"activation_checkpointing": True},
    "twin": {"optimizer": "lamb", "accumulation": 2},
    "mlm": {},
}


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_two_workers_with_half_a_model_each_learn_what_one_learns_and_go_on_after_a_crash(
    tiny_market: Any, tmp_path: Path
) -> None:
    jobs = {}
    for kind, recipe in RECIPES.items():
        stage = StageSettings(
            batch_size=30, num_epochs=2, learning_rate=1e-3, sharding="fsdp", patience=9, **recipe
        )
        job = tiny_market.job(kind, tmp_path / "two", stage=stage)
        jobs[kind] = replace(job, model=still(job.model))
    crashing = replace(
        jobs["teacher"],
        model=tiny_market.teacher,  # with dropout: every worker's chance must go on too
        output=tmp_path / "cut/teacher.safetensors",
        checkpoints=tmp_path / "cut/checkpoints",
    )
    whole = replace(crashing, output=tmp_path / "whole/teacher.safetensors")
    raw = [job.to_json() for job in (*jobs.values(), whole, crashing)]
    run = ray.remote(num_cpus=1)(run_as_one_of_two)
    port = free_port()
    mine, other = ray.get([run.remote(raw, rank, port) for rank in range(2)])

    for kind, job in jobs.items():
        assert mine[kind]["history"] == other[kind]["history"]
        alone = replace(job, output=tmp_path / f"one/{kind}.safetensors")
        expected = run_stage(alone)
        found, reference = load_file(job.output), load_file(alone.output)
        assert found.keys() == reference.keys()
        for name, value in reference.items():
            assert torch.allclose(found[name], value, atol=1e-5), (kind, name)  # order of sums
        assert mine[kind]["best"] == pytest.approx(expected.best, abs=1e-5)
        assert mine[kind]["num_rows"] == expected.num_rows
    assert crashing.output.read_bytes() == whole.output.read_bytes()
    # Each holds half, but for what is padded to be cut in two.
    held, num_parameters = mine["held"], mine["num_parameters"]
    assert held == other["held"]
    assert 0.5 <= held / num_parameters < 0.51


class CrashedError(Exception):
    """Both workers are lost; nothing of ours runs after it."""


def run_as_one_of_two(raw: list[dict[str, Any]], rank: int, port: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    try:
        *jobs, crashing = [StageJob.from_json(one) for one in raw]
        answer: dict[str, Any] = {}
        for job in jobs[:-1]:
            answer[job.name] = asdict(run_stage(job, rank=rank, world_size=2))
        run_stage(jobs[-1], rank=rank, world_size=2)
        _crash_and_go_on(crashing, rank)
        model = place(build_model(crashing.model), crashing.stage, device=CPU)
        parameters: list[Any] = list(model.parameters())
        answer["held"] = sum(p.to_local().numel() for p in parameters)
        answer["num_parameters"] = sum(p.numel() for p in parameters)
        return answer
    finally:
        torch.distributed.destroy_process_group()


def _crash_and_go_on(job: StageJob, rank: int) -> None:
    seen: list[float] = []

    def crash(row: Mapping[str, float]) -> None:
        seen.append(row["step"])
        if len(seen) == 3:
            raise CrashedError

    try:
        run_stage(job, report=crash, rank=rank, world_size=2)
        raise AssertionError("it should have crashed")
    except CrashedError:
        pass
    assert list(job.checkpoints.glob("step-*"))
    run_stage(job, report=lambda row: seen.append(row["step"]), rank=rank, world_size=2)
    assert seen == [1, 2, 3, 3, 4]  # the third evaluation was not written, the second was


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

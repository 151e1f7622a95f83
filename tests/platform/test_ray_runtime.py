import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from ray.util.placement_group import placement_group, remove_placement_group
from safetensors.torch import load_file

from driftline.platform.errors import ContractError, ResourceError
from driftline.platform.ray_runtime import (
    NAMESPACE,
    TRAINER,
    check_resources,
    cpus_per_worker,
    fit,
    ray_session,
    stop_trainer,
    warm_up,
)
from driftline.platform.settings import RaySettings, StageSettings
from driftline.platform.stages import StageJob, run_stage

ONE_CPU = RaySettings(num_cpus_per_worker=1)


def quiet(spec: Any) -> Any:
    """The same model without chance in a step: workers draw different random numbers."""
    if hasattr(spec, "encoder"):
        spec = spec.model_copy(update={"encoder": spec.encoder.model_copy(update={"dropout": 0.0})})
    if hasattr(spec, "head"):
        still = {"dropout": 0.0, "unknown_share": 0.0}
        spec = spec.model_copy(update={"head": spec.head.model_copy(update=still)})
    return spec


def test_without_ray_a_stage_is_trained_in_this_process(tiny_market: Any, tmp_path: Path) -> None:
    if ray.is_initialized():
        pytest.skip("another test's session is running")
    result = fit(tiny_market.job("head", tmp_path / "fit"), num_workers=0, ray=ONE_CPU)
    assert result.num_steps == 20
    run_stage(tiny_market.job("head", tmp_path / "plain"))
    found, expected = (tmp_path / name / "head.safetensors" for name in ("fit", "plain"))
    assert found.read_bytes() == expected.read_bytes()


def test_a_worker_group_without_ray_is_refused(tiny_market: Any, tmp_path: Path) -> None:
    if ray.is_initialized():
        pytest.skip("another test's session is running")
    with pytest.raises(ResourceError, match="num_workers 2 needs Ray; open a ray_session"):
        fit(tiny_market.job("head", tmp_path), num_workers=2, ray=ONE_CPU)


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
class TestOnLocalRay:
    """Everything that needs the session's Ray."""

    def test_the_warm_actor_gives_the_weights_of_a_plain_run_and_stays(
        self, tiny_market: Any, tmp_path: Path
    ) -> None:
        warm_up(ONE_CPU)
        before = ray.get_actor(TRAINER, namespace=NAMESPACE)._actor_id
        seen: list[tuple[int, int]] = []
        job = tiny_market.job("head", tmp_path / "actor")
        fit(job, num_workers=0, ray=ONE_CPU, progress=lambda *at: seen.append(at))
        run_stage(tiny_market.job("head", tmp_path / "plain"))
        assert seen[-1] == (20, 20)
        assert job.output.read_bytes() == (tmp_path / "plain/head.safetensors").read_bytes()
        assert sorted(path.name for path in (tmp_path / "actor").iterdir()) == [
            "head.safetensors",
            "head.safetensors.json",
        ]
        assert ray.get_actor(TRAINER, namespace=NAMESPACE)._actor_id == before

    def test_errors_of_ours_come_through_as_themselves(
        self, tiny_market: Any, tmp_path: Path
    ) -> None:
        (tmp_path / "bad.arrow").write_text("no")
        job = tiny_market.job("head", tmp_path, examples=tmp_path / "bad.arrow")
        with pytest.raises(ContractError, match=r"bad\.arrow cannot be read as Arrow IPC"):
            fit(job, num_workers=0, ray=ONE_CPU)

    def test_a_killed_trainer_is_replaced_and_ends_with_the_same_weights(
        self, tiny_market: Any, tmp_path: Path
    ) -> None:
        stage = StageSettings(batch_size=16, num_epochs=15, evaluations_per_epoch=4, patience=99)
        run_stage(tiny_market.job("twin", tmp_path / "whole", stage=stage))
        job = tiny_market.job("twin", tmp_path / "cut", stage=stage)
        trainer = ray.get_actor(TRAINER, namespace=NAMESPACE)
        pid = ray.get(trainer.warm_up.remote(1))
        killer = threading.Thread(target=kill_at_first_checkpoint, args=(pid, job))
        killer.start()
        fit(job, num_workers=0, ray=ONE_CPU)
        killer.join()
        assert not psutil.pid_exists(pid)
        assert job.output.read_bytes() == (tmp_path / "whole/twin.safetensors").read_bytes()

    def test_more_than_the_cluster_has_is_refused_at_once(
        self, tiny_market: Any, tmp_path: Path
    ) -> None:
        with pytest.raises(ResourceError, match="3 training workers need 3 CPU, the cluster has 2"):
            fit(tiny_market.job("head", tmp_path), num_workers=3, ray=ONE_CPU)
        gpu = RaySettings(num_gpus_per_worker=1, num_cpus_per_worker=1)
        with pytest.raises(ResourceError, match="need 1 GPU, the cluster has 0"):
            fit(tiny_market.job("head", tmp_path), num_workers=1, ray=gpu)

    def test_what_others_hold_is_waited_for_but_not_for_ever(self) -> None:
        held = placement_group([{"CPU": 2}])
        ray.get(held.ready())
        with pytest.raises(ResourceError, match="need 1 CPU, others leave 0"):
            check_resources(ONE_CPU, num_workers=1, wait_seconds=0.5)
        remove_placement_group(held)
        check_resources(ONE_CPU, num_workers=1)

    def test_workers_share_the_largest_node(self) -> None:
        assert cpus_per_worker(RaySettings(), 1) == 2
        assert cpus_per_worker(RaySettings(), 2) == 1
        assert cpus_per_worker(RaySettings(), 5) == 1

    @pytest.mark.slow
    def test_two_workers_learn_what_one_learns(self, tiny_market: Any, tmp_path: Path) -> None:
        jobs = {
            kind: tiny_market.job(
                kind,
                tmp_path / "two",
                model=quiet(model),
                stage=StageSettings(batch_size=30, num_epochs=2, learning_rate=1e-3),
            )
            for kind, model in (
                ("head", tiny_market.head),
                ("twin", tiny_market.twin),
                ("mlm", tiny_market.twin.model_copy(update={"tie_arms": False})),
            )
        }
        raw = [job.to_json() for job in jobs.values()]
        port = free_port()
        run = ray.remote(num_cpus=1)(run_as_one_of_two)
        answers = ray.get([run.remote(raw, rank, port) for rank in range(2)])
        for (kind, job), mine, other in zip(jobs.items(), *answers, strict=True):
            alone = replace(job, output=tmp_path / f"one/{kind}.safetensors")
            expected = run_stage(alone)
            assert mine["history"] == other["history"]
            assert mine["num_rows"] == expected.num_rows
            weights, reference = load_file(job.output), load_file(alone.output)
            for name, value in reference.items():
                # float32 sums in another order; AdamW magnifies where gradients are tiny
                assert torch.allclose(weights[name], value, atol=2e-3), (kind, name)
            assert mine["best"] == pytest.approx(expected.best, rel=1e-3)

    @pytest.mark.slow
    def test_a_worker_group_trains_with_ray_train(self, tiny_market: Any, tmp_path: Path) -> None:
        seen: list[tuple[int, int]] = []
        job = tiny_market.job("head", tmp_path)
        result = fit(job, num_workers=2, ray=ONE_CPU, progress=lambda *at: seen.append(at))
        assert result.num_steps == 20
        assert seen[-1] == (20, 20)
        assert result.core_seconds > 0
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "head.safetensors",
            "head.safetensors.json",
        ]
        assert fit(job, num_workers=0, ray=ONE_CPU) == result  # done before: nothing to do

    def test_a_session_leaves_a_ray_that_was_there_before(self) -> None:
        with ray_session(RaySettings(num_cpus=1)):
            assert ray.cluster_resources()["CPU"] == 2
        assert ray.is_initialized()

    def test_the_warm_actor_ends_when_it_is_stopped(self) -> None:
        warm_up(ONE_CPU)
        stop_trainer()
        with pytest.raises(ValueError, match="Failed to look up actor"):
            ray.get_actor(TRAINER, namespace=NAMESPACE)
        stop_trainer()


LISTENERS = """
import psutil, ray
from driftline.platform.ray_runtime import ray_session
from driftline.platform.settings import RaySettings

with ray_session(RaySettings(num_cpus=1)):
    ray.get(ray.remote(lambda: None).remote())
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        for one in process.net_connections(kind="inet"):
            if one.status == psutil.CONN_LISTEN:
                print("listens", one.laddr.ip, process.name())
"""


@pytest.mark.ray
def test_a_private_ray_listens_on_loopback_only() -> None:
    """In a process of its own, because this one may hold the tests' Ray."""
    ran = subprocess.run(
        [sys.executable, "-c", LISTENERS],
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )

    heard = [line.split()[1:] for line in ran.stdout.splitlines() if line.startswith("listens")]
    assert len(heard) > 4
    assert {ip.removeprefix("::ffff:") for ip, *_ in heard} == {"127.0.0.1"}, heard


def kill_at_first_checkpoint(pid: int, job: StageJob) -> None:
    while not list(job.checkpoints.glob("step-*/state.json")):
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)


def run_as_one_of_two(raw: list[dict[str, Any]], rank: int, port: int) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    try:
        jobs = [StageJob.from_json(one) for one in raw]
        return [asdict(run_stage(job, rank=rank, world_size=2)) for job in jobs]
    finally:
        torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

"""Ray at the edge: a session, and training stages on worker groups or in one warm actor.

A worker group costs 11-19 s before it trains; the warm actor costs milliseconds and is what the
hourly head uses. Both run the same loop with the same checkpoints.
"""

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import ray
import ray.train
import torch
from ray.exceptions import ActorDiedError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer

from driftline.platform import errors
from driftline.platform.errors import DriftlineError, ResourceError, TrainingError
from driftline.platform.loopback import ray_on_loopback
from driftline.platform.priority import step_back
from driftline.platform.settings import RaySettings
from driftline.platform.stages import StageJob, StageResult, run_stage
from driftline.platform.step_file import StepFile, followed
from driftline.platform.training import Progress

logger = logging.getLogger(__name__)

NAMESPACE: Final = "driftline"
TRAINER: Final = "driftline-head-trainer"
MAX_FAILURES: Final = 2  # a lost worker is replaced and continues from the checkpoint
WAIT_SECONDS: Final = 60.0  # for processors that others hold
# A thread that waits for another must sleep: spinning beside other processes costs tenfold.
WORKER_ENVIRONMENT: Final = {"OMP_WAIT_POLICY": "PASSIVE"}
# "/session_<date>_<time>_<pid>/sockets/plasma_store" must fit a Unix socket's path, 107 bytes.
MAX_TEMP_DIR: Final = 40


# --- session ------------------------------------------------------------------------------


@contextmanager
def ray_session(settings: RaySettings, *, temp_dir: Path | None = None) -> Iterator[None]:
    """Ray for the length of a block: the one that runs, the cluster asked for, or a private one.

    A private Ray listens on loopback only, has no dashboard, and is gone with its folder when the
    block ends. A Ray that was there before is left as it was.

    Args:
        settings: Address and processors.
        temp_dir: Folder for logs and sockets of a private Ray; a temporary one when not given or
            when its path is too long for a socket.

    Raises:
        ResourceError: no Ray answers at the address.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # no warning without a GPU
    if settings.address is not None:
        try:
            ray.init(address=settings.address, namespace=NAMESPACE, log_to_driver=False)
        except (ConnectionError, ValueError) as error:
            raise ResourceError(
                f"no Ray answers at ray.address {settings.address!r} ({error}); start it, or leave "
                "ray.address out for a private Ray on this machine"
            ) from error
        try:
            yield
        finally:
            stop_trainer()
            ray.shutdown()
        return
    with _folder(temp_dir) as folder, ray_on_loopback():
        ray.init(
            address="local",
            num_cpus=settings.num_cpus,
            include_dashboard=False,
            log_to_driver=False,
            namespace=NAMESPACE,
            _temp_dir=str(folder),
        )
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _folder(wanted: Path | None) -> Iterator[Path]:
    if wanted is not None and len(str(wanted.absolute())) <= MAX_TEMP_DIR:
        wanted.mkdir(parents=True, exist_ok=True)
        yield wanted.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="driftline-", ignore_cleanup_errors=True) as folder:
        yield Path(folder).resolve()


def cpus_per_worker(settings: RaySettings, num_workers: int) -> float:
    """Processors of one worker: as set, or an even share of the largest node."""
    if settings.num_cpus_per_worker is not None:
        return settings.num_cpus_per_worker
    alive = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    workers_per_node = -(-num_workers // max(1, len(alive)))
    return float(max(1, int(max(alive, default=1.0)) // workers_per_node))


def check_resources(
    settings: RaySettings, *, num_workers: int, wait_seconds: float = WAIT_SECONDS
) -> None:
    """Make sure that a worker group will start; without this check Ray waits forever.

    Raises:
        ResourceError: the cluster is too small, or others hold what is needed for too long.
    """
    cpus = cpus_per_worker(settings, num_workers)
    needed = {"CPU": num_workers * cpus, "GPU": num_workers * settings.num_gpus_per_worker}
    _require(needed, ray.cluster_resources(), "the cluster has", num_workers)
    deadline = time.monotonic() + wait_seconds
    while time.monotonic() < deadline and _missing(needed, ray.available_resources()):
        time.sleep(0.2)
    _require(needed, ray.available_resources(), "others leave", num_workers)


def _missing(needed: Mapping[str, float], there: Mapping[str, float]) -> list[str]:
    return [name for name, amount in needed.items() if there.get(name, 0.0) < amount]


def _require(
    needed: Mapping[str, float], there: Mapping[str, float], what: str, num_workers: int
) -> None:
    for name in _missing(needed, there):
        raise ResourceError(
            f"{num_workers} training workers need {needed[name]:g} {name}, {what} "
            f"{there.get(name, 0.0):g}; lower num_workers or ray.num_cpus_per_worker, or free some"
        )


# --- training -----------------------------------------------------------------------------


def fit(
    job: StageJob, *, num_workers: int, ray: RaySettings, progress: Progress | None = None
) -> StageResult:
    """Train a stage through Ray Train.

    Args:
        job: The stage.
        num_workers: 1 or more: a worker group (DDP over gloo or nccl). 0: Ray Train's local mode
            in a warm, named actor; in this process if it is a Ray worker itself, or without Ray.
        ray: Processors and accelerators of a worker.
        progress: Called with steps done and steps in all, from another thread.

    Raises:
        ResourceError: the cluster cannot give what the group needs.
        TrainingError: workers died more than ``MAX_FAILURES`` times.
        DriftlineError: whatever ``run_stage`` raises.
    """
    with followed(StepFile.of(job.checkpoints), progress):
        if num_workers > 0:
            return _fit_group(job, num_workers=num_workers, settings=ray)
        if _on_driver():
            return _fit_in_actor(job, settings=ray)
        return _unwrap(_fit_locally(job.to_json()))


def _fit_group(job: StageJob, *, num_workers: int, settings: RaySettings) -> StageResult:
    if not ray.is_initialized():
        raise ResourceError(
            f"stage {job.name}: num_workers {num_workers} needs Ray; open a ray_session, or set "
            "num_workers to 0"
        )
    check_resources(settings, num_workers=num_workers)
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # 2 s by default
    cpus = cpus_per_worker(settings, num_workers)
    storage = job.checkpoints.absolute().with_name(f".{job.checkpoints.name}.ray")
    trainer = TorchTrainer(
        _train,
        train_loop_config={
            "job": job.to_json(),
            "num_threads": max(1, int(cpus)),
            "steps_back": True,
        },
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=settings.num_gpus_per_worker > 0,
            resources_per_worker=_worker_resources(cpus, settings.num_gpus_per_worker),
        ),
        run_config=RunConfig(
            name=f"{job.name}-{uuid4().hex[:8]}",
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            worker_runtime_env={"env_vars": WORKER_ENVIRONMENT},
        ),
    )
    try:
        return _unwrap(trainer.fit().return_value)
    except TrainingFailedError as error:
        raise TrainingError(f"stage {job.name}: its workers failed; {error}") from error
    finally:
        shutil.rmtree(storage, ignore_errors=True)


def _fit_in_actor(job: StageJob, *, settings: RaySettings) -> StageResult:
    num_threads = max(1, int(cpus_per_worker(settings, 1)))
    for attempt in (1, 2):
        try:
            return _unwrap(ray.get(_trainer().fit.remote(job.to_json(), num_threads)))
        except ActorDiedError:
            if attempt == 2:
                raise
            logger.warning("the warm trainer died during %s; starting another", job.name)
    raise AssertionError


def warm_up(settings: RaySettings) -> None:
    """Start the warm actor and its imports, so that the first refresh is as fast as the next."""
    num_threads = max(1, int(cpus_per_worker(settings, 1)))
    ray.get(_trainer().warm_up.remote(num_threads))


def _trainer() -> Any:
    """The warm actor, started when there is none; it outlives the command that started it."""
    named = {"name": TRAINER, "namespace": NAMESPACE, "lifetime": "detached"}
    return _Trainer.options(**named, get_if_exists=True).remote()  # type: ignore[attr-defined]


def stop_trainer() -> None:
    """End the warm actor, if there is one."""
    with suppress(ValueError):
        ray.kill(ray.get_actor(TRAINER, namespace=NAMESPACE))


@ray.remote(
    num_cpus=0,
    max_restarts=-1,
    max_task_retries=MAX_FAILURES,
    runtime_env={"env_vars": WORKER_ENVIRONMENT},
)
class _Trainer:
    """The warm actor. A killed one is restarted by Ray and continues from the checkpoint."""

    def __init__(self) -> None:
        step_back()

    def fit(self, raw_job: Mapping[str, Any], num_threads: int) -> dict[str, Any]:
        torch.set_num_threads(num_threads)
        return _fit_locally(raw_job)

    def warm_up(self, num_threads: int) -> int:
        torch.set_num_threads(num_threads)
        return os.getpid()


def _fit_locally(raw_job: Mapping[str, Any]) -> dict[str, Any]:
    """Ray Train's local mode: the same training function, no controller, no worker group."""
    trainer = TorchTrainer(
        _train,
        train_loop_config={"job": dict(raw_job), "num_threads": torch.get_num_threads()},
        scaling_config=ScalingConfig(num_workers=0),
    )
    ray_logger = logging.getLogger("ray.train")
    level = ray_logger.level
    ray_logger.setLevel(logging.WARNING)  # it logs every report
    try:
        answer = trainer.fit().return_value
    finally:
        ray_logger.setLevel(level)
    assert isinstance(answer, dict)
    return answer


def _train(config: Mapping[str, Any]) -> dict[str, Any]:
    """What every worker runs. Errors of ours travel as values, so that Ray does not retry them."""
    if config.get("steps_back"):  # a process of its own, not the caller's
        step_back()
    job = StageJob.from_json(config["job"])
    torch.set_num_threads(config["num_threads"])
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    try:
        result = run_stage(
            job,
            report=lambda measures: ray.train.report(dict(measures)),
            rank=rank,
            world_size=world_size,
            progress=StepFile.of(job.checkpoints).write,
        )
    except DriftlineError as error:
        return {"error": type(error).__name__, "message": str(error)}
    return asdict(result)


def _unwrap(answer: Mapping[str, Any]) -> StageResult:
    if "error" in answer:
        raise getattr(errors, answer["error"])(answer["message"])
    return StageResult.from_json(answer)


def _worker_resources(cpus: float, gpus: float) -> dict[str, float]:
    return {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}


def _on_driver() -> bool:
    """Ray runs, and this process is not itself one of its workers."""
    return ray.is_initialized() and ray.get_runtime_context().worker.mode != ray.WORKER_MODE

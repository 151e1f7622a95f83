"""Do the published sizes take real training steps here, and how fast?

    python tests/benchmarks/large_models.py [--steps 12] [--workers 0] [--only NAME]
    python tests/benchmarks/large_models.py --quick

On an accelerator: the teacher of ``configs/paper/ctrbert.yaml`` (24 layers of width 2240, 1.5 B
parameters; papers.md S0.8) learns masked language and clicks, its student (70 M; S0.13) learns soft
labels, all in bfloat16 autocast over float32 weights, the teacher with activation checkpointing.
``--workers N`` shards each model over N accelerators (FSDP2 through Ray Train); 0 trains in this
process on one.

``--quick`` runs the same code anywhere in about a minute: a small width, in this process and then
cut between two gloo workers.

Data are random tokens, so only throughput and memory mean something. There is no baseline; the
ceiling is the accelerator's own rate in bfloat16, against which the achieved rate of model
operations (6 x parameters x tokens, recomputation not counted) can be held. Rows/s and tokens/s are
those of training alone, without the checkpoint that every stage writes at its end; start-up
kernels are included, so take more ``--steps`` for a steady figure.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

sys.path.append(str(Path(__file__).parents[2]))  # the script's own folder is there already

from tests.benchmarks.rig.report import about

from driftline.platform.devices import choose_device
from driftline.platform.examples import (
    PairRows,
    Ragged,
    Texts,
    TokenRows,
    write_pairs,
    write_texts,
    write_tokens,
)
from driftline.platform.models.build import count_parameters
from driftline.platform.models.spec import TeacherSpec, TwinSpec, encoder_spec, head_spec
from driftline.platform.ray_runtime import fit, ray_session
from driftline.platform.settings import (
    ConfigEncoder,
    DriftlineSettings,
    RaySettings,
    StageSettings,
    load_settings,
)
from driftline.platform.stages import StageJob

CONFIG: Final = Path(__file__).parents[2] / "configs" / "paper" / "ctrbert.yaml"
NUM_CATEGORIES, NUM_NUMBERS = 3, 2 * 13  # papers.md S0.2; numbers with their missing-indicators
FIRST_WORD: Final = 10  # ids below are specials


@dataclass(frozen=True)
class Size:
    """What is tried: the published one, or a toy."""

    teacher: ConfigEncoder
    student: ConfigEncoder
    vocabulary_size: int
    teacher_rows: int
    """Rows of a teacher's step."""
    student_rows: int
    accumulation: int = 1


def published(settings: DriftlineSettings) -> Size:
    teacher, student = settings.teacher.encoder, settings.student.encoder
    assert isinstance(teacher, ConfigEncoder)
    assert isinstance(student, ConfigEncoder)
    return Size(teacher, student, settings.tokenizer.vocabulary_size, 32, 1024, accumulation=2)


QUICK: Final = Size(
    ConfigEncoder(num_layers=3, hidden_size=64, max_tokens=32),
    ConfigEncoder(num_layers=2, hidden_size=32, max_tokens=16),
    vocabulary_size=500,
    teacher_rows=16,
    student_rows=32,
    accumulation=2,
)


def random_texts(num_texts: int, *, max_tokens: int, vocabulary_size: int) -> Ragged:
    """Texts of a quarter of the longest length and more."""
    random = np.random.default_rng(0)
    lengths = random.integers(max_tokens // 4, max_tokens - 2, num_texts)
    return Ragged.of(
        [random.integers(FIRST_WORD, vocabulary_size, n).astype(np.int32) for n in lengths]
    )


def jobs_of(
    size: Size, settings: DriftlineSettings, root: Path, *, num_steps: int, sharded: bool
) -> dict[str, StageJob]:
    """Masked language and clicks for the teacher, soft labels for the student."""
    random = np.random.default_rng(1)
    per_step = size.teacher_rows * size.accumulation
    rows = random_texts(
        4 * per_step, max_tokens=size.teacher.max_tokens, vocabulary_size=size.vocabulary_size
    )
    clicked = (np.arange(len(rows)) % 2).astype(np.float32)
    write_tokens(root / "rows.arrow", TokenRows(rows, clicked))
    texts = random_texts(
        1000, max_tokens=size.student.max_tokens, vocabulary_size=size.vocabulary_size
    )
    write_texts(root / "texts.arrow", Texts(np.arange(len(texts)), texts))
    num_pairs = 4 * size.student_rows
    page, ad = random.integers(0, len(texts), (2, num_pairs)).astype(np.int32)
    pairs = PairRows(
        page,
        ad,
        random.integers(0, 100, (num_pairs, NUM_CATEGORIES)).astype(np.int32),
        random.normal(size=(num_pairs, NUM_NUMBERS)).astype(np.float32),
        (random.random(num_pairs) < 0.5).astype(np.float32),
        random.normal(size=(num_pairs, 2)).astype(np.float32),
    )
    write_pairs(root / "pairs.arrow", pairs)

    teacher = TeacherSpec(encoder=encoder_spec(size.teacher, vocabulary_size=size.vocabulary_size))
    student = encoder_spec(size.student, vocabulary_size=size.vocabulary_size)
    head = head_spec(
        settings.student.head,
        vector_size=student.hidden_size,
        cardinalities=(100,) * NUM_CATEGORIES,
        num_numbers=NUM_NUMBERS,
    )
    recipe = StageSettings(
        num_steps=num_steps,
        batch_size=size.teacher_rows,
        accumulation=size.accumulation,
        learning_rate=1e-4,
        evaluations_per_epoch=1,
        autocast="bfloat16",
        activation_checkpointing=True,
        sharding="fsdp" if sharded else "off",
    )
    mlm = StageJob(
        name="teacher-mlm",
        model=teacher,
        task="mlm",
        examples=root / "rows.arrow",
        output=root / "teacher-mlm.safetensors",
        checkpoints=root / "teacher-mlm",
        stage=recipe,
        seed=1,
    )
    clicks = replace(
        mlm,
        name="teacher-clicks",
        task="clicks",
        output=root / "teacher-clicks.safetensors",
        checkpoints=root / "teacher-clicks",
        initial=(mlm.output,),
    )
    student_recipe = {"batch_size": size.student_rows, "activation_checkpointing": False}
    distil = replace(
        clicks,
        name="student-distil",
        model=TwinSpec(encoder=student, head=head),
        examples=root / "pairs.arrow",
        texts=root / "texts.arrow",
        output=root / "student-distil.safetensors",
        checkpoints=root / "student-distil",
        stage=recipe.model_copy(update=student_recipe),
        objective=settings.student.arms_refresh.objective,
        initial=(),
    )
    return {job.name: job for job in (mlm, clicks, distil)}


def measure(job: StageJob, *, num_workers: int, ray: RaySettings) -> dict[str, Any]:
    """Train a stage and say what it did; memory is known only in this process."""
    if torch.cuda.is_available() and num_workers == 0:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    result = fit(job, num_workers=num_workers, ray=ray)
    seconds = time.perf_counter() - started
    num_parameters = count_parameters(job.model)
    losses = [row["train_loss"] for row in result.history]
    found = {
        "stage": job.name,
        "num_parameters": num_parameters,
        "num_workers": num_workers,
        "sharding": job.stage.sharding if num_workers > 1 else "off",
        "num_steps": result.num_steps,
        "rows_per_s": result.rows_per_second,
        "tokens_per_s": result.tokens_per_second,
        "model_teraflops_per_s": 6 * num_parameters * result.tokens_per_second / 1e12,
        "peak_gib": peak_bytes() / 2**30 if num_workers == 0 else None,
        "train_seconds": result.train_seconds,
        "seconds": seconds,
        "train_loss": losses[-1],
    }
    print(
        f"{job.name:<16}{num_parameters / 1e6:>9.1f} M{num_workers:>4} workers"
        f"{found['rows_per_s']:>11,.1f} rows/s{found['tokens_per_s']:>12,.0f} tokens/s"
        f"{found['model_teraflops_per_s']:>10.3f} TFLOP/s"
        + (f"{found['peak_gib']:>8.1f} GiB" if num_workers == 0 else f"{'-':>8}    ")
        + f"{seconds:>8.1f} s in all, loss {losses[-1]:.3f}",
        flush=True,
    )
    assert np.isfinite(losses).all()
    return found


def peak_bytes() -> int:
    """Of the accelerator since the stage began, or of this process since it began."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def ray_for(num_workers: int) -> Iterator[None]:
    """Ray with a processor a worker; none for this process alone."""
    if num_workers == 0:
        yield
        return
    with ray_session(RaySettings(num_cpus=max(num_workers, os.cpu_count() or 1))):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--only", choices=["teacher-mlm", "teacher-clicks", "student-distil"])
    arguments = parser.parse_args()
    origin, settings = about(), load_settings(CONFIG)
    device = choose_device()
    if device.type == "cpu" and not arguments.quick:
        parser.error("the published sizes need an accelerator; here, take --quick")
    size = QUICK if arguments.quick else published(settings)
    num_steps = min(arguments.steps, 6) if arguments.quick else arguments.steps
    groups = (0, 2) if arguments.quick else (arguments.workers,)
    if arguments.quick:
        torch.set_num_threads(1)
    found = []
    for num_workers in groups:
        gpus = 1 if device.type == "cuda" and num_workers else 0
        ray = RaySettings(num_gpus_per_worker=gpus, num_cpus_per_worker=1)
        with tempfile.TemporaryDirectory() as folder, ray_for(num_workers):
            jobs = jobs_of(
                size, settings, Path(folder), num_steps=num_steps, sharded=num_workers > 1
            )
            if arguments.only == "teacher-clicks":
                jobs[arguments.only] = replace(jobs[arguments.only], initial=())
            for name, job in jobs.items():
                if arguments.only in (None, name):
                    found.append(measure(job, num_workers=num_workers, ray=ray))
    report = {
        "benchmark": "large_models",
        **origin,
        "quick": arguments.quick,
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "stages": found,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()

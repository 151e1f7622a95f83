"""What a laboratory makes: files and trained stages, each named after what decides it, made once.

A stage's weights lie at ``nodes/IDENTITY.safetensors``, so two strategies that begin alike share
their beginning, also when they run in different processes: whoever comes second waits, then finds
the file.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from filelock import FileLock

from driftline.platform.artefacts import hash_value, read_json, write_json
from driftline.platform.stages import StageJob, StageResult, run_stage
from driftline.platform.training import Report

FORMAT: Final = 1  # raise when the same settings would give other files
IDENTITY_LENGTH: Final = 32

Runner = Callable[[StageJob, Report | None], StageResult]


@dataclass(frozen=True)
class Node:
    """One thing that a strategy needed: a trained stage, or a pass of the teacher."""

    name: str
    identity: str
    seconds: float
    core_seconds: float
    made_now: bool
    """False when it was found: another strategy, seed or run had made it."""
    teacher_passes: int = 0
    """Rows that went through the teacher for it."""
    result: StageResult | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, without the history."""
        return {
            "name": self.name,
            "identity": self.identity,
            "seconds": round(self.seconds, 3),
            "core_seconds": round(self.core_seconds, 3),
            "made_now": self.made_now,
            "teacher_passes": self.teacher_passes,
            "metric": self.result and self.result.metric,
            "best": self.result and self.result.best,
            "num_steps": self.result and self.result.num_steps,
        }


def run_here(job: StageJob, report: Report | None) -> StageResult:
    """Train in this process, as a search does inside a trial."""
    return run_stage(job, report=report)


@dataclass
class NodeFolder:
    """Makes nodes in a folder, which processes may share."""

    folder: Path
    run: Runner
    """How a stage is run."""
    num_passes: Callable[[], int]
    """Rows that went through a teacher in this process until now."""
    nodes: list[Node] = field(default_factory=list)
    """Everything asked for so far, in order."""

    def train(self, job: StageJob, *, report: Report | None = None) -> Path:
        """The weights of a stage, trained unless somebody has trained it; see ``StageJob``.

        ``job.output`` and ``job.checkpoints`` are replaced by the node's own places.
        """

        def run(output: Path, checkpoints: Path) -> StageResult:
            return self.run(replace(job, output=output, checkpoints=checkpoints), report)

        return self.train_node(job.name, run, identity=job.identity())

    def train_node(
        self, name: str, run: Callable[[Path, Path], StageResult], *, identity: str
    ) -> Path:
        """The same for anything that trains: ``run(output, checkpoints)`` does, or finds it done.

        Args:
            name: Of the stage, for people.
            run: Resumes from the folder; returns at once when the output is there.
            identity: Hash of everything that decides the weights.
        """
        identity = identity[:IDENTITY_LENGTH]
        output = self.folder / "nodes" / f"{identity}.safetensors"
        with self.lock(f"nodes/{identity}"):
            is_new = not output.exists()
            result = run(output, output.with_suffix(".checkpoints"))
        self.nodes.append(
            Node(name, identity, result.seconds, result.core_seconds, is_new, result=result)
        )
        return output

    def make(self, name: str, write: Callable[[Path], object], *, key: object) -> Path:
        """A file that ``write`` writes, unless it was written before under the same key.

        What it cost stands beside it, teacher passes included.
        """
        identity = hash_value([FORMAT, name, key])[:IDENTITY_LENGTH]
        path = self.folder / "files" / f"{identity}-{name}"
        record = path.with_name(f"{path.name}.json")
        with self.lock(f"files/{identity}"):
            is_new = not (path.exists() and record.exists())
            if is_new:
                path.parent.mkdir(parents=True, exist_ok=True)
                started, cpu = time.monotonic(), time.process_time()
                before = self.num_passes()
                write(path)
                cost = {
                    "seconds": time.monotonic() - started,
                    "core_seconds": time.process_time() - cpu,
                    "teacher_passes": self.num_passes() - before,
                }
                write_json(record, cost)
        self.nodes.append(Node(name, identity, made_now=is_new, **read_json(record)))
        return path

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """One process at a time, of all that work in the folder."""
        path = self.folder / "locks" / f"{name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path):
            yield

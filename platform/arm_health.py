"""Errors and times of the two arms of a canary, as the servers counted them.

Each replica keeps one JSON file, ``state/serving/health/REPLICA.json``, and replaces it every few
seconds. What a killed replica counted stays. It does not depend on the decision log.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from driftline.platform.artefacts import read_json, write_json
from driftline.platform.workspace import Workspace

SHORTEST_SECONDS: Final = 1e-5
BUCKETS_PER_OCTAVE: Final = 8
NUM_BUCKETS: Final = 20 * BUCKETS_PER_OCTAVE
"""Times from 10 microseconds to 10 seconds, each bucket 9 % wide."""


@dataclass
class ArmCounts:
    """What one bundle did in one arm of one experiment."""

    answers: int = 0
    errors: int = 0
    """Requests that it failed to answer."""
    buckets: list[int] = field(default_factory=lambda: [0] * NUM_BUCKETS)
    """Answers by the time they took."""

    def add(self, seconds: float) -> None:
        """Count an answer."""
        self.answers += 1
        self.buckets[bucket_of(seconds)] += 1

    @property
    def attempts(self) -> int:
        """Answers and errors."""
        return self.answers + self.errors

    def quantile(self, share: float) -> float:
        """Seconds within which this share of the answers came: the upper edge of the bucket."""
        if not self.answers:
            return float("nan")
        sums = np.cumsum(self.buckets)
        return upper_edge(int(np.searchsorted(sums, share * sums[-1])))

    def num_slower(self, seconds: float) -> int:
        """Answers in buckets that lie wholly beyond a time."""
        return sum(self.buckets[bucket_of(seconds) + 1 :])

    def __add__(self, other: "ArmCounts") -> "ArmCounts":
        """Both together."""
        buckets = [a + b for a, b in zip(self.buckets, other.buckets, strict=True)]
        return ArmCounts(self.answers + other.answers, self.errors + other.errors, buckets)


@dataclass(frozen=True)
class ArmKey:
    """Whose counts they are."""

    experiment: str
    arm: str
    bundle: str


@dataclass(frozen=True)
class ExperimentHealth:
    """Both arms of an experiment over all replicas."""

    champion: ArmCounts
    canary: ArmCounts
    num_replicas: int


def bucket_of(seconds: float) -> int:
    """The bucket of a time."""
    if seconds <= SHORTEST_SECONDS:
        return 0
    place = int(BUCKETS_PER_OCTAVE * math.log2(seconds / SHORTEST_SECONDS))
    return min(place, NUM_BUCKETS - 1)


def upper_edge(bucket: int) -> float:
    """Seconds at which a bucket ends."""
    return float(SHORTEST_SECONDS * 2 ** ((bucket + 1) / BUCKETS_PER_OCTAVE))


def health_folder(workspace: Workspace) -> Path:
    """Where the replicas' files lie."""
    return workspace.state / "serving" / "health"


def write_health(path: Path, counts: Mapping[ArmKey, ArmCounts]) -> None:
    """Replace a replica's file."""
    entries = [vars(key) | vars(found) for key, found in counts.items()]
    write_json(path, {"arms": entries})


def read_health(workspace: Workspace, experiment: str, *, canary: str) -> ExperimentHealth:
    """Counts of an experiment, summed over replicas; zeros before any request.

    Args:
        workspace: Of the market.
        experiment: ``Canary.experiment``.
        canary: The canary's bundle. What the champion answered in its place is not counted.
    """
    champions, canaries = [ArmCounts()], [ArmCounts()]
    replicas = set()
    for path in sorted(health_folder(workspace).glob("*.json")):
        for entry in _entries(path):
            if entry["experiment"] != experiment:
                continue
            replicas.add(path.stem)
            counts = ArmCounts(entry["answers"], entry["errors"], list(entry["buckets"]))
            if entry["arm"] == "champion":
                champions.append(counts)
            elif entry["bundle"] == canary:
                canaries.append(counts)
    return ExperimentHealth(
        champion=_sum(champions), canary=_sum(canaries), num_replicas=len(replicas)
    )


def _entries(path: Path) -> Sequence[Mapping[str, Any]]:
    entries: Sequence[Mapping[str, Any]] = read_json(path)["arms"]
    return entries


def _sum(parts: Sequence[ArmCounts]) -> ArmCounts:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total

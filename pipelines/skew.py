"""Does the server see what training sees? Decisions of the log, computed again offline.

A sample of logged decisions is joined again with the offline store, point in time and as known
then, by the code that makes training frames, and scored by the bundle that answered. Where a served
value differs from the offline one, the moment of the snapshot that the server had tells why.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from driftline.features.decisions import last_hour, read_decisions
from driftline.pipelines.skew_causes import (
    PROBABILITY_TOLERANCE,
    VALUE_TOLERANCE,
    Comparison,
    Example,
    Mismatch,
)
from driftline.platform.settings import DriftlineSettings
from driftline.platform.windows import HOUR, Window, format_time


@dataclass(frozen=True)
class SkewReport:
    """What the server saw beside what training sees."""

    window: Window
    num_decisions: int
    num_requests: int
    num_in_log: int
    """Decisions of the window, sampled or not."""
    num_without_bundle: int
    """Whose bundle is gone: their probability was not computed again."""
    probability: Mismatch
    features: Mapping[str, Mismatch]
    examples: tuple[Example, ...]

    @property
    def num_unexplained(self) -> int:
        """Values, probabilities included, that differ for no known cause."""
        every = (self.probability, *self.features.values())
        return sum(found.causes.get("unexplained", 0) for found in every)

    def to_json(self) -> dict[str, Any]:
        """The same as JSON-able values."""
        return {
            "window": [format_time(self.window.start), format_time(self.window.end)],
            "num_decisions": self.num_decisions,
            "num_requests": self.num_requests,
            "num_in_log": self.num_in_log,
            "num_without_bundle": self.num_without_bundle,
            "num_unexplained": self.num_unexplained,
            "value_tolerance": VALUE_TOLERANCE,
            "probability_tolerance": list(PROBABILITY_TOLERANCE),
            "probability": _mismatch_json(self.probability),
            "features": {name: _mismatch_json(found) for name, found in self.features.items()},
            "examples": [asdict(example) for example in self.examples],
        }


def check_skew(settings: DriftlineSettings, *, hours: int = 24, sample: int = 2_000) -> SkewReport:
    """Compute a sample of the newest decisions again, and compare.

    Args:
        settings: The market's, tiers resolved.
        hours: How far back from the newest logged hour of event time.
        sample: So many decisions (ads), whole requests, chosen by their id.

    Raises:
        MissingArtefactError: no decision was logged, or the offline store is not there.
    """
    end = last_hour(settings)
    if end is None:
        read_decisions(settings)  # says what is missing
        raise AssertionError("a log without hours has no decisions")
    window = Window(end - hours * HOUR, end)
    every = read_decisions(settings, window)
    rows = _sample(every, sample)
    comparison = Comparison(settings, rows)
    features = {name: comparison.mismatch(name) for name in comparison.names}
    probability, num_without_bundle = comparison.probability()
    return SkewReport(
        window=window,
        num_decisions=rows.num_rows,
        num_requests=len(pc.unique(rows.column("request_id"))),
        num_in_log=every.num_rows,
        num_without_bundle=num_without_bundle,
        probability=probability,
        features=features,
        examples=tuple(comparison.examples()),
    )


def skew_text(report: SkewReport) -> str:
    """The report for people."""
    head = [
        f"{report.num_decisions:,} of {report.num_in_log:,} decisions "
        f"({report.num_requests:,} requests) of {report.window} computed again",
        f"{'value':<40} {'differs':>9}  why",
    ]
    lines = [_line("probability", report.probability)]
    differing = {name: found for name, found in report.features.items() if found.num_different}
    lines += [_line(name, found) for name, found in differing.items()]
    same = len(report.features) - len(differing)
    lines.append(f"{same} of {len(report.features)} features agree in every row")
    if report.num_without_bundle:
        lines.append(
            f"{report.num_without_bundle:,} decisions of bundles that are gone: not scored"
        )
    lines += [
        f"  {e.cause}: {e.name} of {e.impression_id} at {e.event_time}: "
        f"served {e.served!r}, offline {e.offline!r}"
        for e in report.examples
    ]
    verdict = f"{report.num_unexplained} unexplained"
    return "\n".join([*head, *lines, verdict])


def _sample(decisions: pa.Table, number: int) -> pa.Table:
    """Whole requests by the hash of their id, until there are ``number`` rows."""
    ids = decisions.column("request_id").to_pylist()
    counts = Counter(ids)
    order = sorted(counts, key=lambda name: hashlib.blake2b(name.encode(), digest_size=8).digest())
    kept: set[str] = set()
    total = 0
    for name in order:
        if total >= number:
            break
        kept.add(name)
        total += counts[name]
    return decisions.filter(pa.array([name in kept for name in ids], pa.bool_()))


def _line(name: str, found: Mismatch) -> str:
    why = ", ".join(f"{cause} {number}" for cause, number in found.causes.items())
    return f"{name:<40} {found.rate:>8.2%}  {why}".rstrip()


def _mismatch_json(found: Mismatch) -> dict[str, Any]:
    return {
        "num_compared": found.num_compared,
        "num_different": found.num_different,
        "rate": found.rate,
        "causes": dict(found.causes),
    }

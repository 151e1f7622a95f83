"""Did the papers' orderings hold? Each claim gets one of three answers, with its numbers.

*held*: the 95 % interval of every step lies on the claimed side. *reversed*: that of some step lies
on the other side. *not shown*: neither, so this study is too small to tell; whether the means at
least agree is said beside it. With forty claims one or two of these answers will be luck. One seed
shows nothing but what does not depend on it: its interval knows the requests only.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Final, Literal

import numpy as np

from driftline.pipelines.study_results import StudyResults
from driftline.pipelines.study_statistics import Sample, combine, estimate
from driftline.platform.bootstrap import Interval
from driftline.platform.metrics import FloatArray
from driftline.platform.study_claims import StudyOrdering
from driftline.platform.study_contrasts import Contrast
from driftline.platform.study_measures import MEASURES, Measure
from driftline.platform.study_settings import StudySettings

Outcome = Literal["held", "not shown", "reversed", "not measured"]

STRAIGHT: Final = 0.9
"""R^2 above which points count as lying on a line."""


@dataclass(frozen=True)
class Step:
    """One inequality of a claim."""

    statement: str
    difference: Interval
    """Positive speaks for the claim."""
    outcome: Outcome
    num_seeds: int

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "statement": self.statement,
            "outcome": self.outcome,
            "num_seeds": self.num_seeds,
            **self.difference.to_json(),
        }


@dataclass(frozen=True)
class Verdict:
    """One claim and what became of it."""

    claim: str
    source: str
    measure: Measure
    outcome: Outcome
    steps: tuple[Step, ...]

    @property
    def agrees_in_mean(self) -> bool:
        """Whether all means lie on the claimed side, however sure."""
        return bool(self.steps) and all(step.difference.value > 0 for step in self.steps)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "claim": self.claim,
            "source": self.source,
            "measure": self.measure.label,
            "outcome": self.outcome,
            "agrees_in_mean": self.agrees_in_mean,
            "steps": [step.to_json() for step in self.steps],
        }


def judge_orderings(study: StudySettings, results: StudyResults) -> tuple[Verdict, ...]:
    """Every claim of the study, in its order; ``at: each`` gives a verdict a value of the grid."""
    return tuple(
        _judge(study, results, ordering, at=at)
        for ordering in study.orderings
        for at in (study.each if ordering.at == "each" else (None,))
    )


def count_outcomes(verdicts: tuple[Verdict, ...]) -> Mapping[Outcome, int]:
    """How many claims held, and so on; all four are there."""
    outcomes: tuple[Outcome, ...] = ("held", "not shown", "reversed", "not measured")
    return {each: sum(verdict.outcome == each for verdict in verdicts) for each in outcomes}


def _judge(
    study: StudySettings, results: StudyResults, ordering: StudyOrdering, *, at: str | None
) -> Verdict:
    steps = tuple(_steps(study, results, ordering, at=at))
    label = f" · {study.each[at].label or at}" if at is not None else ""
    return Verdict(
        claim=ordering.claim + label,
        source=ordering.source,
        measure=MEASURES[ordering.measure],
        outcome=_together(steps),
        steps=steps,
    )


def _steps(
    study: StudySettings, results: StudyResults, ordering: StudyOrdering, *, at: str | None
) -> Iterator[Step]:
    if ordering.linear:
        yield _line_step(study, results, ordering)
        return
    if ordering.agrees_with is not None:
        for first, second in combinations(ordering.among, 2):
            yield _agreement_step(results, ordering, first, second)
        return
    for lower, higher in ordering.steps:
        low, high = (
            study.resolve(term, measure=ordering.measure, at=at) for term in (lower, higher)
        )
        contrast = high.plus(low, times=-1)
        exact = all(MEASURES[name.partition(":")[2]].exact for name in contrast.weights)
        found = results.contrast(contrast)
        yield _step(f"{lower} < {higher}", found, exact=exact)


def _step(statement: str, sample: Sample | None, *, exact: bool = False) -> Step:
    if sample is None:
        return Step(statement, Interval(np.nan, np.nan, np.nan), "not measured", 0)
    difference = estimate(sample, exact=exact).interval
    outcome = _outcome(difference) if exact or len(sample) > 1 else "not shown"
    return Step(statement, difference, outcome, len(sample))


def _outcome(difference: Interval) -> Outcome:
    if difference.low > 0:
        return "held"
    return "reversed" if difference.high < 0 else "not shown"


def _together(steps: tuple[Step, ...]) -> Outcome:
    outcomes = {step.outcome for step in steps}
    for outcome in ("reversed", "not measured", "not shown"):
        if outcome in outcomes:
            return outcome
    return "held"


def _agreement_step(
    results: StudyResults, ordering: StudyOrdering, first: str, second: str
) -> Step:
    """Whether the second measure ranks a pair as the first one does.

    The difference is that of the second measure, taken in the direction in which the first one
    points; where the first is not sure of its direction, nothing is shown.
    """
    assert ordering.agrees_with is not None
    leading = _difference(results, ordering.measure, first, second)
    if leading is None:
        return _step(f"{first}, {second}", None)
    direction = estimate(leading).interval
    if direction.value < 0:
        first, second = second, first
    following = _difference(results, ordering.agrees_with, first, second)
    names = MEASURES[ordering.measure].label, MEASURES[ordering.agrees_with].label
    step = _step(f"{first} < {second} by {names[0]}, so by {names[1]}", following)
    if step.outcome == "not measured" or direction.excludes(0):
        return step
    return replace(step, outcome="not shown")


def _difference(results: StudyResults, measure: str, first: str, second: str) -> Sample | None:
    return results.contrast(Contrast({f"{second}:{measure}": 1.0, f"{first}:{measure}": -1.0}))


def _line_step(study: StudySettings, results: StudyResults, ordering: StudyOrdering) -> Step:
    """How much of the measure's variation a straight line over x explains, less ``STRAIGHT``."""
    samples = {name: results.sample(name, ordering.measure) for name in ordering.linear}
    known = {name: sample for name, sample in samples.items() if sample is not None}
    statement = f"R^2 over x above {STRAIGHT}"
    if len(known) < len(samples):
        return _step(statement, None)
    x = np.array([study.cells[name].x for name in ordering.linear], dtype=np.float64)

    def excess(**values: FloatArray) -> FloatArray:
        return np.asarray(
            straightness(x, np.stack(np.broadcast_arrays(*values.values()))) - STRAIGHT
        )

    return _step(statement, combine(known, excess))


def straightness(x: FloatArray, y: FloatArray) -> FloatArray:
    """R^2 of the least-squares line through points (x, y); ``x`` ``[P]``, ``y`` ``[P, ...]``."""
    flat = y.reshape(len(x), -1)
    design = np.column_stack([x, np.ones_like(x)])
    line = np.linalg.lstsq(design, flat, rcond=None)[0]
    left = ((flat - design @ line) ** 2).sum(axis=0)
    spread = ((flat - flat.mean(axis=0)) ** 2).sum(axis=0)
    explained = 1 - np.divide(left, spread, out=np.ones_like(left), where=spread > 0)
    return np.asarray(explained.reshape(y.shape[1:]))

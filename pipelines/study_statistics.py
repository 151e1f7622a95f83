"""What a few seeds can say: paired values, their mean, and an honest interval.

Two kinds of luck stand between a study and the truth. *Seeds*: another seed trains another model;
with n seeds the mean is off by s / sqrt(n), and s itself is known only from n values, which is what
Student's t is for. *Requests*: all seeds are judged on the same test requests, so no number of
seeds shows that other requests would judge otherwise; the request bootstrap does. The two are
independent, so their variances add, and Welch and Satterthwaite's degrees of freedom decide how
wide the interval must be: two or three seeds alone are punished by t, a large share of request luck
is not. Everything is paired: the same seed, the same resample of requests, then the difference.

Not covered: another market or another teacher. A study has one of each.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import exp, isfinite, lgamma, nan, pi, sqrt, tan
from typing import Final

import numpy as np
from numpy.typing import NDArray

from driftline.platform.bootstrap import Interval
from driftline.platform.metrics import FloatArray

CONFIDENCE: Final = 0.95
NORMAL_QUANTILE: Final = 1.959963984540054
MOST_DEGREES: Final = 10_000.0
"""From here on t is the normal distribution to four digits."""


@dataclass(frozen=True)
class Sample:
    """One number for each seed, and the same on every resample of the requests."""

    seeds: tuple[int, ...]
    values: FloatArray
    """``[n]``."""
    resamples: FloatArray | None = None
    """``[n, R]``; None where requests play no part, as in core-seconds."""

    def __len__(self) -> int:
        return len(self.seeds)

    def at(self, seeds: Sequence[int]) -> "Sample":
        """The same for some of the seeds, in that order."""
        places = [self.seeds.index(seed) for seed in seeds]
        resamples = None if self.resamples is None else self.resamples[places]
        return Sample(tuple(seeds), self.values[places], resamples)


def combine(
    samples: Mapping[str, Sample], function: Callable[..., NDArray[np.float64]]
) -> Sample | None:
    """A function of several samples, seed by seed and resample by resample.

    Args:
        samples: Arguments of the function by name.
        function: Of arrays that broadcast; called with values and with resamples.

    Returns:
        The result over the seeds that all samples have; None if they share none.
    """
    common = [set(sample.seeds) for sample in samples.values()]
    order = next(iter(samples.values())).seeds if samples else ()
    seeds = [seed for seed in order if all(seed in each for each in common)]
    if not seeds:
        return None
    chosen = {name: sample.at(seeds) for name, sample in samples.items()}
    values = function(**{name: sample.values for name, sample in chosen.items()})
    counts = {s.resamples.shape[1] for s in chosen.values() if s.resamples is not None}
    if not counts:
        return Sample(tuple(seeds), values)
    shared = min(counts)
    drawn = {
        name: sample.values[:, None] if sample.resamples is None else sample.resamples[:, :shared]
        for name, sample in chosen.items()
    }
    return Sample(tuple(seeds), values, np.asarray(function(**drawn)))


@dataclass(frozen=True)
class Estimate:
    """A summary over seeds. The papers differ: 001 gives the mean, 003 the median (S1.8, S3.9)."""

    interval: Interval
    """Mean with its 95 % interval; NaN bounds when one seed is all there is."""
    median: float
    lowest: float
    highest: float
    num_seeds: int

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return self.interval.value


def estimate(sample: Sample, *, exact: bool = False) -> Estimate:
    """Summarise one number over its seeds.

    Args:
        sample: At least one seed.
        exact: The number does not depend on the seed, so one value is the truth.
    """
    values = sample.values
    mean = float(values.mean())
    half = 0.0 if exact else half_width(sample)
    return Estimate(
        interval=Interval(mean, mean - half, mean + half),
        median=float(np.median(values)),
        lowest=float(values.min()),
        highest=float(values.max()),
        num_seeds=len(sample),
    )


def half_width(sample: Sample) -> float:
    """Half the 95 % interval of the mean; NaN if nothing shows how sure it is.

    Source: Welch-Satterthwaite with one term of n - 1 degrees of freedom (seeds) and one of
    infinitely many (requests).
    """
    n = len(sample)
    by_requests = request_variance(sample)
    if n < 2:
        return NORMAL_QUANTILE * sqrt(by_requests) if by_requests > 0 else nan
    by_seeds = float(sample.values.var(ddof=1)) / n
    total = by_seeds + by_requests
    if not isfinite(total):
        return nan
    if by_seeds == 0:
        return NORMAL_QUANTILE * sqrt(by_requests)
    degrees = (n - 1) * min(total / by_seeds, MOST_DEGREES) ** 2
    return t_quantile(degrees) * sqrt(total)


def request_variance(sample: Sample) -> float:
    """Variance of the mean over seeds that the choice of test requests causes."""
    if sample.resamples is None:
        return 0.0
    means = sample.resamples.mean(axis=0)
    means = means[np.isfinite(means)]
    return float(means.var(ddof=1)) if len(means) > 1 else nan


@lru_cache(maxsize=256)
def t_quantile(degrees: float) -> float:
    """How many standard errors to either side Student's t keeps 95 % of its mass in.

    With t = sqrt(v) tan(a), the density becomes proportional to cos(a)^(v - 1), which a fixed
    quadrature integrates to machine precision; the angle is then found by halving.
    """
    if degrees <= 0:
        raise ValueError(f"degrees of freedom must be positive, got {degrees}")
    if degrees > MOST_DEGREES:
        return NORMAL_QUANTILE
    nodes, weights = np.polynomial.legendre.leggauss(80)
    scale = exp(lgamma((degrees + 1) / 2) - lgamma(degrees / 2)) / sqrt(pi)

    def mass(angle: float) -> float:
        places = angle / 2 * (nodes + 1)
        return float(scale * angle * (weights @ np.cos(places) ** (degrees - 1)))

    low, high = 0.0, pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mass(middle) < CONFIDENCE else (low, middle)
    return sqrt(degrees) * tan(low)

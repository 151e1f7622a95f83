"""Made-up sequences: shuffled, or drawn from lengths and frequencies (papers.md S3.16, S3.17).

A sequence is a row of numbers, whatever they stand for: words here, token ids for a token-level
distillation. It holds no [CLS] and no last [SEP]; these stay first and last because they are
put around it afterwards, and count neither as length nor as tokens (A3.9).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from driftline.platform.examples import Ragged

Weights: TypeAlias = NDArray[np.int64] | NDArray[np.float64]


def shuffled(sequences: Ragged, random: np.random.Generator) -> Ragged:
    """Every sequence with its own numbers in random order (Algorithm 1, papers.md S3.16)."""
    row_P = np.repeat(np.arange(len(sequences)), sequences.lengths)
    order_P = np.lexsort((random.random(len(row_P)), row_P))
    return Ragged(sequences.values[order_P], sequences.offsets)


@dataclass(frozen=True)
class SequenceModel:
    """All that Algorithm 2 keeps of a corpus: f_l and f_t (papers.md S3.17)."""

    lengths: NDArray[np.int64]
    length_shares: NDArray[np.float64]
    numbers: NDArray[np.int32]
    number_shares: NDArray[np.float64]

    @classmethod
    def fit(cls, sequences: Ragged, *, weights: Weights | None = None) -> "SequenceModel":
        """Count lengths and numbers.

        Args:
            sequences: The corpus.
            weights: How often each sequence occurs in it; once when not given. ``[N]``.

        Raises:
            ValueError: no sequence occurs.
        """
        weight_N = np.ones(len(sequences)) if weights is None else np.asarray(weights, np.float64)
        if not weight_N.sum() > 0:
            raise ValueError("lengths and tokens can only be counted where a sequence occurs")
        lengths, length_shares = _shares(sequences.lengths, weight_N)
        weight_P = np.repeat(weight_N, sequences.lengths)
        numbers, number_shares = _shares(sequences.values, weight_P)
        return cls(lengths, length_shares, numbers.astype(np.int32), number_shares)

    def draw(self, num_sequences: int, random: np.random.Generator) -> Ragged:
        """Sequences of length l ~ f_l, each of its l numbers ~ f_t on its own."""
        lengths = self.lengths[_draw(self.length_shares, num_sequences, random)]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        values = self.numbers[_draw(self.number_shares, int(offsets[-1]), random)]
        return Ragged(values, offsets)


def join(fields: Sequence[Ragged]) -> Ragged:
    """Row n of every field, one behind the other. All fields have the same number of rows."""
    lengths_FN = np.stack([field.lengths for field in fields])
    row_P = np.concatenate([np.repeat(np.arange(len(f)), f.lengths) for f in fields])
    values = np.concatenate([field.values for field in fields])
    offsets = np.concatenate([[0], np.cumsum(lengths_FN.sum(0))]).astype(np.int64)
    return Ragged(values[np.argsort(row_P, kind="stable")], offsets)


def _shares(
    values: NDArray[np.int64] | NDArray[np.int32], weights: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    distinct, place = np.unique(values, return_inverse=True)
    totals = np.bincount(place, weights=weights, minlength=len(distinct))
    kept = totals > 0
    return distinct[kept].astype(np.int64), totals[kept] / max(totals.sum(), 1e-300)


def _draw(
    shares: NDArray[np.float64], count: int, random: np.random.Generator
) -> NDArray[np.int64]:
    """Places, each with the chance of its share."""
    if count == 0:
        return np.empty(0, np.int64)
    return random.choice(len(shares), size=count, p=shares).astype(np.int64)

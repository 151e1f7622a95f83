"""Cumulative distributions of a transfer set, for plots (papers.md S3.22: F5.3 and F5.4)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from driftline.platform.examples import Ragged
from driftline.platform.text import Tokenizer
from driftline.platform.transfer.sequences import Weights
from driftline.platform.transfer.sets import TransferRows
from driftline.platform.transfer.texts import text_tokens, used_texts


@dataclass(frozen=True)
class CumulativeDistribution:
    """Share of the whole at or below each value; ascending, ends at 1."""

    values: NDArray[np.int64]
    shares: NDArray[np.float64]

    def share_below(self, values: NDArray[np.int64]) -> NDArray[np.float64]:
        """Share at or below each of other values."""
        place = np.searchsorted(self.values, values, side="right")
        return np.concatenate([[0.0], self.shares])[place]

    def to_json(self) -> dict[str, list[float]]:
        """The same as plain values."""
        return {"values": self.values.tolist(), "shares": self.shares.tolist()}


@dataclass(frozen=True)
class TransferDistributions:
    """What the two figures show."""

    lengths: CumulativeDistribution
    """Share of the texts of all rows with at most so many tokens."""
    coverage: CumulativeDistribution
    """Share of all tokens that are among the so many most frequent ones."""


def transfer_distributions(rows: TransferRows, tokenizer: Tokenizer) -> TransferDistributions:
    """Distributions over the texts of all rows, pages and ads, as the tokeniser reads them.

    Raises:
        ValueError: no row has a text.
    """
    used, uses = used_texts(rows.frame, rows.texts)
    tokens = text_tokens(used, tokenizer)
    return TransferDistributions(
        length_distribution(tokens, weights=uses), token_coverage(tokens, weights=uses)
    )


def length_distribution(
    sequences: Ragged, *, weights: Weights | None = None
) -> CumulativeDistribution:
    """Share of the sequences with at most so many tokens.

    Raises:
        ValueError: no sequence occurs.
    """
    weight_N = np.ones(len(sequences)) if weights is None else np.asarray(weights, np.float64)
    lengths, place = np.unique(sequences.lengths, return_inverse=True)
    return _cumulative(lengths, np.bincount(place, weights=weight_N, minlength=len(lengths)))


def token_coverage(sequences: Ragged, *, weights: Weights | None = None) -> CumulativeDistribution:
    """Share of all tokens that are among the 1, 2, 3 ... most frequent ones.

    Raises:
        ValueError: no token occurs.
    """
    weight_N = np.ones(len(sequences)) if weights is None else np.asarray(weights, np.float64)
    _, place = np.unique(sequences.values, return_inverse=True)
    counts = np.bincount(place, weights=np.repeat(weight_N, sequences.lengths))
    return _cumulative(np.arange(1, len(counts) + 1), np.sort(counts)[::-1])


def _cumulative(values: NDArray[np.int64], counts: Weights) -> CumulativeDistribution:
    totals = np.cumsum(counts)
    if not len(totals) or totals[-1] <= 0:
        raise ValueError("a distribution needs something that occurs; there is none")
    return CumulativeDistribution(values.astype(np.int64), totals / totals[-1])

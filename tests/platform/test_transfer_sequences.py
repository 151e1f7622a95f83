"""Algorithms 1 and 2 of the thesis on plain numbers (papers.md T.7)."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from driftline.platform.examples import Ragged
from driftline.platform.transfer.distributions import length_distribution, token_coverage
from driftline.platform.transfer.sequences import SequenceModel, join, shuffled

ROWS = st.lists(st.lists(st.integers(7, 40), max_size=9), min_size=1, max_size=12)
CLS, SEP = 2, 3


def ragged(rows: list[list[int]]) -> Ragged:
    return Ragged.of([np.array(row, np.int32) for row in rows])


def lists(sequences: Ragged) -> list[list[int]]:
    bounds = zip(sequences.offsets[:-1], sequences.offsets[1:], strict=True)
    return [sequences.values[start:end].tolist() for start, end in bounds]


def corpus(num_sequences: int, *, seed: int) -> Ragged:
    """Lengths and tokens far from uniform."""
    random = np.random.default_rng(seed)
    lengths = random.choice([0, 3, 4, 12], p=[0.1, 0.5, 0.3, 0.1], size=num_sequences)
    tokens = random.geometric(0.2, size=int(lengths.sum()))
    return Ragged(tokens.astype(np.int32), np.concatenate([[0], np.cumsum(lengths)]))


def largest_gap(first: NDArray[np.int64], second: NDArray[np.int64]) -> float:
    """Kolmogorov-Smirnov distance."""
    at = np.union1d(first, second)
    shares = [(sample[:, None] <= at).mean(0) for sample in (first, second)]
    return float(np.abs(shares[0] - shares[1]).max())


def total_variation(first: NDArray[np.int32], second: NDArray[np.int32]) -> float:
    counts = [Counter(values.tolist()) for values in (first, second)]
    sizes = [max(sum(count.values()), 1) for count in counts]
    words = {*counts[0], *counts[1]}
    return sum(abs(counts[0][w] / sizes[0] - counts[1][w] / sizes[1]) for w in words) / 2


@given(rows=ROWS, seed=st.integers(0, 99))
def test_shuffling_keeps_tokens_and_length_and_the_ends_around_them(
    rows: list[list[int]], seed: int
) -> None:
    moved = lists(shuffled(ragged(rows), np.random.default_rng(seed)))
    for before, after in zip(rows, moved, strict=True):
        assert sorted(before) == sorted(after)
        whole = [CLS, *after, SEP]
        assert (whole[0], whole[-1], len(whole)) == (CLS, SEP, len(before) + 2)


def test_every_order_is_as_likely() -> None:
    many = ragged([[1, 2, 3]] * 6000)
    orders = Counter(map(tuple, lists(shuffled(many, np.random.default_rng(0)))))
    assert len(orders) == 6
    assert all(abs(count - 1000) < 150 for count in orders.values())  # five deviations


def test_generated_lengths_and_tokens_approach_the_corpus_with_their_number() -> None:
    source = corpus(400, seed=1)
    model = SequenceModel.fit(source)
    gaps, distances = [], []
    for size in (100, 1_000, 30_000):
        made = model.draw(size, np.random.default_rng(size))
        gaps.append(largest_gap(source.lengths, made.lengths))
        distances.append(total_variation(source.values, made.values))
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 0.02
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 0.02


def test_generated_tokens_know_nothing_of_their_neighbours() -> None:
    pairs = ragged([[1, 2]] * 500 + [[3, 4]] * 500)
    made = SequenceModel.fit(pairs).draw(4000, np.random.default_rng(0))
    followed = Counter(map(tuple, lists(made)))
    assert len(followed) == 16
    assert all(abs(count - 250) < 80 for count in followed.values())


@given(rows=ROWS, seed=st.integers(0, 9))
def test_a_sequence_of_weight_two_counts_like_two(rows: list[list[int]], seed: int) -> None:
    weights = np.random.default_rng(seed).integers(0, 3, size=len(rows))
    weights[0] = 1
    repeated = [row for row, weight in zip(rows, weights, strict=True) for _ in range(weight)]
    weighted, plain = (
        SequenceModel.fit(ragged(rows), weights=weights),
        SequenceModel.fit(ragged(repeated)),
    )
    assert weighted.lengths.tolist() == plain.lengths.tolist()
    assert weighted.length_shares == pytest.approx(plain.length_shares)
    assert weighted.numbers.tolist() == plain.numbers.tolist()
    assert weighted.number_shares == pytest.approx(plain.number_shares)


def test_a_corpus_without_tokens_gives_sequences_without_tokens() -> None:
    made = SequenceModel.fit(ragged([[], []])).draw(5, np.random.default_rng(0))
    assert lists(made) == [[]] * 5
    with pytest.raises(ValueError, match="where a sequence occurs"):
        SequenceModel.fit(ragged([]))


@given(rows=st.lists(st.tuples(*[st.lists(st.integers(0, 9), max_size=4)] * 3), min_size=1))
def test_fields_are_joined_row_by_row(rows: list[tuple[list[int], ...]]) -> None:
    fields = [ragged([row[place] for row in rows]) for place in range(3)]
    assert lists(join(fields)) == [[*a, *b, *c] for a, b, c in rows]


def test_cumulative_distributions_equal_a_count() -> None:
    sequences, weights = ragged([[5], [5, 6], [5, 6, 7], []]), np.array([1, 2, 3, 4])
    lengths = length_distribution(sequences, weights=weights)
    assert lengths.to_json() == {"values": [0, 1, 2, 3], "shares": [0.4, 0.5, 0.7, 1.0]}
    assert lengths.share_below(np.array([-1, 2, 99])).tolist() == [0, 0.7, 1]
    coverage = token_coverage(sequences, weights=weights)  # 6 fives, 5 sixes, 3 sevens
    assert coverage.values.tolist() == [1, 2, 3]
    assert coverage.shares == pytest.approx([6 / 14, 11 / 14, 1])
    with pytest.raises(ValueError, match="something that occurs"):
        token_coverage(ragged([[]]))

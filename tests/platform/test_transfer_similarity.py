from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from driftline.platform.transfer.similarity import (
    average_ranks,
    corpus_similarity,
    count_words,
    rank_similarity,
)

COUNTS = st.dictionaries(st.sampled_from("abcdefghij"), st.integers(1, 9), min_size=1)


def slow_ranks(counts: list[int]) -> list[float]:
    """One more than those ahead, and half a place for each that is level."""
    return [
        1 + sum(other > own for other in counts) + (counts.count(own) - 1) / 2 for own in counts
    ]


def slow_similarity(first: Counter[str], second: Counter[str], num_words: int) -> float:
    """Each corpus blown up to the same size, then counted together."""
    both = Counter[str]()
    for corpus, other in ((first, second), (second, first)):
        for word in corpus:
            both[word] += corpus[word] * sum(other.values())
    words = sorted(both, key=lambda word: (-both[word], word))[:num_words]
    ranks = [slow_ranks([corpus[word] for word in words]) for corpus in (first, second)]
    n = len(words)
    return 1 - 6 * sum((a - b) ** 2 for a, b in zip(*ranks, strict=True)) / (n * (n * n - 1))


def test_the_worked_example_of_five_ranks() -> None:  # papers.md T.4
    ranks = [1, 2, 3, 4, 5], [2, 1, 3, 5, 4]
    assert rank_similarity(*ranks) == pytest.approx(0.8)
    assert rank_similarity(*ranks, literal=True) == pytest.approx(0.96667, abs=1e-5)
    assert rank_similarity(ranks[0], ranks[0]) == 1


def test_the_printed_form_never_falls_below_two_thirds() -> None:
    opposite = rank_similarity(range(100), range(100)[::-1], literal=True)
    assert opposite == pytest.approx(1 - 1 / 3)
    for order in permutations(range(5)):
        assert rank_similarity(range(5), order, literal=True) >= opposite - 1e-9


def test_opposite_ranks_are_minus_one() -> None:
    assert rank_similarity(range(7), range(7)[::-1]) == pytest.approx(-1)


@given(counts=st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_equal_counts_share_the_mean_of_their_ranks(counts: list[int]) -> None:
    assert average_ranks(counts).tolist() == pytest.approx(slow_ranks(counts))


@given(first=COUNTS, second=COUNTS, num_words=st.integers(2, 12))
def test_similarity_equals_its_definition_word_by_word(
    first: dict[str, int], second: dict[str, int], num_words: int
) -> None:
    if len(first | second) < 2:
        return
    found = corpus_similarity(first, second, num_words=num_words)
    assert found == pytest.approx(slow_similarity(Counter(first), Counter(second), num_words))
    assert found == pytest.approx(corpus_similarity(second, first, num_words=num_words))


@given(first=COUNTS, second=COUNTS, times=st.integers(2, 50))
def test_a_longer_copy_of_a_corpus_is_the_same_corpus(
    first: dict[str, int], second: dict[str, int], times: int
) -> None:
    if len(first | second) < 2:
        return
    longer = {word: count * times for word, count in first.items()}
    found = corpus_similarity(longer, second, num_words=3)
    assert found == corpus_similarity(first, second, num_words=3)


def test_words_are_counted_without_case_and_punctuation() -> None:
    counts = count_words(["Red, red shoe!", None, "shoe"], weights=[2, 5, 1])
    assert counts == {"red": 4, "shoe": 3}


def test_new_words_of_an_hour_are_seen_beside_a_month() -> None:
    month = {f"old{n}": 100 * (300 - n) for n in range(200)}
    hour = {f"new{n}": 300 - n for n in range(200)}
    assert corpus_similarity(month, hour) < -0.5
    assert corpus_similarity(month, {word: count // 100 for word, count in month.items()}) > 0.9


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match=r"both corpora need words .* got \(1, 0\)"):
        corpus_similarity({"a": 1}, {})
    with pytest.raises(ValueError, match="at least 2; got 1 and 1"):
        corpus_similarity({"a": 1}, {"a": 2})
    with pytest.raises(ValueError, match="got 3 and 2"):
        rank_similarity(np.arange(3), np.arange(2))

"""How far two sets of texts lie apart, by the ranks of their most frequent words.

The paper's measure of domain shift between transfer set and task (papers.md S1.18), and a gauge of
how far the texts of live traffic have moved from those a student was distilled on. Counts come
from anywhere: any mapping of a word to how often it occurs.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike, NDArray

from driftline.platform.transfer.texts import used_texts, words_of

NUM_WORDS: Final = 100
WORD: Final = re.compile(r"\w+")


def count_words(
    texts: Iterable[str | None], *, weights: Iterable[int] | None = None
) -> Counter[str]:
    """How often each word occurs, in lower case and without punctuation.

    Args:
        texts: Any texts; a missing one has no words.
        weights: How often each text occurs; once when not given.
    """
    counts: Counter[str] = Counter()
    pairs = ((text, 1) for text in texts) if weights is None else zip(texts, weights, strict=True)
    for text, weight in pairs:
        for word in WORD.findall(" ".join(words_of(text)).lower()):
            counts[word] += weight
    return counts


def frame_words(frame: pa.Table, texts: pa.Table, *, columns: Sequence[str] = ()) -> Counter[str]:
    """Words of both products' texts in every row, as the teacher meets them.

    Args:
        frame: Rows.
        texts: ``text_id`` and the text fields.
        columns: Categorical columns whose values count as one word each (``name=value``), such as
            in a market without text.

    Raises:
        ContractError: a row points to a text that is not there.
    """
    used, uses = used_texts(frame, texts)
    counts: Counter[str] = Counter()
    for name in used.column_names:
        if name != "text_id":
            counts += count_words(used[name].to_pylist(), weights=uses.tolist())
    for column in columns:
        found = pc.value_counts(frame[column].drop_null())
        for value, count in zip(*(part.to_pylist() for part in found.flatten()), strict=True):
            counts[f"{column}={value}"] += count
    return counts


def corpus_similarity(
    first: Mapping[str, int],
    second: Mapping[str, int],
    *,
    num_words: int = NUM_WORDS,
    literal: bool = False,
) -> float:
    """Rank correlation of the words that are most frequent in both corpora together.

    Both count alike in the choice of the words, however much longer one of them is: an hour of
    traffic would otherwise have no say beside a month. Ranks are then taken within these words,
    ties averaged (papers.md S1.18, A1.3).

    Args:
        first: How often each word occurs in one.
        second: In the other.
        num_words: n; all words where there are fewer.
        literal: The printed form, without the factor 6; see ``rank_similarity``.

    Raises:
        ValueError: a corpus without words, or fewer than two words in all.
    """
    totals = sum(first.values()), sum(second.values())
    if not all(totals):
        raise ValueError(f"both corpora need words to be compared, got {totals} occurrences")
    # counts times the other's total are shares in whole numbers, so that ties are exact
    both = {
        word: first.get(word, 0) * totals[1] + second.get(word, 0) * totals[0]
        for word in {*first, *second}
    }
    chosen = sorted(both, key=lambda word: (-both[word], word))[:num_words]
    ranks = [average_ranks([corpus.get(word, 0) for word in chosen]) for corpus in (first, second)]
    return rank_similarity(*ranks, literal=literal)


def average_ranks(counts: ArrayLike) -> NDArray[np.float64]:
    """Rank 1 for the largest; equal counts share the mean of their ranks. ``[N]``."""
    ranks = pd.Series(np.asarray(counts)).rank(method="average", ascending=False)
    return ranks.to_numpy(np.float64)


def rank_similarity(first: ArrayLike, second: ArrayLike, *, literal: bool = False) -> float:
    """Spearman's 1 - 6 sum d^2 / (n (n^2 - 1)); 1 for equal ranks, -1 for opposite ones.

    Source: papers.md S1.18, A1.1, T.4. The paper prints it without the factor 6 (``literal``), and
    then cannot have reached its own 0.43: that form never falls below 2/3.

    Raises:
        ValueError: the lengths differ, or there are fewer than two ranks.
    """
    first_N, second_N = np.asarray(first, np.float64), np.asarray(second, np.float64)
    n = len(first_N)
    if first_N.shape != second_N.shape or n < 2:
        raise ValueError(
            f"ranks must be two lists of one length, at least 2; got {n} and {len(second_N)}"
        )
    squares = float(((first_N - second_N) ** 2).sum())
    return 1 - (1 if literal else 6) * squares / (n * (n**2 - 1))

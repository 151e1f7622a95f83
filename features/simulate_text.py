"""Made-up words for the simulated market: what a title says is what the product is worth.

Three sorts of words: *quality* words carry a weight (what the word is worth at the moment), *topic*
words tell what the product is about, *filler* words tell nothing. Nothing else tells a product's
quality, so a model must read.
"""

from dataclasses import dataclass
from itertools import product
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

Indices = np.ndarray[Any, np.dtype[np.int64]]

NUM_QUALITY_WORDS: Final = 40
TOPIC_WORDS_EACH: Final = 12
NUM_FILLER_WORDS: Final = 40

TITLE_QUALITY, TITLE_TOPIC = 2, 2
DESCRIPTION_QUALITY, DESCRIPTION_TOPIC, DESCRIPTION_FILLER = 3, 2, 3
NUM_QUALITY: Final = TITLE_QUALITY + DESCRIPTION_QUALITY
NUM_TOPIC: Final = TITLE_TOPIC + DESCRIPTION_TOPIC

CONSONANTS: Final = (
    "b",
    "d",
    "f",
    "g",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "t",
    "v",
    "z",
    "st",
    "br",
)
VOWELS: Final = ("a", "e", "i", "o", "u")


@dataclass(frozen=True)
class Vocabulary:
    """All words of one market, and the names of its categories, advertisers and applications."""

    quality: pa.Array
    topic: pa.Array
    """``TOPIC_WORDS_EACH`` words for each topic, one topic after the other."""
    filler: pa.Array
    categories: pa.Array
    advertisers: pa.Array
    applications: pa.Array


def make_vocabulary(
    rng: np.random.Generator,
    *,
    num_topics: int,
    num_categories: int,
    num_advertisers: int,
    num_applications: int,
) -> Vocabulary:
    """Draw distinct pronounceable words."""
    sizes = (
        NUM_QUALITY_WORDS,
        TOPIC_WORDS_EACH * num_topics,
        NUM_FILLER_WORDS,
        num_categories,
        num_advertisers,
        num_applications,
    )
    words = _distinct_words(rng, sum(sizes))
    ends = np.cumsum(sizes)
    parts = [pa.array(words[end - size : end]) for end, size in zip(ends, sizes, strict=True)]
    return Vocabulary(*parts)


def write_titles(vocabulary: Vocabulary, quality: Indices, topic: Indices) -> pa.Array:
    """Titles of products: quality words, then topic words.

    Args:
        vocabulary: The market's words.
        quality: Quality words of each product, ``[products, NUM_QUALITY]``.
        topic: Topic words of each product, ``[products, NUM_TOPIC]``.
    """
    return _join(
        [vocabulary.quality.take(pa.array(column)) for column in quality.T[:TITLE_QUALITY]]
        + [vocabulary.topic.take(pa.array(column)) for column in topic.T[:TITLE_TOPIC]]
    )


def write_descriptions(
    vocabulary: Vocabulary, quality: Indices, topic: Indices, filler: Indices
) -> pa.Array:
    """Descriptions of products: the rest of their words among words that say nothing."""
    parts = [
        *(vocabulary.filler.take(pa.array(column)) for column in filler.T[:2]),
        *(vocabulary.quality.take(pa.array(column)) for column in quality.T[TITLE_QUALITY:]),
        *(vocabulary.filler.take(pa.array(column)) for column in filler.T[2:]),
        *(vocabulary.topic.take(pa.array(column)) for column in topic.T[TITLE_TOPIC:]),
    ]
    return _join(parts)


def _join(parts: list[pa.Array]) -> pa.Array:
    return pc.binary_join_element_wise(*parts, " ")


def _distinct_words(rng: np.random.Generator, count: int) -> list[str]:
    syllables = ["".join(pair) for pair in product(CONSONANTS, VOWELS)]
    words: dict[str, None] = {}
    length = 2
    while len(words) < count:
        needed = 2 * (count - len(words))
        drawn = rng.integers(0, len(syllables), size=(needed, length))
        for row in drawn:
            words.setdefault("".join(syllables[index] for index in row))
        length = 3
    return list(words)[:count]

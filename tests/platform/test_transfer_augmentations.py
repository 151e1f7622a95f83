from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from driftline.platform.transfer import Augmentation, Augmented
from driftline.platform.transfer.augmentations import (
    Delete,
    LongDisorder,
    Mask,
    NGram,
    ShortDisorder,
)

TEXTS = st.integers(1, 60).map(lambda size: [f"w{n}" for n in range(size)])
CHANCES = st.floats(0, 1)
SEEDS = st.integers(0, 999)


def changed(augmentation: Augmentation, words: list[str], seed: int) -> list[str]:
    before = list(words)
    result = augmentation.changed(words, np.random.default_rng(seed))
    assert words == before
    return result


@given(words=TEXTS, chance=CHANCES, seed=SEEDS)
def test_a_masked_text_keeps_its_length_and_its_other_words(
    words: list[str], chance: float, seed: int
) -> None:
    result = changed(Mask(chance=chance, word="x"), words, seed)
    assert all(new in (old, "x") for old, new in zip(words, result, strict=True))


@given(words=TEXTS, chance=CHANCES, seed=SEEDS)
def test_deleting_keeps_the_order_and_at_least_one_word(
    words: list[str], chance: float, seed: int
) -> None:
    result = changed(Delete(chance=chance), words, seed)
    assert result
    assert result == [word for word in words if word in result]


@given(words=TEXTS, seed=SEEDS)
def test_an_n_gram_is_a_stretch_of_the_text_also_where_that_is_short(  # papers.md B17
    words: list[str], seed: int
) -> None:
    result = changed(NGram(), words, seed)
    start = words.index(result[0])
    assert 1 <= len(result) <= 5
    assert result == words[start : start + len(result)]


def test_every_n_gram_length_and_place_occurs() -> None:
    words = [f"w{n}" for n in range(6)]
    found = Counter(tuple(changed(NGram(lengths=(2, 3)), words, seed)) for seed in range(400))
    assert len(found) == 5 + 4


@given(words=TEXTS, seed=SEEDS, weights=st.lists(st.integers(1, 9), min_size=5, max_size=5))
def test_short_disorder_moves_no_word_by_more_than_two(
    words: list[str], seed: int, weights: list[int]
) -> None:
    chances = [weight / sum(weights) for weight in weights]
    result = changed(ShortDisorder(chances=tuple(chances)), words, seed)
    assert sorted(result) == sorted(words)
    assert all(abs(result.index(word) - place) <= 2 for place, word in enumerate(words))


@pytest.mark.parametrize(
    ("case", "expected"),
    [(0, "abcdef"), (1, "badcef"), (2, "cbafed"), (3, "cabfde"), (4, "bcaefd")],
)
def test_each_short_disorder_is_the_one_it_is_called(case: int, expected: str) -> None:
    chances = [0.0] * 5
    chances[case] = 1.0
    assert "".join(changed(ShortDisorder(chances=tuple(chances)), list("abcdef"), 0)) == expected


@given(words=TEXTS, chance=CHANCES, length=st.floats(0.01, 1) | st.floats(1, 30), seed=SEEDS)
def test_long_disorder_keeps_all_words(
    words: list[str], chance: float, length: float, seed: int
) -> None:
    result = changed(LongDisorder(chance=chance, length=length), words, seed)
    assert sorted(result) == sorted(words)


def test_long_disorder_exchanges_the_halves_of_a_stretch() -> None:
    words = list("abcdefgh")
    assert "".join(changed(LongDisorder(chance=1, length=4), words, 0)) == "cdabghef"
    assert "".join(changed(LongDisorder(chance=1, length=0.5), words, 0)) == "cdabghef"
    assert changed(LongDisorder(chance=1, length=2), words, 0) == words  # halves of one word
    rare = [changed(LongDisorder(chance=0.05, length=4), words, seed) for seed in range(50)]
    assert words in rare
    assert any(pair != ("a", "b") for r in rare for pair in pairwise(r) if r != words)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"kind": "mask", "chance": 1.5}, "less than or equal to 1"),
        ({"kind": "short_disorder", "chances": [0.5, 0, 0, 0, 0]}, r"must add up to 1.*= 0\.5"),
        ({"kind": "n_gram", "lengths": []}, "at least 1 item"),
        ({"kind": "long_disorder", "length": 0}, "greater than 0"),
        ({"kind": "swap"}, "kind must be one of delete, long_disorder, mask, n_gram, short"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_made(
    raw: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        Augmented.model_validate({"kind": "augmented", "steps": [raw]})

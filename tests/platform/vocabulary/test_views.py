from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from driftline.platform.models.encoder import MaskedTexts
from driftline.platform.text import Tokenizer
from driftline.platform.vocabulary.views import ViewMaker, share_of
from driftline.platform.vocabulary.words import WordTexts, words_of

TEXTS = [f"title: {c} lamp {n} [SEP] text: {c} wood" for c in ("red", "golden") for n in range(40)]


@cache
def in_words(teacher: Tokenizer, student: Tokenizer) -> WordTexts:
    return WordTexts.of(TEXTS, teacher=teacher, student=student)


@cache
def pieces_of(tokenizer: Tokenizer, word: str) -> list[int]:
    pieces: list[int] = tokenizer.encode([word], max_tokens=99)[0].tolist()
    return pieces


def maker(market: Any, *, share: float = 0.5, teacher: bool = True, room: int = 60) -> ViewMaker:
    texts = in_words(market.teacher_tokenizer, market.student_tokenizer)
    student, their = (
        spec.model_copy(update={"max_tokens": room})
        for spec in (market.student.encoder, market.teacher.encoder)
    )
    return ViewMaker(
        texts, student=student, teacher=their if teacher else None, student_share=share
    )


@dataclass(frozen=True)
class SlowView:
    """A view told back into words, text by text, with plain lists."""

    true: list[list[int]]
    """What stood there before masking, without framing."""
    masked: list[list[int]]
    is_masked: list[list[bool]]

    @classmethod
    def of(cls, view: MaskedTexts, *, num_prefix: int) -> "SlowView":
        tokens_BT, mask_BT, place_K, target_K = view
        flat, picked = tokens_BT.flatten().clone(), torch.zeros(tokens_BT.numel(), dtype=torch.bool)
        flat[place_K], picked[place_K] = target_K, True
        parts = []
        for rectangle in (flat.view_as(tokens_BT), tokens_BT, picked.view_as(tokens_BT)):
            rows = zip(rectangle.tolist(), mask_BT.sum(1).tolist(), strict=True)
            parts.append([row[num_prefix : length - 1] for row, length in rows])
        return cls(*parts)


def masked_words(text: str, true: list[int], picked: list[bool], *vocabularies: Any) -> list[int]:
    """Which words of a text are masked, reading its view from left to right, word by word.

    Each vocabulary is a tokeniser and the number added to its ids; also checks the view.
    """
    found: list[int] = []
    at = 0
    fields = words_of(text)
    for place, words in enumerate(fields):
        if place and at < len(true):
            assert true[at] == 3
            assert not picked[at]
            at += 1
        for number, word in enumerate(words):
            if at == len(true):  # cut off at a word
                return found
            for tokenizer, shift in vocabularies:
                pieces = [piece + shift for piece in pieces_of(tokenizer, word)]
                if true[at : at + len(pieces)] == pieces:
                    break
            else:
                raise AssertionError(f"{word} is written in no vocabulary: {true[at:]}")
            assert len(set(picked[at : at + len(pieces)])) == 1  # a word is masked as a whole
            found += [place * 100 + number] * picked[at]
            at += len(pieces)
    assert at == len(true)
    return found


@given(share=st.floats(0, 1), seed=st.integers(0, 99))
def test_both_views_hold_the_same_words_and_mask_the_same(
    market: Any, share: float, seed: int
) -> None:
    views = maker(market, share=share).draw(np.arange(80), role=1, seed=(seed,))
    assert views.teacher is not None
    own, theirs = market.student_tokenizer, market.teacher_tokenizer
    size = market.teacher.encoder.vocabulary_size
    student, teacher = (
        SlowView.of(views.student, num_prefix=2),
        SlowView.of(views.teacher, num_prefix=1),
    )
    for row, text in enumerate(TEXTS):
        assert student.true[row] == own.encode([text], max_tokens=99)[0].tolist()
        in_both = (theirs, 0), (own, size)
        assert masked_words(text, student.true[row], student.is_masked[row], (own, 0)) == (
            masked_words(text, teacher.true[row], teacher.is_masked[row], *in_both)
        )


def test_no_id_of_the_teacher_reaches_the_student(market: Any) -> None:
    for share in (0.0, 0.5, 1.0):
        views = maker(market, share=share).draw(np.arange(80), role=0, seed=(1,))
        alone = maker(market, teacher=False).draw(np.arange(80), role=0, seed=(1,))
        assert alone.teacher is None
        for mine, without in zip(views.student, alone.student, strict=True):
            assert torch.equal(mine, without)  # whatever the teacher reads
        tokens_BT, _, _, target_K = views.student
        assert max(tokens_BT.max(), target_K.max()) < market.student.encoder.vocabulary_size


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_words_of_the_teachers_view_are_in_the_students_vocabulary_by_chance(
    market: Any, share: float
) -> None:
    size = market.teacher.encoder.vocabulary_size
    views = maker(market, share=share).draw(np.arange(80), role=None, seed=(2,))
    assert views.teacher is not None
    true = SlowView.of(views.teacher, num_prefix=1).true
    own = market.student_tokenizer
    pieces = {word: [i + size for i in pieces_of(own, word)] for word in ("golden", "red")}
    words = [word for text in TEXTS for word in text.split() if word in pieces]
    students = sum(
        row[at : at + len(piece)] == piece
        for row in true
        for piece in pieces.values()
        for at in range(len(row))
    )
    # binomial: four standard deviations
    spread = 4 * (share * (1 - share) * len(words)) ** 0.5
    assert abs(students - share * len(words)) <= spread


def test_masked_words_are_masked_replaced_or_kept_in_their_own_vocabulary(market: Any) -> None:
    size = market.teacher.encoder.vocabulary_size
    counts = {"words": 0, "picked": 0, "masked": 0, "kept": 0, "drawn": 0}
    for seed in range(12):
        views = maker(market).draw(np.arange(80), role=None, seed=(seed,))
        assert views.teacher is not None
        view = SlowView.of(views.teacher, num_prefix=1)
        for true, masked, picked in zip(view.true, view.masked, view.is_masked, strict=True):
            for before, after, is_picked in zip(true, masked, picked, strict=True):
                if not is_picked:
                    assert before == after
                    counts["words"] += before != 3
                    continue
                counts["words"] += 1
                counts["picked"] += 1
                kind = "masked" if after == 4 else "kept" if after == before else "drawn"
                counts[kind] += 1
                if kind == "drawn":
                    assert (after >= size) == (before >= size)
                    assert after % size not in range(7) or after >= size + 7
    assert counts["picked"] / counts["words"] == pytest.approx(0.15, abs=0.02)
    assert counts["masked"] / counts["picked"] == pytest.approx(0.8, abs=0.06)
    assert counts["kept"] / counts["picked"] == pytest.approx(0.1, abs=0.04)


def test_words_that_do_not_fit_are_left_out_whole(market: Any) -> None:
    own, theirs = market.student_tokenizer, market.teacher_tokenizer
    size = market.teacher.encoder.vocabulary_size
    views = maker(market, room=9).draw(np.arange(80), role=1, seed=(3,))
    assert views.teacher is not None
    for view, prefix, vocabularies in (
        (views.student, 2, [(own, 0)]),
        (views.teacher, 1, [(theirs, 0), (own, size)]),
    ):
        assert view[0].shape[1] <= 9
        slow = SlowView.of(view, num_prefix=prefix)
        for text, true, picked in zip(TEXTS, slow.true, slow.is_masked, strict=True):
            masked_words(text, true, picked, *vocabularies)
        assert any(slow.true)


def test_a_text_without_words_is_framed_and_nothing_else(market: Any) -> None:
    views = maker(market).draw(np.array([-1]), role=1, seed=(0,))
    assert views.teacher is not None
    assert views.student[0].tolist() == [[2, 6, 3]]
    assert views.teacher[0].tolist() == [[2, 3]]
    assert len(views.student[2]) == len(views.teacher[3]) == 0


@given(num_texts=st.integers(1, 7), world_size=st.integers(1, 4))
def test_workers_share_the_masked_places_of_a_view(
    market: Any, num_texts: int, world_size: int
) -> None:
    view = maker(market).draw(np.arange(num_texts), role=None, seed=(4,)).student
    found = []
    for rank in range(world_size):
        tokens_BT, mask_BT, place_K, target_K = share_of(view, rank=rank, world_size=world_size)
        assert len(tokens_BT) == len(mask_BT) > 0
        for place, target in zip(place_K.tolist(), target_K.tolist(), strict=True):
            text, token = divmod(place, tokens_BT.shape[1])
            found.append((text * world_size + rank, token, target))
    whole = zip(view[2].tolist(), view[3].tolist(), strict=True)
    width = view[0].shape[1]
    assert sorted(found) == sorted((*divmod(place, width), target) for place, target in whole)

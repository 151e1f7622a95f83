"""What teacher and student read in one step of dual training (papers.md S4.3, A4.3, A4.4).

The student's view is written in its own vocabulary only. In the teacher's view each word is
written in the student's vocabulary by chance; its pieces then have ids from the size of the
teacher's vocabulary on. The same words are masked in both views.

Masking is by word: all pieces of 15 % of the words, of which 80/10/10 masked, random, kept; the
paper does not say whether words or tokens were masked, and pieces of the same word cannot be
paired across vocabularies. Words that do not fit a view are left out of it.

Shape suffixes: B texts, K masked positions, T tokens, U distinct words, W words of the batch,
P pieces of the batch.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from driftline.platform.batching import Rows, frame_tokens
from driftline.platform.examples import Ragged
from driftline.platform.masked_language import MASK_SHARE, MASK_TOKEN_SHARE, RANDOM_TOKEN_SHARE
from driftline.platform.models.encoder import MaskedTexts
from driftline.platform.models.spec import EncoderSpec
from driftline.platform.models.student import PAGE
from driftline.platform.vocabulary.words import SEPARATOR_WORD, WordTexts

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Random = np.random.Generator
OWN, STUDENTS = 0, 1
"""Vocabularies of the teacher's view."""


class Views(NamedTuple):
    """The same texts as both models read them, masked."""

    student: MaskedTexts
    teacher: MaskedTexts | None
    """None without a teacher. Ids from the size of its vocabulary on are the student's pieces."""

    def to(self, device: torch.device) -> "Views":
        """The same on a device."""
        teacher = None if self.teacher is None else _moved(self.teacher, device)
        return Views(_moved(self.student, device), teacher)


@dataclass(frozen=True)
class _Words:
    """Words of a batch of texts, one after the other, and what happens to them. ``[W]`` each."""

    number: Ints
    text: Ints
    """Which text of the batch each word belongs to, ascending."""
    picked: NDArray[np.bool_]
    way: Floats
    num_texts: int


class ViewMaker:
    """Draws views of texts; the student's do not depend on whether there is a teacher.

    Args:
        texts: All texts.
        student: The student's encoder.
        teacher: The teacher's, or None.
        student_share: Probability p_DT that a word of the teacher's view is written in the
            student's vocabulary.
    """

    def __init__(
        self,
        texts: WordTexts,
        *,
        student: EncoderSpec,
        teacher: EncoderSpec | None,
        student_share: float,
    ) -> None:
        self._texts = texts
        self._student_share = student_share
        self._student = _Side(student, [(texts.student, 0)], [student])
        self._teacher = None
        if teacher is not None:
            shifted = (texts.student, teacher.vocabulary_size)
            self._teacher = _Side(teacher, [(texts.teacher, 0), shifted], [teacher, student])

    def draw(self, rows: Rows, *, role: int | None, seed: tuple[int, ...]) -> Views:
        """Views of some texts (-1: one without words), from a seed of their own.

        Args:
            rows: Which texts. ``[B]``.
            role: Role in which the student reads them (0 page, 1 ad, None without roles).
            seed: The same seed gives the same views.
        """
        random = np.random.default_rng((*seed, 0))
        words = self._words(rows, random)
        own = np.zeros_like(words.number)
        student = self._student.view(words, own, role=role, random=random)
        if self._teacher is None:
            return Views(student, None)
        random = np.random.default_rng((*seed, 1))
        chosen = random.random(len(words.number)) < self._student_share
        chosen &= words.number != SEPARATOR_WORD
        vocabulary_W = np.where(chosen, STUDENTS, OWN)
        return Views(student, self._teacher.view(words, vocabulary_W, role=None, random=random))

    def _words(self, rows: Rows, random: Random) -> _Words:
        texts = self._texts.texts
        starts = texts.offsets[rows]
        lengths = np.where(rows >= 0, texts.offsets[rows + 1] - starts, 0)
        number_W = texts.values[_ranges(starts, lengths)].astype(np.int64)
        picked_W = random.random(len(number_W)) < MASK_SHARE
        return _Words(
            number=number_W,
            text=np.repeat(np.arange(len(rows)), lengths),
            picked=picked_W & (number_W != SEPARATOR_WORD),
            way=random.random(len(number_W)),
            num_texts=len(rows),
        )


class _Side:
    """How one model's view is written: its vocabularies, side by side in one space of ids."""

    def __init__(
        self,
        spec: EncoderSpec,
        vocabularies: list[tuple[Ragged, int]],
        readers: list[EncoderSpec],
    ) -> None:
        self.spec = spec
        pieces = [ragged.values.astype(np.int64) + shift for ragged, shift in vocabularies]
        begins = np.cumsum([0, *map(len, pieces)])[:-1]
        self._pieces = np.concatenate(pieces)
        self._starts = np.stack(
            [
                ragged.offsets[:-1] + begin
                for (ragged, _), begin in zip(vocabularies, begins, strict=True)
            ]
        )
        self._lengths = np.stack([ragged.lengths for ragged, _ in vocabularies])
        plain = [
            np.setdiff1d(np.arange(reader.vocabulary_size), reader.specials.ids) + shift
            for reader, (_, shift) in zip(readers, vocabularies, strict=True)
        ]
        self._plain = np.concatenate(plain)
        self._num_plain = np.array(list(map(len, plain)))
        self._first_plain = np.cumsum([0, *self._num_plain])[:-1]

    def view(
        self, words: _Words, vocabulary_W: Ints, *, role: int | None, random: Random
    ) -> MaskedTexts:
        prefix = (self.spec.specials.cls, *self._marker(role))
        length_W = self._lengths[vocabulary_W, words.number]
        fits_W = _ends(length_W, words.text) <= self.spec.max_tokens - len(prefix) - 1
        length_W = np.where(fits_W, length_W, 0)
        true_P = self._pieces[_ranges(self._starts[vocabulary_W, words.number], length_W)]
        picked_P = np.repeat(words.picked, length_W)
        way_P = np.repeat(words.way, length_W)
        drawn_P = self._draw(np.repeat(vocabulary_W, length_W), random)
        masked = picked_P & (way_P < MASK_TOKEN_SHARE)
        masked_P = np.where(masked, self.spec.specials.mask, true_P)
        masked_P = np.where(picked_P & (way_P >= 1 - RANDOM_TOKEN_SHARE), drawn_P, masked_P)
        num_pieces = np.bincount(words.text, weights=length_W, minlength=words.num_texts)
        offsets = np.concatenate([[0], np.cumsum(num_pieces)]).astype(np.int64)

        def framed(
            values_P: Ints, prefix: tuple[int, ...], sep: int, pad: int
        ) -> tuple[Ints, Ints]:
            ids_BT, mask_BT = frame_tokens(
                Ragged(values_P.astype(np.int32), offsets),
                np.arange(words.num_texts),
                prefix=prefix,
                sep=sep,
                pad=pad,
                max_tokens=self.spec.max_tokens,
            )
            return ids_BT.numpy(), mask_BT.numpy()

        specials = self.spec.specials
        masked_BT, mask_BT = framed(masked_P, prefix, specials.sep, specials.pad)
        picked_BT, _ = framed(picked_P.astype(np.int64), (0,) * len(prefix), 0, 0)
        return (
            torch.from_numpy(masked_BT),
            torch.from_numpy(mask_BT),
            torch.from_numpy(np.flatnonzero(picked_BT)),
            torch.from_numpy(true_P[picked_P]),
        )

    def _draw(self, vocabulary_P: Ints, random: Random) -> Ints:
        """Plain pieces by chance, each from the vocabulary its place is written in."""
        place_P = random.integers(self._num_plain[vocabulary_P])
        return self._plain[self._first_plain[vocabulary_P] + place_P]

    def _marker(self, role: int | None) -> tuple[int, ...]:
        if role is None:
            return ()
        return (self.spec.specials.page if role == PAGE else self.spec.specials.ad,)


def share_of(view: MaskedTexts, *, rank: int, world_size: int) -> MaskedTexts:
    """Every ``world_size``-th text of a view, from ``rank`` on.

    A worker for which there is none gets the first text without masked positions, so that every
    weight of its model has a gradient.
    """
    if world_size == 1:
        return view
    tokens_BT, mask_BT, place_K, target_K = view
    num_texts, num_tokens = tokens_BT.shape
    text_K, token_K = place_K // num_tokens, place_K % num_tokens
    if num_texts <= rank:
        return tokens_BT[:1], mask_BT[:1], place_K[:0], target_K[:0]
    own_K = text_K % world_size == rank
    own = slice(rank, None, world_size)
    place_K = (text_K[own_K] // world_size) * num_tokens + token_K[own_K]
    return tokens_BT[own], mask_BT[own], place_K, target_K[own_K]


def _moved(view: MaskedTexts, device: torch.device) -> MaskedTexts:
    tokens_BT, mask_BT, place_K, target_K = view
    return tokens_BT.to(device), mask_BT.to(device), place_K.to(device), target_K.to(device)


def _ranges(starts: Ints, lengths: Ints) -> Ints:
    """``starts[0], starts[0] + 1, ...`` up to its length, then the next. ``[lengths.sum()]``."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum())


def _ends(length_W: Ints, text_W: Ints) -> Ints:
    """Pieces of each word's text up to and with that word. ``[W]``."""
    total_W = np.cumsum(length_W)
    first = np.searchsorted(text_W, text_W)  # first word of the same text
    return total_W - (total_W - length_W)[first]

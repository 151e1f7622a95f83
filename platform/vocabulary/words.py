"""Texts as words, and each distinct word in both vocabularies (papers.md S4.3, A4.3).

In dual training every word is written in one of two vocabularies, so words have to be segmented
one by one. For our SentencePiece models that equals segmenting the whole text: a piece never
crosses a blank. It holds because words are cut at the blank alone (U+0020), which is what
``serialise_row`` leaves of all white space. Cut at other white space it would not: SentencePiece
drops a vertical tab and keeps U+0085, Python splits at both. It does not hold either for
checkpoints of byte-level BPE, whose words know the blank before them; these are refused.

Letters: W words, U distinct words.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from driftline.platform.artefacts import hash_value, whole_file
from driftline.platform.errors import ContractError, SettingsError
from driftline.platform.examples import Ragged
from driftline.platform.text import SEPARATOR, Tokenizer

BLANK: Final = " "
SEPARATOR_WORD: Final = 0
"""Number of the separator between two fields; never masked, written alike in both vocabularies."""
MAX_PIECES: Final = 512  # of one word
CHECKED_TEXTS: Final = 256


def words_of(text: str) -> list[list[str]]:
    """Words of each field of a text, in order."""
    return [[word for word in field.split(BLANK) if word] for field in text.split(SEPARATOR)]


def encode_words(tokenizer: Tokenizer, text: str) -> list[NDArray[np.int32]]:
    """Pieces of each word of a text, the separators between its fields included.

    Put together they are what ``Tokenizer.encode`` gives for the whole text.
    """
    separator = np.array([tokenizer.specials.sep], np.int32)
    pieces: list[NDArray[np.int32]] = []
    for number, words in enumerate(words_of(text)):
        pieces += [separator] * (number > 0)
        pieces += tokenizer.encode(words, max_tokens=MAX_PIECES)
    return pieces


def require_words(tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """Make sure that a tokeniser can be used word by word on these texts.

    Raises:
        SettingsError: a text of the first few hundred is written otherwise as a whole.
    """
    for text in texts[:CHECKED_TEXTS]:
        whole = tokenizer.encode([text], max_tokens=MAX_PIECES)[0]
        parts = encode_words(tokenizer, text)
        joined = np.concatenate(parts)[:MAX_PIECES] if parts else whole[:0]
        if not np.array_equal(whole, joined):
            raise SettingsError(
                f"tokeniser {tokenizer.path} writes {text!r:.60} otherwise as a whole than word "
                "by word, so a student trained on words would be served something else; choose a "
                "SentencePiece or WordPiece tokeniser"
            )


@dataclass(frozen=True)
class WordTexts:
    """Texts as lists of words; the pieces of each distinct word in both vocabularies."""

    texts: Ragged
    """Numbers of the words of each text."""
    teacher: Ragged
    """Pieces of each word in the teacher's vocabulary; word 0 is the separator."""
    student: Ragged
    """The same in the student's own."""

    @classmethod
    def of(cls, texts: Sequence[str], *, teacher: Tokenizer, student: Tokenizer) -> "WordTexts":
        """Cut texts into words and segment each distinct word once.

        Raises:
            SettingsError: a tokeniser cannot be used word by word.
        """
        require_words(teacher, texts)
        require_words(student, texts)
        numbers: dict[str, int] = {}
        rows = [_numbered(text, numbers) for text in texts]
        words = list(numbers)
        return cls(Ragged.of(rows), *(_segmented(t, words) for t in (teacher, student)))

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def num_pieces(self) -> NDArray[np.int64]:
        """Pieces of each text in the student's vocabulary."""
        totals = np.concatenate([[0], np.cumsum(self.student.lengths[self.texts.values])])
        lengths: NDArray[np.int64] = (
            totals[self.texts.offsets[1:]] - totals[self.texts.offsets[:-1]]
        )
        return lengths

    def save(self, destination: Path) -> None:
        """Write everything as one safetensors file, whole or not at all."""
        tensors = {
            f"{name}.{part}": np.ascontiguousarray(getattr(getattr(self, name), part))
            for name in ("texts", "teacher", "student")
            for part in ("values", "offsets")
        }
        with whole_file(destination) as scratch:
            save_file(tensors, scratch)

    @classmethod
    def open(cls, path: Path) -> "WordTexts":
        """Read what ``save`` wrote.

        Raises:
            ContractError: it is another kind of file.
        """
        tensors = load_file(path)
        try:
            return cls(
                *(
                    Ragged(tensors[f"{name}.values"], tensors[f"{name}.offsets"])
                    for name in ("texts", "teacher", "student")
                )
            )
        except KeyError as error:
            raise ContractError(f"{path} holds no texts in two vocabularies: {error}") from error


def hold_out(texts: Sequence[str], *, share: float) -> tuple[list[str], list[str]]:
    """Distinct texts to learn from and texts to be judged by, told apart by content.

    A text stays on its side when others come or go; both sides keep the order of the texts.
    """
    train: list[str] = []
    held_out: list[str] = []
    for text in dict.fromkeys(texts):
        place = int(hash_value(text)[:12], 16) / 16**12
        (held_out if place < share else train).append(text)
    return train, held_out


def _numbered(text: str, numbers: dict[str, int]) -> NDArray[np.int32]:
    """Numbers of the words of a text; new words are added."""
    row: list[int] = []
    for place, words in enumerate(words_of(text)):
        row += [SEPARATOR_WORD] * (place > 0)
        row += [numbers.setdefault(word, len(numbers) + 1) for word in words]
    return np.array(row, np.int32)


def _segmented(tokenizer: Tokenizer, words: Sequence[str]) -> Ragged:
    separator = np.array([tokenizer.specials.sep], np.int32)
    return Ragged.of([separator, *tokenizer.encode(words, max_tokens=MAX_PIECES)])

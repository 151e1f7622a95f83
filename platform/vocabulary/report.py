"""How a small vocabulary compares with the teacher's: overlap, fertility, saving (papers.md S4.1).

A smaller table is the gain, longer sequences are the price (S4.15); both are counted here, on the
texts at hand, before anything is trained.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from driftline.platform.artefacts import write_json
from driftline.platform.text import SEPARATOR, Tokenizer
from driftline.platform.vocabulary.words import words_of

NUM_BYTES: Final = 256
LONGEST: Final = 1_000_000


@dataclass(frozen=True)
class VocabularyUse:
    """One vocabulary on some texts."""

    size: int
    """Pieces, specials and bytes included: rows of the embedding table."""
    width: int
    """Of the model that uses it."""
    fertility: float
    """Tokens for each word; 1 is the least."""
    tokens_per_text: float
    cut_share: float
    """Share of the texts that are longer than the model reads."""

    @property
    def embedding_parameters(self) -> int:
        """Weights of the token table."""
        return self.size * self.width


@dataclass(frozen=True)
class VocabularyReport:
    """The teacher's and the student's vocabulary side by side."""

    teacher: VocabularyUse
    student: VocabularyUse
    overlap: float
    """Share of the student's pieces that the teacher has too; specials and bytes, which all have,
    are not counted. 0.939 in the paper (papers.md S4.1)."""
    num_texts: int
    num_words: int

    @property
    def embedding_share_saved(self) -> float:
        """Share of the teacher's embedding weights that the student saves (section 5.3-6)."""
        return 1 - self.student.embedding_parameters / self.teacher.embedding_parameters

    @property
    def vocabulary_share_saved(self) -> float:
        """The part of it that the vocabulary alone saves, at equal width."""
        return 1 - self.student.size / self.teacher.size

    def rows(self) -> list[dict[str, Any]]:
        """One row a vocabulary, for a table."""
        return [
            {"vocabulary": name, **asdict(use), "embedding_parameters": use.embedding_parameters}
            for name, use in (("teacher", self.teacher), ("student", self.student))
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain values with everything worked out."""
        return {
            "overlap": self.overlap,
            "embedding_share_saved": self.embedding_share_saved,
            "vocabulary_share_saved": self.vocabulary_share_saved,
            "num_texts": self.num_texts,
            "num_words": self.num_words,
            "vocabularies": self.rows(),
        }

    def save(self, destination: Path) -> None:
        """Write it as readable JSON."""
        write_json(destination, self.to_json())


@dataclass(frozen=True)
class VocabularyUser:
    """A tokeniser and the model that reads with it."""

    tokenizer: Tokenizer
    width: int
    max_tokens: int


def compare_vocabularies(
    teacher: VocabularyUser, student: VocabularyUser, *, texts: Sequence[str]
) -> VocabularyReport:
    """Count both vocabularies on the same texts.

    Raises:
        ValueError: no text holds a word.
    """
    num_words = sum(len(words) for text in texts for words in words_of(text))
    if num_words == 0:
        raise ValueError(f"a vocabulary report needs texts with words, got {len(texts)} without")
    return VocabularyReport(
        teacher=_use(teacher, texts, num_words),
        student=_use(student, texts, num_words),
        overlap=overlap(teacher.tokenizer, student.tokenizer),
        num_texts=len(texts),
        num_words=num_words,
    )


def overlap(large: Tokenizer, small: Tokenizer) -> float:
    """Share of the small vocabulary's pieces that the large one has too; specials and bytes aside.

    1 for two BPE models of one corpus, almost: their merges are a prefix of one list.
    """
    own = _ordinary(small)
    return len(own & _ordinary(large)) / max(1, len(own))


def _ordinary(tokenizer: Tokenizer) -> set[str]:
    bytes_ = {f"<0x{value:02X}>" for value in range(NUM_BYTES)}
    specials = set(tokenizer.specials.ids)
    found = {piece for number, piece in enumerate(tokenizer.pieces) if number not in specials}
    return found - bytes_ - {""}


def _use(user: VocabularyUser, texts: Sequence[str], num_words: int) -> VocabularyUse:
    encoded = user.tokenizer.encode(texts, max_tokens=LONGEST)
    lengths_N = np.array([len(tokens) for tokens in encoded])
    num_separators = sum(text.count(SEPARATOR) for text in texts)
    room = user.max_tokens - 2  # [CLS] and [SEP]
    return VocabularyUse(
        size=user.tokenizer.vocabulary_size,
        width=user.width,
        fertility=float((lengths_N.sum() - num_separators) / num_words),
        tokens_per_text=float(lengths_N.mean()),
        cut_share=float((lengths_N > room).mean()),
    )

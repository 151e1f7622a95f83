"""Texts changed a little before the teacher labels them (papers.md 3.2, C25).

The five changes of TextBrewer, on words instead of tokens because texts are stored as text and
tokenised by each reader. Its ``n_gram_sampling`` fails on a sequence shorter than the drawn n
(B17), and deleting may leave nothing; here a text keeps at least one word.
"""

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from driftline.platform.kinds import Kind
from driftline.platform.transfer.sets import MadeRows, Natural, TransferSet, TransferSource

if TYPE_CHECKING:
    import numpy as np

Chance = Annotated[float, Field(ge=0, le=1)]

ORDERS = ((0, 1, 2), (1, 0, 2), (2, 1, 0), (2, 0, 1), (1, 2, 0))
"""abc, bac, cba, cab, bca: which word of three comes first, second, third."""


class Augmentation(Kind):
    """Base of the changes of a text. One of your own implements ``changed``."""

    @abstractmethod
    def changed(self, words: list[str], random: "np.random.Generator") -> list[str]:
        """Other words for those of one text field, of which there is at least one."""


class Mask(Augmentation):
    """Each word replaced by one and the same other word, by chance."""

    kind: Literal["mask"] = "mask"
    chance: Chance = 0.1
    word: Annotated[str, Field(min_length=1)] = "[MASK]"
    """Written as a word, and read as one: nothing in a text becomes a special token."""

    def changed(self, words: list[str], random: "np.random.Generator") -> list[str]:
        """As many words."""
        hidden = random.random(len(words)) < self.chance
        return [self.word if hide else word for word, hide in zip(words, hidden, strict=True)]


class Delete(Augmentation):
    """Each word left out by chance; one is kept where all would go."""

    kind: Literal["delete"] = "delete"
    chance: Chance = 0.1

    def changed(self, words: list[str], random: "np.random.Generator") -> list[str]:
        """Some of the words, in order."""
        kept = random.random(len(words)) >= self.chance
        if not kept.any():
            kept[random.integers(len(words))] = True
        return [word for word, keep in zip(words, kept, strict=True) if keep]


class NGram(Augmentation):
    """A stretch of neighbouring words; the whole text where it is shorter."""

    kind: Literal["n_gram"] = "n_gram"
    lengths: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 2, 3, 4, 5)
    """Lengths to draw from, all as likely."""

    def changed(self, words: list[str], random: "np.random.Generator") -> list[str]:
        """One to five of the words."""
        length = min(len(words), int(random.choice(self.lengths)))
        start = int(random.integers(len(words) - length + 1))
        return words[start : start + length]


class ShortDisorder(Augmentation):
    """Two or three neighbouring words change places by chance."""

    kind: Literal["short_disorder"] = "short_disorder"
    chances: tuple[Chance, Chance, Chance, Chance, Chance] = (0.9, 0.1, 0.0, 0.0, 0.0)
    """Of abc, bac, cba, cab and bca, for each word abc begins with."""

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        if abs(sum(self.chances) - 1) > 1e-6:
            raise ValueError(
                f"chances must add up to 1, got {list(self.chances)} = {sum(self.chances):.6g}"
            )
        return self

    def changed(self, words: list[str], random: "np.random.Generator") -> list[str]:
        """The same words; after a change it goes on behind the words that moved."""
        result, place = list(words), 0
        while place < len(words) - 2:
            case = int(random.choice(len(ORDERS), p=self.chances))
            result[place : place + 3] = [words[place + step] for step in ORDERS[case]]
            place += (1, 2, 3, 3, 3)[case]
        return result


class LongDisorder(Augmentation):
    """The two halves of a stretch of words change places by chance."""

    kind: Literal["long_disorder"] = "long_disorder"
    chance: Chance = 0.1
    """For each word that a stretch may begin with."""
    length: PositiveFloat = 20
    """Words of a stretch; up to 1, its part of the text."""

    def changed(self, words: list[str], random: "np.random.Generator") -> list[str]:
        """The same words; stretches do not overlap, the last may have a shorter second half."""
        length = self.length * len(words) if self.length <= 1 else self.length
        half = (int(length) + 1) // 2
        result: list[str] = []
        place = 0
        while place < len(words):
            if half >= 2 and place < len(words) - 1 and random.random() < self.chance:
                first, second = words[place : place + half], words[place + half : place + 2 * half]
                result += second + first
                place += 2 * half
            else:
                result.append(words[place])
                place += 1
        return result


class Augmented(TransferSet):
    """The rows of another set with changed texts, perhaps beside the unchanged ones."""

    kind: Literal["augmented"] = "augmented"
    of: TransferSet = Natural()
    """The set whose texts are changed, each distinct text once."""
    steps: Annotated[tuple[Augmentation, ...], Field(min_length=1)]
    """Changes, one after another."""
    keep_original: bool = False
    """Also take the rows as they are: twice as many rows."""

    def make(self, source: TransferSource, *, seed: int) -> MadeRows:
        """The changed rows, behind the unchanged ones if these are kept."""
        from driftline.platform.transfer.mixing import concatenated
        from driftline.platform.transfer.samples import random_of
        from driftline.platform.transfer.texts import rewrite_lists

        rows = self.of.make(source, seed=seed)
        random = random_of((self.kind, seed))

        def change(words: list[str]) -> list[str]:
            for step in self.steps:
                words = step.changed(words, random) if words else words
            return words

        changed = rewrite_lists(rows, change, tag=self.kind)
        return concatenated([rows, changed]) if self.keep_original else changed

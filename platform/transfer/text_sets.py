"""The thesis' two made-up corpora: the order of words destroyed, then also their company.

What is a token to the thesis is a word here; ``texts`` says why.
"""

from typing import Literal

from driftline.platform.transfer.sets import MadeRows, Natural, TransferSet, TransferSource


class Shuffled(TransferSet):
    """Each text with its own words in random order (Algorithm 1, papers.md S3.16).

    Keeps the tokens and the length of every text, in every vocabulary: a set of the same rows and
    tokens as ``of``. Each field is shuffled in itself, so a title keeps its own words; each
    distinct text once, as a product has one text. Differs from the thesis in that the pieces of
    a word stay together.
    """

    kind: Literal["shuffled"] = "shuffled"
    of: TransferSet = Natural()
    """The set whose texts are shuffled."""
    unit: Literal["word", "character"] = "word"
    """``character`` is for scripts without spaces, whose texts would each be one word; the tokens
    then become others."""

    def make(self, source: TransferSource, *, seed: int) -> MadeRows:
        """The same rows, with shuffled texts."""
        from driftline.platform.transfer.samples import random_of
        from driftline.platform.transfer.sequences import shuffled
        from driftline.platform.transfer.texts import rewrite_words

        rows = self.of.make(source, seed=seed)
        random = random_of((self.kind, seed))
        return rewrite_words(
            rows, lambda sequences, _: shuffled(sequences, random), unit=self.unit, tag=self.kind
        )


class Generated(TransferSet):
    """Each text replaced by words drawn one by one (Algorithm 2, papers.md S3.17, A3.9).

    Of each text field only the distribution of its lengths and the frequencies of its words are
    kept, counted over the texts of all rows. A product's new text has nothing to do with its old
    one, but all its rows share it. Rows equal those of ``of``, tokens do so in expectation.
    """

    kind: Literal["generated"] = "generated"
    of: TransferSet = Natural()
    """The set whose texts are counted and replaced."""
    unit: Literal["word", "character"] = "word"
    """See ``Shuffled``."""

    def make(self, source: TransferSource, *, seed: int) -> MadeRows:
        """The same rows, with generated texts."""
        return generated_texts(self.of.make(source, seed=seed), unit=self.unit, seed=seed)


def generated_texts(
    rows: MadeRows, *, unit: Literal["word", "character"] = "word", seed: int
) -> MadeRows:
    """The rows with a generated text in the place of each distinct text; see ``Generated``."""
    from driftline.platform.transfer.samples import random_of
    from driftline.platform.transfer.sequences import SequenceModel
    from driftline.platform.transfer.texts import rewrite_words

    random = random_of(("generated", seed))
    return rewrite_words(
        rows,
        lambda texts, uses: SequenceModel.fit(texts, weights=uses).draw(len(texts), random),
        unit=unit,
        tag="generated",
    )

"""What a transfer set is, and the sets of logged rows: all of them, a sample, another domain.

Every other set is made ``of`` a set, so there is one way to choose a size: ``kind: shuffled`` with
``of: {kind: natural, share: 0.1}`` are the rows of ``{kind: natural, share: 0.1}`` with other
texts, row by row (papers.md S3.15; Table 5.4 compares sets of one size).
"""

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from driftline.platform.kinds import Kind

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    from driftline.platform.text import Tokenizer

Part = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class TransferSource:
    """What a transfer set is made from."""

    frame: "pa.Table"
    """Rows with features, in order of time; see ``columns``. Text does not travel in frames."""
    texts: "pa.Table"
    """``text_id`` (int64, ascending) and one string column for each text feature."""
    tokenizer: "Tokenizer"


@dataclass(frozen=True)
class MadeRows:
    """Rows in the making: what a kind gives, and what one kind hands to the next."""

    frame: "pa.Table"
    texts: "pa.Table"
    made_up: "NDArray[np.bool_]"
    """Rows that nobody was shown: their ``clicked`` means nothing. ``[N]``."""
    notes: dict[str, Any] = field(default_factory=dict)
    """What only this kind can say about them; plain values, part of the provenance."""


@dataclass(frozen=True)
class TransferRows:
    """The rows to ask the teacher about, in the form of the source."""

    frame: "pa.Table"
    """Same schema as the source's frame, in order of time. A made-up row keeps event time, request
    and ``clicked`` of a row it comes from, so that it falls into the same split and is thinned
    alike, but has an ``impression_id`` of its own."""
    texts: "pa.Table"
    """Every text the frame points to; new texts have new ids, ascending. The source's own table
    where no text is new."""
    has_clicks: bool
    """False where any row was made up: ``clicked`` then means nothing (alpha is then 1)."""
    provenance: dict[str, Any]
    """Plain values: the kind and its settings, seed, counts of rows, texts and tokens; see
    ``provenance``."""
    made_up: "NDArray[np.bool_]"
    """Which rows were made up, for who learns from the clicks of the others. ``[N]``."""


class TransferSet(Kind):
    """Base of all transfer sets. A kind of your own implements ``make``."""

    def build(self, source: TransferSource, *, seed: int) -> TransferRows:
        """Make the set; the same source and seed give the same rows. The source is not changed.

        Raises:
            SettingsError: the source cannot give what the set asks for.
            EmptyWindowError: there is no row to make it from, or none is left.
            ContractError: the frame points to texts that are not there.
        """
        from driftline.platform.transfer.provenance import check_source, finished

        check_source(source)
        return finished(self, self.make(source, seed=seed), source=source, seed=seed)

    @abstractmethod
    def make(self, source: TransferSource, *, seed: int) -> MadeRows:
        """The rows alone, in any order; ``build`` sorts, checks and describes them."""


class LoggedRows(TransferSet):
    """Base of the sets that are a choice of logged rows, and their size (papers.md S3.10).

    Whole requests are drawn: the ads of one page share its time, its text and the user's
    intent, so single rows would show the student more pages than a log of that size has, and
    split the groups by which rows are parted and intervals are drawn. The set takes as many
    requests as bring it nearest to the size asked for, and at least one.
    """

    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Part of the rows to take, without replacement; the paper's are 1, 0.1, 0.01 and 0.001."""
    num_rows: PositiveInt | None = None
    """The same as a number of rows."""
    sampling: Literal["independent", "nested"] = "independent"
    """``independent``: each size is a draw of its own (papers.md A3.4). ``nested``: a smaller set
    is part of a larger one with the same seed, for paired comparisons."""

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if self.num_rows is not None and self.share != 1:
            raise ValueError(
                f"give share or num_rows, not both; got share {self.share} "
                f"and num_rows {self.num_rows}"
            )
        return self

    def sampled(self, source: TransferSource, *, seed: int) -> MadeRows:
        """As many of the source's rows as the settings say; their texts are the source's."""
        from driftline.platform.transfer.samples import wanted_rows, without_replacement

        wanted = wanted_rows(source.frame, share=self.share, num_rows=self.num_rows)
        frame = source.frame
        if wanted < frame.num_rows:
            size = None if self.sampling == "nested" else wanted
            frame = frame.filter(without_replacement(frame, wanted, key=("sample", seed, size)))
        return logged(frame, source.texts)


class Natural(LoggedRows):
    """The logged rows as they are (papers.md S3.15)."""

    kind: Literal["natural"] = "natural"

    def make(self, source: TransferSource, *, seed: int) -> MadeRows:
        """The source's own rows."""
        return self.sampled(source, seed=seed)


class OtherDomain(LoggedRows):
    """Logged rows of other categories or of another time, to be cut to size *after* the choice.

    The paper measures how far they lie from the target by the rank correlation of words
    (papers.md S1.17, S1.18): ``similarity_to_the_rest`` in the provenance is that of the rows of
    the domain to the other rows of the source; ``similarity`` has the measure for any other pair.
    """

    kind: Literal["other_domain"] = "other_domain"
    columns: tuple[str, ...] = ()
    """Categorical columns of the frame, such as ``page__category`` and ``ad__category``."""
    values: tuple[str, ...] = ()
    """Their values that make up the domain of the target."""
    inside: bool = False
    """False: rows of which no column has one of ``values``. True: rows of which every column has.
    A row with a null in one of the columns is in neither."""
    period: tuple[Part, Part] = (0.0, 1.0)
    """Part of the time that the source spans: ``[0, 0.25]`` is the oldest quarter."""

    @model_validator(mode="after")
    def _says_which(self) -> Self:
        if bool(self.columns) != bool(self.values):
            raise ValueError(
                f"columns and values go together; got columns {list(self.columns)} "
                f"and values {list(self.values)}"
            )
        start, end = self.period
        if not start < end:
            raise ValueError(f"period must be [start, end] with start < end, got [{start}, {end}]")
        if not self.columns and self.period == (0, 1):
            raise ValueError("give columns with values, or a period; or use kind natural")
        return self

    def make(self, source: TransferSource, *, seed: int) -> MadeRows:
        """Rows of the domain, then a sample of them."""
        from driftline.platform.transfer.domains import domain_mask, split_similarity

        mask = domain_mask(
            source.frame,
            columns=self.columns,
            values=self.values,
            inside=self.inside,
            period=self.period,
        )
        notes = {
            "num_domain_rows": int(mask.sum()),
            "similarity_to_the_rest": split_similarity(source.frame, source.texts, mask),
        }
        domain = replace(source, frame=source.frame.filter(mask))
        return replace(self.sampled(domain, seed=seed), notes=notes)


def logged(frame: "pa.Table", texts: "pa.Table") -> MadeRows:
    """Rows that were really shown."""
    import numpy as np

    return MadeRows(frame, texts, np.zeros(frame.num_rows, np.bool_))

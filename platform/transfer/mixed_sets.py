"""Sets made of sets: mixtures, and a large set from a small one (papers.md S3.20)."""

from dataclasses import replace
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from driftline.platform.data_settings import Settings
from driftline.platform.transfer.sets import MadeRows, Natural, TransferSet, TransferSource


class HybridPart(Settings):
    """One part of a mixture."""

    share: Annotated[float, Field(gt=0, le=1)]
    """Of the rows of the whole."""
    of: TransferSet
    """What these rows are."""


class Hybrid(TransferSet):
    """A mixture of sets, such as half natural and half generated rows.

    The parts are made one after another, each from the requests that no part before it has used;
    so no impression comes twice, and with shares of natural and made-up rows the mixture has the
    rows of the source. With ``other_domain`` it is the paper's augmentation by related data that
    only the teacher has labelled (papers.md S2.14).
    """

    kind: Literal["hybrid"] = "hybrid"
    parts: Annotated[tuple[HybridPart, ...], Field(min_length=2)]
    """Their shares add up to 1."""
    num_rows: PositiveInt | None = None
    """Rows of the whole, to the nearest request; as many as the source when not given."""

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        total = sum(part.share for part in self.parts)
        if abs(total - 1) > 1e-6:
            shares = [part.share for part in self.parts]
            raise ValueError(f"the shares of parts must add up to 1, got {shares} = {total:.6g}")
        return self

    def make(self, source: TransferSource, *, seed: int) -> MadeRows:
        """All parts, one behind the other."""
        from driftline.platform.transfer.mixing import concatenated, cut_part, without_requests

        total = self.num_rows or source.frame.num_rows
        made: list[MadeRows] = []
        left = source
        for place, part in enumerate(self.parts):
            done = sum(rows.frame.num_rows for rows in made)
            is_last = place + 1 == len(self.parts)
            wanted = total - done if is_last else round(part.share * total)
            rows = part.of.make(left, seed=seed)
            rows = cut_part(rows, wanted, name=f"part {place + 1} ({part.of.kind})", seed=seed)
            left = replace(left, frame=without_requests(left.frame, rows.frame))
            made.append(rows)
        notes = {"num_rows_of_parts": [rows.frame.num_rows for rows in made]}
        return replace(concatenated(made), notes=notes)


class Bootstrap(TransferSet):
    """A large set from a small one: requests drawn with replacement (papers.md S3.20).

    ``{kind: bootstrap, of: {kind: natural, share: 0.01}, times: 100}`` has the rows of the whole
    log and the variety of its hundredth. Copies of an impression have ids of their own and its
    request; they keep its click.
    """

    kind: Literal["bootstrap"] = "bootstrap"
    of: TransferSet = Natural()
    """The small set."""
    times: PositiveFloat | None = None
    """Rows of the set for each row of ``of``."""
    num_rows: PositiveInt | None = None
    """The same as a number of rows, to the nearest request."""

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if (self.times is None) == (self.num_rows is None):
            raise ValueError(
                f"give times or num_rows, got times {self.times} and num_rows {self.num_rows}"
            )
        return self

    def make(self, source: TransferSource, *, seed: int) -> MadeRows:
        """Requests of ``of``, many of them more than once."""
        from driftline.platform.transfer.mixing import drawn_again

        rows = self.of.make(source, seed=seed)
        wanted = self.num_rows or max(1, round((self.times or 1) * rows.frame.num_rows))
        return drawn_again(rows, wanted, seed=seed)

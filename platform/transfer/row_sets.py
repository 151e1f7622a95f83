"""Made-up impressions: columns that never met, or pairs of products that were never shown.

Source: papers.md 4.4, the row-level counterparts of the thesis' corpora.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import PositiveInt

from driftline.platform.data_settings import FeatureName
from driftline.platform.transfer.sets import MadeRows, Natural, TransferSet, TransferSource
from driftline.platform.transfer.text_sets import generated_texts

if TYPE_CHECKING:
    import pyarrow as pa


class PermutedColumns(TransferSet):
    """Each column in a random order of its own: marginals exact, the joint destroyed.

    The same rows, texts and tokens as ``of``; text ids are columns like any other.
    """

    kind: Literal["permuted_columns"] = "permuted_columns"
    of: TransferSet = Natural()
    """The set whose columns are permuted."""
    by: Literal["column", "group"] = "column"
    """``group`` keeps together what belongs to the page, the ad, their pair and the context."""

    def make(self, source: TransferSource, *, seed: int) -> MadeRows:
        """As many rows, of the same values."""
        from driftline.platform.transfer.rows import column_groups, permuted
        from driftline.platform.transfer.samples import random_of

        rows = self.of.make(source, seed=seed)
        groups = [names for names in column_groups(rows.frame).values() if names]
        if self.by == "column":
            groups = [(name,) for names in groups for name in names]
        frame = permuted(rows.frame, groups, random_of((self.kind, seed)))
        return _made_up(rows, frame, tag=self.kind)


class GeneratedRows(TransferSet):
    """Every feature drawn on its own from what ``of`` shows of it alone.

    Categories, keys and texts come by their frequency, numbers from the quantiles (between two
    neighbouring values any number may come), nulls as often as there are nulls. The texts
    themselves are those of ``generated``: words by frequency, lengths by field.
    """

    kind: Literal["generated_rows"] = "generated_rows"
    of: TransferSet = Natural()
    """The set that is counted."""

    def make(self, source: TransferSource, *, seed: int) -> MadeRows:
        """As many rows as ``of`` has."""
        from driftline.platform.transfer.rows import drawn
        from driftline.platform.transfer.samples import random_of
        from driftline.platform.transfer.texts import has_texts

        rows = self.of.make(source, seed=seed)
        if has_texts(rows.frame):
            rows = generated_texts(rows, seed=seed)
        frame = drawn(rows.frame, random_of((self.kind, seed)))
        return _made_up(rows, frame, tag=self.kind)


class RePaired(TransferSet):
    """Natural products in pairs that nobody logged: every page gets the ad of another row.

    All that belongs to the page stays with it, and so do time and context; all that belongs to the
    ad (its key, text, counters and those of its category) travels with the ad. Each page and each
    ad occurs exactly as often as in ``of``, so a pair is as likely as both its products are
    frequent and the tokens are the same. Counters of the pair of categories are those of the last
    row with the same two categories (else of the next such row), null where there is none.
    """

    kind: Literal["re_paired"] = "re_paired"
    of: TransferSet = Natural()
    """The set whose ads change places."""
    category: FeatureName | None = None
    """Product feature that pair counters count by (``counters.category``); null pair counters
    when not given, which natural rows do not have."""
    within_hours: PositiveInt | None = None
    """Only exchange ads within the same so many hours, so that no ad is shown before its launch
    or with the counters of another month; any time when not given."""

    def make(self, source: TransferSource, *, seed: int) -> MadeRows:
        """As many rows, with other ads."""
        import numpy as np

        from driftline.platform.transfer.rows import (
            NOWHERE,
            column_groups,
            exchanged_ads,
            latest_of_pair,
            moved,
        )
        from driftline.platform.transfer.samples import random_of

        rows = self.of.make(source, seed=seed)
        groups = column_groups(rows.frame)
        random = random_of((self.kind, seed))
        lenders = exchanged_ads(rows.frame, random, within_hours=self.within_hours)
        frame = moved(rows.frame, groups["ad"], lenders)
        if groups["pair"]:
            lenders = np.full(frame.num_rows, NOWHERE)
            if self.category is not None:
                lenders = latest_of_pair(rows.frame, frame, category=self.category)
            frame = moved(frame, groups["pair"], lenders)
        return _made_up(rows, frame, tag=self.kind)


def _made_up(rows: MadeRows, frame: "pa.Table", *, tag: str) -> MadeRows:
    """The same rows with other columns; all count as made up."""
    import numpy as np

    from driftline.platform.transfer.texts import made_up_ids

    made_up = np.ones(frame.num_rows, np.bool_)
    return replace(rows, frame=made_up_ids(frame, tag=tag), made_up=made_up)

"""The search behind a point-in-time join: for a product and a moment, the newest row known then.

Rows are sorted once by (product, time); a question is then one binary search. The sort key is a
single integer, ``product code * number of distinct times + rank of the time``, so neither strings
nor many decades of microseconds cost anything in the search.

*As known then.* A row is usable from ``visible = max(event time, created time)`` on, but the row
that became visible last is not always the newest one: a late correction of an old value must not
hide a newer value. So, within a product, the running maximum of (event, created) over the rows in
order of ``visible`` is stored, and the search over ``visible`` finds the newest row known at that
moment. Only then is its age compared with the time to live: all rows that it hides are older still.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Int64s = NDArray[np.int64]


class Versions:
    """All versions of each product's features, arranged for the search."""

    def __init__(
        self,
        keys: pa.ChunkedArray,
        event_us: Int64s,
        created_us: Int64s | None = None,
        *,
        as_known: bool = False,
    ) -> None:
        """Sort the versions.

        Args:
            keys: Product of each row; a null matches nothing.
            event_us: Moment that the row describes. ``[N]``.
            created_us: Moment that the row was written; decides between equal event times. ``[N]``.
            as_known: Hide a row until it was written; needs ``created_us``.
        """
        encoded = pc.dictionary_encode(keys).combine_chunks()
        self._products = encoded.dictionary
        codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        self.visible_us = event_us
        if as_known and created_us is not None:
            self.visible_us = np.maximum(event_us, created_us)
        self._times, ranks = _rank(self.visible_us)
        self._num_ranks = len(self._times) + 1
        newest = _order(codes, event_us, created_us)
        if self.visible_us is event_us or np.array_equal(self.visible_us, event_us):
            self._rows = newest
            by_time = newest
        else:
            place = np.empty(len(newest), np.int64)
            place[newest] = np.arange(len(newest))
            by_time = np.lexsort((place, codes * self._num_ranks + ranks))
            # Places grow with the product code, so the maximum never leaves its product.
            self._rows = newest[np.maximum.accumulate(place[by_time])]
        self._codes = (codes * self._num_ranks + ranks)[by_time]

    def newest(self, keys: pa.ChunkedArray | pa.Array, at_us: Int64s) -> Int64s:
        """Row number of the newest version known at each moment, or -1."""
        codes = pc.index_in(keys, value_set=self._products)
        if isinstance(codes, pa.ChunkedArray):
            codes = codes.combine_chunks()
        unknown = codes.is_null().to_numpy(zero_copy_only=False)
        unknown |= keys.is_null().to_numpy(zero_copy_only=False)
        product = codes.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        return self._search(product, at_us, unknown)

    def kept_from(self, start_us: int) -> Int64s:
        """Rows that a question at or after ``start_us`` can still find, in file order."""
        products = np.arange(len(self._products))
        moments = np.full(len(products), start_us, np.int64)
        last = self._search(products, moments, np.zeros(len(products), bool))
        keep = self.visible_us > start_us
        keep[last[last >= 0]] = True
        return np.flatnonzero(keep)

    def _search(self, product: Int64s, at_us: Int64s, unknown: NDArray[np.bool_]) -> Int64s:
        if len(self._rows) == 0:
            return np.full(len(product), -1, np.int64)
        floor = product * self._num_ranks
        question = floor + np.searchsorted(self._times, at_us, side="right")
        place = np.searchsorted(self._codes, question, side="right") - 1
        found = (place >= 0) & ~unknown
        np.maximum(place, 0, out=place)
        found &= self._codes[place] > floor
        return np.where(found, self._rows[place], -1)


def _rank(times: Int64s) -> tuple[Int64s, Int64s]:
    """Distinct times in order, and for each row its place among them, counted from 1."""
    distinct = np.unique(times)
    return distinct, np.searchsorted(distinct, times) + 1


def _order(codes: Int64s, event_us: Int64s, created_us: Int64s | None) -> Int64s:
    """Rows by product, then from the oldest to the newest; equal rows keep their order."""
    if created_us is None:
        return np.lexsort((event_us, codes))
    return np.lexsort((created_us, event_us, codes))

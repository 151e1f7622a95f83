"""The feature values of many reads as columns of one table, for the decision log.

The same values as :attr:`OnlineRead.columns` of each read, one below the other. They are taken a
table at a time and not a read at a time: a request may have a hundred columns, and what is done
once for each of them costs more than scoring it.

Shape suffix: R rows, one for each ad of each read.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from weakref import WeakKeyDictionary

import numpy as np
import pyarrow as pa

from driftline.features.online_read import OnlineRead
from driftline.features.online_views import ViewTable
from driftline.features.views import NO_TEXT, TEXT_ID
from driftline.platform.columns import PRODUCT_ALIASES


class ServedColumns:
    """Gathers columns; remembers the strings of each table's categories while the table lives."""

    def __init__(self) -> None:
        self._strings: WeakKeyDictionary[ViewTable, dict[str, pa.Array]] = WeakKeyDictionary()

    def of(
        self, reads: Sequence[OnlineRead], *, breathe: Callable[[], None]
    ) -> dict[str, pa.Array]:
        """Every product's feature column, and both text ids. ``[R]`` each.

        Args:
            reads: Of one :class:`OnlineFeatures`, one or more.
            breathe: Called between two columns.

        Returns:
            Numbers are float32, categories strings, text ids int64; what is missing is null.
        """
        first, *more = [self._over(list(run), breathe) for _, run in groupby(reads, key=_tables)]
        if not more:
            return first
        return {
            name: pa.concat_arrays([column, *(columns[name] for columns in more)])
            for name, column in first.items()
        }

    def _over(
        self, reads: Sequence[OnlineRead], breathe: Callable[[], None]
    ) -> dict[str, pa.Array]:
        """The columns of reads that looked into the same tables."""
        counts = [read.num_ads for read in reads]
        columns: dict[str, pa.Array] = {}
        for place, part in enumerate(reads[0].parts):
            table = part.found.table
            for alias in part.aliases:
                slots_R = np.concatenate([read.parts[place].slots(alias) for read in reads])
                if alias == PRODUCT_ALIASES[0]:  # one slot a read
                    slots_R = slots_R.repeat(counts)
                numbers_FR = np.ascontiguousarray(table.numbers.take(slots_R, axis=0).T)
                for name, values_R in zip(part.wanted.numbers, numbers_FR, strict=True):
                    columns[f"{alias}__{name}"] = pa.array(values_R, from_pandas=True)
                    breathe()
                for name in table.categories:
                    codes_R = table.categories[name][0].take(slots_R)
                    codes = pa.array(codes_R, mask=codes_R < 0)
                    coded = pa.DictionaryArray.from_arrays(codes, self._categories(table, name))
                    columns[f"{alias}__{name}"] = coded.dictionary_decode()
                    breathe()
                if table.text_id is not None:
                    ids_R = table.text_id.take(slots_R)
                    columns[f"{alias}__{TEXT_ID}"] = pa.array(ids_R, mask=ids_R == NO_TEXT)
        return columns

    def _categories(self, table: ViewTable, name: str) -> pa.Array:
        known = self._strings.get(table)
        if known is None:
            known = self._strings.setdefault(table, {})
        if name not in known:
            known[name] = pa.array(table.categories[name][1][:-1].tolist(), pa.string())
        return known[name]


def _tables(read: OnlineRead) -> list[int]:
    return [id(part.found.table) for part in read.parts]

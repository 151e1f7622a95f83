"""The columns of a view as look-ups want them: by slot, numbers side by side, strings as codes.

They are written once, beside the base file that they come from, and mapped by every reader: a
replica opens ten million products in milliseconds and holds none of them itself. What came later
than the base is put into a private copy of the touched pages (``platform.mapped_tables``).

Shape suffixes: N slots, F numbers.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from driftline.features.feast_plugins.columns import plain_numbers
from driftline.features.feast_plugins.keys import KeyIndex, open_key_index, save_key_index
from driftline.features.feast_plugins.merging import RESERVED
from driftline.features.feast_plugins.scan import EVENT_US, KEY, UNKNOWN_US
from driftline.platform.mapped_tables import grow_table, map_table

_MANIFEST: Final = "arranged.json"
_EVENT, _NUMBERS = "event_us.npy", "numbers.npy"

Codes = tuple[NDArray[np.int32], NDArray[np.object_]]


@dataclass(frozen=True)
class Layout:
    """Which features of a view are arranged, and as what."""

    numbers: tuple[str, ...]
    """``float32`` features."""
    integers: tuple[str, ...]
    """``int64`` features."""
    categories: tuple[str, ...]
    """Strings of which there are few; the others are not arranged."""

    @classmethod
    def of(cls, schema: pa.Schema, categories: Sequence[str]) -> Self:
        """All features that can be arranged; strings only if they are named."""
        features = [part for part in schema if part.name not in RESERVED]
        return cls(
            tuple(part.name for part in features if part.type == pa.float32()),
            tuple(part.name for part in features if part.type == pa.int64()),
            tuple(p.name for p in features if p.type == pa.string() and p.name in categories),
        )

    def only(self, names: Sequence[str]) -> Self:
        """The same for some of the features."""
        parts = (self.numbers, self.integers, self.categories)
        return type(self)(*(tuple(name for name in part if name in names) for part in parts))


@dataclass(frozen=True)
class Arranged:
    """Columns by slot; the last entry of each is that of a missing key. Nobody may change them."""

    layout: Layout
    event_us: NDArray[np.int64]
    """``UNKNOWN_US`` for a missing key. ``[N + 1]``."""
    numbers: NDArray[np.float32]
    """NaN for null. ``[N + 1, F]``."""
    integers: Mapping[str, NDArray[np.int64]]
    """0 for null. ``[N + 1]`` each."""
    categories: Mapping[str, Codes]
    """Codes ``[N + 1]``, -1 for null, and the strings they stand for, the last of them ``None``."""

    @classmethod
    def of(cls, rows: pa.Table, layout: Layout) -> Self:
        """Arrange online rows in memory; slot by slot, in their order."""
        numbers = np.full((len(rows) + 1, len(layout.numbers)), np.nan, np.float32)
        for place, name in enumerate(layout.numbers):
            numbers[:-1, place] = plain_numbers(rows.column(name), null=np.nan)
        integers = {name: plain_numbers(rows.column(name), null=0) for name in layout.integers}
        return cls(
            layout,
            np.append(plain_numbers(rows.column(EVENT_US)), UNKNOWN_US),
            numbers,
            {name: np.append(values, 0) for name, values in integers.items()},
            {name: code_strings(rows.column(name)) for name in layout.categories},
        )

    def save(self, folder: Path, *, durable: bool) -> None:
        """Write one ``.npy`` a column."""
        np.save(folder / _EVENT, self.event_us)
        np.save(folder / _NUMBERS, self.numbers)
        for place, name in enumerate(self.layout.integers):
            np.save(folder / f"integers_{place}.npy", self.integers[name])
        for place, name in enumerate(self.layout.categories):
            np.save(folder / f"codes_{place}.npy", self.categories[name][0])
        manifest: dict[str, Any] = {
            "numbers": self.layout.numbers,
            "integers": self.layout.integers,
            "categories": {name: values[:-1].tolist() for name, (_, values) in self._coded()},
        }
        (folder / _MANIFEST).write_text(json.dumps(manifest))
        for path in folder.iterdir() if durable else ():
            with path.open("rb") as file:
                os.fsync(file.fileno())

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Map what :meth:`save` wrote."""
        manifest = json.loads((folder / _MANIFEST).read_text())
        values: dict[str, list[str]] = manifest["categories"]
        layout = Layout(
            tuple(manifest["numbers"]), tuple(manifest["integers"]), tuple(manifest["categories"])
        )
        return cls(
            layout,
            map_table(folder / _EVENT),
            map_table(folder / _NUMBERS),
            {n: map_table(folder / f"integers_{i}.npy") for i, n in enumerate(layout.integers)},
            {
                name: (map_table(folder / f"codes_{place}.npy"), _strings(values[name]))
                for place, name in enumerate(layout.categories)
            },
        )

    def with_rows(
        self, late: pa.Table, slots: NDArray[np.int64], *, num_slots: int, folder: Path
    ) -> Self:
        """The same with some newer rows, of which this one is left as it is.

        Args:
            late: Online rows with the features of the layout.
            slots: Where they belong; new ones from the number of slots so far on.
            num_slots: Slots from now on.
            folder: Where this one was opened.
        """
        more = num_slots + 1 - len(self.event_us)
        added = Arranged.of(late, self.layout)

        def patched(name: str, values: NDArray[Any]) -> NDArray[Any]:
            table = grow_table(folder / name, more)
            table[slots] = values[:-1]
            table[-1] = values[-1]
            table.setflags(write=False)
            return table

        categories = {}
        for place, name in enumerate(self.layout.categories):
            values, codes = _joined(self.categories[name][1], added.categories[name])
            categories[name] = (patched(f"codes_{place}.npy", codes), values)
        return type(self)(
            self.layout,
            patched(_EVENT, added.event_us),
            patched(_NUMBERS, added.numbers),
            {
                name: patched(f"integers_{place}.npy", added.integers[name])
                for place, name in enumerate(self.layout.integers)
            },
            categories,
        )

    def side_by_side(self, names: Sequence[str]) -> NDArray[np.float32]:
        """Some of the numbers; a view if they are neighbours, a copy if not. ``[N + 1, F]``."""
        if tuple(names) == self.layout.numbers:
            return self.numbers
        at = [self.layout.numbers.index(name) for name in names]
        if at and at == list(range(at[0], at[0] + len(at))):
            return self.numbers[:, at[0] : at[0] + len(at)]
        return self.numbers[:, at]

    def _coded(self) -> list[tuple[str, Codes]]:
        return [(name, self.categories[name]) for name in self.layout.categories]


def write_arranged(
    rows: pa.Table, folder: Path, *, categories: Sequence[str], durable: bool
) -> None:
    """Write the columns of ascending online rows, and the index of their keys: a new folder."""
    folder.mkdir()
    save_key_index(rows.column(KEY).combine_chunks(), folder)
    Arranged.of(rows, Layout.of(rows.schema, categories)).save(folder, durable=durable)


def open_arranged(folder: Path, keys: pa.Array) -> tuple[Arranged, KeyIndex] | None:
    """What :func:`write_arranged` wrote for these keys; ``None`` where an older version did not."""
    if not (folder / _MANIFEST).exists():
        return None
    return Arranged.open(folder), open_key_index(keys, folder)


def code_strings(values: pa.ChunkedArray) -> Codes:
    """Codes and the strings they stand for; -1, also at the end, stands for a missing one."""
    encoded = values.combine_chunks().dictionary_encode()
    codes = np.append(plain_numbers(encoded.indices, null=-1), -1).astype(np.int32)
    return codes, _strings(encoded.dictionary.to_pylist())


def no_codes() -> Codes:
    """The codes of a view without a row."""
    return np.array([-1], np.int32), _strings([])


def _joined(known: NDArray[np.object_], added: Codes) -> tuple[NDArray[np.object_], NDArray[Any]]:
    """The strings of both, those known in their places, and the added codes among them."""
    codes, values = added
    places = {value: place for place, value in enumerate(known[:-1].tolist())}
    moved = [places.setdefault(value, len(places)) for value in values[:-1].tolist()]
    return _strings(list(places)), np.array([*moved, -1], np.int32)[codes]


def _strings(values: Sequence[str]) -> NDArray[np.object_]:
    array = np.empty(len(values) + 1, np.object_)
    array[:-1], array[-1] = values, None
    return array

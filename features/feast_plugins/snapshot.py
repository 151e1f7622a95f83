"""The online features of one view in memory: one slot per product, read without Feast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from driftline.features.feast_plugins.arranged import Arranged, Layout, open_arranged
from driftline.features.feast_plugins.columns import (
    Column,
    Matrix,
    arrow_rows,
    as_numpy,
    is_number,
    matrix_type,
    plain_numbers,
    side_by_side,
)
from driftline.features.feast_plugins.errors import FeatureStoreError
from driftline.features.feast_plugins.keys import KeyIndex, Keys, Rows, build_key_index
from driftline.features.feast_plugins.merging import RESERVED, align, newest_by_key
from driftline.features.feast_plugins.pointer import (
    Pointer,
    arranged_folder,
    current_version,
    read_content,
    read_part,
    read_pointer,
)
from driftline.features.feast_plugins.scan import CREATED_US, EVENT_US, KEY, UNKNOWN_US

__all__ = ["Snapshot", "SnapshotReader", "SnapshotRows", "current_version"]

_ATTEMPTS = 50


@dataclass(frozen=True)
class SnapshotRows:
    """Features of the requested products, in the order of the request."""

    names: tuple[str, ...]
    matrix: Matrix | None
    """``[K, F]``, NaN for what is missing; none if a feature is not a plain number."""
    missing: NDArray[np.bool_]
    """Products that the snapshot does not hold. ``[K]``."""
    event_time_us: NDArray[np.int64]
    """Event time of each row in microseconds, ``UNKNOWN_US`` for missing products. ``[K]``."""
    columns: dict[str, Column] = field(default_factory=dict)
    """Filled instead of ``matrix``."""

    def column(self, name: str) -> Column:
        """Values of one feature. ``[K]``."""
        if self.matrix is None:
            return self.columns[name]
        return self.matrix[:, self.names.index(name)]

    def age_us(self, now_us: int) -> NDArray[np.int64]:
        """Age of each row; the largest integer for missing products. ``[K]``."""
        age = now_us - np.where(self.missing, 0, self.event_time_us)
        return np.where(self.missing, np.iinfo(np.int64).max, age)


class Snapshot:
    """One immutable version of a view's online features.

    Slots are numbered from 0; ``rows`` finds a product's slot and columns are indexed by it. Every
    product has one slot, with its newest row: base and deltas are already merged. Expired values
    are there too, with their times; whoever reads decides how old is too old. Safe to share among
    threads.
    """

    def __init__(self, pointer: Pointer, base: _Base, late: pa.Table | None) -> None:
        """Merge the rows of the deltas, newest per product, into the base; see ``open``."""
        self.version = pointer.version
        self._pointer, self._base, self._late = pointer, base, late
        self._num_rows = len(base.table)
        self._added: KeyIndex | None = None
        self._slots = self._wins = np.empty(0, np.int64)
        self.schema: pa.Schema = base.table.schema
        self._arranged = base.arranged
        if late is not None:
            self._merge(late)
        self.schema = pa.schema([part for part in self.schema if part.name not in RESERVED])
        self._lock = Lock()
        self._made: dict[tuple[str, ...], Column] = {}
        # The last entry, at -1, answers for missing products; the same goes for matrices.
        if self._arranged is None:
            self._times = np.append(self._to_numpy(EVENT_US), UNKNOWN_US)
        else:
            self._times = self._arranged.event_us

    @classmethod
    def open(cls, view_dir: Path, *, since: Snapshot | None = None) -> Snapshot:
        """Map the current version.

        Args:
            view_dir: Folder of the view.
            since: An older snapshot of the same view; what did not change is taken from it, and
                if nothing did it is returned itself.

        Raises:
            FeatureStoreError: the view was never written, or a file is damaged.
        """
        for _ in range(_ATTEMPTS):
            pointer = read_pointer(view_dir)
            if pointer is None:
                raise FeatureStoreError(
                    f"no snapshot in {view_dir}; materialise the feature view or push to it first"
                )
            if since is not None and since.version == pointer.version:
                return since
            try:
                return cls._load(view_dir, pointer, since)
            except FileNotFoundError:
                continue  # A writer has replaced these files since we read the pointer.
            except pa.ArrowInvalid as error:
                raise FeatureStoreError(
                    f"snapshot {pointer.version} in {view_dir} is damaged: {error}; "
                    "remove the folder and materialise the feature view again"
                ) from error
        raise FeatureStoreError(f"the files that {view_dir}/CURRENT names do not exist")

    @classmethod
    def _load(cls, view_dir: Path, pointer: Pointer, since: Snapshot | None) -> Snapshot:
        if since is not None and since._pointer.base == pointer.base:
            base, known = since._base, since._pointer.deltas
            if pointer.deltas[: len(known)] == known:
                late = [] if since._late is None else [since._late]
                late += [read_part(view_dir, name) for name in pointer.deltas[len(known) :]]
                return cls(pointer, base, newest_by_key(late))
        else:
            base = _Base(read_part(view_dir, pointer.base), arranged_folder(view_dir, pointer))
        late = [read_part(view_dir, name) for name in pointer.deltas]
        return cls(pointer, base, newest_by_key(late) if late else None)

    def _merge(self, late: pa.Table) -> None:
        base, self.schema = self._base, late.schema
        slots = base.index.rows(late.column(KEY))
        wins = np.flatnonzero((slots < 0) | base.not_newer(slots, late))
        slots = slots[wins]
        added = slots < 0
        self._num_rows += int(added.sum())
        slots[added] = np.arange(len(base.table), self._num_rows)
        if added.any():
            keys = late.column(KEY).take(arrow_rows(wins[added]))
            self._added = build_key_index(keys.combine_chunks())
        order = np.argsort(slots)
        self._slots, self._wins = slots[order], wins[order]
        if base.arranged is not None:
            self._arranged = self._rearranged(base.arranged, late)

    def _rearranged(self, arranged: Arranged, late: pa.Table) -> Arranged | None:
        """The base's columns with the newer rows in them; none if the features have changed."""
        if Layout.of(late.schema, arranged.layout.categories) != arranged.layout:
            return None
        rows = late.take(arrow_rows(self._wins))
        return arranged.with_rows(
            rows, self._slots, num_slots=self._num_rows, folder=self._base.folder
        )

    def __len__(self) -> int:
        """Number of products."""
        return self._num_rows

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the features."""
        return tuple(self.schema.names)

    @property
    def event_time_us(self) -> NDArray[np.int64]:
        """Event time of each slot in microseconds. ``[N]``."""
        return self._times[:-1]

    def keys(self) -> pa.ChunkedArray:
        """Product of each slot. ``[N]``."""
        return self._arrow(KEY, np.arange(len(self)))

    def rows(self, keys: Keys) -> Rows:
        """Slot of each product, -1 for products that are not there. ``[K]``."""
        found = self._base.index.rows(keys)
        if self._added is not None:
            late = self._added.rows(keys)
            found = np.where(late >= 0, late + len(self._base.table), found)
        return found

    def column(self, name: str) -> Column:
        """One feature over all slots, mapped from the file where possible. ``[N]``.

        Numbers keep their type and have NaN for null (integers with nulls become ``float64``);
        lists of one length become ``[N, D]``; everything else becomes Python objects.

        Raises:
            FeatureStoreError: there is no such feature.
        """
        self._type(name)
        return self._once((name,), lambda: self._to_numpy(name))

    def matrix(self, names: Sequence[str]) -> Matrix:
        """Features side by side over all slots, built once per version. ``[N, F]``.

        ``float32``, or ``float64`` where a feature needs it.

        Raises:
            FeatureStoreError: a feature does not exist or is not a plain number.
        """
        return self._padded_matrix(tuple(names))[:-1]

    def arrow(self, name: str, rows: Rows) -> pa.ChunkedArray:
        """Values of one feature at some slots, nulls kept; -1 gives null. ``[K]``."""
        self._type(name)
        return self._arrow(name, rows)

    def arranged(self, features: Sequence[str]) -> Arranged:
        """Features as look-ups want them: numbers side by side, strings as codes.

        Mapped where the writer arranged all of them, else built in memory at every call.

        Raises:
            FeatureStoreError: a feature does not exist.
        """
        texts = [name for name in features if self._type(name) == pa.string()]
        made = self._arranged
        if made is not None and set(texts) <= set(made.layout.categories):
            return made
        every = np.arange(len(self))
        rows = {name: self._arrow(name, every) for name in (EVENT_US, *features)}
        return Arranged.of(pa.table(rows), Layout.of(self.schema, texts).only(features))

    def read(self, keys: Keys, features: Sequence[str] | None = None) -> SnapshotRows:
        """Features of some products, in the order of ``keys``.

        Args:
            keys: Products; unknown ones are reported, not refused.
            features: Names; all of the view by default.
        """
        names = self.names if features is None else tuple(features)
        rows = self.rows(keys)
        missing = rows < 0
        times = self._times.take(rows, mode="wrap")
        if self._all_numbers(names):
            matrix = self._padded_matrix(names).take(rows, axis=0, mode="wrap")
            return SnapshotRows(names, matrix, missing, times)
        columns = {name: as_numpy(self._arrow(name, rows)) for name in names}
        return SnapshotRows(names, None, missing, times, columns)

    def _padded_matrix(self, names: tuple[str, ...]) -> Matrix:
        """The matrix with one more row of NaN, which -1 finds."""
        made = self._made.get(("", *names))
        if made is None:
            kinds = [self._type(name) for name in names]
            for name, kind in zip(names, kinds, strict=True):
                if not is_number(kind):
                    raise FeatureStoreError(
                        f"feature {name} is {kind}, not a number; read it with column()"
                    )
            made = self._once(("", *names), lambda: self._build_matrix(names, matrix_type(kinds)))
        return made

    def _build_matrix(self, names: tuple[str, ...], dtype: np.dtype[np.floating]) -> Matrix:
        if self._arranged is not None and set(names) <= set(self._arranged.layout.numbers):
            return self._arranged.side_by_side(names)
        base = self._base.padded_matrix(names, dtype)
        if self._late is None:
            return base
        # After a small write this is a copy in memory and a few rows, not a new reading.
        matrix = np.empty((len(self) + 1, len(names)), dtype)
        matrix[: len(base) - 1], matrix[-1] = base[:-1], np.nan
        matrix[self._slots] = side_by_side(self._late.take(arrow_rows(self._wins)), names, dtype)
        return matrix

    def _all_numbers(self, names: tuple[str, ...]) -> bool:
        if ("", *names) in self._made:
            return True
        return bool(names) and all(is_number(self._type(name)) for name in names)

    def _once(self, name: tuple[str, ...], build: Callable[[], Column]) -> Column:
        made = self._made.get(name)
        if made is None:
            with self._lock:
                if name not in self._made:
                    self._made[name] = build()
                    self._made[name].setflags(write=False)
                made = self._made[name]
        return made

    def _type(self, name: str) -> pa.DataType:
        if name not in self.schema.names:
            raise FeatureStoreError(
                f"feature {name} is not in snapshot {self.version}, which has "
                f"{', '.join(self.names)}; materialise the feature view after changing it"
            )
        return self.schema.field(name).type

    def _stacked(self, name: str) -> pa.ChunkedArray:
        """One column of the base, and below it that of the deltas."""
        if self._late is None:
            return self._base.table.column(name)
        schema = pa.schema([self._late.schema.field(name)])
        stacked = [self._base.table, self._late]
        return pa.concat_tables([align(_only(part, name), schema) for part in stacked]).column(name)

    def _to_numpy(self, name: str) -> Column:
        values = as_numpy(self._stacked(name))
        return values if self._late is None else values[self._places(np.arange(len(self)))]

    def _arrow(self, name: str, rows: Rows) -> pa.ChunkedArray:
        place = self._places(rows)
        return self._stacked(name).take(pa.array(place, pa.int64(), mask=rows < 0))

    def _places(self, slots: Rows) -> Rows:
        """Where slots stand in the base with the deltas below it."""
        if not len(self._slots):
            return slots
        at = np.minimum(np.searchsorted(self._slots, slots), len(self._slots) - 1)
        late = self._wins[at] + len(self._base.table)
        return np.where(self._slots[at] == slots, late, slots)


class SnapshotReader:
    """Follows one view: always the current version, opened anew only when there is a new one."""

    def __init__(self, view_dir: Path) -> None:
        """Open nothing yet."""
        self.view_dir = view_dir
        self._folder = str(view_dir)
        self._last: tuple[bytes, Snapshot] | None = None

    def current(self) -> Snapshot | None:
        """The current version; none before the first write. Costs microseconds if none is new."""
        content, last = read_content(self._folder), self._last
        if content is None:
            return None
        if last is not None and last[0] == content:
            return last[1]
        snapshot = Snapshot.open(self.view_dir, since=None if last is None else last[1])
        self._last = (content, snapshot)
        return snapshot


class _Base:
    """The base file and the index of its products, shared by the versions that build on it."""

    def __init__(self, table: pa.Table, folder: Path) -> None:
        self.table, self.folder = table, folder
        self.arranged: Arranged | None = None
        keys = _whole(table.column(KEY))
        arranged = open_arranged(folder, keys)
        if arranged is None:
            self.index: KeyIndex = build_key_index(keys)
        else:
            self.arranged, self.index = arranged
        self._event_us = plain_numbers(table.column(EVENT_US))
        self._created_us = plain_numbers(table.column(CREATED_US))
        self._matrices: dict[tuple[str, ...], Matrix] = {}

    def padded_matrix(self, names: tuple[str, ...], dtype: np.dtype[np.floating]) -> Matrix:
        """Features of all products, and a last row of NaN; kept for the versions to come."""
        wanted = (dtype.name, *names)
        if wanted not in self._matrices:
            matrix = np.full((len(self.table) + 1, len(names)), np.nan, dtype)
            matrix[:-1] = side_by_side(self.table, names, dtype)
            self._matrices[wanted] = matrix
        return self._matrices[wanted]

    def not_newer(self, slots: Rows, late: pa.Table) -> NDArray[np.bool_]:
        """Whether a late row replaces the base row at its slot; of equal ones, it does."""
        if not len(self.table):
            return np.ones(len(slots), bool)
        event_us, mine = plain_numbers(late.column(EVENT_US)), self._event_us[slots]
        created_us = plain_numbers(late.column(CREATED_US))
        return (mine < event_us) | ((mine == event_us) & (self._created_us[slots] <= created_us))


def _whole(column: pa.ChunkedArray) -> pa.Array:
    """A column as one array, without a copy where it is one already."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _only(table: pa.Table, name: str) -> pa.Table:
    return table.select([name] if name in table.column_names else [KEY])

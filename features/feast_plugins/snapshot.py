"""The online features of one view in memory: one slot per product, read without Feast.

A view's folder holds Arrow files and ``CURRENT``, a small file that names those which count: a
*base*, sorted by product, and *deltas* with rows that came later. Files never change once they are
named; a new version is new files and a new ``CURRENT``, put in place by one atomic rename. So a
reader either sees a version whole or does not see it, and maps the files instead of copying them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
from numpy.typing import NDArray

from driftline.features.feast_plugins.errors import FeatureStoreError
from driftline.features.feast_plugins.keys import KeyIndex, Keys, Rows, build_key_index
from driftline.features.feast_plugins.merging import RESERVED, align, newest_by_key
from driftline.features.feast_plugins.scan import CREATED_US, EVENT_US, KEY, UNKNOWN_US

POINTER = "CURRENT"
_ATTEMPTS = 50

Column = NDArray[Any]


@dataclass(frozen=True)
class Pointer:
    """What ``CURRENT`` says."""

    version: str
    """Grows with every write; no two writes share one."""
    base: str
    base_rows: int
    deltas: tuple[str, ...] = ()
    delta_rows: int = 0


def read_pointer(view_dir: Path) -> Pointer | None:
    """What counts now; none before the first write."""
    try:
        values = json.loads((view_dir / POINTER).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    return Pointer(**{**values, "deltas": tuple(values["deltas"])})


def current_version(view_dir: Path) -> str | None:
    """Version that a reader would open now, in microseconds; none before the first write."""
    pointer = read_pointer(view_dir)
    return None if pointer is None else pointer.version


def read_part(view_dir: Path, name: str) -> pa.Table:
    """Map one file of a view."""
    with pa.memory_map(str(view_dir / name)) as mapped:
        return ipc.open_file(mapped).read_all()


@dataclass(frozen=True)
class SnapshotRows:
    """Features of the requested products, in the order of the request."""

    names: tuple[str, ...]
    matrix: NDArray[np.floating] | None
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
        self._place: Rows | None = None
        self.schema: pa.Schema = base.table.schema
        if late is not None:
            self._merge(late)
        self.schema = pa.schema([part for part in self.schema if part.name not in RESERVED])
        self._lock = Lock()
        self._made: dict[tuple[str, ...], Column] = {}
        # The last entry, at -1, answers for missing products; the same goes for matrices.
        self._times = np.append(self._to_numpy(EVENT_US), UNKNOWN_US)

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
        raise FeatureStoreError(f"the files that {view_dir / POINTER} names do not exist")

    @classmethod
    def _load(cls, view_dir: Path, pointer: Pointer, since: Snapshot | None) -> Snapshot:
        if since is not None and since._pointer.base == pointer.base:
            base, known = since._base, since._pointer.deltas
            if pointer.deltas[: len(known)] == known:
                late = [] if since._late is None else [since._late]
                late += [read_part(view_dir, name) for name in pointer.deltas[len(known) :]]
                return cls(pointer, base, newest_by_key(late))
        else:
            base = _Base(read_part(view_dir, pointer.base))
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
        place = np.arange(self._num_rows)
        place[slots] = len(base.table) + wins
        self._place = place
        if added.any():
            keys = late.column(KEY).take(pa.array(wins[added]))
            self._added = build_key_index(keys.combine_chunks())

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

    def matrix(self, names: Sequence[str]) -> NDArray[np.floating]:
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
        if names and all(_is_number(self._type(name)) for name in names):
            matrix = self._padded_matrix(names).take(rows, axis=0, mode="wrap")
            return SnapshotRows(names, matrix, missing, times)
        columns = {name: _as_numpy(self._arrow(name, rows)) for name in names}
        return SnapshotRows(names, None, missing, times, columns)

    def _padded_matrix(self, names: tuple[str, ...]) -> NDArray[np.floating]:
        for name in names:
            if not _is_number(self._type(name)):
                raise FeatureStoreError(
                    f"feature {name} is {self._type(name)}, not a number; read it with column()"
                )

        def build() -> Column:
            columns = [self._to_numpy(name) for name in names]
            dtype = np.result_type(np.float32, *(column.dtype for column in columns))
            matrix = np.full((len(self) + 1, len(names)), np.nan, dtype)
            for place, column in enumerate(columns):
                matrix[:-1, place] = column
            return matrix

        return self._once(("", *names), build)

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
        values = _as_numpy(self._stacked(name))
        return values if self._place is None else values[self._place]

    def _arrow(self, name: str, rows: Rows) -> pa.ChunkedArray:
        place = rows if self._place is None or not len(self) else self._place[rows]
        return self._stacked(name).take(pa.array(place, pa.int64(), mask=rows < 0))


class SnapshotReader:
    """Follows one view: always the current version, opened anew only when there is a new one."""

    def __init__(self, view_dir: Path) -> None:
        """Open nothing yet."""
        self.view_dir = view_dir
        self._snapshot: Snapshot | None = None

    def current(self) -> Snapshot | None:
        """The current version; none before the first write."""
        if current_version(self.view_dir) is None:
            return None
        self._snapshot = Snapshot.open(self.view_dir, since=self._snapshot)
        return self._snapshot


class _Base:
    """The base file and the index of its products, shared by the versions that build on it."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        self.index: KeyIndex = build_key_index(table.column(KEY).combine_chunks())
        self._event_us = table.column(EVENT_US).to_numpy()
        self._created_us = table.column(CREATED_US).to_numpy()

    def not_newer(self, slots: Rows, late: pa.Table) -> NDArray[np.bool_]:
        """Whether a late row replaces the base row at its slot; of equal ones, it does."""
        if not len(self.table):
            return np.ones(len(slots), bool)
        event_us, mine = late.column(EVENT_US).to_numpy(), self._event_us[slots]
        created_us = late.column(CREATED_US).to_numpy()
        return (mine < event_us) | ((mine == event_us) & (self._created_us[slots] <= created_us))


def _only(table: pa.Table, name: str) -> pa.Table:
    return table.select([name] if name in table.column_names else [KEY])


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)


def _as_numpy(values: pa.ChunkedArray) -> Column:
    kind = values.type
    if _is_number(kind):
        if pa.types.is_boolean(kind):
            values = values.cast(pa.int8())
        return values.to_numpy()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _list_column(values)
    return np.array(values.to_pylist(), object)


def _list_column(values: pa.ChunkedArray) -> Column:
    """Lists as ``[N, D]`` if all have one length, else one array (or ``None``) per row."""
    column = values.combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks)
    flat = column.flatten().to_numpy(zero_copy_only=False)
    if len(column) and not column.null_count and len(flat) % len(column) == 0:
        lengths = np.asarray(column.value_lengths())
        if (lengths == lengths[0]).all():
            return flat.reshape(len(column), -1)
    found = np.empty(len(column), object)
    for row, value in enumerate(column):
        found[row] = value.values.to_numpy(zero_copy_only=False) if value.is_valid else None
    return found

"""Newest values of one view by key, as arrays, from the embedded snapshot.

Shape suffixes: K requested keys, N keys of a snapshot, F numeric features.
"""

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from driftline.features.feast_plugins.arranged import no_codes
from driftline.features.feast_plugins.keys import Keys
from driftline.features.feast_plugins.snapshot import Snapshot, current_version
from driftline.features.views import NO_TEXT, TEXT_ID, View

if TYPE_CHECKING:
    from driftline.features.online_catalogue import Catalogue
Key = int | str


@dataclass(frozen=True, eq=False)
class ViewTable:
    """Newest values of a view by slot; the last slot, also at -1, is that of a missing key."""

    event_us: NDArray[np.int64]
    """Event time in microseconds; without meaning in the last slot. ``[N + 1]``."""
    numbers: NDArray[np.float32]
    """NaN where missing. ``[N + 1, F]``."""
    categories: Mapping[str, tuple[NDArray[np.int32], NDArray[np.object_]]]
    """For each category: codes ``[N + 1]``, -1 where missing, and the strings that they stand for,
    whose last entry is ``None``."""
    text_id: NDArray[np.int64] | None
    """``NO_TEXT`` where missing. ``[N + 1]``."""


@dataclass(frozen=True)
class Found:
    """Where the requested keys stand in a table: -1 where they do not. ``[K]``."""

    table: ViewTable
    slots: NDArray[np.int64]


@dataclass(frozen=True)
class Wanted:
    """The features that a head reads of one view; the texts themselves are never loaded."""

    view: View
    numbers: tuple[str, ...]
    categories: tuple[str, ...]
    text_id: bool


class OnlineVersion(Protocol):
    """What all views hold at one moment, for one request."""

    @property
    def as_of(self) -> datetime | None:
        """Moment up to which the store is known to be complete; ``None`` before the first time."""

    @property
    def catalogue(self) -> "Catalogue | None":
        """All products in one numbering; ``None`` where there are too many."""

    def products(self, keys: Keys) -> Mapping[str, Found] | None:
        """Every view of products by name, in the order of ``keys``; ``None`` with no store."""

    def group(self, view: View, keys: Sequence[Key | None]) -> Found | None:
        """One view of categories; the same."""

    def tables(self) -> Sequence[ViewTable]:
        """Those that many requests will look into."""

    def view_version(self, name: str) -> str | None:
        """Changes with every write; ``None`` before the first, or when it cannot be known."""


class SnapshotLookup:
    """One immutable version of a view, mapped."""

    def __init__(self, wanted: Wanted, snapshot: Snapshot | None) -> None:
        """Take the columns of the wanted features."""
        self.wanted = wanted
        self.snapshot = snapshot
        self.table = empty_table(wanted) if snapshot is None else _table(wanted, snapshot)

    @classmethod
    def open(
        cls, folder: Path, wanted: Wanted, *, since: "SnapshotLookup | None" = None
    ) -> "SnapshotLookup":
        """The current version of a view's folder, or ``since`` when it is still current."""
        old = None if since is None else since.snapshot
        if current_version(folder) is None:
            return since or cls(wanted, None)
        snapshot = Snapshot.open(folder, since=old)
        if since is not None and snapshot is old:
            return since
        return cls(wanted, snapshot)

    def version(self) -> str | None:
        """Version of the snapshot."""
        return None if self.snapshot is None else self.snapshot.version

    def find(self, keys: Keys) -> Found:
        """Slots in the order of ``keys``, in microseconds."""
        if self.snapshot is None:
            return Found(self.table, np.full(_length(keys), -1))
        return Found(self.table, self.snapshot.rows(keys))


@dataclass(frozen=True)
class SnapshotVersion:
    """What requests see of the embedded store; never changed, only replaced."""

    lookups: Mapping[str, SnapshotLookup]
    as_of: datetime | None
    catalogue: "Catalogue | None" = None

    def products(self, keys: Keys) -> Mapping[str, Found] | None:
        """All views of products."""
        return {
            name: lookup.find(keys)
            for name, lookup in self.lookups.items()
            if lookup.wanted.view.entity == "product"
        }

    def equals(self, other: "SnapshotVersion") -> bool:
        """Whether both hold the very same snapshots of the same moment."""
        return self.as_of == other.as_of and self.has_lookups_of(other)

    def has_lookups_of(self, other: "SnapshotVersion") -> bool:
        """Whether both hold the very same snapshots."""
        return all(other.lookups[name] is lookup for name, lookup in self.lookups.items())

    def group(self, view: View, keys: Keys) -> Found | None:
        """A view of categories."""
        return self.lookups[view.name].find(keys)

    def tables(self) -> Sequence[ViewTable]:
        """Of all views."""
        return [lookup.table for lookup in self.lookups.values()]

    def view_version(self, name: str) -> str | None:
        """Version of a view's snapshot."""
        return self.lookups[name].version()


def _length(keys: Keys) -> int:
    assert isinstance(keys, Sized)
    return len(keys)


def _table(wanted: Wanted, snapshot: Snapshot) -> ViewTable:
    """A snapshot's columns: mapped, so that nothing of their size is read or copied."""
    arranged = snapshot.arranged([*wanted.numbers, *wanted.categories, *_text(wanted)])
    return ViewTable(
        event_us=arranged.event_us,
        numbers=arranged.side_by_side(wanted.numbers),
        categories={name: arranged.categories[name] for name in wanted.categories},
        text_id=arranged.integers[TEXT_ID] if wanted.text_id else None,
    )


def empty_table(wanted: Wanted) -> ViewTable:
    """A table without a key, for a view that was never materialised or cannot be read."""
    return ViewTable(
        event_us=np.zeros(1, np.int64),
        numbers=np.full((1, len(wanted.numbers)), np.nan, np.float32),
        categories={name: no_codes() for name in wanted.categories},
        text_id=np.full(1, NO_TEXT, np.int64) if wanted.text_id else None,
    )


def _text(wanted: Wanted) -> tuple[str, ...]:
    return (TEXT_ID,) if wanted.text_id else ()
